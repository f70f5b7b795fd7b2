"""ShardedMoCoQueue: a MoCoQueue whose rows are distributed over the ranks of a process group.

Each of the W ranks stores K / W rows. It passes its own queries and gets the losses and negatives that one process with the whole
queue would compute for them. The communication is in negmine/queues/sharded_ops.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.collectives import Ranks, SharedGroup
from negmine.losses.info_nce import Batch, Plan
from negmine.ops import backends, checks
from negmine.ops.accumulate import each_widened
from negmine.ops.negatives import check_negatives
from negmine.ops.pool import Pool
from negmine.ops.sort_key import LAST_INDEX
from negmine.ops.vectors import for_kernels, scale_of, score_of_positive
from negmine.ops.windows import bounded
from negmine.options import Negatives, Select, Weight
from negmine.queues.moco import MoCoQueue, check_arguments, from_moco, wrong_counter
from negmine.queues.sharded_ops import Merging, ShardedKernels
from negmine.selection import Mined

ROWS = ("queue", "queue_ids", "queue_labels")  # buffers with one entry for each row
COUNTERS = ("queue_ptr", "queue_len")
ROWS_AT_ONCE = 4096  # number of rows that random_init draws with one seed


class ShardedMoCoQueue(MoCoQueue):
    """A `MoCoQueue` whose rows are distributed over the ranks of a process group.

    Its losses and negatives are those of the whole queue.

    Parameters
    ----------
    dim, K, dtype, with_ids, with_labels : optional
        As in `MoCoQueue`. K is the size of the whole queue, at least the number of ranks.
    random_init : bool
        True starts with K random unit vectors, which depend on `seed` but not on the number of ranks. False starts with an
        empty queue.
    seed : int
        The seed of the random vectors.
    process_group : ProcessGroup, optional
        The process group whose ranks store the queue. The default is all ranks, or this process without torch.distributed.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid or differs between ranks. Every rank raises an error if one does.

    Notes
    -----
    The constructor, `enqueue`, `info_nce`, `mine_hardest`, ``load_state_dict`` and `load_shards` are collective: every rank
    must call them in the same order, with the same options. If one rank raises an error, all ranks do. Batches may differ in
    size between ranks, and may be empty.

    Rank r of W stores rows [r C, (r + 1) C), with C = K / W rounded up. ``state_dict`` has these rows under MoCoQueue's
    names, and queue_range (3,) int64: the first row, the end and K. Rows, ids and labels are not buffers, because
    DistributedDataParallel would overwrite them with those of rank 0. `keys`, `ids` and `labels` are the valid rows of this
    rank, but ``len()`` is the length of the whole queue. Use `distributed_state_dict` with torch.distributed.checkpoint.

    Examples
    --------
    >>> queue = negmine.queues.ShardedMoCoQueue(dim=16, K=100)  # in one process: the whole queue
    >>> query, key = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> loss = queue.info_nce(query, key, temperature=0.2)
    >>> queue.enqueue(key)
    >>> queue.mine_hardest(query, 5).index.shape
    torch.Size([8, 5])
    """

    def __init__(
        self,
        dim: int = 128,
        K: int = 65536,
        *,
        dtype: torch.dtype | None = None,
        with_ids: bool = False,
        with_labels: bool = False,
        random_init: bool = True,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        arguments: dict[str, Any] = {
            "dim": dim, "K": K, "dtype": dtype, "with_ids": with_ids, "with_labels": with_labels, "random_init": random_init,
        }  # fmt: skip
        op, ranks = type(self).__name__, Ranks(process_group)
        with ranks.agreement(op) as call:
            check_arguments(op, **arguments, least=ranks.size)
            if K > LAST_INDEX:
                raise checks.refuse(op, "K", f"at most {LAST_INDEX}, because a sort key has 32 bits for an index", K)
            checks.require_draw(op, seed, 0, 0)
            call.facts = {**arguments, "seed": seed}
        rows_each = -(-K // ranks.size)  # the split of torch.chunk and DTensor
        first, end = (min(place * rows_each, K) for place in (ranks.rank, ranks.rank + 1))
        self.K, self.gather_distributed, self._group = K, True, SharedGroup(process_group)
        self._first = first  # the number in the whole queue of the first row stored here
        rows = torch.zeros(end - first, dim, dtype=dtype or torch.get_default_dtype())
        self._make_buffers(rows, with_ids, with_labels, K if random_init else 0)
        if random_init:
            drawn = torch.empty(ROWS_AT_ONCE, dim, dtype=torch.float32, device="cpu")  # the only temporary memory
            for block in range(first // ROWS_AT_ONCE, -(-end // ROWS_AT_ONCE)):
                start = block * ROWS_AT_ONCE
                drawn.normal_(generator=torch.Generator().manual_seed(seed * (LAST_INDEX + 1) + block))
                F.normalize(drawn, dim=1, out=drawn)
                low, high = max(start, first), min(start + ROWS_AT_ONCE, end)
                self.queue[low - first : high - first] = drawn[low - start : high - start]

    def _store(self, name: str, rows: Tensor | None) -> None:
        setattr(self, name, rows)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors that this rank holds, by name, with one entry for each of its rows."""
        return {name: rows for name in ROWS if (rows := getattr(self, name)) is not None}

    @property
    def _range(self) -> list[int]:
        return [self._first, self._first + len(self.queue), self.K]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, rows in self.stored.items():
            setattr(self, name, fn(rows))
        return super()._apply(fn, recurse)

    @property
    def _held(self) -> int:
        return min(max(len(self) - self._first, 0), len(self.queue))

    def stored_columns(self) -> Any:
        raise TypeError(
            f"{type(self).__name__}: no rank stores the whole queue; call the queue's methods info_nce and mine_hardest"
        )

    def _write(self, columns: list[tuple[Tensor, Tensor]]) -> None:
        finite = columns[0][1].isfinite().all(1)  # (B,) the rows of all ranks, so all ranks skip the same rows
        columns = [(stored, rows[finite]) for stored, rows in columns]
        entering = len(columns[0][1])
        kept = min(entering, self.K)
        ptr = int(self.queue_ptr)
        start = (ptr + entering - kept) % self.K
        before_end = min(kept, self.K - start)
        for stored, rows in columns:
            rows = rows[entering - kept :]
            for begin, part in ((start, rows[:before_end]), (0, rows[before_end:])):
                low, high = max(begin, self._first), min(begin + len(part), self._first + len(stored))
                if low < high:
                    stored[low - self._first : high - self._first] = part[low - begin : high - begin]
        self.queue_ptr.fill_((ptr + entering) % self.K)
        self.queue_len.add_(entering).clamp_max_(self.K)
        self.num_refused.add_(len(finite) - entering)

    def info_nce(
        self,
        query: Tensor,
        positive_key: Tensor,
        *,
        temperature: float | Tensor = 0.07,
        select: Select | None = None,
        weight: Weight | None = None,
        query_ids: Tensor | None = None,
        query_labels: Tensor | None = None,
        decoupled: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
        return_stats: bool = False,
    ) -> Any:
        """`negmine.info_nce` of this rank's queries against the rows of all ranks.

        Parameters
        ----------
        query, positive_key : Tensor (b, D)
            The queries and positives of this rank. b may differ between ranks.
        temperature, select, weight, decoupled, reduction, backend, return_stats : optional
            As in `negmine.info_nce`. ``reduction="mean"`` is the mean over this rank's rows.
        query_ids, query_labels : Tensor (b,), optional
            Integer tensors, for a queue that stores ids or labels: a key with an equal id or label is not a negative.

        Returns
        -------
        Tensor () or (b,)
            The loss of this rank. With `return_stats`, a pair of the loss and an InfoNCEStats.

        Raises
        ------
        ValueError, TypeError
            If an argument is invalid, or if the ranks make different calls. Every rank raises an error if one does.

        Notes
        -----
        The gradient flows to query, positive_key and temperature. Backward does not communicate, and the queue may be
        overwritten before it. Selection is exact: of equal scores, the one with the lower row number ranks first. The loss
        equals that of one process with the whole queue, except for rounding. `mix`, `false_negatives`, ``select.sample`` and
        float64 need the whole queue and are not supported.
        """
        op = f"{type(self).__name__}.info_nce"
        settings = {
            "select": select,
            "weight": weight,
            "temperature": temperature,
            "decoupled": decoupled,
            "return_stats": return_stats,
            "backend": backend,
        }

        def check() -> Pool:
            checks.require_vectors(op, "query", query, "(b, D)", (2,), self.queue, "the queue")
            checks.require_positive(op, positive_key, query)
            checks.require_temperature(op, temperature)
            # Reading the value synchronises with the device, as the other exchanges of this queue do.
            settings["temperature"] = float(temperature)
            checks.require_options(op, select=select, weight=weight)
            for name, value in (("decoupled", decoupled), ("return_stats", return_stats)):
                checks.require_bool(op, name, value)
            checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
            return self._pool(op, query, query_ids, query_labels)

        wants = isinstance(temperature, Tensor) and temperature.requires_grad
        windowed = ("rank_thresholds", "count_negatives", "mine_hardest") if select is not None else ()
        pool, kernels = self._shards(op, query, check, ("logsumexp", *windowed), backend, select, settings, wants)
        plan = Plan(select=select, weight=weight, decoupled=decoupled, want_stats=return_stats)
        # The kernels have the queries of all ranks already, in their storage dtype.
        query, positive_key = each_widened(query, positive_key)
        rows, stats = plan.run(kernels, Batch(query, positive_key, self.keys, pool), scale_of(temperature, query))
        loss = reference.reduced(rows, reduction)
        return loss if stats is None else (loss, stats)

    def mine_hardest(
        self,
        query: Tensor,
        N: int,
        *,
        positive_key: Tensor | None = None,
        select: Select | None = None,
        query_ids: Tensor | None = None,
        query_labels: Tensor | None = None,
        backend: str | None = None,
    ) -> Mined:
        """`negmine.mine_hardest` of this rank's queries over the rows of all ranks. The result is exact.

        Parameters
        ----------
        query : Tensor (b, D)
            The queries of this rank. b may differ between ranks.
        N : int
            The number of negatives for each query.
        positive_key : Tensor (b, D), optional
            The positives, needed if `select` has a margin.
        select, query_ids, query_labels, backend : optional
            As in `negmine.mine_hardest`. ``select.sample`` is not supported.

        Returns
        -------
        Mined
            scores (b, N) float32 and index (b, N) int64 in the whole queue; -inf and -1 if a pool has fewer than N columns.
            They have no gradient.

        Raises
        ------
        ValueError, TypeError
            If an argument is invalid, or if the ranks make different calls. Every rank raises an error if one does.
        """
        op = f"{type(self).__name__}.mine_hardest"

        def check() -> Pool:
            checks.require_vectors(op, "query", query, "(b, D)", (2,), self.queue, "the queue")
            checks.require_count(op, "N", N)
            checks.require_options(op, select=select)
            if positive_key is not None:
                checks.require_positive(op, positive_key, query)
            elif select is not None and select.has_margin:
                raise checks.refuse(op, "positive_key", "given if select has a margin", None)
            return self._pool(op, query, query_ids, query_labels)

        wanted = ("mine_hardest", "rank_thresholds", "count_negatives")
        pool, kernels = self._shards(
            op, query, check, wanted, backend, select, {"N": N, "select": select, "backend": backend}, False
        )
        with torch.no_grad():
            if select is not None:
                anchor = None if positive_key is None else score_of_positive(query, positive_key)  # (b,)
                pool = bounded(kernels, for_kernels(query), self.keys, pool, select, anchor)
            scores, index, _ = kernels.mine_hardest(for_kernels(query), self.keys, N, False, *pool)
            return Mined(scores, index)

    def _pool(self, op: str, query: Tensor, query_ids: Tensor | None, query_labels: Tensor | None) -> Pool:
        for name, given, stored, option in (
            ("query_ids", query_ids, self.ids, "with_ids"),
            ("query_labels", query_labels, self.labels, "with_labels"),
        ):
            if given is not None and stored is None:
                raise checks.refuse(op, name, f"None, because the queue was created without {option}=True", given)
        ids = None if query_ids is None else self.ids
        labels = None if query_labels is None else self.labels
        return check_negatives(op, query, None, Negatives(self.keys, ids=ids, labels=labels), query_ids, query_labels)[
            1
        ]

    def _shards(
        self,
        op: str,
        query: Any,
        check: Any,
        wanted: tuple,
        backend: Any,
        select: Any,
        settings: dict[str, Any],
        wants_mean: bool,
    ) -> tuple[Pool, Any]:
        """The checked pool and the sharded kernels. If one rank raises an error, all ranks do."""
        ranks = Ranks(self.process_group)
        with ranks.agreement(op) as call:
            pool = check()
            if isinstance(select, Select) and select.sample is not None:
                raise checks.refuse(
                    op, "select", "without sample, because a random sample needs the whole queue", select
                )
            kernels = backends.choose(op, wanted, backend, (query, self.queue))
            if kernels is None:
                raise backends.BackendUnavailable(
                    f"{op}: no kernel runs this call, and the reference backend does not support sharded queues"
                )
            masks = [name for name, part in pool._asdict().items() if part is not None]
            call.facts = {**settings, "query": query.dtype, "masks": masks}
            call.counters = {"queue_ptr": self.queue_ptr, "queue_len": self.queue_len}
            call.count = len(query)
            call.flag = torch.is_grad_enabled() and (wants_mean or query.requires_grad)
        merging = Merging(ranks, call.counts, call.any_flag)
        return pool, ShardedKernels(kernels, merging, for_kernels(query), len(self), self._first)

    def load_shards(self, states: Iterable[Mapping[str, Tensor]], prefix: str = "") -> None:
        """Load a queue from the state dicts of all ranks of an earlier run, which may have had another number of ranks.

        Every rank of this run reads all state dicts and copies its own rows.

        Parameters
        ----------
        states : iterable of mappings
            The results of ``state_dict()`` of all ranks of the earlier run, in any order. Each is used once, so the iterable
            may load them one after the other, for example with ``torch.load(path, mmap=True)``.
        prefix : str
            The part of the names in the state dicts before those of the queue's own state dict, for example "queue." for the
            state of a model whose attribute `queue` is the sharded queue.

        Raises
        ------
        ValueError
            If the state dicts are not those of one queue with this K and D, saved at one step, with the ids and labels that
            this queue stores. Every rank raises an error if one does.
        """
        op, ranks = f"{type(self).__name__}.load_shards", Ranks(self.process_group)
        with ranks.agreement(op) as call:
            fresh, counters = self._read_shards(op, states, prefix)
            call.facts = counters
        for name, rows in self.stored.items():
            rows.copy_(fresh[name])
        self.queue_ptr.fill_(counters["queue_ptr"])
        self.queue_len.fill_(counters["queue_len"])

    def _read_shards(
        self, op: str, states: Iterable[Mapping[str, Tensor]], prefix: str
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The checked rows of this rank, and the counters, from the states of all ranks of an earlier run."""
        fresh = {name: torch.empty_like(rows) for name, rows in self.stored.items()}
        counters: dict[str, int] = {}
        covered: list[tuple[int, int]] = []
        for state in states:
            missing = [n for n in (*fresh, *COUNTERS, "queue_range") if prefix + n not in state]
            if missing:
                raise ValueError(f"{op}: each of states must have {prefix + missing[0]}, got one with {sorted(state)}")
            wrong = wrong_counter(state, prefix, self.K) or _wrong_range(state[prefix + "queue_range"], self.K)
            if wrong:
                raise ValueError(f"{op}: states: {wrong}")
            first, end, _ = state[prefix + "queue_range"].tolist()
            for name, rows in fresh.items():
                held = state[prefix + name]
                if not isinstance(held, Tensor) or held.shape != (end - first, *rows.shape[1:]):
                    wanted = f"of shape {(end - first, *rows.shape[1:])}, rows {first} to {end} of {self.K}"
                    raise checks.refuse(op, f"{prefix}{name} of states", wanted, held)
            own = {name: int(state[prefix + name]) for name in COUNTERS}
            if counters not in ({}, own):
                raise ValueError(f"{op}: states must have been saved at one step, got {counters} and {own}")
            counters = own
            covered.append((first, end))
            low, high = max(first, self._first), min(end, self._first + len(self.queue))
            for name in fresh if low < high else ():
                fresh[name][low - self._first : high - self._first] = state[prefix + name][low - first : high - first]
        ends = [0, *(end for _, end in sorted(covered))]
        if [first for first, _ in sorted(covered)] != ends[:-1] or ends[-1] != self.K:
            raise ValueError(f"{op}: states must cover rows 0 to {self.K} once, got {sorted(covered)}")
        return fresh, counters

    def moco_state_dict(self) -> dict[str, Tensor]:
        """Not supported, because no rank stores the whole queue.

        Call `load_shards` in one process instead. There ``state_dict()``, without queue_range, is the state of a `MoCoQueue`,
        which has this method.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            f"{type(self).__name__}.moco_state_dict: no rank stores the whole queue; load the shards into a MoCoQueue in one "
            "process (docs/sharded.md)"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, rows in self.stored.items():
            destination[prefix + name] = rows if keep_vars else rows.detach()
        destination[prefix + "queue_range"] = torch.tensor(self._range, device="cpu")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Load a shard with the same rows, or the state of a MoCoQueue, of which this rank copies its own rows.

        If one rank cannot load its state, no rank does.
        """
        op, ranks = f"{type(self).__name__}.load_state_dict", Ranks(self.process_group)
        try:
            with ranks.agreement(op) as call:
                given = self._own_rows(state_dict, prefix)
                call.facts = {name: int(state_dict[prefix + name]) for name in COUNTERS if prefix + name in state_dict}
        except (ValueError, RuntimeError) as error:
            error_msgs.append(str(error))
            return
        for name, rows in self.stored.items():
            if name in given and local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, given[name].clone())
            elif name in given:
                with torch.no_grad():
                    rows.copy_(given[name])
            elif strict:
                missing_keys.append(prefix + name)
        known = {prefix + name for name in (*self.stored, "queue_range")}
        rest = {name: value for name, value in state_dict.items() if name not in known}
        super(MoCoQueue, self)._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget_refused()

    def _own_rows(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """The rows of this rank in a state dict, by name. Raises ValueError if the state dict does not fit this queue."""
        from_moco(self, state_dict, prefix)
        wrong = wrong_counter(state_dict, prefix, self.K)
        if wrong:
            raise ValueError(wrong)
        first, end, K = self._range
        given = {name: state_dict[prefix + name] for name in self.stored if prefix + name in state_dict}
        saved_range = state_dict.get(prefix + "queue_range")
        given = {name: rows.to_local() if hasattr(rows, "to_local") else rows for name, rows in given.items()}
        if saved_range is None:
            given = {name: rows[first:end] if len(rows) == K else rows for name, rows in given.items()}
        elif not isinstance(saved_range, Tensor) or saved_range.tolist() != [first, end, K]:
            range_text = checks.describe(saved_range.tolist() if isinstance(saved_range, Tensor) else saved_range)
            raise ValueError(
                f"{prefix}queue_range must be {[first, end, K]} on this rank, got {range_text}; use load_shards to load "
                "the states of another number of ranks"
            )
        for name, rows in given.items():
            wanted = getattr(self, name).shape
            if not isinstance(rows, Tensor) or rows.shape != wanted:
                raise ValueError(f"{prefix}{name} must be of shape {tuple(wanted)}, got {checks.describe(rows)}")
        return given

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self._first} to {self._first + len(self.queue)}"


def _wrong_range(given: Any, K: int) -> str:
    """The problem with a saved queue_range, or "" if there is none."""
    whole = isinstance(given, Tensor) and given.shape == (3,) and given.dtype == torch.int64
    if whole and 0 <= given[0] <= given[1] <= K and given[2] == K:
        return ""
    came = given.tolist() if isinstance(given, Tensor) and given.numel() == 3 else given
    return f"queue_range must be (first row, end, {K}) for a queue of K = {K}, got {checks.describe(came)}"
