"""mix_negatives in Triton: synthetic negatives, each a normalised mix of two hard negatives or of the query and one.

A program makes BLOCK_S synthetic negatives of one query: it draws their parents and coefficients (draws.py), gathers the
parents' rows and stores the mixes, their parents and their coefficients. Source: MoCHi (Kalantidis et al. 2020).
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .draws import draw, draw_arguments, entries, mix_rows
from .launch import UNFUSED, capability, launcher


@triton.jit(do_not_specialize=["N", "S", "pairs", "seed", "step", "row_low", "row_high"])
def mix_negatives_kernel(
    query_ptr, keys_ptr, hard_ptr, quantiles_ptr, vectors_ptr, parents_ptr, coefficients_ptr,
    stride_qb, stride_kk, N, S, pairs, pair_low, pair_high, query_low, query_high, seed, step, row_low, row_high,
    DISTINCT: tl.constexpr, HAS_QUANTILES: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_S)
    b = tl.program_id(0).to(tl.int64) // blocks
    slot = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    s_ok = slot < S
    available = entries(hard_ptr, b, N)
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
    first, second, coefficient = draw(
        b, slot, available, seed, step, row_low, row_high, pairs, pair_low, pair_high, query_low, query_high,
        hard_ptr, quantiles_ptr, N, s_ok, DISTINCT, HAS_QUANTILES,
    )  # (BLOCK_S,) each  # fmt: skip
    mixed = mix_rows(query, keys_ptr, stride_kk, first, second, coefficient, offs_d, D)  # (BLOCK_S, BLOCK_D)
    cell = b * S + slot  # (BLOCK_S,)
    tl.store(vectors_ptr + cell[:, None] * D + offs_d[None, :], mixed, mask=s_ok[:, None] & (offs_d < D)[None, :])
    tl.store(parents_ptr + 2 * cell, first, mask=s_ok)
    tl.store(parents_ptr + 2 * cell + 1, second, mask=s_ok)
    tl.store(coefficients_ptr + cell, coefficient, mask=s_ok)


@launcher
def mix_negatives(query: Tensor, negative_keys: Tensor, hard_index: Tensor, *draws) -> tuple[Tensor, Tensor, Tensor]:
    """vectors (B, S, D) of query's dtype, parents (B, S, 2) int64, coefficients (B, S) fp32."""
    B, D = query.shape
    arguments = draw_arguments(query, hard_index.contiguous(), draws)
    S = arguments["S"]
    vectors = query.new_empty(B, S, D)
    parents = query.new_empty(B, S, 2, dtype=torch.int64)
    coefficients = query.new_empty(B, S, dtype=torch.float32)
    BLOCK_S, BLOCK_D, num_warps = tiles.mix_block(D, capability(query.device))
    if B and S:
        mix_negatives_kernel[(B * triton.cdiv(S, BLOCK_S),)](
            query_ptr=query, keys_ptr=negative_keys, vectors_ptr=vectors, parents_ptr=parents,
            coefficients_ptr=coefficients, stride_qb=query.stride(0), stride_kk=negative_keys.stride(0), **arguments,
            D=D, BLOCK_S=BLOCK_S, BLOCK_D=BLOCK_D, num_warps=num_warps, **UNFUSED,
        )  # fmt: skip
    return vectors, parents, coefficients
