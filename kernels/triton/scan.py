"""The two passes that mining is made of: scores of some columns, held whole; and places of all that matter, kept compact.

sample_kernel  scores evenly spaced columns, or all columns of a short queue, and stores the scores, or their places.
scan_kernel    scores the whole queue once and appends the places of columns whose score lies in a bracket to a buffer
               private to (row, split, lane), so there are no atomics and the contents do not depend on timing. It also
               counts the columns above each bracket. The next key tile is loaded before survivors are pulled out of the
               scores (pull.py), which hides the memory's latency.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from negmine.order import NOWHERE

from . import tiles
from .launch import processors, score_arguments
from .order import pack
from .pool import pool_bounds, pool_keys, pool_masks, pool_rows
from .pull import by_lane, lowest, some_left
from .score import load_whole_rows, score_tile


@triton.jit(do_not_specialize=["B", "K"])
def sample_kernel(
    query_ptr, keys_ptr, out_ptr, stride_qb, stride_kk, B, K, W,
    mask_ptr, stride_mb, query_ids_ptr, negative_ids_ptr, query_labels_ptr, negative_labels_ptr, lower_ptr, upper_ptr,
    MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr, PLACES: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    offs_w = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Evenly spaced over the ring, so that old and new keys are sampled alike; past W, past K.
    offs_k = tl.where(offs_w < W, offs_w.to(tl.int64) * K // W, K)
    k_ok = pool_keys(offs_k, K, mask_ptr, MASK, False)  # (BLOCK_K,)
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    ids, labels, lower_score, lower_index, upper_score, upper_index = pool_rows(
        offs_b, b_ok, query_ids_ptr, query_labels_ptr, lower_ptr, upper_ptr, HAS_IDS, HAS_LABELS, HAS_LOWER, HAS_UPPER
    )
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
    ptrs = out_ptr + offs_b[:, None] * W + offs_w[None, :]
    ok = b_ok[:, None] & (offs_w < W)[None, :]
    inside = inside & (s == s)
    if PLACES:
        tl.store(ptrs, tl.where(inside, pack(s, offs_k[None, :]), -(2**63)), mask=ok)
    else:  # one zero and one NaN, so that a sort by bits and a comparison agree
        tl.store(ptrs, tl.where(inside, s + 0.0, float("nan")), mask=ok)


@triton.jit(do_not_specialize=["B", "K", "SPLITS", "CAPACITY"])
def scan_kernel(
    query_ptr, keys_ptr, cut_lo_ptr, cut_hi_ptr, survivors_ptr, found_ptr, above_ptr,
    stride_qb, stride_kk, B, K, SPLITS, CAPACITY,
    mask_ptr, stride_mb, query_ids_ptr, negative_ids_ptr, query_labels_ptr, negative_labels_ptr, lower_ptr, upper_ptr,
    MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    BRACKETS: tl.constexpr, HAS_HI: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    lane = tl.arange(0, LANES)
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    ids, labels, lower_score, lower_index, upper_score, upper_index = pool_rows(
        offs_b, b_ok, query_ids_ptr, query_labels_ptr, lower_ptr, upper_ptr, HAS_IDS, HAS_LABELS, HAS_LOWER, HAS_UPPER
    )
    # Rows past B get NaN cuts, and keep nothing.
    nan = float("nan")
    cuts = offs_b * BRACKETS
    lo_a = tl.load(cut_lo_ptr + cuts, mask=b_ok, other=nan)  # (BLOCK_B,)
    if HAS_HI:
        hi_a = tl.load(cut_hi_ptr + cuts, mask=b_ok, other=nan)  # (BLOCK_B,)
    if BRACKETS == 2:
        lo_b = tl.load(cut_lo_ptr + cuts + 1, mask=b_ok, other=nan)  # (BLOCK_B,)
        hi_b = tl.load(cut_hi_ptr + cuts + 1, mask=b_ok, other=nan)  # (BLOCK_B,)

    count = tl.zeros((BLOCK_B, LANES), tl.int32)
    above_a = tl.zeros((BLOCK_B,), tl.int32)
    above_b = tl.zeros((BLOCK_B,), tl.int32)
    buffer = (offs_b[:, None] * SPLITS + split) * LANES + lane[None, :]  # (BLOCK_B, LANES)
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = pool_keys(offs_k, K, mask_ptr, MASK, EVEN_K)  # (BLOCK_K,)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    # Splits take turns at tiles: keys that are close in the ring are often alike, and should not fill one buffer.
    for k0 in tl.range(split * BLOCK_K, K, SPLITS * BLOCK_K, num_stages=1):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(offs_k, K, mask_ptr, MASK, EVEN_K)  # (BLOCK_K,)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        offs_next = offs_k + SPLITS * BLOCK_K
        next_ok = pool_keys(offs_next, K, mask_ptr, MASK, False)  # (BLOCK_K,)
        keys = load_whole_rows(keys_ptr, offs_next, next_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
        allowed = pool_masks(
            offs_b, b_ok, offs_k, k_ok, ids, labels, mask_ptr, stride_mb, negative_ids_ptr, negative_labels_ptr,
            MASK, HAS_IDS, HAS_LABELS,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        inside = pool_bounds(
            s, offs_k, allowed, lower_score, lower_index, upper_score, upper_index, HAS_LOWER, HAS_UPPER
        )  # (BLOCK_B, BLOCK_K)
        keep = s >= lo_a[:, None]  # (BLOCK_B, BLOCK_K)
        if HAS_HI:
            keep = keep & (s <= hi_a[:, None])
            above_a += tl.sum((inside & (s > hi_a[:, None])).to(tl.int32), 1)
        if BRACKETS == 2:
            keep = keep | ((s >= lo_b[:, None]) & (s <= hi_b[:, None]))
            above_b += tl.sum((inside & (s > hi_b[:, None])).to(tl.int32), 1)

        kept, word = by_lane(inside & keep, s, LANES, LEVELS)  # (BLOCK_B, LANES, BITS), (BLOCK_B, LANES)
        while some_left(word):
            score, column = lowest(kept, word, LEVELS)  # (BLOCK_B, LANES) each
            ptrs = survivors_ptr + buffer * CAPACITY + count
            tl.store(ptrs, pack(score, k0 + column), mask=(word != 0) & (count < CAPACITY))
            count += (word != 0).to(tl.int32)
            word = word & (word - 1)

    tl.store(found_ptr + buffer, count, mask=b_ok[:, None])
    cell = (split.to(tl.int64) * B + offs_b) * BRACKETS  # (BLOCK_B,) of (SPLITS, B, BRACKETS)
    if HAS_HI:
        tl.store(above_ptr + cell, above_a, mask=b_ok)
    if BRACKETS == 2:
        tl.store(above_ptr + cell + 1, above_b, mask=b_ok)


class Survivors(NamedTuple):
    places: Tensor  # (B, W) int64, NOWHERE in unused entries
    found: Tensor  # (B, SPLITS LANES) int32, survivors that each buffer of the row was offered
    above: Tensor | None  # (SPLITS, B, BRACKETS) int32, columns of the pool above each bracket
    capacity: int  # of one buffer


def sample(
    query: Tensor, negative_keys: Tensor, W: int, tile: tiles.ScoreTile, pool: tuple, as_places: bool = False
) -> Tensor:
    """(B, W) fp32: scores of W evenly spaced columns, or of all of them where W = K; NaN outside the pool.

    as_places: (B, W) int64, their places instead; NOWHERE outside the pool.
    """
    B = query.shape[0]
    out = query.new_empty(B, W, dtype=torch.int64 if as_places else torch.float32)
    arguments = score_arguments(query, negative_keys, tile, pool)
    arguments["EVEN_K"] = False
    grid = triton.cdiv(W, tile.BLOCK_K), triton.cdiv(B, tile.BLOCK_B)
    sample_kernel[grid](out_ptr=out, W=W, PLACES=as_places, **arguments)
    return out


def places(query: Tensor, negative_keys: Tensor, tile: tiles.ScoreTile, pool: tuple) -> Tensor:
    """(B, K) int64: the place of every column of a short queue, NOWHERE outside the pool."""
    return sample(query, negative_keys, negative_keys.shape[0], tile, pool, as_places=True)


def scan(
    query: Tensor, negative_keys: Tensor, cut_lo: Tensor, cut_hi: Tensor | None, capacity: int,
    tile: tiles.ScoreTile, pool: tuple,
) -> Survivors:  # fmt: skip
    """What lies in the brackets [cut_lo, cut_hi], each (B, BRACKETS) fp32 with one or two brackets; no cut_hi is infinity."""
    B, BRACKETS = cut_lo.shape
    K = negative_keys.shape[0]
    plan = tiles.scan_plan(B, K, capacity, tile, processors(query.device))
    kept = torch.full((B, plan.splits * tiles.LANES * plan.capacity), NOWHERE, dtype=torch.int64, device=query.device)
    found = query.new_empty(B, plan.splits * tiles.LANES, dtype=torch.int32)
    above = None if cut_hi is None else query.new_empty(plan.splits, B, BRACKETS, dtype=torch.int32)
    scan_kernel[(triton.cdiv(B, tile.BLOCK_B), plan.splits)](
        cut_lo_ptr=cut_lo, cut_hi_ptr=cut_lo if cut_hi is None else cut_hi,
        survivors_ptr=kept, found_ptr=found, above_ptr=found if above is None else above,
        SPLITS=plan.splits, CAPACITY=plan.capacity, BRACKETS=BRACKETS, HAS_HI=cut_hi is not None, LANES=tiles.LANES,
        LEVELS=tiles.levels(tile),
        **score_arguments(query, negative_keys, tile, pool),
    )  # fmt: skip
    return Survivors(kept, found, above, plan.capacity)
