"""info_nce in Triton: the loss of each row and its gradient, computed by the kernel that merges the parts of its log-sum-exp.

    x = scale q . positive,   g = lse - x,   row = log(1 + exp(g)),   share = sigmoid(g)        decoupled: row = g, share = 1
    d row / d query = scale share (mean - positive),   d row / d scale = share q . (mean - positive)

lse and mean are those of logsumexp over the pool, or between two of its ranks, combined with the log-sum-exp and the mean of
synthetic negatives if there are any. A row without any negative has loss 0 and no gradient. The same computation in PyTorch needs
about twenty small launches, which dominate the time of a small batch. kernels/README.md explains the arguments and results.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import triton.language as tl
from triton import jit

from . import tiles
from .launch import UNFUSED, launcher
from .logsumexp_parts import merged, sum_parts
from .mine_hardest import mine
from .mix_logsumexp import mix
from .numerics import finite_shift, log1p_unit
from .pool import kernel_pool
from .rank_window import rank_window


class Mixed(NamedTuple):
    """The synthetic negatives of each row, as an argument of the kernel."""

    hard_index: Tensor  # (B, N) int64, the columns from which parents are drawn
    stride_hb: int
    count: int  # number of synthetic negatives of a row with at least one hard negative
    lse: Tensor  # (B,) fp32
    mean: Tensor  # (B, D) fp32, only if a gradient is wanted


class Results(NamedTuple):
    """The results of the op except the sort keys."""

    rows: Tensor
    d_query: Tensor
    d_scale: Tensor
    weight: Tensor
    lse: Tensor
    total: Tensor
    num_kept: Tensor
    num_above: Tensor
    num_mixed: Tensor


@jit(do_not_specialize=["B", "SPLITS"])
def info_nce_kernel(
    parts_ptr, query_ptr, stride_qb, positive_ptr, stride_pb, scale_ptr,
    mixed, results, B, SPLITS, WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr, DECOUPLED: tl.constexpr,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mixed: the synthetic negatives, or None."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    d_ok = offs_d < D
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=d_ok, other=0.0).to(tl.float32)  # (BLOCK_D,)
    positive = tl.load(positive_ptr + b * stride_pb + offs_d, mask=d_ok, other=0.0).to(tl.float32)  # (BLOCK_D,)
    scale = tl.load(scale_ptr)
    lse, mean, num_kept, num_above = merged(
        parts_ptr, query, b, 0, tl.num_programs(1), B, SPLITS, D, WANT_MEAN, ALONG, HAS_PIVOT, D, BLOCK_P, BLOCK_D
    )
    num_mixed = tl.zeros((), tl.int64)
    if mixed is not None:
        num_mixed += tl.where(tl.load(mixed.hard_index + b * mixed.stride_hb) >= 0, mixed.count, 0)
        lse_mixed = tl.load(mixed.lse + b) * LOG2E
        most = tl.where((lse > lse_mixed) | (lse != lse), lse, lse_mixed)  # tl.maximum would lose a NaN
        shift = finite_shift(most)
        own = tl.math.exp2(lse - shift)
        other = tl.math.exp2(lse_mixed - shift)
        if WANT_MEAN:
            synthetic = tl.load(mixed.mean + b * D + offs_d, mask=d_ok, other=0.0)  # (BLOCK_D,)
            mean = tl.where(own + other == 0, 0.0, (own * mean + other * synthetic) / (own + other))
        lse = shift + tl.math.log2(own + other)
    some = num_kept + num_mixed > 0
    lse = lse * LN2
    score = tl.sum(query * positive, 0)
    x = score * scale
    gap = lse - x
    if DECOUPLED:
        row = tl.where(some, gap, 0.0 * x)
        share = tl.where(some, 1.0, 0.0)
        total = lse
    else:
        e = tl.math.exp2(-tl.abs(gap) * LOG2E)
        row = tl.where(gap > 0, gap, 0.0) + log1p_unit(e)
        share = tl.where(gap > 0, 1.0, e) / (1.0 + e)
        total = tl.where(some, x + row, x)
    tl.store(results.rows + b, row)
    tl.store(results.weight + b, scale * share)
    tl.store(results.lse + b, lse)
    tl.store(results.total + b, total)
    tl.store(results.num_kept + b, num_kept)
    tl.store(results.num_above + b, num_above)
    tl.store(results.num_mixed + b, num_mixed)
    if WANT_MEAN:
        tl.store(results.d_query + b * D + offs_d, scale * share * (mean - positive), mask=d_ok)
        tl.store(results.d_scale + b, share * (tl.sum(query * mean, 0) - score))


@launcher
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_gradient: bool,
    decoupled: bool, ranks: Tensor | None, hard: int, skip: int,
    pairs: int, with_query: int, pair_low: float, pair_high: float, query_low: float, query_high: float, distinct: bool,
    quantiles: Tensor | None, seed: int, step: Tensor | None, row_offset: Tensor | None, *pool: Tensor | bool | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """rows (B,), d_query (B or 0, D), d_scale (B or 0,), weight, lse, total (B,) fp32, num_kept, num_above, num_mixed (B,) int64,
    sort_keys (B, 2 or 0) int64.

    Raises ValueError if both ranks and synthetic negatives are given.
    """
    columns = kernel_pool(pool)
    (B, D), K = query.shape, negative_keys.shape[0]
    count = pairs + with_query if hard else 0  # number of synthetic negatives of a row
    if count and ranks is not None:
        raise ValueError("info_nce: ranks and synthetic negatives (hard above 0) are not supported together.")
    rows = query.new_empty(B, dtype=torch.float32)
    d_query = query.new_empty(B if want_gradient else 0, D, dtype=torch.float32)
    d_scale = torch.empty_like(rows) if want_gradient else query.new_empty(0, dtype=torch.float32)
    num_kept = query.new_empty(B, dtype=torch.int64)
    results = Results(
        rows, d_query, d_scale, torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows),
        num_kept, torch.empty_like(num_kept), torch.empty_like(num_kept),
    )  # fmt: skip
    if ranks is None:
        sort_keys = query.new_empty(B, 0, dtype=torch.int64)
    else:
        columns, sort_keys = rank_window(query, negative_keys, ranks, columns)
    if not B:
        return *results, sort_keys
    mixed = None
    if count:
        hard_index = mine(query, negative_keys, min(skip + hard, max(K, skip + 1)), columns)[1]
        hard_index = hard_index[:, skip:] if skip else hard_index  # (B, hard)
        lse, mean = mix(
            query, negative_keys, hard_index, scale, want_gradient, pairs, with_query, pair_low, pair_high, query_low,
            query_high, distinct, quantiles, seed, step, row_offset,
        )  # fmt: skip
        mixed = Mixed(hard_index, hard_index.stride(0), count, lse, mean)
    parts = sum_parts(query, negative_keys, scale, pivot, want_gradient, columns)
    BLOCK_P, BLOCK_D, num_warps = tiles.merge_block(D, parts.splits)
    info_nce_kernel[(B,)](
        parts.buffer, query, query.stride(0), positive_key, positive_key.stride(0), scale, mixed, results,
        B, parts.splits, want_gradient, parts.along, pivot is not None, decoupled, D, BLOCK_P, BLOCK_D,
        num_warps=num_warps, **UNFUSED,
    )  # fmt: skip
    return *results, sort_keys
