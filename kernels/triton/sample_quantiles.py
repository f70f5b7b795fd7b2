"""Cuts at given ranks of each sampled row: where a scan should begin to keep columns, and where it should end.

A cut is a sort key, of a score and a column: it admits the columns whose sort key is at least that, so that it can lie among
columns of equal score. It needs no exactness, the scan's certificate sees to that. So the row (W,) stays in registers, as
integers that sort like its scores. The score of a cut is found by bisection, in at most 32 steps; where more columns have that
score than are wanted, so is the position in the sample of the last one that is.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import capability
from .sample import sampled_column
from .sort_key import EVERYTHING, NOTHING, ordered


@triton.jit
def sampled_rows(scores_ptr, rows, ok, W: tl.constexpr):
    """values (BLOCK_R, W) int32, the ordered scores, -2^31 where there is none; how many there are (BLOCK_R,)."""
    ptrs = scores_ptr + rows[:, None] * W + tl.arange(0, W)[None, :]
    scores = tl.load(ptrs, mask=ok[:, None], other=float("nan"))  # (BLOCK_R, W)
    present = scores == scores
    return tl.where(present, ordered(scores), -(2**31)), tl.sum(present.to(tl.int32), 1)


@triton.jit
def score_at(values, size, rank):
    """low (BLOCK_R,) int32: rank + 1 values are at or above it; how many are, which is more only where values are equal."""
    # At least rank + 1 values are >= low, and at most rank are >= high.
    low = tl.min(tl.where(values == -(2**31), 2**31 - 1, values), 1)  # (BLOCK_R,)
    high = tl.max(values, 1) + 1  # (BLOCK_R,)
    middle = (low & high) + ((low ^ high) >> 1)
    reached = size
    going = (rank >= 0) & (rank < size) & (reached > rank + 1) & (middle > low)
    while tl.max(going.to(tl.int32), 0) > 0:
        count = tl.sum((values >= middle[:, None]).to(tl.int32), 1)  # (BLOCK_R,)
        enough = going & (count > rank)
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, count, reached)
        high = tl.where(going & ~enough, middle, high)
        middle = (low & high) + ((low ^ high) >> 1)
        going = going & (reached > rank + 1) & (middle > low)
    return low, reached


@triton.jit
def cut_at(values, size, rank, K, IS_LOW: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_R,) int64: a cut that admits the rank + 1 hardest sampled columns, and a few more with IS_LOW, else a few less.

    NOTHING before the first rank, EVERYTHING past the last.
    """
    low, reached = score_at(values, size, rank)
    tied = (rank >= 0) & (rank < size) & (reached > rank + 1)
    at = tl.arange(0, W)[None, :]
    equal = values == low[:, None]  # (BLOCK_R, W)
    wanted = rank + 1 - reached + tl.sum(equal.to(tl.int32), 1)  # (BLOCK_R,), of those that are equal
    begin = tl.zeros_like(rank)  # fewer than wanted lie before begin, as many or more before end
    end = begin + W
    going = tied
    while tl.max(going.to(tl.int32), 0) > 0:
        middle = (begin + end) >> 1
        enough = tl.sum((equal & (at < middle[:, None])).to(tl.int32), 1) >= wanted
        end = tl.where(going & enough, middle, end)
        begin = tl.where(going & ~enough, middle, begin)
        going = going & (end - begin > 1)
    if IS_LOW:
        column = (sampled_column(end, K, W) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        tied = tied & (end < W)
    else:
        column = sampled_column(end - 1, K, W) // BLOCK_K * BLOCK_K
    columns = tl.where(tied, column, 1 << 32)  # (BLOCK_R,) int64, how many may have this score
    cut = ((low.to(tl.int64) + 1) << 32) - columns
    return tl.where(rank < 0, NOTHING, tl.where(rank < size, cut, EVERYTHING))


@triton.jit(do_not_specialize=["B", "rank", "K"])
def sample_quantile_kernel(
    scores_ptr, cut_ptr, B, rank, K, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = rows < B
    values, size = sampled_rows(scores_ptr, rows, ok, W)
    ranks = tl.zeros((BLOCK_R,), tl.int32) + rank
    tl.store(cut_ptr + rows, cut_at(values, size, ranks, K, True, W, BLOCK_K), mask=ok)


@triton.jit(do_not_specialize=["B", "R", "K"])
def sample_brackets_kernel(
    scores_ptr, ranks_ptr, cut_lo_ptr, cut_hi_ptr, B, R, K,
    SIGMAS: tl.constexpr, PLACES_BELOW: tl.constexpr, PLACES_ABOVE: tl.constexpr,
    W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = rows < B
    values, size = sampled_rows(scores_ptr, rows, ok, W)
    share = tl.full((), W, tl.float32) / K
    for r in range(0, R):
        rank = tl.load(ranks_ptr + rows * R + r, mask=ok, other=-1)  # (BLOCK_R,)
        position = tl.minimum(tl.maximum((rank + 1).to(tl.float32) * share, 0.0), W)
        reach = SIGMAS * tl.sqrt(position * (1 - position / W) * (1 - share))
        below = tl.ceil(position + reach + PLACES_BELOW).to(tl.int32) - 1
        # If there are few sampled keys above a rank, the deviation is skewed to the safe side; if there are few below, to the
        # other.
        skew = tl.where(2 * position <= W, PLACES_ABOVE, -PLACES_BELOW)
        above = tl.floor(position - reach + skew).to(tl.int32) - 1
        # Near the top, the places added for the skew would move the upper cut below the rank.
        above = tl.where(position - reach < 1, -1, above)
        tl.store(cut_lo_ptr + rows * R + r, cut_at(values, size, below, K, True, W, BLOCK_K), mask=ok)
        tl.store(cut_hi_ptr + rows * R + r, cut_at(values, size, above, K, False, W, BLOCK_K), mask=ok)


def sample_quantile(scores: Tensor, rank: int, K: int, BLOCK_K: int) -> Tensor:
    """scores (B, W) fp32 with NaN where there is none, W a power of two, of K columns -> (B, 1) int64: the cut at a rank from 0.

    A scan finds it among equal scores where a tile of BLOCK_K columns begins.
    """
    B, W = scores.shape
    out = torch.empty((B, 1), dtype=torch.int64, device=scores.device)
    BLOCK_R, _, num_warps = tiles.row_block(W, capability(scores.device))
    sample_quantile_kernel[(-(-B // BLOCK_R),)](scores, out, B, rank, K, W, BLOCK_R, BLOCK_K, num_warps=num_warps)
    return out


def sample_brackets(scores: Tensor, ranks: Tensor, K: int, BLOCK_K: int) -> tuple[Tensor, Tensor]:
    """scores (B, W) as in sample_quantile, ranks (B, R) int64 of K -> cut_lo, cut_hi (B, R) int64 around the columns there."""
    B, W = scores.shape
    cut_lo, cut_hi = torch.empty_like(ranks), torch.empty_like(ranks)
    BLOCK_R, _, num_warps = tiles.row_block(W, capability(scores.device))
    sample_brackets_kernel[(-(-B // BLOCK_R),)](
        scores, ranks, cut_lo, cut_hi, B, ranks.shape[1], K, tiles.SIGMAS, tiles.PLACES_BELOW, tiles.PLACES_ABOVE,
        W, BLOCK_R, BLOCK_K, num_warps=num_warps,
    )  # fmt: skip
    return cut_lo, cut_hi
