"""Which negatives each query may see: the masks a caller gives, checked, and what they mean to a kernel and to the reference.

A Pool is the tail of arguments that every kernel takes (kernels/README.md): masks, and the two bounds that `bounded` adds for
score filters and rank windows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine import order, philox
from negmine.backends import Launchers
from negmine.checks import describe, refuse, require_tensor, require_vectors
from negmine.options import Select

UNKNOWN = -(2**63)  # stands for a query's unknown label: no key has it


class Pool(NamedTuple):
    """What every kernel is told of a row's columns, in order: seven optional tensors and a flag."""

    negative_mask: Tensor | None = None  # (K,) or (B, K) bool, True = usable
    query_ids: Tensor | None = None  # (B,) int64
    negative_ids: Tensor | None = None  # (K,) int64, equal = not a negative
    query_labels: Tensor | None = None  # (B,) int64
    negative_labels: Tensor | None = None  # (K,) int64, equal = not a negative
    lower: Tensor | None = None  # (B,) int64 order
    upper: Tensor | None = None  # (B,) int64 order
    same_label: bool = False  # True: equal labels are what is kept

    @property
    def is_everything(self) -> bool:
        return all(part is None for part in self[:7])


def _check_tags(
    op: str, names: tuple[str, str], query_tags: Any, negative_tags: Any, query: Tensor, negative_shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """A pair of ids or of labels: both or neither, whole numbers, one a query and one a negative."""
    if query_tags is None and negative_tags is None:
        return None, None
    if query_tags is None or negative_tags is None:
        given, missing = names if negative_tags is None else names[::-1]
        raise refuse(op, missing, f"given together with {given}", None)
    for name, tags, shape in ((names[0], query_tags, (len(query),)), (names[1], negative_tags, negative_shape)):
        require_tensor(op, name, tags, query)
        if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
            raise refuse(op, name, "a tensor of whole numbers", tags, TypeError)
        if tuple(tags.shape) != shape:
            raise refuse(op, name, f"of shape {shape}", tags)
    return query_tags.long().contiguous(), negative_tags.long().contiguous()


def check_pool(
    op: str,
    query: Tensor,
    negative_keys: Tensor,
    negative_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    keys_are: str = "negative",
) -> Pool:
    """The caller's masks, in the order of Pool; raises in a sentence where they do not fit query (B, D) and negative_keys.

    keys_are: how the caller's arguments name the keys: "negative", or "key".
    """
    own = (query.shape[0], negative_keys.shape[-2])  # (B, K)
    shared = own[1:]  # (K,)
    tag_shape = shared if negative_keys.dim() == 2 else own
    if negative_mask is not None:
        require_tensor(op, f"{keys_are}_mask", negative_mask, query)
        if negative_mask.dtype != torch.bool:
            raise refuse(op, f"{keys_are}_mask", "a bool tensor (True = usable)", negative_mask, TypeError)
        if tuple(negative_mask.shape) not in (shared, own):
            raise refuse(op, f"{keys_are}_mask", f"of shape {describe([shared, own])}", negative_mask)
        negative_mask = negative_mask.contiguous()
    ids = _check_tags(op, ("query_ids", f"{keys_are}_ids"), query_ids, negative_ids, query, tag_shape)
    labels = _check_tags(op, ("query_labels", f"{keys_are}_labels"), query_labels, negative_labels, query, tag_shape)
    return Pool(negative_mask, *ids, *labels)


def label_pool(
    op: str,
    query: Any,
    keys: Any,
    query_labels: Any,
    key_labels: Any,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_mask: Tensor | None,
) -> Pool:
    """The pool of keys of another label, checked; with same_label it is that of equal labels. Below 0 a label is unknown."""
    require_vectors(op, "query", query, "(B, D)", (2,))
    require_vectors(op, "keys", keys, "(K, D)", (2,), query)
    require_tensor(op, "query_labels", query_labels, query)
    pool = check_pool(op, query, keys, key_mask, query_ids, key_ids, query_labels, key_labels, keys_are="key")
    return pool._replace(query_labels=torch.where(query_labels < 0, UNKNOWN, query_labels.long()))


def usable(pool: Pool, query: Tensor, negative_keys: Tensor) -> Tensor | None:
    """The masks of a pool as one dense (B, K) bool for the reference; None where nothing is masked."""
    shape = (query.shape[0], negative_keys.shape[-2])  # (B, K)
    dense = None if pool.negative_mask is None else pool.negative_mask.expand(shape)
    for query_tags, negative_tags, same in ((*pool[1:3], False), (*pool[3:5], pool.same_label)):
        if query_tags is not None and negative_tags is not None:
            fits = (query_tags[:, None] == negative_tags) == same  # (B, K)
            dense = fits if dense is None else dense & fits
    return dense


def readable(negative_keys: Tensor, pool: Pool) -> Tensor:
    """Keys with zeros in the rows that a (K,) mask takes from everybody, which may hold anything, NaN included.

    For what reads every row: the dense products, and kernels under a (B, K) mask.
    """
    mask = pool.negative_mask
    if mask is None or mask.dim() == 2:
        return negative_keys
    return torch.where(mask[:, None], negative_keys, 0.0)


def of_columns(pool: Pool, part: slice) -> Pool:
    """The masks of a pool over some of the columns."""
    own, ids, labels = (
        None if t is None else t[..., part] for t in (pool.negative_mask, pool.negative_ids, pool.negative_labels)
    )
    return pool._replace(negative_mask=own, negative_ids=ids, negative_labels=labels)


def pieces(each: int, count: int, most: int) -> list[slice]:
    """[0, count) in pieces of at most `most` numbers, `each` an element, one element at least: columns of B scores, say."""
    step = max(1, most // max(1, each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def filtered(query: Tensor, pool: Pool, select: Select, positive_score: Tensor | None) -> Pool:
    """The pool narrowed by the score filters of `select`; positive_score (B,) is needed where it has a margin."""
    B = query.shape[0]
    if select.min_score is not None:
        least = torch.full((B,), select.min_score, dtype=torch.float32, device=query.device)
        pool = pool._replace(lower=order.pack(least, order.LAST_INDEX))
    if select.has_margin or select.max_score is not None:
        anchor = query.new_zeros(B, dtype=torch.float32) if positive_score is None else positive_score
        pool = pool._replace(upper=order.pack(select.highest_score(anchor), 0))
    return pool


def window_of(
    ops: Launchers, query: Tensor, negative_keys: Tensor, pool: Pool, select: Select
) -> tuple[Tensor | int, Tensor | int]:
    """The ranks [first, end) of a filtered pool that `select` keeps, (B,) int64 each or one number for all rows."""
    # Only fractions need the pool's size: a rank past the end of a pool has no place, and keeps nothing or everything.
    by_share = isinstance(select.range_min, float) or isinstance(select.range_max, float)
    if by_share and not pool.is_everything:
        return select.window(ops.count_negatives(query, negative_keys, *pool))
    return select.window(ops.rows(negative_keys))


def side_by_side(ranks: list[Tensor | int], query: Tensor) -> Tensor:
    """Ranks, (B,) each or one number for all rows -> (B, R) int64."""
    each = [
        rank if isinstance(rank, Tensor) else torch.full((len(query),), rank, dtype=torch.int64, device=query.device)
        for rank in ranks
    ]
    return torch.stack(each, 1)


def between(pool: Pool, first: Tensor | None, last: Tensor | None) -> Pool:
    """A filtered pool narrowed to the places [first, last] (B,) of its ranking.

    A rank with no place bounds nothing from below and leaves nothing above it: an empty window begins at such a rank.
    """
    if last is not None:
        lower = last.clamp_min(order.BOTTOM) if pool.lower is None else last.maximum(pool.lower)
        pool = pool._replace(lower=lower)
    return pool if first is None else pool._replace(upper=first.contiguous())


def bounded(
    ops: Launchers, query: Tensor, negative_keys: Tensor, pool: Pool, select: Select, positive_score: Tensor | None
) -> Pool:
    """The pool narrowed to what `select` keeps: its filters and its rank window as two places of each row.

    positive_score (B,) is needed where select has a margin. The places are exact: columns that tie with a bound are kept or
    dropped by their index.
    """
    pool = filtered(query, pool, select, positive_score)
    if not (select.starts_late or select.ends_early):
        if select.has_filter:
            return pool
        # A window of everything is a window: it keeps no NaN score.
        return pool._replace(lower=torch.full((len(query),), order.BOTTOM, device=query.device))
    first, end = window_of(ops, query, negative_keys, pool, select)
    wanted = side_by_side([first] * select.starts_late + [end - 1] * select.ends_early, query)
    places = ops.rank_thresholds(query, negative_keys, wanted, *pool)  # (B, 1 or 2)
    return between(pool, places[:, 0] if select.starts_late else None, places[:, -1] if select.ends_early else None)


def to_sum(
    ops: Launchers, query: Tensor, negative_keys: Tensor, pool: Pool, select: Select, positive_score: Tensor | None
) -> tuple[Pool, Tensor | None]:
    """What a log-sum-exp over `select` takes: the bounded pool, or the filtered one and ranks (B, 2), first and last.

    The latter where the backend sums a window in the pass that finds it, and the window is narrow: that sum reads the rows of
    the window again, one by one, and past an eighth of the queue another pass over all is faster.
    """
    narrow = select.ends_early and 8 * select.widest(ops.rows(negative_keys)) <= ops.rows(negative_keys)
    if ops.logsumexp_window is None or not narrow:
        return bounded(ops, query, negative_keys, pool, select, positive_score), None
    pool = filtered(query, pool, select, positive_score)
    first, end = window_of(ops, query, negative_keys, pool, select)
    return pool, side_by_side([first, end - 1], query)


def sampled(
    ops: Launchers,
    query: Tensor,
    negative_keys: Tensor,
    window: Pool,
    select: Select,
    seed: int,
    step: int,
    row_offset: int,
) -> Tensor:
    """The places (B, sample) int64 order that select.sample draws from a pool that `bounded` made, NOWHERE past its end."""
    count = ops.count_negatives(query, negative_keys, *window)  # (B,)
    rows = torch.arange(len(query), device=query.device) + row_offset  # (B,)
    most = select.widest(negative_keys.shape[-2])
    ranks = philox.sample(
        count, most, select.sample or 0, select.replace, rows, seed, step
    )  # (B, sample) in the window
    return ops.rank_thresholds(query, negative_keys, ranks, *window)
