"""Pool: which columns of a queue each query may see, as every kernel op takes it (kernels/README.md, "Pool")."""

from typing import NamedTuple

import torch
from torch import Tensor

from negmine.ops import sort_key
from negmine.ops.guide import within_limit


class Pool(NamedTuple):
    """The arguments that end the list of every op that reads a queue, in this order."""

    negative_mask: Tensor | None = None  # (K,) or (B, K) bool, True = usable
    query_ids: Tensor | None = None  # (B,) int64
    negative_ids: Tensor | None = None  # (K,) int64, equal = not a negative
    query_labels: Tensor | None = None  # (B,) int64
    negative_labels: Tensor | None = None  # (K,) int64, equal = not a negative
    lower: Tensor | None = None  # (B,) int64 sort keys: keep what is at or above
    upper: Tensor | None = None  # (B,) int64 sort keys: keep what is at or below
    num_rows: Tensor | None = None  # () int64: rows of the queue that are valid; None = all
    bias: Tensor | None = None  # (K,) fp32, added to the logits that are summed
    guide_query: Tensor | None = None  # (B, G)
    guide_keys: Tensor | None = None  # (K, G)
    guide_limit: Tensor | None = None  # (B,) fp32; guide_query . guide_keys above it = not a negative
    same_label: bool = False  # True: equal labels are what is kept

    @property
    def is_everything(self) -> bool:
        """True where every row of the queue is in every query's pool."""
        return all(part is None for part in self[:-1])

    @property
    def extra(self) -> str:
        """The part of the pool that not every backend takes: 'guide', 'bias' or ''."""
        return "guide" if self.guide_query is not None else "bias" if self.bias is not None else ""

    @property
    def is_bounded(self) -> bool:
        return self.lower is not None or self.upper is not None


def usable(pool: Pool, query: Tensor, negative_keys: Tensor) -> Tensor | None:
    """The masks of a pool as one dense (B, K) bool for the reference; None where nothing is masked. Bounds are left aside."""
    shape = (query.shape[0], negative_keys.shape[-2])  # (B, K)
    dense = None if pool.negative_mask is None else pool.negative_mask.expand(shape)
    if pool.num_rows is not None:
        valid = (torch.arange(shape[1], device=query.device) < pool.num_rows).expand(shape)  # (B, K)
        dense = valid if dense is None else dense & valid
    for query_tags, negative_tags, same in ((*pool[1:3], False), (*pool[3:5], pool.same_label)):
        if query_tags is not None and negative_tags is not None:
            fits = (query_tags[:, None] == negative_tags) == same  # (B, K)
            dense = fits if dense is None else dense & fits
    if pool.guide_query is not None and pool.guide_keys is not None and pool.guide_limit is not None:
        stays = within_limit(pool.guide_query, pool.guide_keys, pool.guide_limit)  # (B, K)
        dense = stays if dense is None else dense & stays
    return dense


def hide_masked_rows(negative_keys: Tensor, pool: Pool) -> Tensor:
    """Keys with zeros in the rows that a (K,) mask or num_rows hides from every query, which may hold anything, NaN included.

    For what reads every row: dense products, and kernels under a (B, K) mask.
    """
    visible = pool.negative_mask if pool.negative_mask is not None and pool.negative_mask.dim() == 1 else None
    if pool.num_rows is not None:
        valid = torch.arange(negative_keys.shape[-2], device=negative_keys.device) < pool.num_rows  # (K,)
        visible = valid if visible is None else visible & valid
    return negative_keys if visible is None else torch.where(visible[:, None], negative_keys, 0.0)


def pool_of_columns(pool: Pool, part: slice) -> Pool:
    """The pool of the columns `part` of the queue, as a queue of their own."""
    per_column = pool.negative_mask, pool.negative_ids, pool.negative_labels, pool.bias
    mask, ids, labels, bias = (None if t is None else t[..., part] for t in per_column)
    num_rows = None if pool.num_rows is None else (pool.num_rows - part.start).clamp_min(0)
    return pool._replace(
        negative_mask=mask, negative_ids=ids, negative_labels=labels, num_rows=num_rows, bias=bias,
        guide_keys=None if pool.guide_keys is None else pool.guide_keys[part],
    )  # fmt: skip


def narrow(pool: Pool, first: Tensor | None, last: Tensor | None) -> Pool:
    """A filtered pool narrowed to the columns between two sort keys (B,) of its ranking, `first` the harder one.

    A rank with no column bounds nothing from below and leaves nothing above it: an empty window begins at such a rank.
    """
    if last is not None:
        lower = last.clamp_min(sort_key.BOTTOM) if pool.lower is None else last.maximum(pool.lower)
        pool = pool._replace(lower=lower)
    return pool if first is None else pool._replace(upper=first.contiguous())


def pieces(each: int, count: int, most: int) -> list[slice]:
    """[0, count) in pieces of at most `most` numbers, `each` an element, one element at least: columns of B scores, say."""
    step = max(1, most // max(1, each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
