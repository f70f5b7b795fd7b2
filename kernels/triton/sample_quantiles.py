"""The scores at given ranks of each sampled row, which are the cuts of a scan.

The cuts need not be exact, because the result of the scan is checked. A row (W,) is kept in registers, and a cut is found by
halving an interval of scores until the count above it is right or no score lies between its ends.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import capability


@triton.jit
def sampled_rows(scores_ptr, rows, ok, W: tl.constexpr):
    """scores (BLOCK_R, W), -inf where there is none; how many there are, the least and the most of them (BLOCK_R,)."""
    HUGE: tl.constexpr = 3.0e38
    ptrs = scores_ptr + rows[:, None] * W + tl.arange(0, W)[None, :]
    scores = tl.load(ptrs, mask=ok[:, None], other=float("nan"))  # (BLOCK_R, W)
    present = scores == scores
    scores = tl.minimum(tl.maximum(scores, -HUGE), HUGE)
    least = tl.min(tl.where(present, scores, HUGE), 1)  # (BLOCK_R,)
    most = tl.max(tl.where(present, scores, -HUGE), 1)  # (BLOCK_R,)
    return tl.where(present, scores, float("-inf")), tl.sum(present.to(tl.int32), 1), least, most


@triton.jit
def cut_at(scores, size, least, most, rank):
    """(BLOCK_R,) fp32: inf for a negative rank, which keeps nothing; -inf for a rank past the last, which keeps everything."""
    # More than `rank` scores are >= low, and at most `rank` are above high.
    low = least
    high = most
    middle = 0.5 * low + 0.5 * high
    going = (rank >= 0) & (rank < size) & (middle > low) & (middle < high)
    while tl.max(going.to(tl.int32), 0) > 0:
        count = tl.sum((scores >= middle[:, None]).to(tl.int32), 1)  # (BLOCK_R,)
        low = tl.where(going & (count > rank), middle, low)
        high = tl.where(going & (count <= rank), middle, high)
        middle = 0.5 * low + 0.5 * high
        going = going & (count != rank + 1) & (middle > low) & (middle < high)
    return tl.where(rank < 0, float("inf"), tl.where(rank < size, low, float("-inf")))


@triton.jit(do_not_specialize=["B", "rank"])
def sample_quantile_kernel(scores_ptr, cut_ptr, B, rank, W: tl.constexpr, BLOCK_R: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = rows < B
    scores, size, least, most = sampled_rows(scores_ptr, rows, ok, W)
    ranks = tl.zeros((BLOCK_R,), tl.int32) + rank
    tl.store(cut_ptr + rows, cut_at(scores, size, least, most, ranks), mask=ok)


@triton.jit(do_not_specialize=["B", "R", "K"])
def sample_brackets_kernel(
    scores_ptr, ranks_ptr, cut_lo_ptr, cut_hi_ptr, B, R, K,
    SIGMAS: tl.constexpr, PLACES_BELOW: tl.constexpr, PLACES_ABOVE: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = rows < B
    scores, size, least, most = sampled_rows(scores_ptr, rows, ok, W)
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
        tl.store(cut_lo_ptr + rows * R + r, cut_at(scores, size, least, most, below), mask=ok)
        tl.store(cut_hi_ptr + rows * R + r, cut_at(scores, size, least, most, above), mask=ok)


def sample_quantile(scores: Tensor, rank: int) -> Tensor:
    """(B, 1) fp32: the score at the 0-based rank of scores (B, W) fp32, where NaN is no score. W is a power of two."""
    B, W = scores.shape
    out = torch.empty((B, 1), dtype=torch.float32, device=scores.device)
    BLOCK_R, _, num_warps = tiles.row_block(W, capability(scores.device))
    sample_quantile_kernel[(-(-B // BLOCK_R),)](scores, out, B, rank, W, BLOCK_R, num_warps=num_warps)
    return out


def sample_brackets(scores: Tensor, ranks: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """cut_lo and cut_hi (B, R) fp32 that bracket the scores at ranks (B, R) int64 of K, from a sample scores (B, W)."""
    B, W = scores.shape
    cut_lo = torch.empty_like(ranks, dtype=torch.float32)
    cut_hi = torch.empty_like(cut_lo)
    BLOCK_R, _, num_warps = tiles.row_block(W, capability(scores.device))
    sample_brackets_kernel[(-(-B // BLOCK_R),)](
        scores, ranks, cut_lo, cut_hi, B, ranks.shape[1], K, tiles.SIGMAS, tiles.PLACES_BELOW, tiles.PLACES_ABOVE, W, BLOCK_R,
        num_warps=num_warps,
    )  # fmt: skip
    return cut_lo, cut_hi
