"""The sort key at a rank of each row, from the compact buffers of a scan, or from the sort keys of all columns of a short queue.

The result of a scan is checked: the key must be in its bracket, its rank must not be among the columns counted above the bracket,
and no buffer may have overflowed.

The sort keys of a row (W,) are distinct int64, and the one at a rank is found by counting those at or above a key between two
ends, which then moves one of the ends onto a key of the row. The row comes from cache each time, so the number of passes over it
is what counts. The scores of a bracket lie almost evenly, so the key is taken where the rank would lie were they even. Every
fourth pass halves the interval of keys instead, so that no row takes more than 4 * 64. NOWHERE marks unused entries and is the
answer past the end.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .certificate import BLOCK_P, offered
from .launch import capability
from .scan import Survivors
from .sort_key import EVERYTHING, from_ordered, ordered


@triton.jit
def ends_of(sort_keys_ptr, row, ok, W, lo, hi, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of each row: how many keys are >= hi, how many lie in [lo, hi), the smallest and the largest of these; (BLOCK_R,) each."""
    NOWHERE: tl.constexpr = -(2**63)
    END: tl.constexpr = 2**63 - 1
    num_higher = tl.zeros((BLOCK_R,), tl.int32)
    count = tl.zeros((BLOCK_R,), tl.int32)
    least = tl.full((BLOCK_R,), END, tl.int64)
    most = tl.full((BLOCK_R,), NOWHERE, tl.int64)
    for w0 in range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        ptrs = sort_keys_ptr + row[:, None] * W + offs_w[None, :]
        sort_keys = tl.load(ptrs, mask=ok[:, None] & (offs_w < W)[None, :], other=NOWHERE)  # (BLOCK_R, BLOCK_W)
        higher = sort_keys >= hi[:, None]  # (BLOCK_R, BLOCK_W)
        inside = (sort_keys >= lo[:, None]) & ~higher
        num_higher += tl.sum(higher.to(tl.int32), 1)
        count += tl.sum(inside.to(tl.int32), 1)
        least = tl.minimum(least, tl.min(tl.where(inside, sort_keys, END), 1))
        most = tl.maximum(most, tl.max(tl.where(inside, sort_keys, NOWHERE), 1))
    return num_higher, count, least, most


@triton.jit
def count_from(sort_keys_ptr, row, ok, W, middle, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """For each row: the number of keys >= middle, the smallest of them, and the largest key below middle; (BLOCK_R,) each."""
    NOWHERE: tl.constexpr = -(2**63)
    END: tl.constexpr = 2**63 - 1
    count = tl.zeros((BLOCK_R,), tl.int32)
    above = tl.full((BLOCK_R,), END, tl.int64)
    below = tl.full((BLOCK_R,), NOWHERE, tl.int64)
    for w0 in range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        ptrs = sort_keys_ptr + row[:, None] * W + offs_w[None, :]
        sort_keys = tl.load(ptrs, mask=ok[:, None] & (offs_w < W)[None, :], other=NOWHERE)  # (BLOCK_R, BLOCK_W)
        hit = sort_keys >= middle[:, None]  # (BLOCK_R, BLOCK_W)
        count += tl.sum(hit.to(tl.int32), 1)
        above = tl.minimum(above, tl.min(tl.where(hit, sort_keys, END), 1))
        below = tl.maximum(below, tl.max(tl.where(hit, NOWHERE, sort_keys), 1))
    return count, above, below


@triton.jit
def between(low, high, share):
    """(BLOCK_R,) int64: the key at a share of the way from low to high, by score, or by index where the scores are equal."""
    HUGE: tl.constexpr = 3.0e38
    score_low = tl.maximum(from_ordered((low >> 32).to(tl.int32)), -HUGE)
    score_high = tl.minimum(from_ordered((high >> 32).to(tl.int32)), HUGE)
    by_score = ordered(score_low * (1 - share) + score_high * share).to(tl.int64) << 32
    by_index = low + (share * ((high - low) & 0xFFFFFFFF).to(tl.float32)).to(tl.int64)
    return tl.where((low >> 32) == (high >> 32), by_index, by_score)


@triton.jit
def key_at_rank(
    sort_keys_ptr, row, ok, W, rank, num_higher, count, least, most, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    """(BLOCK_R,) int64: the sort key at the rank of each row, of which num_higher lie above `most` and `count` in [least, most];
    NOWHERE where the rank is not one of these."""
    found = (rank >= num_higher) & (rank < num_higher + count)
    # The key lies in [low, high]: more than rank keys are >= low, at most rank are > high.
    low = tl.where(found, least, 0)  # (BLOCK_R,)
    high = tl.where(found, most, 0)
    from_low = num_higher + count  # keys >= low
    past_high = num_higher  # keys > high
    turn = 0
    while tl.max((low < high).to(tl.int32), 0) > 0:
        wanted = (from_low - rank).to(tl.float32) - 0.5
        even = between(low, high, wanted / tl.maximum(from_low - past_high, 1).to(tl.float32))
        half = (low & high) + ((low ^ high) >> 1) + 1  # rounded up
        middle = tl.where((turn < 3) & (even > low) & (even <= high), even, half)
        turn = tl.where(turn == 3, 0, turn + 1)
        num_from, above, below = count_from(sort_keys_ptr, row, ok, W, middle, BLOCK_R, BLOCK_W)
        enough = (low < high) & (num_from > rank)
        short = (low < high) & (num_from <= rank)
        from_low = tl.where(enough, num_from, from_low)
        past_high = tl.where(short, num_from, past_high)
        low = tl.where(enough, above, tl.where(short & (num_from == rank), below, low))
        high = tl.where(short, below, tl.where(enough & (num_from == rank + 1), above, high))
    return tl.where(found, low, -(2**63))


@triton.jit(do_not_specialize=["CELLS", "R"])
def select_by_rank_kernel(
    sort_keys_ptr, ranks_ptr, out_ptr, CELLS, W, R, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,) of (B, R)
    ok = cell < CELLS
    row = cell // R
    rank = tl.load(ranks_ptr + cell, mask=ok, other=-1)  # (BLOCK_R,)
    lo = tl.full((BLOCK_R,), -(2**63) + 1, tl.int64)
    hi = tl.full((BLOCK_R,), 2**63 - 1, tl.int64)
    num_higher, count, least, most = ends_of(sort_keys_ptr, row, ok, W, lo, hi, BLOCK_R, BLOCK_W)
    sort_key = key_at_rank(sort_keys_ptr, row, ok, W, rank, num_higher, count, least, most, BLOCK_R, BLOCK_W)
    tl.store(out_ptr + cell, sort_key, mask=ok)


@triton.jit(do_not_specialize=["CELLS", "R", "SPLITS", "BUFFERS", "CAPACITY"])
def select_certified_kernel(
    sort_keys_ptr, ranks_ptr, found_ptr, num_above_ptr, cut_lo_ptr, cut_hi_ptr, out_ptr, missing_ptr,
    CELLS, W, R, SPLITS, BUFFERS, CAPACITY, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,) of (B, R)
    ok = cell < CELLS
    row = cell // R
    rank = tl.load(ranks_ptr + cell, mask=ok, other=-1)  # (BLOCK_R,)
    lo = tl.load(cut_lo_ptr + cell, mask=ok, other=0)  # (BLOCK_R,)
    hi = tl.load(cut_hi_ptr + cell, mask=ok, other=0)  # (BLOCK_R,)
    num_above = tl.zeros((BLOCK_R,), tl.int64)
    for p0 in range(0, SPLITS, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        ptrs = num_above_ptr + offs_p.to(tl.int64)[None, :] * CELLS + cell[:, None]  # (BLOCK_R, BLOCK_P)
        part = tl.load(ptrs, mask=ok[:, None] & (offs_p < SPLITS)[None, :], other=0)
        num_above += tl.sum(part.to(tl.int64), 1)
    # Of the columns above this bracket the scan counted all, and another bracket kept some.
    num_higher, count, least, most = ends_of(sort_keys_ptr, row, ok, W, lo, hi, BLOCK_R, BLOCK_W)
    among = rank - num_above + num_higher  # (BLOCK_R,) int64
    sort_key = key_at_rank(sort_keys_ptr, row, ok, W, among, num_higher, count, least, most, BLOCK_R, BLOCK_W)
    _, most_offered = offered(found_ptr, row, ok, BUFFERS, BLOCK_R, BLOCK_P)
    # A rank past what lies in the bracket is past the end of the pool where the bracket reaches there.
    inside = (rank >= num_above) & ((rank < num_above + count) | (lo == EVERYTHING))
    sure = (most_offered <= CAPACITY) & inside
    tl.store(out_ptr + cell, sort_key, mask=ok)
    tl.store(missing_ptr + cell, tl.where(sure, -1, rank), mask=ok)


def select_by_rank(sort_keys: Tensor, ranks: Tensor) -> Tensor:
    """sort_keys (B, W) int64, ranks (B, R) int64 from 0 -> (B, R) int64."""
    W, R = sort_keys.shape[1], ranks.shape[1]
    out = torch.empty_like(ranks)
    BLOCK_R, BLOCK_W, num_warps = tiles.row_block(W, capability(sort_keys.device))
    select_by_rank_kernel[(-(-ranks.numel() // BLOCK_R),)](
        sort_keys, ranks, out, ranks.numel(), W, R, BLOCK_R, BLOCK_W, num_warps=num_warps
    )
    return out


def select_certified(survivors: Survivors, ranks: Tensor, cut_lo: Tensor, cut_hi: Tensor) -> tuple[Tensor, Tensor]:
    """The sort keys at ranks (B, R) of the whole pool, from the survivors of a scan in the brackets [cut_lo, cut_hi) (B, R).

    The second result has the ranks whose check failed, which must still be found, and -1 for the others. (B, R) int64 each.
    """
    sort_keys, found, num_above, capacity = survivors
    W, R = sort_keys.shape[1], ranks.shape[1]
    out, missing = torch.empty_like(ranks), torch.empty_like(ranks)
    BLOCK_R, BLOCK_W, num_warps = tiles.row_block(W, capability(sort_keys.device))
    select_certified_kernel[(-(-ranks.numel() // BLOCK_R),)](
        sort_keys, ranks, found, num_above, cut_lo, cut_hi, out, missing, ranks.numel(), W, R, len(num_above), found.shape[1],
        capacity, BLOCK_R, BLOCK_W, BLOCK_P, num_warps=num_warps,
    )  # fmt: skip
    return out, missing
