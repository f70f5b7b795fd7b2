"""The scores of evenly spaced columns of the queue, or the sort keys of all columns of a short queue.

The sample determines the cut of a scan (sample_quantiles.py).
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import score_arguments
from .pool import KernelPool, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import load_whole_rows, score_tile
from .sort_key import pack


@triton.jit
def sampled_column(at, K, W):
    """int64: the column at a position of a sample of W: one of each of W even parts of the ring, so that old and new keys are
    sampled alike, and not always the same one, so that no period of the ring is mistaken for all of it."""
    first = at.to(tl.int64) * K // W
    width = (at.to(tl.int64) + 1) * K // W - first
    return first + ((width * ((at.to(tl.int64) * 0x9E3779B9) & 0xFFFFFFFF)) >> 32)


@triton.jit(do_not_specialize=["B", "K"])
def sample_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    out_ptr, W, AS_SORT_KEYS: tl.constexpr,
):  # fmt: skip
    offs_b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    offs_w = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_k = tl.where(offs_w < W, sampled_column(offs_w, K, W), K)  # past W, past K
    k_ok = pool_keys(pool, offs_k, pool_size(pool, K), False)  # (BLOCK_K,)
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    s = score_tile(
        query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
        D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
    )  # (BLOCK_B, BLOCK_K)  # fmt: skip
    allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
    inside = pool_bounds(pool, rows, s, offs_k, allowed)  # (BLOCK_B, BLOCK_K)
    ptrs = out_ptr + offs_b[:, None] * W + offs_w[None, :]
    ok = b_ok[:, None] & (offs_w < W)[None, :]
    inside = inside & (s == s)
    if AS_SORT_KEYS:
        tl.store(ptrs, tl.where(inside, pack(s, offs_k[None, :]), -(2**63)), mask=ok)
    else:  # one zero and one NaN, so that a sort by bits and a comparison agree
        tl.store(ptrs, tl.where(inside, s + 0.0, float("nan")), mask=ok)


def sample(query: Tensor, negative_keys: Tensor, W: int, tile: tiles.ScoreTile, pool: KernelPool) -> Tensor:
    """(B, W) fp32: scores of W evenly spaced columns, or of all columns if W = K; NaN outside the pool."""
    return _launch(query, negative_keys, query.new_empty(query.shape[0], W, dtype=torch.float32), tile, pool, False)


def sort_keys(query: Tensor, negative_keys: Tensor, tile: tiles.ScoreTile, pool: KernelPool) -> Tensor:
    """(B, K) int64: the sort key of every column of a short queue, NOWHERE outside the pool."""
    out = query.new_empty(query.shape[0], negative_keys.shape[0], dtype=torch.int64)
    return _launch(query, negative_keys, out, tile, pool, True)


def _launch(
    query: Tensor, negative_keys: Tensor, out: Tensor, tile: tiles.ScoreTile, pool: KernelPool, as_sort_keys: bool
) -> Tensor:
    B, W = out.shape
    sample_kernel[(-(-W // tile.BLOCK_K), -(-B // tile.BLOCK_B))](
        *score_arguments(query, negative_keys, tile, pool), out, W, as_sort_keys, num_warps=tile.num_warps
    )
    return out
