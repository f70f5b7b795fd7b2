"""Which columns a row may see: the eight parts of a pool, as kernel arguments and on the device.

On the host a pool is a tuple of seven tensors and a flag; pool_arguments spells it for a kernel, where an absent tensor becomes
a dummy pointer and a False flag. On the device there are three steps: pool_rows reads what belongs to the rows once;
pool_keys says which key rows may be read at all; pool_masks and pool_bounds say, for a tile, which columns are allowed
and which lie inside the bounds. Meaning: kernels/README.md, "Pool".
"""

from torch import Tensor

import triton
import triton.language as tl

from .order import unpack

NO_MASK, KEY_MASK, TILE_MASK = 0, 1, 2
NO_LABELS, OTHER_LABELS, SAME_LABELS = 0, 1, 2  # HAS_LABELS in the kernels


def complete(pool: tuple) -> tuple:
    """The seven pool tensors and same_label, absent where a caller left them off the end."""
    return (*pool, *(None, None, None, None, None, None, None, False)[len(pool) :])


def is_masked(pool: tuple) -> bool:
    return any(x is not None for x in pool[:5])


def is_bounded(pool: tuple) -> bool:
    return any(x is not None for x in pool[5:7])


def of_rows(pool: tuple, start: int, stop: int) -> tuple:
    """The pool of queries [start, stop): what belongs to queries is cut, what belongs to keys stays."""
    mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, same_label = pool
    if mask is not None and mask.ndim == 2:
        mask = mask[start:stop]
    query_ids, query_labels, lower, upper = (
        None if x is None else x[start:stop] for x in (query_ids, query_labels, lower, upper)
    )
    return mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, same_label


def pool_arguments(pool: tuple, dummy: Tensor) -> dict:
    """The pool as kernel arguments; `dummy` stands where there is no tensor."""
    mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, same_label = pool
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()

    def pointer(x: Tensor | None) -> Tensor:
        return dummy if x is None else x.contiguous()

    return {
        "mask_ptr": dummy if mask is None else mask,
        "stride_mb": mask.stride(0) if mask is not None and mask.ndim == 2 else 0,
        "query_ids_ptr": pointer(query_ids),
        "negative_ids_ptr": pointer(negative_ids),
        "query_labels_ptr": pointer(query_labels),
        "negative_labels_ptr": pointer(negative_labels),
        "lower_ptr": pointer(lower),
        "upper_ptr": pointer(upper),
        "MASK": NO_MASK if mask is None else (KEY_MASK if mask.ndim == 1 else TILE_MASK),
        "HAS_IDS": query_ids is not None,
        "HAS_LABELS": NO_LABELS if query_labels is None else SAME_LABELS if same_label else OTHER_LABELS,
        "HAS_LOWER": lower is not None,
        "HAS_UPPER": upper is not None,
    }


@triton.jit
def pool_rows(
    offs_b, b_ok, query_ids_ptr, query_labels_ptr, lower_ptr, upper_ptr,
    HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
):  # fmt: skip
    """ids, labels (BLOCK_B,) int64 and the two bounds' (score fp32, index int32); zeros where absent."""
    ids = tl.zeros_like(offs_b)  # (BLOCK_B,)
    labels = tl.zeros_like(offs_b)  # (BLOCK_B,)
    lower = tl.zeros_like(offs_b)  # (BLOCK_B,)
    upper = tl.zeros_like(offs_b)  # (BLOCK_B,)
    if HAS_IDS:
        ids = tl.load(query_ids_ptr + offs_b, mask=b_ok, other=0)
    if HAS_LABELS:
        labels = tl.load(query_labels_ptr + offs_b, mask=b_ok, other=0)
    if HAS_LOWER:
        lower = tl.load(lower_ptr + offs_b, mask=b_ok, other=0)
    if HAS_UPPER:
        upper = tl.load(upper_ptr + offs_b, mask=b_ok, other=0)
    lower_score, lower_index = unpack(lower)
    upper_score, upper_index = unpack(upper)
    return ids, labels, lower_score, lower_index, upper_score, upper_index


@triton.jit
def pool_keys(offs_k, K, mask_ptr, MASK: tl.constexpr, EVEN_K: tl.constexpr):
    """(BLOCK_K,) bool: key rows that exist and that a (K,) mask lets be read.  MASK == 1 is KEY_MASK.

    EVEN_K says that no tile passes K, and makes an unmasked pool a constant that costs nothing per score.
    """
    if EVEN_K:
        k_ok = tl.full(offs_k.shape, 1, tl.int1)
    else:
        k_ok = offs_k < K
    if MASK == 1:
        k_ok = k_ok & tl.load(mask_ptr + offs_k, mask=k_ok, other=0).to(tl.int1)
    return k_ok


@triton.jit
def pool_masks(
    offs_b, b_ok, offs_k, k_ok, ids, labels, mask_ptr, stride_mb, negative_ids_ptr, negative_labels_ptr,
    MASK: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_K) bool: columns the masks allow; of rows past B nothing is promised.

    MASK == 2 is TILE_MASK, HAS_LABELS == 2 is SAME_LABELS.
    """
    allowed = tl.broadcast_to(k_ok[None, :], (offs_b.shape[0], offs_k.shape[0]))  # (BLOCK_B, BLOCK_K)
    if MASK == 2:
        ptrs = mask_ptr + offs_b.to(tl.int64)[:, None] * stride_mb + offs_k[None, :]
        allowed = tl.load(ptrs, mask=b_ok[:, None] & k_ok[None, :], other=0).to(tl.int1)
    if HAS_IDS:
        negative_ids = tl.load(negative_ids_ptr + offs_k, mask=k_ok, other=0)  # (BLOCK_K,)
        allowed = allowed & (ids[:, None] != negative_ids[None, :])
    if HAS_LABELS:
        negative_labels = tl.load(negative_labels_ptr + offs_k, mask=k_ok, other=0)  # (BLOCK_K,)
        if HAS_LABELS == 2:
            allowed = allowed & (labels[:, None] == negative_labels[None, :])
        else:
            allowed = allowed & (labels[:, None] != negative_labels[None, :])
    return allowed


@triton.jit
def pool_bounds(
    s, offs_k, allowed, lower_score, lower_index, upper_score, upper_index,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_K) bool: allowed columns whose place lies inside the bounds."""
    inside = allowed  # (BLOCK_B, BLOCK_K)
    k = offs_k.to(tl.int32)[None, :]
    if HAS_LOWER:
        tie = (s == lower_score[:, None]) & (k <= lower_index[:, None])
        inside = inside & ((s > lower_score[:, None]) | tie)
    if HAS_UPPER:
        tie = (s == upper_score[:, None]) & (k >= upper_index[:, None])
        inside = inside & ((s < upper_score[:, None]) | tie)
    return inside
