"""Pool: the arguments of a kernel op that say which columns of a queue are candidates of each query.

The section "Pool" of kernels/README.md has their exact meaning.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negmine.ops import sort_key
from negmine.ops.guide import within_limit


class Pool(NamedTuple):
    """The last arguments of every op that reads a queue, in this order."""

    negative_mask: Tensor | None = None  # (K,) or (B, K) bool, True = may be a negative
    query_ids: Tensor | None = None  # (B,) int64
    negative_ids: Tensor | None = None  # (K,) int64, equal = not a negative
    query_labels: Tensor | None = None  # (B,) int64
    negative_labels: Tensor | None = None  # (K,) int64, equal = not a negative
    lower: Tensor | None = None  # (B,) int64 sort keys: the columns at or above it are kept
    upper: Tensor | None = None  # (B,) int64 sort keys: the columns at or below it are kept
    num_rows: Tensor | None = None  # () int64: number of valid rows in the queue; None = all
    bias: Tensor | None = None  # (K,) fp32, added to the logits that are summed
    guide_query: Tensor | None = None  # (B, G)
    guide_keys: Tensor | None = None  # (K, G)
    guide_limit: Tensor | None = None  # (B,) fp32; guide_query . guide_keys above it = not a negative
    same_label: bool = False  # True: the columns with equal labels are kept instead of removed

    @property
    def is_everything(self) -> bool:
        """True if every row of the queue is in every query's pool."""
        return all(part is None for part in self[:-1])

    @property
    def extra(self) -> str:
        """The part of the pool that some backends do not support: 'guide', 'bias' or ''."""
        return "guide" if self.guide_query is not None else "bias" if self.bias is not None else ""

    @property
    def is_bounded(self) -> bool:
        return self.lower is not None or self.upper is not None


def usable(pool: Pool, query: Tensor, negative_keys: Tensor) -> Tensor | None:
    """Combine the masks of a pool, without its bounds, into one (B, K) bool for the reference; None if nothing is masked."""
    shape = (query.shape[0], negative_keys.shape[-2])  # (B, K)
    dense = None if pool.negative_mask is None else pool.negative_mask.expand(shape)
    if pool.num_rows is not None:
        valid = (torch.arange(shape[1], device=query.device) < pool.num_rows).expand(shape)  # (B, K)
        dense = valid if dense is None else dense & valid
    for query_tags, negative_tags, same in ((*pool[1:3], False), (*pool[3:5], pool.same_label)):
        if query_tags is not None and negative_tags is not None:
            allowed = (query_tags[:, None] == negative_tags) == same  # (B, K)
            dense = allowed if dense is None else dense & allowed
    if pool.guide_query is not None and pool.guide_keys is not None and pool.guide_limit is not None:
        allowed = within_limit(pool.guide_query, pool.guide_keys, pool.guide_limit)  # (B, K)
        dense = allowed if dense is None else dense & allowed
    return dense


def hide_masked_rows(negative_keys: Tensor, pool: Pool) -> Tensor:
    """Return the keys with zeros in the rows that a (K,) mask or num_rows hides from every query.

    Such rows may hold any values, NaN included. Code that reads every row needs this: dense products, and kernels with a (B, K)
    mask.
    """
    visible = pool.negative_mask if pool.negative_mask is not None and pool.negative_mask.dim() == 1 else None
    if pool.num_rows is not None:
        valid = torch.arange(negative_keys.shape[-2], device=negative_keys.device) < pool.num_rows  # (K,)
        visible = valid if visible is None else visible & valid
    return negative_keys if visible is None else torch.where(visible[:, None], negative_keys, 0.0)


def pool_of_columns(pool: Pool, part: slice) -> Pool:
    """The pool of a queue that consists of the columns `part` only."""
    per_column = pool.negative_mask, pool.negative_ids, pool.negative_labels, pool.bias
    mask, ids, labels, bias = (None if t is None else t[..., part] for t in per_column)
    num_rows = None if pool.num_rows is None else (pool.num_rows - part.start).clamp_min(0)
    return pool._replace(
        negative_mask=mask, negative_ids=ids, negative_labels=labels, num_rows=num_rows, bias=bias,
        guide_keys=None if pool.guide_keys is None else pool.guide_keys[part],
    )  # fmt: skip


def pool_of_lists(pool: Pool, index: Tensor) -> Pool:
    """The masks of a pool for keys (B, M, D) that are gathered from its queue, or from each query's own keys, at index (B, M)."""

    def listed(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index] if values.dim() == 1 else values.gather(1, index)

    mask = listed(pool.negative_mask)  # (B, M)
    if pool.num_rows is not None:
        mask = index < pool.num_rows if mask is None else mask & (index < pool.num_rows)
    return pool._replace(
        negative_mask=mask, negative_ids=listed(pool.negative_ids), negative_labels=listed(pool.negative_labels),
        num_rows=None, bias=None, guide_keys=None if pool.guide_keys is None else pool.guide_keys[index],
    )  # fmt: skip


def narrow(pool: Pool, first: Tensor | None, last: Tensor | None) -> Pool:
    """Narrow a filtered pool to the columns between two sort keys (B,), those of the first and the last rank of a window.

    A rank past the end of the pool has the sort key NOWHERE. As the last rank it removes nothing; as the first rank it leaves the
    window empty.
    """
    if last is not None:
        lower = last.clamp_min(sort_key.BOTTOM) if pool.lower is None else last.maximum(pool.lower)
        pool = pool._replace(lower=lower)
    return pool if first is None else pool._replace(upper=first.contiguous())


def pieces(each: int, count: int, most: int) -> list[slice]:
    """Split [0, count) into slices that need at most `most` numbers, where each element needs `each` of them.

    A slice has at least one element. An element is for example a column of B scores.
    """
    step = max(1, most // max(1, each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
