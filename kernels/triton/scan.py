"""One pass over the queue that keeps the columns whose scores are in a bracket, as sort keys in compact buffers.

The sort keys of columns that lie in a bracket go to a buffer private to (row, split, lane), so there are no atomics and the
contents do not depend on timing. The columns above each bracket are counted. The ends of a bracket are cuts
(sample_quantiles.py), which may lie among equal scores, but only where a tile of keys begins: within a tile a cut is a score and
costs one comparison. The next key tile is loaded before the wanted columns are taken out of the scores (extract_columns.py),
which hides the memory's latency.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from negmine.ops.sort_key import NOWHERE

from . import tiles
from .extract_columns import any_wanted, lowest_wanted, wanted_by_lane
from .launch import programs_at_once, score_arguments
from .pool import KernelPool, pool_bounds, pool_keys, pool_masks, pool_rows, pool_size
from .score import load_whole_rows, score_tile
from .sort_key import NOTHING, from_ordered, pack


@triton.jit
def score_cuts(cut_ptr, cells, ok):
    """Of cuts int64: the least score in tiles before a column, the least score in later tiles, and this column; (BLOCK_B,) each.

    Of rows where ok is False nothing is kept.
    """
    cut = tl.load(cut_ptr + cells, mask=ok, other=NOTHING)  # (BLOCK_B,)
    value = (cut >> 32).to(tl.int32)
    turn = tl.minimum((1 << 32) - (cut & 0xFFFFFFFF), 0x7FFFFFFF).to(tl.int32)
    return from_ordered(value), from_ordered(value + 1), turn


@triton.jit
def reaches(s, k0, cuts):
    """(BLOCK_B, BLOCK_K) bool: the scores of the tile from column k0 on that a cut admits.  cuts: from score_cuts."""
    before, after, turn = cuts
    return s >= tl.where(k0 < turn, before, after)[:, None]


@triton.jit(do_not_specialize=["B", "K", "SPLITS", "CAPACITY"])
def scan_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    cut_lo_ptr, cut_hi_ptr, survivors_ptr, found_ptr, num_above_ptr, SPLITS, CAPACITY,
    BRACKETS: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """If cut_hi_ptr is None, the brackets have no upper end and num_above_ptr is not written."""
    split = tl.program_id(1)
    size = pool_size(pool, K)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    lane = tl.arange(0, LANES)
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    rows = pool_rows(pool, offs_b, b_ok)
    cuts = offs_b * BRACKETS
    lo_a = score_cuts(cut_lo_ptr, cuts, b_ok)
    if cut_hi_ptr is not None:
        hi_a = score_cuts(cut_hi_ptr, cuts, b_ok)
    if BRACKETS == 2:
        lo_b = score_cuts(cut_lo_ptr, cuts + 1, b_ok)
        hi_b = score_cuts(cut_hi_ptr, cuts + 1, b_ok)

    count = tl.zeros((BLOCK_B, LANES), tl.int32)
    num_above_a = tl.zeros((BLOCK_B,), tl.int32)
    num_above_b = tl.zeros((BLOCK_B,), tl.int32)
    buffer = (offs_b[:, None] * SPLITS + split) * LANES + lane[None, :]  # (BLOCK_B, LANES)
    offs_k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
    keys = load_whole_rows(keys_ptr, offs_k, k_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
    # Tiles are assigned to splits in turn, because neighbouring keys are often similar and would fill one buffer.
    for k0 in tl.range(split * BLOCK_K, size, SPLITS * BLOCK_K, num_stages=1):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
        s = score_tile(
            query_ptr, query, offs_b, b_ok, stride_qb, keys_ptr, keys, offs_k, k_ok, stride_kk,
            D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
        )  # (BLOCK_B, BLOCK_K)  # fmt: skip
        offs_next = offs_k + SPLITS * BLOCK_K
        next_ok = pool_keys(pool, offs_next, size, False)  # (BLOCK_K,)
        keys = load_whole_rows(keys_ptr, offs_next, next_ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
        allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        inside = pool_bounds(pool, rows, s, offs_k, allowed)  # (BLOCK_B, BLOCK_K)
        keep = reaches(s, k0, lo_a)  # (BLOCK_B, BLOCK_K)
        if cut_hi_ptr is not None:
            above = reaches(s, k0, hi_a)  # (BLOCK_B, BLOCK_K)
            keep = keep & ~above
            num_above_a += tl.sum((inside & above).to(tl.int32), 1)
        if BRACKETS == 2:
            above = reaches(s, k0, hi_b)  # (BLOCK_B, BLOCK_K)
            keep = keep | (reaches(s, k0, lo_b) & ~above)
            num_above_b += tl.sum((inside & above).to(tl.int32), 1)

        scores, word = wanted_by_lane(inside & keep, s, LANES, LEVELS)  # (BLOCK_B, LANES, BITS), (BLOCK_B, LANES)
        while any_wanted(word):
            score, column = lowest_wanted(scores, word, LEVELS)  # (BLOCK_B, LANES) each
            ptrs = survivors_ptr + buffer * CAPACITY + count
            tl.store(ptrs, pack(score, k0 + column), mask=(word != 0) & (count < CAPACITY))
            count += (word != 0).to(tl.int32)
            word = word & (word - 1)

    tl.store(found_ptr + buffer, count, mask=b_ok[:, None])
    cell = (split.to(tl.int64) * B + offs_b) * BRACKETS  # (BLOCK_B,) of (SPLITS, B, BRACKETS)
    if cut_hi_ptr is not None:
        tl.store(num_above_ptr + cell, num_above_a, mask=b_ok)
    if BRACKETS == 2:
        tl.store(num_above_ptr + cell + 1, num_above_b, mask=b_ok)


class Survivors(NamedTuple):
    sort_keys: Tensor  # (B, W) int64, NOWHERE in unused entries
    found: Tensor  # (B, SPLITS * LANES) int32, number of survivors for each buffer of the row; more than capacity = overflow
    num_above: Tensor | None  # (SPLITS, B, BRACKETS) int32, columns of the pool above each bracket
    capacity: int  # of one buffer


def scan(
    query: Tensor, negative_keys: Tensor, cut_lo: Tensor, cut_hi: Tensor | None, capacity: int,
    tile: tiles.ScoreTile, pool: KernelPool,
) -> Survivors:  # fmt: skip
    """What lies in the brackets [cut_lo, cut_hi), each (B, BRACKETS) int64 with one or two brackets; no cut_hi is NOTHING."""
    B, BRACKETS = cut_lo.shape
    at_once = programs_at_once(query.device, tile)
    plan = tiles.scan_plan(B, negative_keys.shape[0], capacity, BRACKETS, tile, at_once)
    buffers = plan.splits * tiles.LANES
    sort_keys = torch.full((B, buffers * plan.capacity), NOWHERE, dtype=torch.int64, device=query.device)
    found = query.new_empty(B, buffers, dtype=torch.int32)
    num_above = None if cut_hi is None else query.new_empty(plan.splits, B, BRACKETS, dtype=torch.int32)
    scan_kernel[(-(-B // tile.BLOCK_B), plan.splits)](
        *score_arguments(query, negative_keys, tile, pool), cut_lo, cut_hi, sort_keys, found, num_above, plan.splits,
        plan.capacity, BRACKETS, tiles.LANES, tiles.levels(tile), num_warps=tile.num_warps,
    )  # fmt: skip
    return Survivors(sort_keys, found, num_above, plan.capacity)
