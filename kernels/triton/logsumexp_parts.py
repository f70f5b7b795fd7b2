"""Log-sum-exp over parts of the queue, and the merging of the parts of a row. logsumexp and info_nce use this code.

As in FlashAttention, with the keys as values, a program keeps BLOCK_B queries and processes its part of the queue in tiles, with
a running maximum and running sums in the exp2 domain; the (B, K) scores are never stored. The queue is split into SPLITS parts so
that a few queries still use the whole GPU. `merged` adds the parts of a row in order, so the result does not depend on timing.
The mean of wide embeddings is computed in slices of D, one program each; each of them computes the scores again. Each scale has
its own programs.

Tensor cores need probabilities in the storage type, with 8 or 11 bits. The component of the mean along the query is the mean of
the scores, which alone determines the gradient of the scale. It is therefore also summed in fp32, and replaces the rounded
component at the end.

All parts are in one buffer of fp32. With `cells` = S * SPLITS * B, it has sums of keys (cells, D) if the mean is wanted, and then
`cells` numbers each of: maxima, sums, sums along the query, columns kept, columns above the pivot. The last two are int32 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import programs_at_once, score_arguments
from .launch import score_tile as choose_tile
from .numerics import finite_shift
from .pool import KernelPool, may_hide_pairs, pool_bias, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import any_not_finite, as_stored, load_rows, load_whole_rows, or_zero, score_tile

CHUNK = tl.constexpr(8)  # how many tiles are searched together for equal ids and labels
SEARCH = tl.constexpr(256)  # how many columns this search compares at a time


@triton.jit
def add_columns(
    sums, start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale, pivot,
    WIDEN: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    PLAIN: tl.constexpr, WHOLE: tl.constexpr, MENDED: tl.constexpr,
):  # fmt: skip
    """The running sums with columns [start, stop) added.

    PLAIN: nothing is masked. WHOLE: the columns are whole tiles. MENDED: hidden pairs may hold any values, NaN included.
    """
    m, z, along, num_kept, num_above, acc = sums
    # No score is below -inf, but the compiler does not know this. A mask that depends on scores gets the layout of the scores.
    floor = -tl.abs(scale) * float("inf")
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(pool, offs_k, size, WHOLE)  # (BLOCK_K,)
        keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        allowed = tl.broadcast_to(k_ok[None, :], (BLOCK_B, BLOCK_K))  # all True in a whole tile, which costs nothing
        inside = allowed  # (BLOCK_B, BLOCK_K)
        if not PLAIN:
            allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
            inside = pool_bounds(pool, rows, s, offs_k, allowed & ~(s < floor))  # (BLOCK_B, BLOCK_K)
        if pivot is not None:
            num_above += tl.sum((allowed & (s > pivot[:, None])).to(tl.int32), 1)
        num_kept += tl.sum(inside.to(tl.int32), 1)
        x = s * scale  # (BLOCK_B, BLOCK_K)
        if pool.bias is not None:
            x += pool_bias(pool, offs_k, k_ok)[None, :] * 1.4426950408889634  # log2(e)
        x = tl.where(inside, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        shift = finite_shift(m_new)
        decay = tl.math.exp2(m - shift)  # (BLOCK_B,)
        p = tl.math.exp2(x - shift[:, None])  # (BLOCK_B, BLOCK_K)
        if ALONG:  # first, so that scores need not outlive the rest
            if MENDED:
                s = tl.where(inside, s, 0.0)
            along = along * decay + tl.sum(p * s, 1)
        z = z * decay + tl.sum(p, 1)
        m = m_new
        if WANT_MEAN:
            if D <= SLICE and D <= BLOCK_D:
                values = keys
            else:
                values = load_rows(keys_ptr, offs_k, k_ok, stride_kk, d0, D, SLICE, WIDEN)  # (BLOCK_K, SLICE)
            if MENDED:
                values = or_zero(values)
            p = as_stored(p, query_ptr, keys_ptr).to(values.dtype)
            acc = tl.dot(p, values, acc * decay[:, None], input_precision="ieee")  # (BLOCK_B, SLICE)
    return m, z, along, num_kept, num_above, acc


@triton.jit
def no_sums(BLOCK_B: tl.constexpr, SLICE: tl.constexpr):
    """The initial running sums: maxima, sums, sums along the query, columns kept, columns above the pivot, sums of keys."""
    m = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK_B,), tl.float32)
    along = tl.zeros((BLOCK_B,), tl.float32)
    num_kept = tl.zeros((BLOCK_B,), tl.int32)
    num_above = tl.zeros((BLOCK_B,), tl.int32)
    acc = tl.zeros((BLOCK_B, SLICE), tl.float32)
    return m, z, along, num_kept, num_above, acc


@triton.jit
def sums_of_part(
    start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale, pivot,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    HIDES: tl.constexpr, BY_TAGS: tl.constexpr,
):  # fmt: skip
    """The running sums over columns [start, stop). HIDES: there are masks or bounds. BY_TAGS: only ids and labels hide pairs.

    Tiles whose masks are read are half as wide, so that there are enough registers. Equal ids are rare, so a chunk of tiles is
    searched for them first; if there are none, its masks are not read.
    """
    sums = no_sums(BLOCK_B, SLICE)
    # Only the last tile, which is added after the loop, may extend past the end of the queue.
    whole = stop
    if not EVEN_K:
        whole = start + tl.maximum(stop - start, 0) // BLOCK_K * BLOCK_K
    if BY_TAGS:
        for chunk in range(start, whole, CHUNK * BLOCK_K):
            end = tl.minimum(chunk + CHUNK * BLOCK_K, whole)
            if may_hide_pairs(pool, rows, chunk, end, SEARCH):
                sums = add_columns(
                    sums, chunk, end, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale,
                    pivot, WIDEN, D, BLOCK_B, BLOCK_K // 2, BLOCK_D, WANT_MEAN, ALONG, SLICE, STAGES, False, True, False,
                )  # fmt: skip
            else:
                sums = add_columns(
                    sums, chunk, end, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale,
                    pivot, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, WANT_MEAN, ALONG, SLICE, STAGES, True, True, False,
                )  # fmt: skip
    elif HIDES:
        NARROW: tl.constexpr = BLOCK_K // 2 if pool.guide_query is None else BLOCK_K  # a guide's tile is small enough
        sums = add_columns(
            sums, start, whole, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale,
            pivot, WIDEN, D, BLOCK_B, NARROW, BLOCK_D, WANT_MEAN, ALONG, SLICE, STAGES, False, True, False,
        )  # fmt: skip
    else:
        sums = add_columns(
            sums, start, whole, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale,
            pivot, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, WANT_MEAN, ALONG, SLICE, STAGES, True, True, False,
        )  # fmt: skip
    if not EVEN_K:
        sums = add_columns(
            sums, whole, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale,
            pivot, WIDEN, D, BLOCK_B, BLOCK_K // 2, BLOCK_D, WANT_MEAN, ALONG, SLICE, STAGES, False, False, False,
        )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def logsumexp_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    scales_ptr, pivot_ptr, parts_ptr, tiles_per_split,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    HIDES: tl.constexpr, HIDES_PAIRS: tl.constexpr, BY_TAGS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    d0 = tl.program_id(2) % SLICES * SLICE
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    scale = tl.load(scales_ptr + tl.program_id(2) // SLICES) * 1.4426950408889634  # log2(e)
    pivot = None
    if pivot_ptr is not None:
        pivot = tl.load(pivot_ptr + offs_b, mask=b_ok, other=0.0)  # (BLOCK_B,)

    size = pool_size(pool, K)
    start = split * tiles_per_split * BLOCK_K
    stop = tl.minimum(start + tiles_per_split * BLOCK_K, size)
    m, z, along, num_kept, num_above, acc = sums_of_part(
        start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale, pivot,
        EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, WANT_MEAN, ALONG, SLICE, STAGES, HIDES, BY_TAGS,
    )  # fmt: skip
    if WANT_MEAN and HIDES_PAIRS:  # hidden rows may hold NaN, and 0 * NaN is not 0
        broken = any_not_finite(acc, b_ok)
        if ALONG:
            broken = broken | any_not_finite(along[:, None], b_ok)
        if broken:
            m, z, along, num_kept, num_above, acc = add_columns(
                no_sums(BLOCK_B, SLICE), start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size,
                pool, rows, scale, pivot, WIDEN, D, BLOCK_B, max(BLOCK_K // 4, 16), BLOCK_D, WANT_MEAN, ALONG, SLICE, 1,
                False, False, True,
            )  # fmt: skip

    SPLITS = tl.num_programs(1)
    cells = (tl.num_programs(2) // SLICES * SPLITS).to(tl.int64) * B
    cell = (tl.program_id(2) // SLICES * SPLITS + split).to(tl.int64) * B + offs_b  # (BLOCK_B,) of (S, SPLITS, B)
    ptrs = parts_ptr + cell  # (BLOCK_B,)
    if WANT_MEAN:
        offs_d = d0 + tl.arange(0, SLICE)
        tl.store(parts_ptr + cell[:, None] * D + offs_d[None, :], acc, mask=b_ok[:, None] & (offs_d < D)[None, :])
        ptrs += cells * D
    first = b_ok & (d0 == 0)
    tl.store(ptrs, m, mask=first)
    tl.store(ptrs + cells, z, mask=first)
    if ALONG:
        tl.store(ptrs + 2 * cells, along, mask=first)
    tl.store(ptrs + 3 * cells, num_kept.to(tl.float32, bitcast=True), mask=first)
    if pivot_ptr is not None:
        tl.store(ptrs + 4 * cells, num_above.to(tl.float32, bitcast=True), mask=first)


@triton.jit
def merged(
    parts_ptr, query, b, scale_index, S, B, SPLITS, width,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The merged parts of row b: log2 sum_p 2^m_p z_p, mean (BLOCK_D,) = sum_p 2^m_p acc_p divided by that sum, and counts.

    Only the first `width` of the D columns of a part are read; query is zeros past them.
    ALONG: then mean += query (sum_p 2^m_p along_p / sum - query . mean) / |query|^2.
    """
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    cells = (S * SPLITS).to(tl.int64) * B
    first = (scale_index * SPLITS).to(tl.int64) * B + b
    acc_ptr = parts_ptr + first * D + offs_d[None, :]
    m_ptr = parts_ptr + first
    if WANT_MEAN:
        m_ptr += cells * D
    z_ptr = m_ptr + cells
    along_ptr = z_ptr + cells
    num_kept_ptr = along_ptr + cells
    num_above_ptr = num_kept_ptr + cells
    top = tl.full((), float("-inf"), tl.float32)
    for p0 in range(0, SPLITS, BLOCK_P):
        m = tl.load(m_ptr + (p0 + offs_p) * B, mask=p0 + offs_p < SPLITS, other=float("-inf"))  # (BLOCK_P,)
        top = tl.maximum(top, tl.max(m, 0))
    shift = finite_shift(top)
    z = tl.zeros((), tl.float32)
    along = tl.zeros((), tl.float32)
    num_kept = tl.zeros((), tl.int64)
    num_above = tl.zeros((), tl.int64)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for p0 in range(0, SPLITS, BLOCK_P):
        p_ok = p0 + offs_p < SPLITS
        part = (p0 + offs_p).to(tl.int64) * B  # (BLOCK_P,)
        weight = tl.math.exp2(tl.load(m_ptr + part, mask=p_ok, other=float("-inf")) - shift)  # (BLOCK_P,)
        z += tl.sum(weight * tl.load(z_ptr + part, mask=p_ok, other=0.0), 0)
        counted = tl.load(num_kept_ptr + part, mask=p_ok, other=0.0).to(tl.int32, bitcast=True)  # (BLOCK_P,)
        num_kept += tl.sum(counted.to(tl.int64), 0)
        if HAS_PIVOT:
            counted_above = tl.load(num_above_ptr + part, mask=p_ok, other=0.0).to(tl.int32, bitcast=True)  # (BLOCK_P,)
            num_above += tl.sum(counted_above.to(tl.int64), 0)
        if WANT_MEAN:
            ok = p_ok[:, None] & (offs_d < width)[None, :]
            keys = tl.load(acc_ptr + part[:, None] * D, mask=ok, other=0.0)  # (BLOCK_P, BLOCK_D)
            acc += tl.sum(weight[:, None] * keys, 0)
        if ALONG:
            along += tl.sum(weight * tl.load(along_ptr + part, mask=p_ok, other=0.0), 0)
    mean = tl.where(z == 0, 0.0, acc / z)  # (BLOCK_D,)
    if ALONG:
        missing = tl.where(z == 0, 0.0, along / z) - tl.sum(query * mean, 0)
        squares = tl.sum(query * query, 0)
        mean += query * tl.where(squares == 0, 0.0, missing / squares)
    return shift + tl.math.log2(z), mean, num_kept, num_above


class Parts(NamedTuple):
    """The sums over parts of the queue for each row, as an argument of the kernel that merges them."""

    buffer: Tensor  # fp32
    splits: int
    along: bool


def sum_parts(
    query: Tensor, negative_keys: Tensor, scales: Tensor, pivot: Tensor | None, want_mean: bool, pool: KernelPool
) -> Parts:
    """The sums over parts of the queue for S log-sum-exps. B > 0; scales are (S,) or ()."""
    (B, D), K, S = query.shape, negative_keys.shape[0], scales.numel()
    tile = choose_tile(query, negative_keys, pool)
    splits, per_split = tiles.even_splits(B, K, tile, programs_at_once(query.device, tile))
    rounds = want_mean and query.dtype == negative_keys.dtype != torch.float32  # probabilities, for the mean
    slices = -(-D // tile.SLICE) if want_mean else 1
    buffer = query.new_empty(S * splits * B * (D + 5 if want_mean else 5), dtype=torch.float32)
    logsumexp_kernel[(-(-B // tile.BLOCK_B), splits, S * slices)](
        *score_arguments(query, negative_keys, tile, pool),
        scales, None if pivot is None else pivot.contiguous(), buffer, per_split,
        want_mean, rounds, slices, tile.SLICE, tile.num_stages, pool.hides_pairs or pool.key_mask is not None, pool.hides_pairs,
        pool.hides_by_tags, num_warps=tile.num_warps,
    )  # fmt: skip
    return Parts(buffer, splits, rounds)
