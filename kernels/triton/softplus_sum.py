"""softplus_sum in Triton: the sum of log(1 + exp(scale s + offset)) over each query's pool, and its derivatives.

The algorithm is that of logsumexp without the running maximum, because no term is much larger than its logit: a program keeps
BLOCK_B queries and a slice of D, and sums its part of the queue in tiles. The parts of a row are added in order, so the result
does not depend on timing. The (B, K) scores are never stored. Tensor cores need sigmoids in the storage type, so, as in
logsumexp_parts.py, the component of sigmoid_keys along the query is also summed in fp32 and replaces the rounded component at the
end. kernels/README.md explains the arguments and results.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import launcher, programs_at_once, score_arguments
from .launch import score_tile as choose_tile
from .numerics import log1p_unit
from .pool import kernel_pool, pool_bias, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import any_not_finite, as_stored, load_rows, load_whole_rows, or_nan, or_zero, score_tile


@triton.jit
def add_tiles(
    start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale, offset,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    WANT_KEYS: tl.constexpr, ALONG: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, MENDED: tl.constexpr,
):  # fmt: skip
    """The sums over columns [start, stop). MENDED: hidden pairs may hold any values, NaN included."""
    LOG2E: tl.constexpr = 1.4426950408889634
    total = tl.zeros((BLOCK_B,), tl.float32)
    sigmoid_sum = tl.zeros((BLOCK_B,), tl.float32)
    along = tl.zeros((BLOCK_B,), tl.float32)
    num_kept = tl.zeros((BLOCK_B,), tl.int32)
    acc = tl.zeros((BLOCK_B, SLICE), tl.float32)
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
        keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        inside = pool_bounds(pool, rows, s, offs_k, allowed)  # (BLOCK_B, BLOCK_K)
        num_kept += tl.sum(inside.to(tl.int32), 1)
        x = s * scale + offset  # (BLOCK_B, BLOCK_K)
        if pool.bias is not None:
            x += pool_bias(pool, offs_k, k_ok)[None, :]
        e = tl.math.exp2(-tl.abs(x) * LOG2E)  # (BLOCK_B, BLOCK_K)
        total += tl.sum(tl.where(inside, tl.where(x > 0, x, 0.0) + log1p_unit(e), 0.0), 1)
        inverse = tl.math.rsqrt(1.0 + tl.math.exp2(-x * LOG2E))  # (BLOCK_B, BLOCK_K); 0 of inf
        sigmoid = tl.where(inside, inverse * inverse, 0.0)  # (BLOCK_B, BLOCK_K)
        sigmoid_sum += tl.sum(sigmoid, 1)
        if MENDED:
            sigmoid = or_nan(sigmoid, s)
            s = tl.where(inside, s, 0.0)
        if ALONG:
            along += tl.sum(sigmoid * s, 1)
        if WANT_KEYS:
            if D <= SLICE and D <= BLOCK_D:
                values = keys
            else:
                values = load_rows(keys_ptr, offs_k, k_ok, stride_kk, d0, D, SLICE, WIDEN)  # (BLOCK_K, SLICE)
            if MENDED:
                values = or_zero(values)
            p = as_stored(sigmoid, query_ptr, keys_ptr).to(values.dtype)
            acc = tl.dot(p, values, acc, input_precision="ieee")  # (BLOCK_B, SLICE)
    return total, sigmoid_sum, along, num_kept, acc


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def softplus_sum_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    scale_ptr, offset_ptr, total_ptr, sigmoid_sum_ptr, acc_ptr, along_ptr, num_kept_ptr, tiles_per_split,
    WANT_KEYS: tl.constexpr, ALONG: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, HIDES_PAIRS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    d0 = tl.program_id(2) * SLICE
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    scale = tl.load(scale_ptr)
    offset = tl.load(offset_ptr)
    size = pool_size(pool, K)
    start = split * tiles_per_split * BLOCK_K
    stop = tl.minimum(start + tiles_per_split * BLOCK_K, size)
    total, sigmoid_sum, along, num_kept, acc = add_tiles(
        start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale, offset,
        EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, WANT_KEYS, ALONG, SLICE, STAGES, False,
    )  # fmt: skip
    if WANT_KEYS and HIDES_PAIRS:  # hidden rows may hold NaN, and 0 * NaN is not 0
        broken = any_not_finite(acc, b_ok)
        if ALONG:
            broken = broken | any_not_finite(along[:, None], b_ok)
        if broken:
            total, sigmoid_sum, along, num_kept, acc = add_tiles(
                start, stop, d0, query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale, offset,
                EVEN_K, WIDEN, D, BLOCK_B, BLOCK_K, BLOCK_D, WANT_KEYS, ALONG, SLICE, STAGES, True,
            )  # fmt: skip

    row = split.to(tl.int64) * B + offs_b  # (BLOCK_B,) of (SPLITS, B)
    if WANT_KEYS:
        offs_d = d0 + tl.arange(0, SLICE)
        tl.store(acc_ptr + row[:, None] * D + offs_d[None, :], acc, mask=b_ok[:, None] & (offs_d < D)[None, :])
    first = b_ok & (d0 == 0)
    tl.store(total_ptr + row, total, mask=first)
    tl.store(sigmoid_sum_ptr + row, sigmoid_sum, mask=first)
    if ALONG:
        tl.store(along_ptr + row, along, mask=first)
    tl.store(num_kept_ptr + row, num_kept, mask=first)


@launcher
def softplus_sum(
    query: Tensor,
    negative_keys: Tensor,
    scale: Tensor,
    offset: Tensor,
    want_sigmoid_keys: bool,
    *pool: Tensor | bool | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total (B,) fp32, sigmoid_keys (B or 0, D) fp32, sigmoid_sum (B,) fp32, num_kept (B,) int64."""
    columns = kernel_pool(pool)
    (B, D), K = query.shape, negative_keys.shape[0]
    tile = choose_tile(query, negative_keys, columns)
    splits, per_split = tiles.even_splits(B, K, tile, programs_at_once(query.device, tile))

    total = query.new_empty(splits, B, dtype=torch.float32)
    sigmoid_sum = query.new_empty(splits, B, dtype=torch.float32)
    acc = query.new_empty(splits, B if want_sigmoid_keys else 0, D, dtype=torch.float32)
    rounds = want_sigmoid_keys and query.dtype == negative_keys.dtype != torch.float32  # sigmoids, for the sum of keys
    along = query.new_empty(splits if rounds else 0, B, dtype=torch.float32)
    num_kept = query.new_empty(splits, B, dtype=torch.int32)
    if B:
        slices = -(-D // tile.SLICE) if want_sigmoid_keys else 1
        softplus_sum_kernel[(-(-B // tile.BLOCK_B), splits, slices)](
            *score_arguments(query, negative_keys, tile, columns),
            scale, offset, total, sigmoid_sum, acc, along, num_kept, per_split,
            want_sigmoid_keys, rounds, tile.SLICE, tile.num_stages, columns.hides_pairs, num_warps=tile.num_warps,
        )  # fmt: skip
    sigmoid_keys = acc.sum(0)  # (B, D)
    if rounds:
        wide = query.float()  # (B, D)
        squares = (wide * wide).sum(1)  # (B,)
        missing = along.sum(0) - (wide * sigmoid_keys).sum(1)  # (B,)
        sigmoid_keys += wide * torch.where(squares == 0, 0.0, missing / squares)[:, None]
    return total.sum(0), sigmoid_keys, sigmoid_sum.sum(0), num_kept.sum(0)
