"""The pool, that is, which columns are candidates of each query, as one kernel argument, and its evaluation on the device.

On the host, kernel_pool converts a negmine.ops.pool.Pool into the tuple that kernels take. Absent parts are None and cost a
kernel nothing. On the device there are four steps: pool_size gives the number of valid rows of the queue; pool_rows reads the
values of the queries once; pool_keys gives the rows of keys that may be read; pool_masks and pool_bounds give, for a tile, the
columns that the masks allow and those inside the bounds. Kernels that sum logits also call pool_bias. kernels/README.md, section
"Pool", has the meaning.
"""

from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .score import load_whole_rows, score_tile, widens
from .sort_key import unpack


class KernelPool(NamedTuple):
    """The pool for kernels. No field may be a Python bool, because the interpreter of Triton 3.6 fails on it."""

    key_mask: Tensor | None = None  # (K,) bool
    pair_mask: Tensor | None = None  # (B, K) bool
    stride_mb: int | None = None  # of the rows of pair_mask
    query_ids: Tensor | None = None  # (B,) int64
    negative_ids: Tensor | None = None  # (K,) int64
    query_labels: Tensor | None = None  # (B,) int64
    negative_labels: Tensor | None = None  # (K,) int64
    same_label: tl.constexpr | None = None  # not None: the columns with equal labels are kept
    lower: Tensor | None = None  # (B,) int64 sort keys
    upper: Tensor | None = None  # (B,) int64 sort keys
    num_rows: Tensor | None = None  # () int64
    bias: Tensor | None = None  # (K,) fp32, added to scale * score where logits are summed
    guide_query: Tensor | None = None  # (B, G)
    guide_keys: Tensor | None = None  # (K, G)
    guide_limit: Tensor | None = None  # (B,) fp32
    stride_gb: int | None = None  # of the rows of guide_query
    stride_gk: int | None = None  # of the rows of guide_keys
    guide_width: tl.constexpr | None = None  # G
    guide_block: tl.constexpr | None = None  # columns of G in one step
    guide_widens: tl.constexpr | None = None  # as WIDEN of score.py

    @property
    def is_masked(self) -> bool:
        return self.hides_some_pairs or self.key_mask is not None or self.num_rows is not None

    @property
    def is_bounded(self) -> bool:
        return self.lower is not None or self.upper is not None

    @property
    def hides_pairs(self) -> bool:
        """True if a column may be hidden from some queries but not from others."""
        return self.is_bounded or self.hides_some_pairs

    @property
    def hides_some_pairs(self) -> bool:
        """The same, without regard to the bounds."""
        return any(x is not None for x in (self.pair_mask, self.query_ids, self.query_labels, self.guide_query))

    @property
    def hides_by_tags(self) -> bool:
        """True if only equal ids or labels hide pairs, and no mask hides columns."""
        tagged = self.query_ids is not None or self.query_labels is not None
        others = self.pair_mask, self.key_mask, self.same_label, self.guide_query
        return tagged and all(part is None for part in others) and not self.is_bounded

    def of_queries(self, start: int, stop: int) -> "KernelPool":
        """The pool of queries [start, stop): tensors of queries are sliced, tensors of keys are unchanged."""
        of_queries = ("pair_mask", "query_ids", "query_labels", "lower", "upper", "guide_query", "guide_limit")
        parts = {name: getattr(self, name) for name in of_queries}
        return self._replace(**{name: x[start:stop] for name, x in parts.items() if x is not None})


EVERYTHING = KernelPool()
SAME_LABEL = tl.constexpr(True)


def kernel_pool(pool: tuple) -> KernelPool:
    """Convert the last arguments of an op, a negmine.ops.pool.Pool, for its kernels."""
    (
        mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, num_rows,
        bias, guide_query, guide_keys, guide_limit, same_label,
    ) = pool  # fmt: skip
    if mask is query_ids is query_labels is lower is upper is num_rows is bias is guide_query is None:
        return EVERYTHING
    key_mask = pair_mask = stride_mb = None
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        if mask.ndim == 1:
            key_mask = mask
        else:
            pair_mask, stride_mb = mask, mask.stride(0)
    columns = KernelPool(
        key_mask, pair_mask, stride_mb, _dense(query_ids), _dense(negative_ids), _dense(query_labels), _dense(negative_labels),
        SAME_LABEL if same_label and query_labels is not None else None, _dense(lower), _dense(upper), num_rows, _dense(bias),
    )  # fmt: skip
    if guide_query is None:
        return columns
    G = guide_query.shape[1]
    return columns._replace(
        guide_query=guide_query,
        guide_keys=guide_keys,
        guide_limit=_dense(guide_limit),
        stride_gb=guide_query.stride(0),
        stride_gk=guide_keys.stride(0),
        guide_width=tl.constexpr(G),
        guide_block=tl.constexpr(tiles.guide_block(G)),
        guide_widens=tl.constexpr(widens(guide_query, guide_keys)),
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit
def pool_size(pool, K):
    """int32: how many of the K rows of the queue are valid."""
    size = K
    if pool.num_rows is not None:
        size = tl.minimum(tl.load(pool.num_rows), K).to(tl.int32)
    return size


@triton.jit
def pool_rows(pool, offs_b, b_ok):
    """ids and labels (BLOCK_B,) int64, and score fp32 and index int32 of the two bounds; zeros if absent."""
    ids = tl.zeros_like(offs_b)  # (BLOCK_B,)
    labels = tl.zeros_like(offs_b)  # (BLOCK_B,)
    lower = tl.zeros_like(offs_b)  # (BLOCK_B,)
    upper = tl.zeros_like(offs_b)  # (BLOCK_B,)
    if pool.query_ids is not None:
        ids = tl.load(pool.query_ids + offs_b, mask=b_ok, other=0)
    if pool.query_labels is not None:
        labels = tl.load(pool.query_labels + offs_b, mask=b_ok, other=0)
    if pool.lower is not None:
        lower = tl.load(pool.lower + offs_b, mask=b_ok, other=0)
    if pool.upper is not None:
        upper = tl.load(pool.upper + offs_b, mask=b_ok, other=0)
    lower_score, lower_index = unpack(lower)
    upper_score, upper_index = unpack(upper)
    return ids, labels, lower_score, lower_index, upper_score, upper_index


@triton.jit
def pool_keys(pool, offs_k, size, EVEN_K: tl.constexpr):
    """(BLOCK_K,) bool: the rows of keys below `size` that a (K,) mask allows to be read.

    EVEN_K: no tile extends past `size`. Without masks, the result is then a constant that costs nothing.
    """
    if EVEN_K:
        k_ok = tl.full(offs_k.shape, 1, tl.int1)
    else:
        k_ok = offs_k < size
    if pool.key_mask is not None:
        k_ok = k_ok & tl.load(pool.key_mask + offs_k, mask=k_ok, other=0).to(tl.int1)
    return k_ok


@triton.jit
def pool_masks(pool, rows, offs_b, b_ok, offs_k, k_ok):
    """(BLOCK_B, BLOCK_K) bool: the columns that the masks allow; undefined for rows past B. rows: from pool_rows."""
    ids, labels, _, _, _, _ = rows
    allowed = tl.broadcast_to(k_ok[None, :], (offs_b.shape[0], offs_k.shape[0]))  # (BLOCK_B, BLOCK_K)
    if pool.pair_mask is not None:
        ptrs = pool.pair_mask + offs_b.to(tl.int64)[:, None] * pool.stride_mb + offs_k[None, :]
        allowed = tl.load(ptrs, mask=b_ok[:, None] & k_ok[None, :], other=0).to(tl.int1)
    if pool.query_ids is not None:
        negative_ids = tl.load(pool.negative_ids + offs_k, mask=k_ok, other=0)  # (BLOCK_K,)
        allowed = allowed & (ids[:, None] != negative_ids[None, :])
    if pool.query_labels is not None:
        negative_labels = tl.load(pool.negative_labels + offs_k, mask=k_ok, other=0)  # (BLOCK_K,)
        if pool.same_label is not None:
            allowed = allowed & (labels[:, None] == negative_labels[None, :])
        else:
            allowed = allowed & (labels[:, None] != negative_labels[None, :])
    if pool.guide_query is not None:
        s = guide_scores(pool, offs_b, b_ok, offs_k, k_ok)  # (BLOCK_B, BLOCK_K)
        limit = tl.load(pool.guide_limit + offs_b, mask=b_ok, other=0.0)  # (BLOCK_B,)
        allowed = allowed & ~(s > limit[:, None])  # a NaN hides nothing
    return allowed


@triton.jit
def folded(tags):
    """Fold int64 tags into int32: equal tags remain equal, and different tags rarely become equal."""
    return (tags ^ ((tags >> 32) * 0x9E3779B1)).to(tl.int32)


@triton.jit
def may_hide_pairs(pool, rows, start, stop, BLOCK_K: tl.constexpr):
    """Whether a column in [start, stop) may have the id or label of one of these rows, by comparing 32 bits of each pair."""
    ids, labels, _, _, _, _ = rows
    hits = tl.zeros((), tl.int32)
    for k0 in range(start, stop, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k_ok = offs_k < stop
        if pool.query_ids is not None:
            tags = folded(tl.load(pool.negative_ids + offs_k, mask=k_ok, other=0))  # (BLOCK_K,)
            hits = tl.maximum(hits, tl.max((tags[:, None] == folded(ids)[None, :]).to(tl.int32)))
        if pool.query_labels is not None:
            tags = folded(tl.load(pool.negative_labels + offs_k, mask=k_ok, other=0))  # (BLOCK_K,)
            hits = tl.maximum(hits, tl.max((tags[:, None] == folded(labels)[None, :]).to(tl.int32)))
    return hits > 0


@triton.jit
def guide_scores(pool, offs_b, b_ok, offs_k, k_ok):
    """(BLOCK_B, BLOCK_K) fp32: the guide's scores."""
    G: tl.constexpr = pool.guide_width
    BLOCK_G: tl.constexpr = pool.guide_block
    WIDEN: tl.constexpr = pool.guide_widens
    query = load_whole_rows(pool.guide_query, offs_b, b_ok, pool.stride_gb, G, BLOCK_G, WIDEN)  # (BLOCK_B, BLOCK_G)
    keys = load_whole_rows(pool.guide_keys, offs_k, k_ok, pool.stride_gk, G, BLOCK_G, WIDEN)  # (BLOCK_K, BLOCK_G)
    return score_tile(
        pool.guide_query, query, offs_b, b_ok, pool.stride_gb, pool.guide_keys, keys, offs_k, k_ok, pool.stride_gk,
        G, offs_b.shape[0], offs_k.shape[0], BLOCK_G, WIDEN,
    )  # fmt: skip


@triton.jit
def pool_bias(pool, offs_k, k_ok):
    """(BLOCK_K,) fp32: the bias of the columns, for a pool that has a bias."""
    return tl.load(pool.bias + offs_k, mask=k_ok, other=0.0)


@triton.jit
def at_or_above(s, offs_k, score, index):
    """(BLOCK_B, BLOCK_K) bool: columns whose sort key is at least that of (score, index) (BLOCK_B,)."""
    tie = (s == score[:, None]) & (offs_k.to(tl.int32)[None, :] <= index[:, None])
    return (s > score[:, None]) | tie


@triton.jit
def at_or_below(s, offs_k, score, index):
    """(BLOCK_B, BLOCK_K) bool: columns whose sort key is at most that of (score, index) (BLOCK_B,)."""
    tie = (s == score[:, None]) & (offs_k.to(tl.int32)[None, :] >= index[:, None])
    return (s < score[:, None]) | tie


@triton.jit
def pool_bounds(pool, rows, s, offs_k, allowed):
    """(BLOCK_B, BLOCK_K) bool: allowed columns whose sort key lies inside the bounds.  rows: from pool_rows."""
    _, _, lower_score, lower_index, upper_score, upper_index = rows
    inside = allowed  # (BLOCK_B, BLOCK_K)
    if pool.lower is not None:
        inside = inside & at_or_above(s, offs_k, lower_score, lower_index)
    if pool.upper is not None:
        inside = inside & at_or_below(s, offs_k, upper_score, upper_index)
    return inside
