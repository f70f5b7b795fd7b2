"""count_negatives in Triton: the number of columns in each query's pool.

Without bounds no score is computed and only masks are read, if there are any. With bounds the scores are computed as in every
other op (score.py), so the count of a window is exact. The queue is split into parts whose counts are summed after the kernel.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import launcher, programs_at_once, score_arguments
from .launch import score_tile as choose_tile
from .pool import KernelPool, kernel_pool, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import load_whole_rows, score_tile


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def count_negatives_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    count_ptr, tiles_per_split, WITH_SCORES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """WITH_SCORES: scores are computed, columns with NaN scores are not counted, and there may be bounds."""
    split = tl.program_id(1)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    if WITH_SCORES:
        query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    count = tl.zeros((BLOCK_B,), tl.int32)
    size = pool_size(pool, K)
    start = split * tiles_per_split * BLOCK_K
    stop = tl.minimum(start + tiles_per_split * BLOCK_K, size)
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
        inside = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        if WITH_SCORES:
            keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
            s = score_tile(
                query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
                D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
            )  # (BLOCK_B, BLOCK_K)  # fmt: skip
            inside = pool_bounds(pool, rows, s, offs_k, inside)  # (BLOCK_B, BLOCK_K)
            if pool.lower is None and pool.upper is None:
                inside = inside & (s == s)
        count += tl.sum(inside.to(tl.int32), 1)
    tl.store(count_ptr + split.to(tl.int64) * B + offs_b, count, mask=b_ok)


def count(query: Tensor, negative_keys: Tensor, pool: KernelPool, numbers_only: bool) -> Tensor:
    """(B,) int64. numbers_only: columns with a NaN score are not counted, even if the pool has no bounds."""
    B, K = query.shape[0], negative_keys.shape[0]
    with_scores = numbers_only or pool.is_bounded
    if not B or not K or not (pool.is_masked or with_scores):
        return torch.full((B,), K, dtype=torch.int64, device=query.device)
    tile = choose_tile(query, negative_keys, pool)
    splits, per_split = tiles.even_splits(B, K, tile, programs_at_once(query.device, tile))
    counts = query.new_empty(splits, B, dtype=torch.int32)
    count_negatives_kernel[(-(-B // tile.BLOCK_B), splits)](
        *score_arguments(query, negative_keys, tile, pool), counts, per_split, with_scores, tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return counts.sum(0)


@launcher
def count_negatives(query: Tensor, negative_keys: Tensor, *pool: Tensor | bool | None) -> Tensor:
    """(B,) int64."""
    return count(query, negative_keys, kernel_pool(pool), numbers_only=False)
