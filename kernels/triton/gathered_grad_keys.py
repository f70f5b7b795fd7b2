"""gathered_grad_keys in Triton: the gradient of the keys for sums over lists of columns.

The entries (b, m) are sorted by their key with a stable sort, so that the entries of a key are contiguous. A program sums the
entries of one key, BLOCK_S at a time. There are no atomics, so the result is deterministic.

    row k = sum over the entries with index_bm = k of weight_bm q_b
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import UNFUSED, capability, launcher


@triton.jit
def gathered_grad_keys_kernel(
    query_ptr, weight_ptr, cells_ptr, begin_ptr, grad_ptr, stride_qb, M,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    d_ok = offs_d < D
    end = tl.load(begin_ptr + k + 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i0 in range(tl.load(begin_ptr + k), end, BLOCK_S):
        at = i0 + tl.arange(0, BLOCK_S)
        cell = tl.load(cells_ptr + at, mask=at < end, other=0)  # (BLOCK_S,)
        weight = tl.load(weight_ptr + cell, mask=at < end, other=0.0)  # (BLOCK_S,)
        ptrs = query_ptr + (cell // M)[:, None] * stride_qb + offs_d[None, :]
        rows = tl.load(ptrs, mask=(at < end)[:, None] & d_ok[None, :], other=0.0).to(tl.float32)  # (BLOCK_S, BLOCK_D)
        acc += tl.sum(weight[:, None] * rows, 0)
    tl.store(grad_ptr + k * D + offs_d, acc, mask=d_ok)


@launcher
def gathered_grad_keys(query: Tensor, index: Tensor, weight: Tensor, K: int) -> Tensor:
    """(K, D) fp32."""
    D, M = query.shape[1], index.shape[1]
    grad = query.new_zeros(K, D, dtype=torch.float32)
    if K and index.numel():
        named, cells = index.flatten().sort(stable=True)  # (B M,) each
        begin = torch.searchsorted(named, torch.arange(K + 1, device=query.device))  # (K + 1,)
        BLOCK_S, BLOCK_D, num_warps = tiles.mix_block(D, capability(query.device))
        gathered_grad_keys_kernel[(K,)](
            query, weight.contiguous(), cells, begin, grad, query.stride(0), M, D, min(BLOCK_S, 16), BLOCK_D,
            num_warps=num_warps, **UNFUSED,
        )  # fmt: skip
    return grad
