"""count_negatives in Triton: how many columns each query's pool holds.

Without bounds only masks are read, no score is computed, and nothing at all is read where nothing is masked. With bounds the
scores are those of every other op (score.py), so a count agrees with the window it counts. The queue is cut into parts whose
counts are summed after the kernel.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import launcher, processors, score_arguments
from .launch import score_tile as choose_tile
from .pool import complete, is_bounded, is_masked, pool_bounds, pool_keys, pool_masks, pool_rows
from .score import load_whole_rows, score_tile


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def count_negatives_kernel(
    query_ptr, keys_ptr, count_ptr, stride_qb, stride_kk, B, K, tiles_per_split,
    mask_ptr, stride_mb, query_ids_ptr, negative_ids_ptr, query_labels_ptr, negative_labels_ptr, lower_ptr, upper_ptr,
    MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    if HAS_LOWER or HAS_UPPER:
        query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    ids, labels, lower_score, lower_index, upper_score, upper_index = pool_rows(
        offs_b, b_ok, query_ids_ptr, query_labels_ptr, lower_ptr, upper_ptr, HAS_IDS, HAS_LABELS, HAS_LOWER, HAS_UPPER
    )
    count = tl.zeros((BLOCK_B,), tl.int32)
    start = split * tiles_per_split * BLOCK_K
    stop = tl.minimum(start + tiles_per_split * BLOCK_K, K)
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(offs_k, K, mask_ptr, MASK, EVEN_K)  # (BLOCK_K,)
        inside = pool_masks(
            offs_b, b_ok, offs_k, k_ok, ids, labels, mask_ptr, stride_mb, negative_ids_ptr, negative_labels_ptr,
            MASK, HAS_IDS, HAS_LABELS,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        if HAS_LOWER or HAS_UPPER:
            keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
            s = score_tile(
                query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
                D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
            )  # (BLOCK_B, BLOCK_K)  # fmt: skip
            inside = pool_bounds(
                s, offs_k, inside, lower_score, lower_index, upper_score, upper_index, HAS_LOWER, HAS_UPPER
            )  # (BLOCK_B, BLOCK_K)
        count += tl.sum(inside.to(tl.int32), 1)
    tl.store(count_ptr + split.to(tl.int64) * B + offs_b, count, mask=b_ok)


@launcher
def count_negatives(query: Tensor, negative_keys: Tensor, *pool: Tensor | None) -> Tensor:
    """(B,) int64."""
    pool = complete(pool)
    B, K = query.shape[0], negative_keys.shape[0]
    if not B or not K or not (is_masked(pool) or is_bounded(pool)):
        return torch.full((B,), K, dtype=torch.int64, device=query.device)
    tile = choose_tile(query, negative_keys)
    key_tiles = triton.cdiv(K, tile.BLOCK_K)
    per_split = triton.cdiv(key_tiles, tiles.splits(B, K, tile, processors(query.device)))
    count = query.new_empty(triton.cdiv(key_tiles, per_split), B, dtype=torch.int32)  # (SPLITS, B)
    count_negatives_kernel[(triton.cdiv(B, tile.BLOCK_B), count.shape[0])](
        count_ptr=count, tiles_per_split=per_split, STAGES=tile.num_stages,
        **score_arguments(query, negative_keys, tile, pool),
    )  # fmt: skip
    return count.sum(0)
