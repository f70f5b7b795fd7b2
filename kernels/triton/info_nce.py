"""info_nce in Triton: the loss of each row and its gradient, finished by the kernel that merges the parts of its log-sum-exp.

    x = scale q . positive,   g = lse - x,   row = log(1 + exp(g)),   share = sigmoid(g)        decoupled: row = g, share = 1
    d row / d query = scale share (mean - positive),   d row / d scale = share q . (mean - positive)

lse and mean are those of logsumexp over the pool, joined with the log-sum-exp and the softmax mean of synthetic negatives where
there are any. A row with no negative at all has loss 0 and no gradient. In PyTorch the same takes some twenty small launches,
which a small batch waits for. Meaning of the arguments and results: kernels/README.md.
"""

import torch
from torch import Tensor

import triton.language as tl
from triton import jit

from .launch import launcher
from .logsumexp import finite_shift, merged, parts
from .softplus_sum import log1p_unit


@jit(do_not_specialize=["B", "SPLITS"])
def info_nce_kernel(
    m_ptr, z_ptr, acc_ptr, along_ptr, kept_parts_ptr, above_parts_ptr, query_ptr, stride_qb,
    positive_ptr, stride_pb, scale_ptr, mixed_lse_ptr, mixed_mean_ptr,
    rows_ptr, d_query_ptr, d_scale_ptr, weight_ptr, lse_ptr, total_ptr, kept_ptr, above_ptr, B, SPLITS,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr, MIXED: tl.constexpr, DECOUPLED: tl.constexpr,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    d_ok = offs_d < D
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=d_ok, other=0.0).to(tl.float32)  # (BLOCK_D,)
    positive = tl.load(positive_ptr + b * stride_pb + offs_d, mask=d_ok, other=0.0).to(tl.float32)  # (BLOCK_D,)
    scale = tl.load(scale_ptr)
    lse, mean, kept, above = merged(
        m_ptr, z_ptr, acc_ptr, along_ptr, kept_parts_ptr, above_parts_ptr, query, b, B, SPLITS,
        WANT_MEAN, ALONG, HAS_PIVOT, D, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    some = kept > 0
    if MIXED:
        mixed = tl.load(mixed_lse_ptr + b) * LOG2E
        some = some | (mixed != float("-inf"))
        most = tl.where((lse > mixed) | (lse != lse), lse, mixed)  # tl.maximum would lose a NaN
        shift = finite_shift(most)
        own = tl.math.exp2(lse - shift)
        other = tl.math.exp2(mixed - shift)
        if WANT_MEAN:
            synthetic = tl.load(mixed_mean_ptr + b * D + offs_d, mask=d_ok, other=0.0)  # (BLOCK_D,)
            mean = tl.where(own + other == 0, 0.0, (own * mean + other * synthetic) / (own + other))
        lse = shift + tl.math.log2(own + other)
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
    tl.store(rows_ptr + b, row)
    tl.store(weight_ptr + b, scale * share)
    tl.store(lse_ptr + b, lse)
    tl.store(total_ptr + b, total)
    tl.store(kept_ptr + b, kept)
    tl.store(above_ptr + b, above)
    if WANT_MEAN:
        tl.store(d_query_ptr + b * D + offs_d, scale * share * (mean - positive), mask=d_ok)
        tl.store(d_scale_ptr + b, share * (tl.sum(query * mean, 0) - score))


@launcher
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_gradient: bool,
    decoupled: bool, mixed_lse: Tensor | None, mixed_mean: Tensor | None, *pool: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """rows, d_query (B, D) or (0, D), d_scale, weight, lse, total (B,) fp32, kept, above (B,) int64."""
    B, D = query.shape
    rows, d_scale, weight, lse, total = (query.new_empty(B, dtype=torch.float32) for _ in range(5))
    d_query = query.new_empty(B if want_gradient else 0, D, dtype=torch.float32)
    kept, above = (query.new_empty(B, dtype=torch.int64) for _ in range(2))
    if B:
        info_nce_kernel[(B,)](
            positive_ptr=positive_key, stride_pb=positive_key.stride(0), scale_ptr=scale,
            mixed_lse_ptr=query if mixed_lse is None else mixed_lse,
            mixed_mean_ptr=query if mixed_mean is None else mixed_mean,
            rows_ptr=rows, d_query_ptr=d_query, d_scale_ptr=d_scale, weight_ptr=weight, lse_ptr=lse, total_ptr=total,
            kept_ptr=kept, above_ptr=above, MIXED=mixed_lse is not None, DECOUPLED=decoupled,
            **parts(query, negative_keys, scale, pivot, want_gradient, pool),
        )  # fmt: skip
    return rows, d_query, d_scale, weight, lse, total, kept, above
