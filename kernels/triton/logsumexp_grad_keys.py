"""logsumexp_grad_keys in Triton: the gradient of weighted log-sum-exps with respect to the keys.

A program computes BLOCK_K rows of the result, for a slice of D, in a loop over all queries. Scores and probabilities are computed
again with the saved lse and are never stored. Every row of the result is computed by one program, so there are no atomics and the
result is deterministic. Wide embeddings are split into slices of D, one program each.

    row k = sum_b weight_b p_bk q_b,   p_bk = exp(scale * s_bk - lse_b) inside the pool

Tensor cores need weight_b p_bk in the storage type. The range of fp16 is too small for the large weights of a gradient scaler
and for the small probabilities of a long queue, so the weights are scaled to at most 2^15 first, and the result is scaled back.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import launcher, score_arguments
from .launch import score_tile as choose_tile
from .pool import KernelPool, kernel_pool, pool_bias, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import any_not_finite, as_stored, load_rows, load_whole_rows, or_nan, or_zero, score_tile


@triton.jit
def derivative(s, scale, lse, pool, offs_k, k_ok, SIGMOID: tl.constexpr):
    """exp(x - lse), or its sigmoid, of the logits x of scores; scale and lse (BLOCK_B,) times log2(e)."""
    x = s * scale - lse[:, None]  # (BLOCK_B, BLOCK_K)
    if pool.bias is not None:
        x += pool_bias(pool, offs_k, k_ok)[None, :] * 1.4426950408889634  # log2(e)
    if SIGMOID:
        p = 1.0 / (1.0 + tl.math.exp2(-x))  # exp2 may overflow to inf: then p is 0
    else:
        p = tl.math.exp2(x)
    return p


@triton.jit
def add_queries(
    d0, keys, offs_k, k_ok, scale, gain, query_ptr, keys_ptr, stride_qb, stride_kk, lse_ptr, weight_ptr, B, pool,
    WIDEN: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SIGMOID: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, MENDED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, SLICE): the sum over all queries for the keys of the tile.

    MENDED: the values of queries that do not contribute, or only have hidden pairs, may be anything, NaN included.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    acc = tl.zeros((BLOCK_K, SLICE), tl.float32)
    for b0 in tl.range(0, B, BLOCK_B, num_stages=STAGES):
        offs_b = tl.arange(0, BLOCK_B).to(tl.int64) + b0
        b_ok = offs_b < B
        query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
        rows = pool_rows(pool, offs_b, b_ok)
        lse = tl.load(lse_ptr + offs_b, mask=b_ok, other=0.0) * LOG2E  # (BLOCK_B,)
        weight = tl.load(weight_ptr + offs_b, mask=b_ok, other=0.0) * gain  # (BLOCK_B,)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        inside = pool_bounds(pool, rows, s, offs_k, allowed)  # (BLOCK_B, BLOCK_K)
        p = derivative(s, scale, lse, pool, offs_k, k_ok, SIGMOID)  # (BLOCK_B, BLOCK_K)
        if MENDED:
            inside = inside & ((weight != 0) & (lse != float("-inf")))[:, None]
            p = or_nan(tl.where(inside, p * weight[:, None], 0.0), s)  # (BLOCK_B, BLOCK_K)
        else:
            p = tl.where(inside, p, 0.0) * weight[:, None]  # (BLOCK_B, BLOCK_K)
        if D <= SLICE and D <= BLOCK_D:
            values = query
        else:
            values = load_rows(query_ptr, offs_b, b_ok, stride_qb, d0, D, SLICE, WIDEN)  # (BLOCK_B, SLICE)
        if MENDED:
            values = or_zero(values)
        p = as_stored(p, query_ptr, keys_ptr).to(values.dtype)
        acc = tl.dot(tl.trans(p), values, acc, input_precision="ieee")  # (BLOCK_K, SLICE)
    return acc


@triton.jit(do_not_specialize=["B", "K"])
def logsumexp_grad_keys_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    scale_ptr, lse_ptr, weight_ptr, largest_ptr, grad_ptr, SIGMOID: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    HIDES_PAIRS: tl.constexpr,
):  # fmt: skip
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d0 = tl.program_id(1) * SLICE
    size = pool_size(pool, K)
    k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e)
    gain = 32768.0 / tl.maximum(tl.load(largest_ptr), 7.888609052210118e-31)  # 2^15 / max(|weight|, 2^-100)
    acc = add_queries(
        d0, keys, offs_k, k_ok, scale, gain, query_ptr, keys_ptr, stride_qb, stride_kk, lse_ptr, weight_ptr, B, pool,
        WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, SIGMOID, SLICE, STAGES, False,
    )  # fmt: skip
    if HIDES_PAIRS:  # noqa: SIM102  known when the kernel is compiled, which the next condition is not
        if any_not_finite(acc, k_ok):
            acc = add_queries(
                d0, keys, offs_k, k_ok, scale, gain, query_ptr, keys_ptr, stride_qb, stride_kk, lse_ptr, weight_ptr, B, pool,
                WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, SIGMOID, SLICE, STAGES, True,
            )  # fmt: skip

    offs_d = d0 + tl.arange(0, SLICE)
    ptrs = grad_ptr + offs_k.to(tl.int64)[:, None] * D + offs_d[None, :]
    if not EVEN_K or pool.key_mask is not None:
        acc = tl.where(k_ok[:, None], acc, 0.0)  # 0 times a query that is not finite
    tl.store(ptrs, acc / gain, mask=(offs_k < K)[:, None] & (offs_d < D)[None, :])


def grad_keys(
    query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, pool: KernelPool, sigmoid: bool
) -> Tensor:
    """(K, D) fp32; sigmoid: p = sigmoid(scale * s - lse), for softplus_sum_grad_keys."""
    K, D = negative_keys.shape
    if not len(query):
        return negative_keys.new_zeros(K, D, dtype=torch.float32)
    grad = negative_keys.new_empty(K, D, dtype=torch.float32)
    if K:
        tile = choose_tile(query, negative_keys, pool)
        logsumexp_grad_keys_kernel[(-(-K // tile.BLOCK_K), -(-D // tile.SLICE))](
            *score_arguments(query, negative_keys, tile, pool),
            scale, lse.contiguous(), weight.contiguous(), torch.linalg.vector_norm(weight, torch.inf), grad,
            sigmoid, tile.SLICE, tile.num_stages, pool.hides_pairs, num_warps=tile.num_warps,
        )  # fmt: skip
    return grad


@launcher
def logsumexp_grad_keys(
    query: Tensor, negative_keys: Tensor, scale: Tensor, lse: Tensor, weight: Tensor, *pool: Tensor | bool | None
) -> Tensor:
    """(K, D) fp32."""
    return grad_keys(query, negative_keys, scale, lse, weight, kernel_pool(pool), sigmoid=False)
