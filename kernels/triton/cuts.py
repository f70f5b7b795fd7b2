"""A score at a given rank of each sampled row: where a scan should cut.

The cut needs no exactness, the scan's certificate sees to that. So the row (W,) stays in registers and the cut is found by
halving an interval of scores until the count above it is right, or no score lies between its ends.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import capability


@triton.jit(do_not_specialize=["B", "R"])
def cuts_kernel(
    scores_ptr, ranks_ptr, cuts_ptr, B, R, W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    HUGE: tl.constexpr = 3.0e38
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = rows < B
    ptrs = scores_ptr + rows[:, None] * W + tl.arange(0, W)[None, :]
    scores = tl.load(ptrs, mask=ok[:, None], other=float("nan"))  # (BLOCK_R, W)
    present = scores == scores
    scores = tl.minimum(tl.maximum(scores, -HUGE), HUGE)
    scores = tl.where(present, scores, float("-inf"))
    size = tl.sum(present.to(tl.int32), 1)  # (BLOCK_R,)
    least = tl.min(tl.where(present, scores, HUGE), 1)  # (BLOCK_R,)
    most = tl.max(tl.where(present, scores, -HUGE), 1)  # (BLOCK_R,)
    for r in range(0, R):
        rank = tl.load(ranks_ptr + rows * R + r, mask=ok, other=-1)  # (BLOCK_R,)
        # More than rank scores are >= low; above high there are too few.
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
        cut = tl.where(rank < 0, float("inf"), tl.where(rank < size, low, float("-inf")))
        tl.store(cuts_ptr + rows * R + r, cut, mask=ok)


def cuts(scores: Tensor, ranks: Tensor) -> Tensor:
    """scores (B, W) fp32 with NaN where there is none, W a power of two; ranks (B, R) int64 from 0 -> (B, R) fp32.

    inf before the first rank, -inf past the last: such a cut leaves nothing out, or everything.
    """
    B, W = scores.shape
    R = ranks.shape[1]
    out = torch.empty_like(ranks, dtype=torch.float32)
    BLOCK_R, _, num_warps = tiles.row_block(W, capability(scores.device))
    cuts_kernel[(triton.cdiv(B, BLOCK_R),)](scores, ranks, out, B, R, W=W, BLOCK_R=BLOCK_R, num_warps=num_warps)
    return out
