"""prefix_logsumexp in Triton: log-sum-exps at several prefix widths of the vectors, and the softmax means of the prefixes.

A program walks its part of the queue as in logsumexp_parts.py. In each tile it multiplies the segments between widths one after
the other: the scores of a width are those of the width before, plus those of the segment. Each width has sums of its own. Sums
of keys are in registers, so widths are taken together as far as their sums fit: each such group is one launch, which scores as
far as its largest width. A group of one width may be wider than that, and is then cut into slices, one program each.

All parts of the queue lie in one buffer, as in logsumexp_parts.py with widths in the place of scales, and are merged here.
Meaning of the arguments and results: kernels/README.md.
"""

# ruff: noqa: RUF005  Triton joins tuples by + alone

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import UNFUSED, capability, launcher, programs_at_once, score_arguments
from .logsumexp_parts import merged
from .numerics import finite_shift
from .pool import kernel_pool, pool_bias, pool_keys, pool_masks, pool_rows, pool_size
from .score import any_not_finite, as_stored, load_rows, load_whole_rows, or_zero, score_tile


@triton.jit
def no_sums(BLOCK_B: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """The running sums over nothing, of each width: maxima, sums, sums along the query, sums of keys; and columns kept."""
    m = ()
    z = ()
    along = ()
    acc = ()
    for i in tl.static_range(COUNT):
        m = m + (tl.full((BLOCK_B,), float("-inf"), tl.float32),)
        z = z + (tl.zeros((BLOCK_B,), tl.float32),)
        along = along + (tl.zeros((BLOCK_B,), tl.float32),)
        acc = acc + (tl.zeros((BLOCK_B, COLUMNS[i]), tl.float32),)
    return m, z, along, acc, tl.zeros((BLOCK_B,), tl.int32)


@triton.jit
def add_prefixes(
    sums, start, stop, d0, query_ptr, queries, offs_b, b_ok, stride_qb, keys_ptr, stride_kk, size, pool, rows, scale,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    STARTS: tl.constexpr, LENGTHS: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, STAGES: tl.constexpr, MENDED: tl.constexpr,
):  # fmt: skip
    """The running sums with columns [start, stop) added. MENDED: hidden pairs may hold anything."""
    m, z, along, acc, num_kept = sums
    floor = -tl.abs(scale) * float("inf")  # as in logsumexp_parts.py
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = pool_keys(pool, offs_k, size, EVEN_K)  # (BLOCK_K,)
        allowed = pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        s = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        m_after = ()
        z_after = ()
        along_after = ()
        acc_after = ()
        for i in tl.static_range(COUNT):
            query_at = query_ptr + STARTS[i]
            keys_at = keys_ptr + STARTS[i]
            keys = load_whole_rows(
                keys_at, offs_k, k_ok, stride_kk, LENGTHS[i], BLOCKS[i], WIDEN
            )  # (BLOCK_K, BLOCKS[i])
            s += score_tile(
                query_at, queries[i], offs_b, b_ok, stride_qb, keys_at, keys, offs_k, k_ok, stride_kk,
                LENGTHS[i], BLOCK_B, BLOCK_K, BLOCKS[i], WIDEN,
            )  # fmt: skip
            if i == 0:
                allowed = allowed & ~(s < floor)
                num_kept += tl.sum(allowed.to(tl.int32), 1)
            x = s * scale  # (BLOCK_B, BLOCK_K)
            if pool.bias is not None:
                x += pool_bias(pool, offs_k, k_ok)[None, :] * 1.4426950408889634  # log2(e)
            x = tl.where(allowed, x, float("-inf"))
            most = tl.maximum(m[i], tl.max(x, 1))  # (BLOCK_B,)
            shift = finite_shift(most)
            decay = tl.math.exp2(m[i] - shift)  # (BLOCK_B,)
            p = tl.math.exp2(x - shift[:, None])  # (BLOCK_B, BLOCK_K)
            m_after = m_after + (most,)
            z_after = z_after + (z[i] * decay + tl.sum(p, 1),)
            if ALONG:
                shown = s
                if MENDED:
                    shown = tl.where(allowed, s, 0.0)
                along_after = along_after + (along[i] * decay + tl.sum(p * shown, 1),)
            else:
                along_after = along_after + (along[i],)
            if WANT_MEAN:
                if i == 0 and WIDTHS[0] <= BLOCKS[0] and COLUMNS[0] == BLOCKS[0]:
                    values = keys
                else:
                    values = load_rows(keys_ptr, offs_k, k_ok, stride_kk, d0, WIDTHS[i], COLUMNS[i], WIDEN)
                if MENDED:
                    values = or_zero(values)  # (BLOCK_K, COLUMNS[i])
                p = as_stored(p, query_ptr, keys_ptr).to(values.dtype)
                acc_after = acc_after + (tl.dot(p, values, acc[i] * decay[:, None], input_precision="ieee"),)
            else:
                acc_after = acc_after + (acc[i],)
        m = m_after
        z = z_after
        along = along_after
        acc = acc_after
    return m, z, along, acc, num_kept


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def prefix_logsumexp_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, B, K, pool, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    scale_ptr, parts_ptr, tiles_per_split,
    STARTS: tl.constexpr, LENGTHS: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr, ALL: tl.constexpr, WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, SLICE: tl.constexpr,
    STAGES: tl.constexpr, HIDES_PAIRS: tl.constexpr,
):  # fmt: skip
    """Widths [FIRST, FIRST + COUNT) of ALL. The rest of tiles.PrefixGroup: the start and the length of the segment of each, how
    many of its columns one step multiplies, and how many columns of the mean are summed here."""
    split = tl.program_id(1)
    d0 = tl.program_id(2) * SLICE
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    queries = ()
    for i in tl.static_range(COUNT):
        queries = queries + (
            load_whole_rows(query_ptr + STARTS[i], offs_b, b_ok, stride_qb, LENGTHS[i], BLOCKS[i], WIDEN),
        )
    rows = pool_rows(pool, offs_b, b_ok)
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e)
    size = pool_size(pool, K)
    start = split * tiles_per_split * BLOCK_K
    stop = tl.minimum(start + tiles_per_split * BLOCK_K, size)
    m, z, along, acc, num_kept = add_prefixes(
        no_sums(BLOCK_B, COLUMNS, COUNT), start, stop, d0, query_ptr, queries, offs_b, b_ok, stride_qb, keys_ptr, stride_kk,
        size, pool, rows, scale, EVEN_K, WIDEN, BLOCK_B, BLOCK_K, STARTS, LENGTHS, WIDTHS, BLOCKS, COLUMNS, COUNT,
        WANT_MEAN, ALONG, STAGES, False,
    )  # fmt: skip
    if WANT_MEAN and HIDES_PAIRS:  # what is hidden may hold anything, and 0 times that is not 0
        broken = tl.full((), 0, tl.int1)
        for i in tl.static_range(COUNT):
            broken = broken | any_not_finite(acc[i], b_ok)
            if ALONG:
                broken = broken | any_not_finite(along[i][:, None], b_ok)
        if broken:
            m, z, along, acc, num_kept = add_prefixes(
                no_sums(BLOCK_B, COLUMNS, COUNT), start, stop, d0, query_ptr, queries, offs_b, b_ok, stride_qb, keys_ptr,
                stride_kk, size, pool, rows, scale, EVEN_K, WIDEN, BLOCK_B, BLOCK_K, STARTS, LENGTHS, WIDTHS, BLOCKS, COLUMNS,
                COUNT, WANT_MEAN, ALONG, 1, True,
            )  # fmt: skip

    SPLITS = tl.num_programs(1)
    cells = (ALL * SPLITS).to(tl.int64) * B
    first = b_ok & (d0 == 0)
    for i in tl.static_range(COUNT):
        cell = ((FIRST + i) * SPLITS + split).to(tl.int64) * B + offs_b  # (BLOCK_B,) of (ALL, SPLITS, B)
        ptrs = parts_ptr + cell  # (BLOCK_B,)
        if WANT_MEAN:
            offs_d = d0 + tl.arange(0, COLUMNS[i])
            within = b_ok[:, None] & (offs_d < WIDTHS[i])[None, :]
            tl.store(parts_ptr + cell[:, None] * D + offs_d[None, :], acc[i], mask=within)
            ptrs += cells * D
        tl.store(ptrs, m[i], mask=first)
        tl.store(ptrs + cells, z[i], mask=first)
        if ALONG:
            tl.store(ptrs + 2 * cells, along[i], mask=first)
        tl.store(ptrs + 3 * cells, num_kept.to(tl.float32, bitcast=True), mask=first)


@triton.jit(do_not_specialize=["B", "SPLITS"])
def prefix_merge_kernel(
    parts_ptr, query_ptr, stride_qb, lse_ptr, mean_ptr, num_kept_ptr, B, SPLITS, WIDTHS: tl.constexpr, ALL: tl.constexpr,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1)
    width = tl.full((), WIDTHS[0], tl.int32)
    for i in tl.static_range(1, ALL):
        width = tl.where(at == i, WIDTHS[i], width)
    offs_d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=offs_d < width, other=0.0).to(tl.float32)  # (BLOCK_D,)
    lse, mean, num_kept, _ = merged(
        parts_ptr, query, b, at, ALL, B, SPLITS, width, WANT_MEAN, ALONG, False, D, BLOCK_P, BLOCK_D
    )
    tl.store(num_kept_ptr + b, num_kept, mask=at == 0)
    cell = at.to(tl.int64) * B + b
    tl.store(lse_ptr + cell, lse * 0.6931471805599453)  # ln(2)
    if WANT_MEAN:
        tl.store(mean_ptr + cell * D + offs_d, mean, mask=offs_d < D)


@launcher
def prefix_logsumexp(
    query: Tensor, negative_keys: Tensor, widths: Sequence[int], scale: Tensor, want_mean: bool, *pool: Tensor | bool | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """lse (W, B), mean (W, B or 0, D) fp32, num_kept (B,) int64.

    Raises ValueError for bounds.
    """
    columns = kernel_pool(pool)
    if columns.is_bounded:
        raise ValueError("prefix_logsumexp: lower and upper are not supported.")
    (B, D), K, W = query.shape, negative_keys.shape[0], len(widths)
    lse = query.new_empty(W, B, dtype=torch.float32)
    mean = query.new_empty(W, B if want_mean else 0, D, dtype=torch.float32)
    num_kept = query.new_empty(B, dtype=torch.int64)
    if not B:
        return lse, mean, num_kept
    itemsize = 4 if query.dtype != negative_keys.dtype else query.element_size()
    tile, most = tiles.prefix_tile(D, itemsize, capability(query.device), columns.is_masked or K % 64 != 0)
    splits, per_split = tiles.even_splits(B, K, tile, programs_at_once(query.device, tile))
    rounds = want_mean and query.dtype == negative_keys.dtype != torch.float32  # probabilities, for the mean
    buffer = query.new_empty(W * splits * B * (D + 5 if want_mean else 5), dtype=torch.float32)
    for first, group in tiles.prefix_groups(tuple(widths), tile, most if want_mean else 0):
        slices = -(-group.widths[-1] // tile.SLICE) if want_mean else 1
        prefix_logsumexp_kernel[(-(-B // tile.BLOCK_B), splits, slices)](
            *score_arguments(query, negative_keys, tile, columns), scale, buffer, per_split,
            *group, len(group.widths), first, W, want_mean, rounds, tile.SLICE, tile.num_stages,
            columns.hides_pairs or columns.key_mask is not None, num_warps=tile.num_warps,
        )  # fmt: skip
    BLOCK_P, BLOCK_D, num_warps = tiles.merge_block(D, splits)
    prefix_merge_kernel[(B, W)](
        buffer, query, query.stride(0), lse, mean, num_kept, B, splits, tuple(widths), W,
        want_mean, rounds, D, BLOCK_P, BLOCK_D, num_warps=num_warps, **UNFUSED,
    )  # fmt: skip
    return lse, mean, num_kept
