"""gathered_logsumexp in Triton: scores, log-sum-exp and mean of the listed columns of each query.

A program processes one query. It gathers BLOCK_S of the listed rows at a time, computes their scores, and keeps a running
maximum, sum and mean in the exp2 domain.

    scores_bm = q_b . n_index_bm,   lse_b = log sum_m exp(scale * scores_bm),   mean_b = sum_m softmax_m n_index_bm
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import UNFUSED, capability, launcher
from .numerics import finite_shift


@triton.jit
def gathered_logsumexp_kernel(
    query_ptr, keys_ptr, index_ptr, scale_ptr, scores_ptr, lse_ptr, mean_ptr, stride_qb, stride_kk, M,
    WANT_MEAN: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    d_ok = offs_d < D
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=d_ok, other=0.0).to(tl.float32)  # (BLOCK_D,)
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e)
    m = tl.full((), float("-inf"), tl.float32)
    z = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for m0 in range(0, M, BLOCK_S):
        offs_m = m0 + tl.arange(0, BLOCK_S)
        column = tl.load(index_ptr + b * M + offs_m, mask=offs_m < M, other=-1)  # (BLOCK_S,)
        ptrs = keys_ptr + column[:, None] * stride_kk + offs_d[None, :]
        rows = tl.load(ptrs, mask=(column >= 0)[:, None] & d_ok[None, :], other=0.0).to(
            tl.float32
        )  # (BLOCK_S, BLOCK_D)
        s = tl.where(column >= 0, tl.sum(rows * query[None, :], 1), float("-inf"))  # (BLOCK_S,)
        tl.store(scores_ptr + b * M + offs_m, s, mask=offs_m < M)
        x = tl.where(column >= 0, s * scale, float("-inf"))  # needed because -inf times a scale of 0 is NaN
        m_new = tl.maximum(m, tl.max(x, 0))
        shift = finite_shift(m_new)
        decay = tl.math.exp2(m - shift)
        p = tl.math.exp2(x - shift)  # (BLOCK_S,)
        z = z * decay + tl.sum(p, 0)
        if WANT_MEAN:
            acc = acc * decay + tl.sum(p[:, None] * rows, 0)
        m = m_new
    tl.store(lse_ptr + b, (finite_shift(m) + tl.math.log2(z)) * 0.6931471805599453)  # ln(2)
    if WANT_MEAN:
        tl.store(mean_ptr + b * D + offs_d, tl.where(z == 0, 0.0, acc / z), mask=d_ok)


@launcher
def gathered_logsumexp(
    query: Tensor, negative_keys: Tensor, index: Tensor, scale: Tensor, want_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (B, M) fp32, lse (B,) fp32, mean (B, D) fp32 or (0, D)."""
    (B, D), M = query.shape, index.shape[1]
    scores = query.new_empty(B, M, dtype=torch.float32)
    lse = query.new_empty(B, dtype=torch.float32)
    mean = query.new_empty(B if want_mean else 0, D, dtype=torch.float32)
    BLOCK_S, BLOCK_D, num_warps = tiles.mix_block(D, capability(query.device))
    if B:
        gathered_logsumexp_kernel[(B,)](
            query, negative_keys, index.contiguous(), scale, scores, lse, mean, query.stride(0), negative_keys.stride(0), M,
            want_mean, D, BLOCK_S, BLOCK_D, num_warps=num_warps, **UNFUSED,
        )  # fmt: skip
    return scores, lse, mean
