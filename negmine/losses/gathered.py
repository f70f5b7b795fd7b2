"""Negatives of all ranks: the function `gathered`, and gather_distributed=True of the losses.

Each rank passes its own queries and gets the loss of its own rows with the keys of all ranks. The gradient of a gathered row is
the sum of its gradients from the losses of all ranks. With DistributedDataParallel, which averages gradients, a model therefore
gets the gradient of the mean of the ranks' losses. This equals the gradient of one process with the whole batch if the batches of
the ranks are of equal size and the reduction is "mean". All ranks must pass the same options. If one rank raises an error, all
do.

torch.compile breaks the graph where ranks communicate, because they compare their options on the host. fullgraph=True is
therefore not possible with more than one rank. A new step does not cause recompilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negmine.collectives import Call, Ranks, SharedGroup
from negmine.ops import checks
from negmine.ops.negatives import UNEQUAL, UNKNOWN
from negmine.options import Negatives


def gathered(rows: Tensor, *, process_group: Any = None) -> Tensor:
    """The rows of all ranks of a process group, concatenated in rank order, with gradient.

    Parameters
    ----------
    rows : Tensor (B, ...)
        The rows of this rank. On a GPU, B must be the same on all ranks.
    process_group : ProcessGroup, optional
        The process group of torch.distributed. The default is all ranks.

    Returns
    -------
    Tensor (sum of B, ...)
        The rows of all ranks. In one process, or without torch.distributed, the rows themselves.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid, or if the ranks make different calls. Every rank raises an error if one does.

    Notes
    -----
    The gradient of a row is the sum of its gradients from the losses of all ranks. Backward communicates too, so every rank
    must run it.

    Examples
    --------
    >>> rows = torch.randn(8, 16, requires_grad=True)
    >>> negmine.losses.gathered(rows).shape  # in one process
    torch.Size([8, 16])
    """
    op, ranks = "gathered", Ranks(process_group)
    with ranks.agreement(op, _device_of(ranks, rows)) as call:
        checks.require_tensor(op, "rows", rows)
        if rows.dim() == 0:
            raise checks.refuse(op, "rows", "of shape (B, ...)", rows)
        call.facts = {"rows": _kind(rows)}
        call.count = len(rows)
    return ranks.gather_with_gradient(rows, call.counts)


def _device_of(ranks: Ranks, *values: Any) -> torch.device | None:
    """The device of the tensors of a call; None if it has no tensors."""
    return next((value.device for value in values if isinstance(value, Tensor)), None)


def _kind(value: Any) -> str:
    """The properties of a gathered tensor, or of an option, that must be equal on all ranks."""
    if isinstance(value, Tensor):
        grad = ", requires grad" if torch.is_grad_enabled() and value.requires_grad else ""
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape[1:])}{grad}"
    return checks.describe(value)


class Gathering:
    """The options gather_distributed and process_group of a loss module. It calls a loss with the negatives of all ranks."""

    def __init__(self, op: str, gather_distributed: Any, process_group: Any) -> None:
        checks.require_bool(op, "gather_distributed", gather_distributed)
        self.op, self.wanted, self._group = op, gather_distributed, SharedGroup(process_group)

    @property
    def process_group(self) -> Any:
        return self._group.group

    @property
    def rank(self) -> int:
        """This rank, or 0 if nothing is gathered."""
        return Ranks(self.process_group).rank if self.wanted else 0

    def paired(
        self, loss: Callable[..., Any], query: Any, positive_key: Any, negative_keys: Any, options: dict[str, Any]
    ) -> Any:
        """loss(query, positive_key, negative_keys, **options) with the negatives of all ranks.

        If negative_keys is None, the negatives are the positives of all ranks, except the query's own positive and those of rows
        with equal query_ids or query_labels. A tensor (K, D) is concatenated with those of the other ranks. A queue, or keys
        (B, M, D), are not gathered.
        """
        ranks = Ranks(self.process_group) if self.wanted else None
        if ranks is None or ranks.size == 1:
            return loss(query, positive_key, negative_keys, **options)
        op, device = self.op, _device_of(ranks, query, positive_key)
        tags = {name: options.get(name) for name in ("query_ids", "query_labels")}
        with ranks.agreement(op, device) as call:
            checks.require_vectors(op, "query", query, "(B, D)", (2,))
            checks.require_positive(op, positive_key, query)
            pools = [_as_negatives(op, given, query) for given in _listed(negative_keys)]
            for name, given in tags.items():
                _require_tags(op, name, given, query, (len(query),))
            call.count = len(query)
            call.facts = _facts(options) | {"query": _kind(query), "positive_key": _kind(positive_key)}
            for place, pool in enumerate(pools):
                call.facts |= _facts_of_pool(f"negative_keys {place}", pool)
        own = sum(call.counts[: ranks.rank]) + torch.arange(len(query), device=query.device)  # (B,) global rows
        joined = [self._joined(ranks, call, pool, positive_key, own, tags, len(pools) == 1) for pool in pools]
        if any(pool.keys is None for pool in pools):
            if tags["query_ids"] is not None:
                tags["query_ids"] = _distinct(tags["query_ids"], own)
            elif len(pools) == 1:
                tags["query_ids"] = own
        options = {"row_offset": sum(call.counts[: ranks.rank]), **options, **tags}
        negative_keys = joined if len(joined) > 1 else joined[0]
        return self._run(ranks, loss, device, query, positive_key, negative_keys, **options)

    def _joined(
        self,
        ranks: Ranks,
        call: Call,
        pool: Negatives,
        positive_key: Tensor,
        own: Tensor,
        tags: dict[str, Any],
        alone: bool,
    ) -> Negatives:
        """The pool with the columns of all ranks."""
        keys = pool.keys
        if keys is None:
            counts, fields = call.counts, {"ids": tags["query_ids"], "labels": tags["query_labels"]}
            if fields["ids"] is not None:
                fields["ids"] = _distinct(fields["ids"], own)  # unknown ids become distinct
            elif alone:
                fields["ids"] = own
            else:  # a mask, because query_ids would also be compared with the ids of the other pools
                others = torch.arange(sum(counts), device=own.device) != own[:, None]  # (B, sum of counts)
                fields["mask"] = others if pool.mask is None else others & pool.mask
            keys = positive_key
        elif isinstance(keys, Tensor) and keys.dim() == 2:
            counts = [len(keys)] * ranks.size
            fields = {"ids": pool.ids, "labels": pool.labels, "mask": pool.mask}
        else:
            return pool
        for name in ("ids", "labels", "mask"):
            if name in fields and fields[name] is not None and fields[name].dim() == 1:
                fields[name] = ranks.gather_rows(fields[name], counts)
        bias, guide = getattr(pool, "bias", None), getattr(pool, "guide", None)
        if bias is not None and bias.dim() == 1:
            fields["bias"] = ranks.gather_with_gradient(bias, counts)
        if guide is not None:
            guide_keys = guide.positive if pool.keys is None else guide.keys
            fields["guide"] = dataclasses.replace(guide, keys=ranks.gather_rows(guide_keys, counts))
        return dataclasses.replace(pool, keys=ranks.gather_with_gradient(keys, counts), **fields)

    def labelled(
        self,
        loss: Callable[..., Any],
        query: Any,
        keys: Any,
        query_labels: Any,
        key_labels: Any,
        options: dict[str, Any],
    ) -> Any:
        """loss(query, keys, query_labels, key_labels, **options) with the keys of all ranks.

        Their labels, key_ids and key_mask (K,) are gathered like the keys.
        """
        ranks = Ranks(self.process_group) if self.wanted else None
        if ranks is None or ranks.size == 1:
            return loss(query, keys, query_labels, key_labels, **options)
        op, device = self.op, _device_of(ranks, query, keys)
        tags = {"key_labels": key_labels, "key_ids": options.get("key_ids")}
        mask = options.get("key_mask")
        with ranks.agreement(op, device) as call:
            checks.require_vectors(op, "keys", keys, "(K, D)", (2,))
            for name, given in tags.items():
                _require_tags(op, name, given, keys, (len(keys),))
            call.count = len(keys)
            call.facts = _facts(options) | {
                "keys": _kind(keys),
                **{name: given is not None for name, given in tags.items()},
            }
        tags = {name: given if given is None else ranks.gather_rows(given, call.counts) for name, given in tags.items()}
        if isinstance(mask, Tensor) and mask.dim() == 1:
            mask = ranks.gather_rows(mask, call.counts)
        all_keys = ranks.gather_with_gradient(keys, call.counts)
        options = {**options, "key_ids": tags["key_ids"], "key_mask": mask}
        return self._run(ranks, loss, device, query, all_keys, query_labels, tags["key_labels"], **options)

    def _run(
        self, ranks: Ranks, loss: Callable[..., Any], device: torch.device | None, *tensors: Any, **options: Any
    ) -> Any:
        """The loss of this rank's rows. If one rank raises an error, all do, before any backward pass starts."""
        with ranks.agreement(f"{self.op}, after gathering", device):
            return loss(*tensors, **options)


def _listed(negative_keys: Any) -> list:
    return list(negative_keys) if isinstance(negative_keys, (list, tuple)) else [negative_keys]


def _as_negatives(op: str, given: Any, query: Tensor) -> Negatives:
    pool = given if isinstance(given, Negatives) else Negatives(given)
    if isinstance(pool.keys, Tensor):
        checks.require_vectors(op, "negative_keys", pool.keys, "(K, D) or (B, M, D)", (2, 3), query)
    return pool


def _require_tags(op: str, name: str, given: Any, like: Tensor, shape: tuple[int, ...]) -> None:
    if given is None:
        return
    checks.require_tensor(op, name, given, like)
    if given.is_floating_point() or given.dtype == torch.bool or tuple(given.shape) != shape:
        raise checks.refuse(op, name, f"an integer tensor of shape {shape}", given)


def _distinct(ids: Tensor, own: Tensor) -> Tensor:
    """ids (B,) in which unknown ids are replaced by distinct numbers below all others. own (B,): the global row numbers."""
    ids = ids.long()
    return torch.where(ids == UNKNOWN, UNEQUAL + 1 + own, ids)


def _facts(options: dict[str, Any]) -> dict[str, Any]:
    """The options that must be equal on all ranks. The values of tensors may differ."""
    return {
        name: "a tensor" if isinstance(value, Tensor) else checks.describe(value)
        for name, value in options.items()
        if name not in ("step", "row_offset")
    }


def _facts_of_pool(name: str, pool: Negatives) -> dict[str, Any]:
    parts = {field.name: getattr(pool, field.name) for field in dataclasses.fields(pool)}
    kinds = {f"{name} {part}": type(value).__name__ for part, value in parts.items()}
    if isinstance(pool.keys, Tensor):
        shape = tuple(pool.keys.shape[:-1] if pool.keys.dim() == 2 else pool.keys.shape[1:-1])
        kinds[f"{name} keys"] = f"{shape} {_kind(pool.keys)}"
    return kinds
