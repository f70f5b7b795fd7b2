"""mix_negatives in Triton: synthetic negatives, each a normalised mix of two hard negatives or of the query and a hard negative.

A program computes BLOCK_S synthetic negatives of one query: it draws their parents and coefficients (draws.py), gathers the rows
of the parents, and stores the vectors, the parents and the coefficients. Source: MoCHi (Kalantidis et al. 2020).
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .draws import draw, entries, kernel_draws, mix_rows
from .launch import UNFUSED, capability, launcher


@triton.jit(do_not_specialize=["N", "draws"])
def mix_negatives_kernel(
    query_ptr, keys_ptr, hard_ptr, stride_qb, stride_kk, stride_hb, N, draws, vectors_ptr, parents_ptr, coefficients_ptr,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    S = draws.total
    blocks = tl.cdiv(S, BLOCK_S)
    b = tl.program_id(0).to(tl.int64) // blocks
    slot = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    s_ok = slot < S
    hard_ptr += b * stride_hb
    available = entries(hard_ptr, N)
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
    first, second, coefficient = draw(draws, b, slot, available, hard_ptr, s_ok)  # (BLOCK_S,) each
    mixed = mix_rows(query, keys_ptr, stride_kk, first, second, coefficient, offs_d, D)  # (BLOCK_S, BLOCK_D)
    cell = b * S + slot  # (BLOCK_S,)
    tl.store(vectors_ptr + cell[:, None] * D + offs_d[None, :], mixed, mask=s_ok[:, None] & (offs_d < D)[None, :])
    tl.store(parents_ptr + 2 * cell, first, mask=s_ok)
    tl.store(parents_ptr + 2 * cell + 1, second, mask=s_ok)
    tl.store(coefficients_ptr + cell, coefficient, mask=s_ok)


@launcher
def mix_negatives(
    query: Tensor, negative_keys: Tensor, hard_index: Tensor, *draws: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """vectors (B, S, D) of query's dtype, parents (B, S, 2) int64, coefficients (B, S) fp32."""
    (B, D), N = query.shape, hard_index.shape[1]
    drawn = kernel_draws(*draws)
    S = drawn.total
    vectors = query.new_empty(B, S, D)
    parents = query.new_empty(B, S, 2, dtype=torch.int64)
    coefficients = query.new_empty(B, S, dtype=torch.float32)
    BLOCK_S, BLOCK_D, num_warps = tiles.mix_block(D, capability(query.device))
    if B and S:
        hard_index = hard_index.contiguous()
        mix_negatives_kernel[(B * -(-S // BLOCK_S),)](
            query, negative_keys, hard_index, query.stride(0), negative_keys.stride(0), N, N, drawn,
            vectors, parents, coefficients, D, BLOCK_S, BLOCK_D, num_warps=num_warps, **UNFUSED,
        )  # fmt: skip
    return vectors, parents, coefficients
