"""The exact search for rows whose check failed. It is correct for any input, including ties, duplicates and clusters.

exact_rank_kernel     the sort key at a missing rank, by bisection on the score with one counting pass over the queue per step,
                      at most 32 and few where few scores differ; then one pass that walks the ties of that score in index
                      order. Row tiles without a failed row exit at once, so the launch costs next to nothing and no one has
                      to ask the device whether it is needed.
exact_collect_kernel  writes the columns at or above a sort key to the front of a failed row's buffer.

Scores are computed by the same score_tile as in the earlier passes, so sort keys are comparable.
"""

from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .extract_columns import any_wanted, lowest_wanted, wanted_by_lane
from .launch import score_arguments
from .pool import KernelPool, at_or_above, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import load_whole_rows, score_tile
from .sort_key import ordered, pack, unpack


@triton.jit
def pool_scores(
    query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, offs_k, size, pool, rows,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_K) fp32 scores, and bool: whether the column is a candidate of the row."""
    k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    s = score_tile(
        query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
        D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
    )  # (BLOCK_B, BLOCK_K)  # fmt: skip
    allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
    inside = pool_bounds(pool, rows, s, offs_k, allowed)  # (BLOCK_B, BLOCK_K)
    return s, inside & (s == s)


@triton.jit(do_not_specialize=["B", "K", "R"])
def exact_rank_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    missing_ptr, out_ptr, R,
):  # fmt: skip
    LEAST: tl.constexpr = -(2**31)  # below the ordered score of every number
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    cell = offs_b * R + tl.program_id(1)
    rank = tl.load(missing_ptr + cell, mask=b_ok, other=-1)  # (BLOCK_B,)
    failed = rank >= 0
    if tl.max(failed.to(tl.int32), 0) == 0:
        return
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    size = pool_size(pool, K)

    # The score at the rank lies in [low, high): more than rank columns are >= low, at most rank are >= high. The first
    # step counts the whole pool; low is always a score of the row, and so is high - 1 once a count fell short.
    low = tl.full((BLOCK_B,), LEAST, tl.int32)
    high = tl.full((BLOCK_B,), 2**31 - 1, tl.int32)
    more = tl.zeros((BLOCK_B,), tl.int32)  # columns >= high
    middle = tl.full((BLOCK_B,), LEAST + 1, tl.int32)
    active = failed
    while tl.max(active.to(tl.int32), 0) > 0:
        count = tl.zeros((BLOCK_B,), tl.int32)
        above = tl.full((BLOCK_B,), 2**31 - 1, tl.int32)
        below = tl.full((BLOCK_B,), LEAST, tl.int32)
        for k0 in tl.range(0, size, BLOCK_K, num_stages=1):
            s, ok = pool_scores(
                query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, k0 + tl.arange(0, BLOCK_K), size,
                pool, rows, EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            value = tl.where(ok, ordered(s), LEAST)  # (BLOCK_B, BLOCK_K)
            hit = value >= middle[:, None]
            count += tl.sum(hit.to(tl.int32), 1)
            above = tl.minimum(above, tl.min(tl.where(hit, value, 2**31 - 1), 1))
            below = tl.maximum(below, tl.max(tl.where(hit, LEAST, value), 1))
        enough = active & (count > rank)
        short = active & (count <= rank)
        low = tl.where(enough, above, low)
        high = tl.where(short, below + 1, high)
        more = tl.where(short, count, more)
        # A pool with at most `rank` columns does not have this rank. The count of the first step shows it.
        active = active & (low != LEAST) & (high.to(tl.int64) - low > 1)
        middle = (low & high) + ((low ^ high) >> 1)

    found = failed & (low != LEAST)
    ties_before = (rank - more).to(tl.int32)  # how many ties with a lower index precede the wanted column
    seen = tl.zeros((BLOCK_B,), tl.int32)
    index = tl.zeros((BLOCK_B,), tl.int32)
    for k0 in tl.range(0, size, BLOCK_K, num_stages=1):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        s, ok = pool_scores(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, offs_k, size,
            pool, rows, EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        tie = (ok & (ordered(s) == low[:, None])).to(tl.int32)  # (BLOCK_B, BLOCK_K)
        nth = seen[:, None] + tl.cumsum(tie, 1) - 1  # (BLOCK_B, BLOCK_K)
        index += tl.sum(tl.where((tie > 0) & (nth == ties_before[:, None]), offs_k[None, :], 0), 1)
        seen += tl.sum(tie, 1)
    sort_key = (low.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))  # (BLOCK_B,)
    tl.store(out_ptr + cell, tl.where(found, sort_key, -(2**63)), mask=failed)


@triton.jit(do_not_specialize=["B", "K", "W"])
def exact_collect_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    cut_ptr, missing_ptr, survivors_ptr, W, LANES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    failed = tl.load(missing_ptr + offs_b, mask=b_ok, other=-1) >= 0  # (BLOCK_B,)
    if tl.max(failed.to(tl.int32), 0) == 0:
        return
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    size = pool_size(pool, K)
    cut = tl.load(cut_ptr + offs_b, mask=b_ok, other=0)  # (BLOCK_B,)
    cut_score, cut_index = unpack(cut)
    everything = cut == -(2**63)
    seen = tl.zeros((BLOCK_B,), tl.int32)
    for k0 in tl.range(0, size, BLOCK_K, num_stages=1):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        s, ok = pool_scores(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, offs_k, size,
            pool, rows, EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        high = ok & at_or_above(s, offs_k, cut_score, cut_index)
        keep = failed[:, None] & (high | (ok & everything[:, None]))  # (BLOCK_B, BLOCK_K)
        scores, word = wanted_by_lane(keep, s, LANES, LEVELS)  # (BLOCK_B, LANES, BITS), (BLOCK_B, LANES)
        found = tl.sum((scores == scores).to(tl.int32), 2)  # (BLOCK_B, LANES)
        slot = seen[:, None] + tl.cumsum(found, 1) - found  # (BLOCK_B, LANES)
        seen += tl.sum(found, 1)
        while any_wanted(word):
            score, column = lowest_wanted(scores, word, LEVELS)  # (BLOCK_B, LANES) each
            tl.store(survivors_ptr + offs_b[:, None] * W + slot, pack(score, k0 + column), mask=word != 0)
            slot += 1
            word = word & (word - 1)
    for w0 in range(0, W, 16):
        offs_w = w0 + tl.arange(0, 16)
        unused = failed[:, None] & (offs_w[None, :] >= seen[:, None]) & (offs_w < W)[None, :]  # (BLOCK_B, 16)
        ptrs = survivors_ptr + offs_b[:, None] * W + offs_w[None, :]
        tl.store(ptrs, tl.full((BLOCK_B, 16), -(2**63), tl.int64), mask=unused)


def find_missing(
    query: Tensor, negative_keys: Tensor, missing: Tensor, out: Tensor, tile: tiles.ScoreTile, pool: KernelPool
) -> None:
    """Overwrites out (B, R) int64 with the sort key at each rank in missing (B, R) int64; -1 leaves an entry unchanged."""
    B, R = missing.shape
    exact_rank_kernel[(-(-B // tile.BLOCK_B), R)](
        *score_arguments(query, negative_keys, tile, pool), missing, out, R, num_warps=tile.num_warps
    )


def collect_from(
    query: Tensor, negative_keys: Tensor, cut: Tensor, missing: Tensor, survivors: Tensor, tile: tiles.ScoreTile,
    pool: KernelPool,
) -> None:  # fmt: skip
    """Refills survivors (B, W) int64 of rows whose missing (B, 1) is not -1 with all sort keys >= cut (B, 1) int64.

    A cut of NOWHERE means all columns of the pool.
    """
    exact_collect_kernel[(-(-query.shape[0] // tile.BLOCK_B),)](
        *score_arguments(query, negative_keys, tile, pool), cut, missing, survivors, survivors.shape[1],
        tiles.LANES, tiles.levels(tile), num_warps=tile.num_warps,
    )  # fmt: skip
