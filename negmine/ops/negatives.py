"""Checks the `negative_keys` argument of a public function and converts it into what kernels take: keys and a Pool."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine.ops.checks import Phrase, describe, not_a_tensor, refuse, require_tensor, require_vectors
from negmine.ops.guide import guide_limit, within_limit
from negmine.ops.pool import Pool
from negmine.ops.vectors import for_kernels, widened
from negmine.options import Negatives

KEYS = "a tensor, a MoCoQueue, a Negatives, or None for in-batch negatives"
UNKNOWN = -1  # an id or label that equals nothing
NO_MASK = Pool()
# "Tags" are ids or labels. Kernels get UNEQUAL in place of an unknown tag of a query; it differs from the tag of every key.
UNEQUAL = -(2**63)


class StoredColumns(NamedTuple):
    """The content of a queue: all its rows, and the number of valid ones."""

    keys: Tensor  # (K, D)
    ids: Tensor | None  # (K,) int64
    labels: Tensor | None  # (K,) int64
    num_rows: Tensor | None  # () int64 on the device, None = all rows are valid


def check_negatives(
    op: str,
    query: Any,
    positive_key: Tensor | None,
    negative_keys: Any,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    own_keys: bool = False,
    options: tuple[str, ...] = (),
    with_bias: bool = False,
    name: str = "negative_keys",
) -> tuple[Tensor, Pool]:
    """Check query (B, D) and negatives in any form. Returns keys (K, D), or (B, M, D), and the pool of the caller's masks.

    Parameters
    ----------
    negative_keys
        A tensor, a queue (an object with stored_columns()), a Negatives, or None for the positives of the other rows.
    own_keys
        Whether keys (B, M, D), a list of keys for each query, are allowed.
    options
        The options (select, mix, weight) that the caller reads from a Negatives. The others must be None in it.
    with_bias
        True if the caller sums logits: the pool then includes the bias of a Negatives. A caller that only ranks scores passes
        False, because a bias does not change the ranking.
    name
        The name of the argument for error messages.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type, shape, dtype or device.
    """
    require_vectors(op, "query", query, "(B, D)", (2,))
    if type(negative_keys) is Tensor and query_ids is None and query_labels is None:
        _require_keys(op, name, negative_keys, query, own_keys)
        return negative_keys, NO_MASK
    given = negative_keys if isinstance(negative_keys, Negatives) else Negatives(_as_keys(op, name, negative_keys))
    for option in ("select", "mix", "weight"):
        if option not in options and getattr(given, option) is not None:
            raise refuse(op, f"{name}.{option}", f"None, because {op} has no option {option}", getattr(given, option))
    keys, ids, labels, num_rows = given.keys, given.ids, given.labels, None
    if keys is None:
        keys, pool = _in_batch(op, query, positive_key, given.mask, query_ids, query_labels, name)
        return keys, _with_bias_and_guide(op, query, keys, pool, given, with_bias, name)
    if not isinstance(keys, Tensor):
        if not hasattr(keys, "stored_columns"):
            raise refuse(op, f"{name}.keys", "a tensor, a MoCoQueue, or None", not_a_tensor(keys), TypeError)
        stored = keys.stored_columns()
        keys, num_rows = stored.keys, stored.num_rows
        # The tags of the queue are used only if the query has tags. Tags in a Negatives replace those of the queue.
        ids = ids if ids is not None or query_ids is None else stored.ids
        labels = labels if labels is not None or query_labels is None else stored.labels
        for argument, tags, found, option in (
            ("query_ids", query_ids, ids, "with_ids"),
            ("query_labels", query_labels, labels, "with_labels"),
        ):
            if tags is not None and found is None:
                raise refuse(op, argument, f"None, because the queue was created without {option}=True", tags)
    _require_keys(op, name, keys, query, own_keys)
    names = (f"{name}.mask", f"{name}.ids", f"{name}.labels")
    pool = _pool(op, query, keys, given.mask, query_ids, ids, query_labels, labels, num_rows, names)
    return keys, _with_bias_and_guide(op, query, keys, pool, given, with_bias, name)


def option_of(negative_keys: Any, option: str, common: Any) -> Any:
    """select, mix or weight of a pool: its own if it has one, else `common`, the argument of the call."""
    own = getattr(negative_keys, option) if isinstance(negative_keys, Negatives) else None
    return common if own is None else own


def pools_in(op: str, negative_keys: list | tuple, name: str = "negative_keys") -> list:
    """The pools in a list, which must have at least one and must not be nested."""
    if not negative_keys:
        raise refuse(op, name, "a list of at least one pool", negative_keys)
    for p, given in enumerate(negative_keys):
        if isinstance(given, (list, tuple)):
            raise refuse(op, f"{name}[{p}]", KEYS, not_a_tensor(given), TypeError)
    return list(negative_keys)


def check_pools(
    op: str,
    query: Any,
    positive_key: Tensor | None,
    pools: list,
    query_ids: Tensor | None,
    query_labels: Tensor | None,
    options: tuple[str, ...],
) -> list[tuple[Tensor, Pool]]:
    """check_negatives for several pools.

    Ids and labels of the queries are compared in each pool that has ids or labels. At least one pool must have them.
    """
    for argument, given_tags, kind in (("query_ids", query_ids, "ids"), ("query_labels", query_labels, "labels")):
        if given_tags is not None and not any(has_tags(given, kind) for given in pools):
            raise refuse(op, argument, f"None, because no pool of negative_keys has {kind}", given_tags)
    checked = []
    for p, given in enumerate(pools):
        name = f"negative_keys[{p}]"
        by_ids, by_labels = has_tags(given, "ids"), has_tags(given, "labels")
        tags = query_ids if by_ids else None, query_labels if by_labels else None
        checked.append(
            check_negatives(
                op, query, positive_key, given, *tags, own_keys=True, options=options, with_bias=True, name=name
            )
        )
    return checked


def has_tags(given: Any, kind: str) -> bool:
    """True if a pool has ids or labels (`kind`) to compare with those of the queries."""
    keys = given
    if isinstance(given, Negatives):
        if getattr(given, kind) is not None:
            return True
        keys = given.keys
    return keys is None or (hasattr(keys, "stored_columns") and getattr(keys.stored_columns(), kind) is not None)


def _as_keys(op: str, name: str, value: Any) -> Any:
    if value is None or isinstance(value, Tensor) or hasattr(value, "stored_columns"):
        return value
    came = not_a_tensor(value)
    if isinstance(value, (list, tuple)) and any(isinstance(each, (Tensor, Negatives)) for each in value):
        came = Phrase(f"several pools, but {op} takes one")
    raise refuse(op, name, KEYS, came, TypeError)


def _require_keys(op: str, name: str, keys: Tensor, query: Tensor, own_keys: bool) -> None:
    shapes, dims = ("(K, D) or (B, M, D)", (2, 3)) if own_keys else ("(K, D)", (2,))
    require_vectors(op, name, keys, shapes, dims, query)
    if keys.dim() == 3 and keys.shape[0] != query.shape[0]:
        raise refuse(op, name, f"of shape (B, M, D) with query's B = {query.shape[0]}", keys)


def _in_batch(
    op: str, query: Tensor, positive_key: Tensor | None, mask: Any, query_ids: Any, query_labels: Any, name: str
) -> tuple[Tensor, Pool]:
    """The positives of the batch as keys. Each query's own positive, and rows with an equal id or label, are not negatives."""
    if positive_key is None:
        raise refuse(op, name, "given if there is no positive_key", None)
    require_vectors(op, "positive_key", positive_key, "(B, D)", (2,), query)
    own = torch.arange(len(query), device=query.device)  # (B,)
    if query_ids is not None:
        query_ids = _tags(op, "query_ids", query_ids, query, (len(query),))
        query_ids = torch.where(query_ids == UNKNOWN, UNEQUAL + 1 + own, query_ids)
    ids = own if query_ids is None else query_ids
    names = (f"{name}.mask", "query_ids", "query_labels")
    return positive_key, _pool(op, query, positive_key, mask, ids, ids, query_labels, query_labels, None, names)


def _with_bias_and_guide(
    op: str, query: Tensor, keys: Tensor, pool: Pool, given: Negatives, with_bias: bool, name: str
) -> Pool:
    """Add the bias of a Negatives, in fp32 or float64, and its guide to the pool. For keys (B, M, D) the guide becomes a mask."""
    own = (len(query), keys.shape[-2])  # (B, K)
    if given.bias is not None:
        require_tensor(op, f"{name}.bias", given.bias, query)
        shape = own[1:] if keys.dim() == 2 else own
        if not given.bias.is_floating_point() or tuple(given.bias.shape) != shape:
            raise refuse(op, f"{name}.bias", f"a floating tensor of shape {shape}", given.bias)
        pool = pool._replace(bias=widened(given.bias) if with_bias else None)
    guide = given.guide
    if guide is None:
        return pool
    require_tensor(op, f"{name}.guide.query", guide.query, query)
    if len(guide.query) != len(query):
        raise refuse(op, f"{name}.guide.query", f"of shape (B, G) with query's B = {len(query)}", guide.query)
    columns: Any = guide.positive if guide.keys is None and given.keys is None else guide.keys
    require_tensor(op, f"{name}.guide.keys", columns, query)
    require_tensor(op, f"{name}.guide.positive", guide.positive, query)
    if tuple(columns.shape[:-1]) != tuple(keys.shape[:-1]):
        wanted = f"of shape {(*keys.shape[:-1], guide.query.shape[1])}, one row for each key"
        raise refuse(op, f"{name}.guide.keys", wanted, columns)
    if keys.dim() == 3:
        keep = within_limit(guide.query, columns, guide_limit(guide))  # (B, M)
        return pool._replace(negative_mask=keep if pool.negative_mask is None else keep & pool.negative_mask)
    parts = [for_kernels(part) for part in (guide.query, columns, guide_limit(guide))]
    if query.dtype != torch.float64:  # kernels do not support float64
        parts = [part.float() if part.dtype == torch.float64 else part for part in parts]
    return pool._replace(guide_query=parts[0], guide_keys=parts[1], guide_limit=parts[2])


def _tags(op: str, name: str, tags: Any, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    require_tensor(op, name, tags, query)
    if tags.is_floating_point() or tags.is_complex() or tags.dtype == torch.bool:
        raise refuse(op, name, "an integer tensor", tags, TypeError)
    if tuple(tags.shape) != shape:
        raise refuse(op, name, f"of shape {shape}", tags)
    return tags.long().contiguous()


def _tag_pair(
    op: str, names: tuple[str, str], query_tags: Any, key_tags: Any, query: Tensor, key_shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Check a pair of ids or of labels: both or neither are given, and they are integers, one per query and one per key."""
    if query_tags is None and key_tags is None:
        return None, None
    if query_tags is None or key_tags is None:
        given, missing = names if key_tags is None else names[::-1]
        kind = names[0].removeprefix("query_")
        how = f", as in Negatives(keys, {kind}=...)" if missing.endswith(f".{kind}") else ""
        raise refuse(op, missing, f"given together with {given}{how}", None)
    query_tags = _tags(op, names[0], query_tags, query, (len(query),))
    return query_tags.masked_fill(query_tags == UNKNOWN, UNEQUAL), _tags(op, names[1], key_tags, query, key_shape)


def _pool(
    op: str, query: Tensor, keys: Tensor, mask: Any, query_ids: Any, ids: Any, query_labels: Any, labels: Any,
    num_rows: Tensor | None, names: tuple[str, str, str],
) -> Pool:  # fmt: skip
    own = (query.shape[0], keys.shape[-2])  # (B, K)
    shared = own[1:]  # (K,)
    tag_shape = shared if keys.dim() == 2 else own
    if mask is not None:
        require_tensor(op, names[0], mask, query)
        if mask.dtype != torch.bool:
            raise refuse(op, names[0], "a bool tensor (True = usable)", mask, TypeError)
        if tuple(mask.shape) not in (shared, own):
            raise refuse(op, names[0], f"of shape {describe([shared, own])}", mask)
        mask = mask.contiguous()
    pair_of_ids = _tag_pair(op, ("query_ids", names[1]), query_ids, ids, query, tag_shape)
    pair_of_labels = _tag_pair(op, ("query_labels", names[2]), query_labels, labels, query, tag_shape)
    return Pool(mask, *pair_of_ids, *pair_of_labels, num_rows=num_rows)


def check_labelled_keys(
    op: str, query: Any, keys: Any, query_labels: Any, key_labels: Any, query_ids: Any, key_ids: Any, key_mask: Any
) -> Pool:
    """Check the arguments and return the pool of the keys (K, D) whose label differs from the query's.

    With same_label=True it becomes the pool of the keys with an equal label.
    """
    require_vectors(op, "query", query, "(B, D)", (2,))
    require_vectors(op, "keys", keys, "(K, D)", (2,), query)
    for name, labels in (("query_labels", query_labels), ("key_labels", key_labels)):
        require_tensor(op, name, labels, query)
    return labelled_pool(op, query, keys, key_mask, query_ids, key_ids, query_labels, key_labels)


def labelled_pool(
    op: str,
    query: Tensor,
    keys: Tensor,
    key_mask: Any,
    query_ids: Any,
    key_ids: Any,
    query_labels: Any,
    key_labels: Any,
) -> Pool:
    """Check masks and tags and return their pool. The keys (K, D) have been checked already. The labels may be None."""
    names = ("key_mask", "key_ids", "key_labels")
    return _pool(op, query, keys, key_mask, query_ids, key_ids, query_labels, key_labels, None, names)
