"""softplus_sum in Triton: the sum of log(1 + exp(scale s + bias)) over each query's pool, and its derivatives.

The walk of logsumexp without its running maximum, for no term outgrows its score: a program keeps BLOCK_B queries and a slice
of D, goes through its part of the queue in tiles and sums. The parts of a row are added in order, so the bits do not depend
on timing. (B, K) never exists. Tensor cores take sigmoids in the storage type: as in logsumexp.py, the pull's part along the
query is summed beside it in fp32 and put right at the end. Meaning of the arguments and results: kernels/README.md.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import launcher, processors, score_arguments
from .launch import score_tile as choose_tile
from .pool import complete, pool_bounds, pool_keys, pool_masks, pool_rows
from .score import as_stored, load_rows, load_whole_rows, score_tile


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1] to 2 ulp however small e is: e times a polynomial fitted at Chebyshev points."""
    y = e * 0.005253457929939032 - 0.02958850748836994
    y = y * e + 0.07836166769266129
    y = y * e - 0.13674770295619965
    y = y * e + 0.19111430644989014
    y = y * e - 0.24844369292259216
    y = y * e + 0.33319270610809326
    y = y * e - 0.49999502301216125
    return e * (y * e + 1.0)


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def softplus_sum_kernel(
    query_ptr, keys_ptr, scale_ptr, bias_ptr, total_ptr, mass_ptr, acc_ptr, along_ptr, kept_ptr,
    stride_qb, stride_kk, B, K, tiles_per_split,
    mask_ptr, stride_mb, query_ids_ptr, negative_ids_ptr, query_labels_ptr, negative_labels_ptr, lower_ptr, upper_ptr,
    MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EVEN_K: tl.constexpr,
    WANT_PULL: tl.constexpr, ALONG: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    split = tl.program_id(1)
    d0 = tl.program_id(2) * SLICE
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    ids, labels, lower_score, lower_index, upper_score, upper_index = pool_rows(
        offs_b, b_ok, query_ids_ptr, query_labels_ptr, lower_ptr, upper_ptr, HAS_IDS, HAS_LABELS, HAS_LOWER, HAS_UPPER
    )
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)

    total = tl.zeros((BLOCK_B,), tl.float32)
    mass = tl.zeros((BLOCK_B,), tl.float32)
    along = tl.zeros((BLOCK_B,), tl.float32)
    kept = tl.zeros((BLOCK_B,), tl.int32)
    acc = tl.zeros((BLOCK_B, SLICE), tl.float32)
    start = split * tiles_per_split * BLOCK_K
    stop = tl.minimum(start + tiles_per_split * BLOCK_K, K)
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(offs_k, K, mask_ptr, MASK, EVEN_K)  # (BLOCK_K,)
        keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        allowed = pool_masks(
            offs_b, b_ok, offs_k, k_ok, ids, labels, mask_ptr, stride_mb, negative_ids_ptr, negative_labels_ptr,
            MASK, HAS_IDS, HAS_LABELS,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        inside = pool_bounds(
            s, offs_k, allowed, lower_score, lower_index, upper_score, upper_index, HAS_LOWER, HAS_UPPER
        )  # (BLOCK_B, BLOCK_K)
        kept += tl.sum(inside.to(tl.int32), 1)
        x = s * scale + bias  # (BLOCK_B, BLOCK_K)
        e = tl.math.exp2(-tl.abs(x) * LOG2E)  # (BLOCK_B, BLOCK_K)
        total += tl.sum(tl.where(inside, tl.where(x > 0, x, 0.0) + log1p_unit(e), 0.0), 1)
        inverse = tl.math.rsqrt(1.0 + tl.math.exp2(-x * LOG2E))  # (BLOCK_B, BLOCK_K); 0 of inf
        sigmoid = tl.where(inside, inverse * inverse, 0.0)  # (BLOCK_B, BLOCK_K)
        mass += tl.sum(sigmoid, 1)
        if ALONG:
            along += tl.sum(sigmoid * s, 1)
        if WANT_PULL:
            if D <= SLICE and D <= BLOCK_D:
                values = keys
            else:
                values = load_rows(keys_ptr, offs_k, k_ok, stride_kk, d0, D, SLICE, WIDEN)  # (BLOCK_K, SLICE)
            p = as_stored(sigmoid, query_ptr, keys_ptr).to(values.dtype)
            acc = tl.dot(p, values, acc, input_precision="ieee")  # (BLOCK_B, SLICE)

    row = split.to(tl.int64) * B + offs_b  # (BLOCK_B,) of (SPLITS, B)
    if WANT_PULL:
        offs_d = d0 + tl.arange(0, SLICE)
        tl.store(acc_ptr + row[:, None] * D + offs_d[None, :], acc, mask=b_ok[:, None] & (offs_d < D)[None, :])
    first = b_ok & (d0 == 0)
    tl.store(total_ptr + row, total, mask=first)
    tl.store(mass_ptr + row, mass, mask=first)
    if ALONG:
        tl.store(along_ptr + row, along, mask=first)
    tl.store(kept_ptr + row, kept, mask=first)


@launcher
def softplus_sum(
    query: Tensor, negative_keys: Tensor, scale: Tensor, bias: Tensor, want_pull: bool, *pool: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total (B,) fp32, pull (B, D) fp32 or (0, D), mass (B,) fp32, kept (B,) int64."""
    B, D = query.shape
    K = negative_keys.shape[0]
    tile = choose_tile(query, negative_keys)
    key_tiles = triton.cdiv(K, tile.BLOCK_K)
    per_split = max(1, triton.cdiv(key_tiles, tiles.splits(B, K, tile, processors(query.device))))
    parts = max(1, triton.cdiv(key_tiles, per_split))

    total = query.new_empty(parts, B, dtype=torch.float32)
    mass = query.new_empty(parts, B, dtype=torch.float32)
    acc = query.new_empty(parts, B if want_pull else 0, D, dtype=torch.float32)
    rounds = want_pull and query.dtype == negative_keys.dtype != torch.float32  # sigmoids, for the pull
    along = query.new_empty(parts if rounds else 0, B, dtype=torch.float32)
    kept = query.new_empty(parts, B, dtype=torch.int32)
    if B:
        slices = triton.cdiv(D, tile.SLICE) if want_pull else 1
        softplus_sum_kernel[(triton.cdiv(B, tile.BLOCK_B), parts, slices)](
            scale_ptr=scale, bias_ptr=bias, total_ptr=total, mass_ptr=mass, acc_ptr=acc, along_ptr=along, kept_ptr=kept,
            tiles_per_split=per_split, WANT_PULL=want_pull, ALONG=rounds, SLICE=tile.SLICE, STAGES=tile.num_stages,
            **score_arguments(query, negative_keys, tile, complete(pool)),
        )  # fmt: skip
    pull = acc.sum(0)  # (B, D)
    if rounds:
        wide = query.float()  # (B, D)
        squares = (wide * wide).sum(1)  # (B,)
        missing = along.sum(0) - (wide * pull).sum(1)  # (B,)
        pull += wide * torch.where(squares == 0, 0.0, missing / squares)[:, None]
    return total.sum(0), pull, mass.sum(0), kept.sum(0)
