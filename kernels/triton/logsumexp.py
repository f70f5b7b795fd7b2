"""logsumexp in Triton: log-sum-exp over each query's pool, and the softmax mean of its keys.

Flash style: a program keeps BLOCK_B queries and walks its part of the queue in tiles, with a running maximum and sums in
the exp2 domain; the (B, K) scores never exist. The queue is cut into SPLITS parts so that few queries still fill the card;
`merged` adds the parts of a row in order, so the bits do not depend on timing. Wide embeddings accumulate their mean
in slices of D, one program each, and score once per slice.

Tensor cores take probabilities in the storage type, with 8 or 11 bits. The mean's part along the query, which is the softmax
mean of the scores and alone decides the gradient of the scale, is therefore summed beside it in fp32 and put right at the end.

Meaning of the arguments and results: kernels/README.md. Idea: FlashAttention with keys as values.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import UNFUSED, launcher, processors, score_arguments
from .launch import score_tile as choose_tile
from .pool import complete, pool_bounds, pool_keys, pool_masks, pool_rows
from .score import as_stored, load_rows, load_whole_rows, score_tile


@triton.jit
def finite_shift(m):
    """The maximum to subtract; 0 where it is infinite, so that inf - inf never happens."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit(do_not_specialize=["B", "K", "tiles_per_split"])
def logsumexp_kernel(
    query_ptr, keys_ptr, scale_ptr, pivot_ptr, m_ptr, z_ptr, acc_ptr, along_ptr, kept_ptr, above_ptr,
    stride_qb, stride_kk, B, K, tiles_per_split,
    mask_ptr, stride_mb, query_ids_ptr, negative_ids_ptr, query_labels_ptr, negative_labels_ptr, lower_ptr, upper_ptr,
    MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EVEN_K: tl.constexpr,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    d0 = tl.program_id(2) * SLICE
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = offs_b < B
    query = load_whole_rows(query_ptr, offs_b, b_ok, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    ids, labels, lower_score, lower_index, upper_score, upper_index = pool_rows(
        offs_b, b_ok, query_ids_ptr, query_labels_ptr, lower_ptr, upper_ptr, HAS_IDS, HAS_LABELS, HAS_LOWER, HAS_UPPER
    )
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e)
    if HAS_PIVOT:
        pivot = tl.load(pivot_ptr + offs_b, mask=b_ok, other=0.0)  # (BLOCK_B,)

    m = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK_B,), tl.float32)
    kept = tl.zeros((BLOCK_B,), tl.int32)
    above = tl.zeros((BLOCK_B,), tl.int32)
    along = tl.zeros((BLOCK_B,), tl.float32)
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
        if HAS_PIVOT:
            above += tl.sum((allowed & (s > pivot[:, None])).to(tl.int32), 1)
        kept += tl.sum(inside.to(tl.int32), 1)
        x = tl.where(inside, s * scale, float("-inf"))  # (BLOCK_B, BLOCK_K)
        m_new = tl.maximum(m, tl.max(x, 1))
        shift = finite_shift(m_new)
        decay = tl.math.exp2(m - shift)  # (BLOCK_B,)
        p = tl.math.exp2(x - shift[:, None])  # (BLOCK_B, BLOCK_K)
        if ALONG:  # first, so that scores need not outlive the rest
            along = along * decay + tl.sum(p * s, 1)
        z = z * decay + tl.sum(p, 1)
        m = m_new
        if WANT_MEAN:
            if D <= SLICE and D <= BLOCK_D:
                values = keys
            else:
                values = load_rows(keys_ptr, offs_k, k_ok, stride_kk, d0, D, SLICE, WIDEN)  # (BLOCK_K, SLICE)
            p = as_stored(p, query_ptr, keys_ptr).to(values.dtype)
            acc = tl.dot(p, values, acc * decay[:, None], input_precision="ieee")  # (BLOCK_B, SLICE)

    row = split.to(tl.int64) * B + offs_b  # (BLOCK_B,) of (SPLITS, B)
    if WANT_MEAN:
        offs_d = d0 + tl.arange(0, SLICE)
        tl.store(acc_ptr + row[:, None] * D + offs_d[None, :], acc, mask=b_ok[:, None] & (offs_d < D)[None, :])
    first = b_ok & (d0 == 0)
    tl.store(m_ptr + row, m, mask=first)
    tl.store(z_ptr + row, z, mask=first)
    if ALONG:
        tl.store(along_ptr + row, along, mask=first)
    tl.store(kept_ptr + row, kept, mask=first)
    if HAS_PIVOT:
        tl.store(above_ptr + row, above, mask=first)


@triton.jit
def merged(
    m_ptr, z_ptr, acc_ptr, along_ptr, kept_ptr, above_ptr, query, b, B, SPLITS,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts of row b as one: log2 sum_p 2^m_p z_p, mean (BLOCK_D,) = sum_p 2^m_p acc_p over the same sum; counts add up.

    ALONG: then mean += query (sum_p 2^m_p along_p / sum - query . mean) / |query|^2.
    """
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    top = tl.full((), float("-inf"), tl.float32)
    for p0 in range(0, SPLITS, BLOCK_P):
        m = tl.load(m_ptr + (p0 + offs_p) * B + b, mask=p0 + offs_p < SPLITS, other=float("-inf"))  # (BLOCK_P,)
        top = tl.maximum(top, tl.max(m, 0))
    shift = finite_shift(top)
    z = tl.zeros((), tl.float32)
    along = tl.zeros((), tl.float32)
    kept = tl.zeros((), tl.int64)
    above = tl.zeros((), tl.int64)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for p0 in range(0, SPLITS, BLOCK_P):
        p_ok = p0 + offs_p < SPLITS
        row = (p0 + offs_p).to(tl.int64) * B + b  # (BLOCK_P,)
        weight = tl.math.exp2(tl.load(m_ptr + row, mask=p_ok, other=float("-inf")) - shift)  # (BLOCK_P,)
        z += tl.sum(weight * tl.load(z_ptr + row, mask=p_ok, other=0.0), 0)
        kept += tl.sum(tl.load(kept_ptr + row, mask=p_ok, other=0).to(tl.int64), 0)
        if HAS_PIVOT:
            above += tl.sum(tl.load(above_ptr + row, mask=p_ok, other=0).to(tl.int64), 0)
        if WANT_MEAN:
            ok = p_ok[:, None] & (offs_d < D)[None, :]
            part = tl.load(acc_ptr + row[:, None] * D + offs_d[None, :], mask=ok, other=0.0)  # (BLOCK_P, BLOCK_D)
            acc += tl.sum(weight[:, None] * part, 0)
        if ALONG:
            along += tl.sum(weight * tl.load(along_ptr + row, mask=p_ok, other=0.0), 0)
    mean = tl.where(z == 0, 0.0, acc / z)  # (BLOCK_D,)
    if ALONG:
        missing = tl.where(z == 0, 0.0, along / z) - tl.sum(query * mean, 0)
        squares = tl.sum(query * query, 0)
        mean += query * tl.where(squares == 0, 0.0, missing / squares)
    return shift + tl.math.log2(z), mean, kept, above


@triton.jit(do_not_specialize=["B", "SPLITS"])
def logsumexp_merge(
    m_ptr, z_ptr, acc_ptr, along_ptr, kept_parts_ptr, above_parts_ptr, query_ptr, stride_qb,
    lse_ptr, mean_ptr, kept_ptr, above_ptr, B, SPLITS,
    WANT_MEAN: tl.constexpr, ALONG: tl.constexpr, HAS_PIVOT: tl.constexpr,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + b * stride_qb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
    lse, mean, kept, above = merged(
        m_ptr, z_ptr, acc_ptr, along_ptr, kept_parts_ptr, above_parts_ptr, query, b, B, SPLITS,
        WANT_MEAN, ALONG, HAS_PIVOT, D, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    tl.store(kept_ptr + b, kept)
    tl.store(above_ptr + b, above)
    tl.store(lse_ptr + b, lse * 0.6931471805599453)  # ln(2)
    if WANT_MEAN:
        tl.store(mean_ptr + b * D + offs_d, mean, mask=offs_d < D)


def parts(
    query: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_mean: bool, pool: tuple
) -> dict:
    """What the parts of the queue say of each row, B > 0, as the arguments that a kernel which merges them takes."""
    B, D = query.shape
    K = negative_keys.shape[0]
    tile = choose_tile(query, negative_keys)
    key_tiles = triton.cdiv(K, tile.BLOCK_K)
    per_split = max(1, triton.cdiv(key_tiles, tiles.splits(B, K, tile, processors(query.device))))
    count = max(1, triton.cdiv(key_tiles, per_split))
    rounds = want_mean and query.dtype == negative_keys.dtype != torch.float32  # probabilities, for the mean

    def rows(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty(count if wanted else 0, B, dtype=dtype)

    found = {
        "m_ptr": rows(),
        "z_ptr": rows(),
        "acc_ptr": query.new_empty(count if want_mean else 0, B, D, dtype=torch.float32),
        "along_ptr": rows(rounds),
    }
    counts = {"kept": rows(dtype=torch.int32), "above": rows(pivot is not None, torch.int32)}
    flags = {"WANT_MEAN": want_mean, "ALONG": rounds, "HAS_PIVOT": pivot is not None}
    slices = triton.cdiv(D, tile.SLICE) if want_mean else 1
    logsumexp_kernel[(triton.cdiv(B, tile.BLOCK_B), count, slices)](
        scale_ptr=scale, pivot_ptr=query if pivot is None else pivot.contiguous(),
        kept_ptr=counts["kept"], above_ptr=counts["above"], tiles_per_split=per_split, **found, **flags,
        SLICE=tile.SLICE, STAGES=tile.num_stages, **score_arguments(query, negative_keys, tile, complete(pool)),
    )  # fmt: skip
    return {
        **found, **flags, "kept_parts_ptr": counts["kept"], "above_parts_ptr": counts["above"],
        "query_ptr": query, "stride_qb": query.stride(0), "B": B, "SPLITS": count,
        "D": D, **tiles.merge_block(D), **UNFUSED,
    }  # fmt: skip


@launcher
def logsumexp(
    query: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_mean: bool, *pool: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse (B,) fp32, mean (B, D) fp32 or (0, D), kept (B,) int64, above (B,) int64."""
    B, D = query.shape
    lse = query.new_empty(B, dtype=torch.float32)
    mean = query.new_empty(B if want_mean else 0, D, dtype=torch.float32)
    kept, above = (query.new_empty(B, dtype=torch.int64) for _ in range(2))
    if B:
        logsumexp_merge[(B,)](
            lse_ptr=lse, mean_ptr=mean, kept_ptr=kept, above_ptr=above,
            **parts(query, negative_keys, scale, pivot, want_mean, pool),
        )  # fmt: skip
    return lse, mean, kept, above
