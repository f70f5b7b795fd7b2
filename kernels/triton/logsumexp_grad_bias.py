"""logsumexp_grad_bias in Triton: the gradient of weighted log-sum-exps with respect to the bias of the columns.

A program owns BLOCK_K columns and walks over all queries, as in logsumexp_grad_keys.py, and sums the weights themselves in fp32.

    element k = sum_b weight_b p_bk,   p_bk = exp(scale * s_bk + bias_k - lse_b) inside the pool
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import launcher, score_arguments
from .launch import score_tile as choose_tile
from .logsumexp_grad_keys import derivative
from .pool import KernelPool, kernel_pool, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import load_whole_rows, score_tile


@triton.jit(do_not_specialize=["B", "K"])
def logsumexp_grad_bias_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    scale_ptr, lse_ptr, weight_ptr, grad_ptr, SIGMOID: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    size = pool_size(pool, K)
    k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for b0 in tl.range(0, B, BLOCK_B, num_stages=STAGES):
        offs_b = tl.arange(0, BLOCK_B).to(tl.int64) + b0
        b_ok = offs_b < B
        query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
        rows = pool_rows(pool, offs_b, b_ok)
        lse = tl.load(lse_ptr + offs_b, mask=b_ok, other=0.0) * 1.4426950408889634  # (BLOCK_B,)
        weight = tl.load(weight_ptr + offs_b, mask=b_ok, other=0.0)  # (BLOCK_B,)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        inside = pool_bounds(pool, rows, s, offs_k, allowed) & ((weight != 0) & (lse != float("-inf")))[:, None]
        p = derivative(s, scale, lse, pool, offs_k, k_ok, SIGMOID)  # (BLOCK_B, BLOCK_K)
        total += tl.sum(tl.where(inside, p * weight[:, None], 0.0), 0)
    tl.store(grad_ptr + offs_k, total, mask=offs_k < K)


def grad_bias(
    query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, pool: KernelPool, sigmoid: bool
) -> Tensor:
    """(K,) fp32; sigmoid: p = sigmoid(scale * s + bias - lse), for softplus_sum_grad_bias."""
    K = len(negative_keys)
    grad = negative_keys.new_empty(K, dtype=torch.float32)
    if K:
        tile = choose_tile(query, negative_keys, pool)
        logsumexp_grad_bias_kernel[(-(-K // tile.BLOCK_K),)](
            *score_arguments(query, negative_keys, tile, pool), scale, lse.contiguous(), weight.contiguous(), grad,
            sigmoid, tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
    return grad


@launcher
def logsumexp_grad_bias(
    query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, *pool: Tensor | bool | None
) -> Tensor:
    """(K,) fp32."""
    return grad_bias(query, negative_keys, scale, lse, weight, kernel_pool(pool), sigmoid=False)
