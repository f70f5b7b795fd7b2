"""Narrows a pool to the columns between two of its ranks.

The sort key at the first rank becomes the upper bound of the pool, and that at the last rank the lower bound. A last rank past
the end of the pool is no bound. A window is empty if its last rank is below its first, or if the pool does not have its first
rank.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .pool import KernelPool
from .rank_thresholds import thresholds


@triton.jit(do_not_specialize=["B"])
def rank_window_kernel(ranks_ptr, sort_keys_ptr, lower_ptr, bounds_ptr, B, BLOCK: tl.constexpr):
    """bounds (2, B): the lower bounds, then the upper ones. sort_keys (B, 2) are both NOWHERE if the window is empty."""
    NOWHERE: tl.constexpr = -(2**63)
    BOTTOM: tl.constexpr = -0x7F800001 << 32  # of the score -inf: only NaN is below
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = b < B
    first = tl.load(sort_keys_ptr + 2 * b, mask=ok, other=NOWHERE)  # (BLOCK,)
    last = tl.load(sort_keys_ptr + 2 * b + 1, mask=ok, other=NOWHERE)  # (BLOCK,)
    backwards = tl.load(ranks_ptr + 2 * b + 1, mask=ok, other=0) < tl.load(ranks_ptr + 2 * b, mask=ok, other=0)
    empty = backwards | (first == NOWHERE)
    first = tl.where(empty, NOWHERE, first)
    last = tl.where(empty, NOWHERE, last)
    tl.store(sort_keys_ptr + 2 * b, first, mask=ok)
    tl.store(sort_keys_ptr + 2 * b + 1, last, mask=ok)
    if lower_ptr is not None:
        lower = tl.maximum(last, tl.load(lower_ptr + b, mask=ok, other=0))
    else:
        lower = tl.maximum(last, BOTTOM)
    tl.store(bounds_ptr + b, lower, mask=ok)
    tl.store(bounds_ptr + B + b, first, mask=ok)


def rank_window(query: Tensor, negative_keys: Tensor, ranks: Tensor, pool: KernelPool) -> tuple[KernelPool, Tensor]:
    """The pool between ranks (B, 2) int64, both included, and the sort keys (B, 2) int64 there, NOWHERE if it is empty."""
    B = query.shape[0]
    ranks = ranks.contiguous()
    sort_keys = thresholds(query, negative_keys, ranks, pool)  # (B, 2)
    bounds = torch.empty((2, B), dtype=torch.int64, device=query.device)
    if B:
        rank_window_kernel[(-(-B // 256),)](ranks, sort_keys, pool.lower, bounds, B, 256, num_warps=4)
    return pool._replace(lower=bounds[0], upper=bounds[1]), sort_keys
