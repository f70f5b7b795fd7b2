"""logsumexp in Triton: log-sum-exp over each query's pool at one or several scales, and the mean of its keys.

The parts of the queue are summed separately (logsumexp_parts.py) and merged here, one row and one scale for each program. For a
window of ranks, its sort keys are found first (rank_window.py). kernels/README.md explains the arguments and results.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import UNFUSED, launcher
from .logsumexp_parts import merged, sum_parts
from .mine_hardest import mine
from .pool import kernel_pool
from .rank_window import rank_window


@triton.jit(do_not_specialize=["B", "SPLITS"])
def logsumexp_merge_kernel(
    parts_ptr, query_ptr, stride_qb, lse_ptr, mean_ptr, num_kept_ptr, num_above_ptr, B, SPLITS,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    scale_index = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
    lse, mean, num_kept, num_above = merged(
        parts_ptr, query, b, scale_index, tl.num_programs(1), B, SPLITS, D,
        WANT_MEAN, ALONG, HAS_PIVOT, D, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    tl.store(num_kept_ptr + b, num_kept, mask=scale_index == 0)
    tl.store(num_above_ptr + b, num_above, mask=scale_index == 0)
    cell = scale_index.to(tl.int64) * B + b
    tl.store(lse_ptr + cell, lse * 0.6931471805599453)  # ln(2)
    if WANT_MEAN:
        tl.store(mean_ptr + cell * D + offs_d, mean, mask=offs_d < D)


@launcher
def logsumexp(
    query: Tensor, negative_keys: Tensor, scales: Tensor, pivot: Tensor | None, want_mean: bool, N: int,
    ranks: Tensor | None, *pool: Tensor | bool | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """lse (S, B), mean (S, B or 0, D) fp32, num_kept, num_above (B,) int64, scores, index (B, N), sort_keys (B, 2 or 0) int64.

    Raises ValueError if N > 0 and ranks are combined.
    """
    columns = kernel_pool(pool)
    if N and ranks is not None:
        raise ValueError("logsumexp: N above 0 and ranks are not supported together.")
    (B, D), S = query.shape, scales.shape[0]
    lse = query.new_empty(S, B, dtype=torch.float32)
    mean = query.new_empty(S, B if want_mean else 0, D, dtype=torch.float32)
    num_kept, num_above = query.new_empty(B, dtype=torch.int64), query.new_empty(B, dtype=torch.int64)
    if N:
        scores, index = mine(query, negative_keys, N, columns)
    else:
        scores, index = query.new_empty(B, 0, dtype=torch.float32), query.new_empty(B, 0, dtype=torch.int64)
    if ranks is not None:
        columns, sort_keys = rank_window(query, negative_keys, ranks, columns)
    else:
        sort_keys = query.new_empty(B, 0, dtype=torch.int64)
    if B and S:
        parts = sum_parts(query, negative_keys, scales.contiguous(), pivot, want_mean, columns)
        BLOCK_P, BLOCK_D, num_warps = tiles.merge_block(D, parts.splits)
        logsumexp_merge_kernel[(B, S)](
            parts.buffer, query, query.stride(0), lse, mean, num_kept, num_above, B, parts.splits,
            want_mean, parts.along, pivot is not None, D, BLOCK_P, BLOCK_D, num_warps=num_warps, **UNFUSED,
        )  # fmt: skip
    return lse, mean, num_kept, num_above, scores, index, sort_keys
