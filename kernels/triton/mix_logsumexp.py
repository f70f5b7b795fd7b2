"""mix_logsumexp in Triton: log-sum-exp and mean of each query's synthetic negatives, which are never stored.

A program processes one query. It computes the same synthetic negatives as mix_negatives (draws.py), BLOCK_S at a time, and their
scores, and keeps a running maximum, sum and mean in the exp2 domain.

    lse_b  = log sum_s exp(scale * q_b . h_bs),   mean_b = sum_s softmax_s h_bs
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .draws import draw, entries, kernel_draws, mix_rows
from .launch import UNFUSED, capability, launcher
from .numerics import finite_shift


@triton.jit(do_not_specialize=["N", "draws"])
def mix_logsumexp_kernel(
    query_ptr, keys_ptr, hard_ptr, stride_qb, stride_kk, stride_hb, N, draws, scale_ptr, lse_ptr, mean_ptr,
    WANT_MEAN: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    S = draws.total
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    hard_ptr += b * stride_hb
    available = entries(hard_ptr, N)
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e)
    m = tl.full((), float("-inf"), tl.float32)
    z = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        slot = s0 + tl.arange(0, BLOCK_S)
        s_ok = slot < S
        first, second, coefficient = draw(draws, b, slot, available, hard_ptr, s_ok)  # (BLOCK_S,) each
        mixed = mix_rows(query, keys_ptr, stride_kk, first, second, coefficient, offs_d, D)  # (BLOCK_S, BLOCK_D)
        x = tl.where(second >= 0, tl.sum(mixed * query[None, :], 1) * scale, float("-inf"))  # (BLOCK_S,)
        m_new = tl.maximum(m, tl.max(x, 0))
        shift = finite_shift(m_new)
        decay = tl.math.exp2(m - shift)
        p = tl.math.exp2(x - shift)  # (BLOCK_S,)
        z = z * decay + tl.sum(p, 0)
        acc = acc * decay + tl.sum(p[:, None] * mixed, 0)
        m = m_new
    tl.store(lse_ptr + b, (finite_shift(m) + tl.math.log2(z)) * 0.6931471805599453)  # ln(2)
    if WANT_MEAN:
        tl.store(mean_ptr + b * D + offs_d, tl.where(z == 0, 0.0, acc / z), mask=offs_d < D)


def mix(
    query: Tensor,
    negative_keys: Tensor,
    hard_index: Tensor,
    scale: Tensor,
    want_mean: bool,
    *draws: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """lse (B,) fp32, mean (B, D) fp32 or (0, D); of hard_index (B, N) the rows may have any stride."""
    (B, D), N = query.shape, hard_index.shape[1]
    lse = query.new_empty(B, dtype=torch.float32)
    mean = query.new_empty(B if want_mean else 0, D, dtype=torch.float32)
    BLOCK_S, BLOCK_D, num_warps = tiles.mix_block(D, capability(query.device))
    if B:
        mix_logsumexp_kernel[(B,)](
            query, negative_keys, hard_index, query.stride(0), negative_keys.stride(0), hard_index.stride(0), N,
            kernel_draws(*draws), scale, lse, mean, want_mean, D, BLOCK_S, BLOCK_D, num_warps=num_warps, **UNFUSED,
        )  # fmt: skip
    return lse, mean


@launcher
def mix_logsumexp(
    query: Tensor,
    negative_keys: Tensor,
    hard_index: Tensor,
    scale: Tensor,
    want_mean: bool,
    *draws: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """lse (B,) fp32, mean (B, D) fp32 or (0, D)."""
    return mix(query, negative_keys, hard_index.contiguous(), scale, want_mean, *draws)
