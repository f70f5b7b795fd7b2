"""MoCoQueue: the ring buffer of past keys that serves as negatives (He et al. 2020, moco/builder.py)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine.collectives import Ranks, SharedGroup
from negmine.ops import checks
from negmine.ops.negatives import StoredColumns


def check_arguments(
    op: str, dim: Any, K: Any, dtype: Any, with_ids: Any, with_labels: Any, random_init: Any, least: int = 1
) -> None:
    """Raise an error for the first invalid argument of a queue's constructor. `least` is the smallest allowed K."""
    checks.require_count(op, "dim", dim)
    checks.require_count(op, "K", K, least)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise checks.refuse(op, "dtype", "a floating torch.dtype or None", dtype, TypeError)
    for name, value in (("with_ids", with_ids), ("with_labels", with_labels), ("random_init", random_init)):
        checks.require_bool(op, name, value)


class MoCoQueue(nn.Module):
    """A ring buffer of the last K keys, which are used as negatives (MoCo).

    Parameters
    ----------
    dim : int
        D, the width of a key.
    K : int
        The number of keys that the queue can store.
    dtype : torch.dtype, optional
        The dtype of the stored keys. The default is torch's default dtype. `enqueue` converts keys to it. The queue needs
        K * (D * bytes per number + 8 with ids + 8 with labels) bytes, and its constructor at most 16 MiB more.
    with_ids, with_labels : bool
        Whether to store an int64 id or label with each key; -1 is stored for keys without one.
    random_init : bool
        True starts with K random unit vectors, as MoCo does. False starts with an empty queue.
    gather_distributed : bool
        Whether `enqueue` adds the keys of all ranks, in rank order, so that the queues of all ranks stay identical. Every rank
        must create the queue with the same arguments and call `enqueue` in the same order. If one rank raises an error, all
        ranks do: at once, or on a GPU by a device assertion, because the host does not wait for the device.
    process_group : ProcessGroup, optional
        The process group of torch.distributed for `gather_distributed`. The default is all ranks.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

    Notes
    -----
    Pass the queue itself to the losses as `negative_keys`. Enqueueing overwrites rows in place. This is safe between forward
    and backward of negmine's losses.

    The complete state is in buffers: queue (K, D), queue_ptr (1,), queue_len (1,), queue_ids (K,) and queue_labels (K,).
    ``load_state_dict`` also loads a MoCo checkpoint, whose queue is (D, K); `moco_state_dict` returns one.

    A key that is not finite in the queue's dtype is not stored. `num_refused`, a () int64 buffer that is not part of the
    state dict, counts such keys.

    `keys`, `ids`, `labels` and ``len()`` read the length on the host and so synchronise with the GPU. The losses do not.

    References
    ----------
    He et al. 2020 (arXiv 1911.05722; facebookresearch/moco moco/builder.py).

    Examples
    --------
    >>> queue = negmine.MoCoQueue(dim=16, K=100, with_ids=True)
    >>> query, key = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> loss = negmine.info_nce(query, key, queue, query_ids=torch.arange(8))
    >>> queue.enqueue(key, ids=torch.arange(8))
    >>> queue.ids[:8].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    queue: Tensor
    queue_ptr: Tensor
    queue_len: Tensor
    num_refused: Tensor
    queue_ids: Tensor | None
    queue_labels: Tensor | None

    def __init__(
        self,
        dim: int = 128,
        K: int = 65536,
        *,
        dtype: torch.dtype | None = None,
        with_ids: bool = False,
        with_labels: bool = False,
        random_init: bool = True,
        gather_distributed: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        arguments: dict[str, Any] = {
            "dim": dim, "K": K, "dtype": dtype, "with_ids": with_ids, "with_labels": with_labels, "random_init": random_init,
        }  # fmt: skip
        op = type(self).__name__
        if gather_distributed:
            ranks = Ranks(process_group)
            with ranks.agreement(op) as call:
                check_arguments(op, **arguments)
                checks.require_bool(op, "gather_distributed", gather_distributed)
                call.facts = arguments
        else:
            check_arguments(op, **arguments)
            checks.require_bool(op, "gather_distributed", gather_distributed)
        self.K, self.gather_distributed, self._group = K, gather_distributed, SharedGroup(process_group)
        rows = torch.zeros(K, dim, dtype=dtype or torch.get_default_dtype())
        if random_init:
            fill_with_unit_vectors(rows)
        self._make_buffers(rows, with_ids, with_labels, K if random_init else 0)

    def _make_buffers(self, rows: Tensor, with_ids: bool, with_labels: bool, length: int) -> None:
        self.dim = rows.shape[1]
        self._store("queue", rows)  # (K, D)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_len", torch.full((1,), length, dtype=torch.long))
        self.register_buffer("num_refused", torch.zeros((), dtype=torch.long), persistent=False)
        self._store("queue_ids", torch.full((len(rows),), -1, dtype=torch.long) if with_ids else None)
        self._store("queue_labels", torch.full((len(rows),), -1, dtype=torch.long) if with_labels else None)

    def _store(self, name: str, rows: Tensor | None) -> None:
        """Register a buffer `name` with one entry for each row."""
        self.register_buffer(name, rows)

    @property
    def process_group(self) -> Any:
        """The process group that was passed to the constructor, or None for the default group."""
        return self._group.group

    @property
    def keys(self) -> Tensor:
        """The valid rows (len, D) of the queue, as a view."""
        return self.queue[: self._held]

    @property
    def ids(self) -> Tensor | None:
        """The ids (len,) of the valid rows, or None without with_ids."""
        return None if self.queue_ids is None else self.queue_ids[: self._held]

    @property
    def labels(self) -> Tensor | None:
        """The labels (len,) of the valid rows, or None without with_labels."""
        return None if self.queue_labels is None else self.queue_labels[: self._held]

    @property
    def _held(self) -> int:
        """The number of valid rows in a stored tensor."""
        return len(self)

    def __len__(self) -> int:
        return int(self.queue_len)

    def stored_columns(self) -> StoredColumns:
        """All rows of the queue, their ids and labels, and the number of valid rows. The losses call this."""
        return StoredColumns(self.queue, self.queue_ids, self.queue_labels, self.queue_len[0])

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Add keys to the queue, overwriting the oldest ones.

        Parameters
        ----------
        keys : Tensor (B, D)
            The keys, of any floating dtype and on the device of the queue. B may differ from call to call; of more than K keys
            only the last K are stored. Rows that are not finite in the queue's dtype are skipped and counted in `num_refused`.
        ids, labels : Tensor (B,), optional
            Integer tensors, for a queue that stores ids or labels. The default stores -1, unknown.

        Raises
        ------
        ValueError, TypeError
            If an argument has a wrong shape, dtype or device, or if the queue does not store ids or labels. With
            `gather_distributed`, every rank raises an error if one does.
        """
        op = f"{type(self).__name__}.enqueue"
        ranks = Ranks(self.process_group) if self.gather_distributed else None
        if ranks is None or ranks.size == 1:
            self._write(self._entering(op, keys, ids, labels))
            return
        with ranks.agreement(op, self.queue.device) as call:
            columns = self._entering(op, keys, ids, labels)
            call.facts = {
                "keys": keys.dtype, "ids are given": ids is not None, "labels are given": labels is not None, "K": self.K,
                "D": self.dim, "dtype": self.queue.dtype, "with_ids": self.queue_ids is not None,
                "with_labels": self.queue_labels is not None,
            }  # fmt: skip
            call.counters = {"queue_ptr": self.queue_ptr, "queue_len": self.queue_len}
            call.count = len(keys)
        self._write([(stored, ranks.gather_rows(rows, call.counts)) for stored, rows in columns])

    def _entering(
        self, op: str, keys: Tensor, ids: Tensor | None, labels: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Check the arguments of `enqueue`. Returns pairs of a stored tensor (K, ...) and the rows (B, ...) to write to it."""
        checks.require_vectors(op, "keys", keys, "(B, D)", (2,), self.queue, "the queue")
        tags = {"ids": (ids, self.queue_ids, "with_ids"), "labels": (labels, self.queue_labels, "with_labels")}
        for name, (given, stored, option) in tags.items():
            if given is None:
                continue
            if stored is None:
                raise checks.refuse(op, name, f"None, because the queue was created without {option}=True", given)
            checks.require_tensor(op, name, given, self.queue, "the queue")
            if given.shape != keys.shape[:1] or given.is_floating_point():
                raise checks.refuse(op, name, f"an integer tensor of shape ({len(keys)},)", given)
        columns = [(self.queue, keys.detach().to(self.queue.dtype))]
        for given, stored, _ in tags.values():
            if stored is not None:
                fill = torch.full((len(keys),), -1, dtype=torch.long, device=keys.device)
                columns.append((stored, fill if given is None else given.long()))
        return columns

    def _write(self, columns: list[tuple[Tensor, Tensor]]) -> None:
        """Overwrite the oldest rows. columns: pairs of a buffer (K, ...) and the rows to write, as many rows in each pair."""
        finite = columns[0][1].isfinite().all(1)  # (B,)
        number = finite.cumsum(0)  # (B,) 1 for the first finite row
        entering = finite.sum()  # ()
        kept = finite & (number > entering - self.K)  # (B,)
        # The number of kept rows is known only on the device, so min(B, K) rows are always written. The rows after the kept
        # ones are written with the values that are already stored.
        source = (~kept).byte().argsort(stable=True)[: self.K]  # (min(B, K),) kept rows first
        slot = torch.arange(len(source), device=finite.device)  # (min(B, K),)
        target = (self.queue_ptr + entering - kept.sum() + slot) % self.K
        for stored, rows in columns:
            is_new = (slot < kept.sum()).view(-1, *[1] * (stored.dim() - 1))
            stored.index_copy_(0, target, torch.where(is_new, rows[source], stored[target]))
        self.queue_ptr.add_(entering).remainder_(self.K)
        self.queue_len.add_(entering).clamp_max_(self.K)
        self.num_refused.add_(len(finite) - entering)

    @torch.no_grad()
    def reset(self) -> None:
        """Remove all keys, ids and labels, and set num_refused to 0."""
        for counter in (self.queue_ptr, self.queue_len, self.num_refused):
            counter.zero_()
        for tags in (self.queue_ids, self.queue_labels):
            if tags is not None:
                tags.fill_(-1)

    def moco_state_dict(self) -> dict[str, Tensor]:
        """The queue in the format of the published MoCo code.

        Returns
        -------
        dict
            queue (D, K) and queue_ptr (1,), as copies.

        Raises
        ------
        ValueError
            If the queue is not full. The published format cannot express that.
        """
        if len(self) < self.K:
            raise ValueError(f"MoCoQueue.moco_state_dict: the queue must be full, got {len(self)} of {self.K} rows")
        return {"queue": self.queue.T.clone(), "queue_ptr": self.queue_ptr.clone()}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        from_moco(self, state_dict, prefix)
        wrong = wrong_counter(state_dict, prefix, self.K)
        if wrong:
            args[-1].append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget_refused()

    def _forget_refused(self) -> None:
        """Set num_refused to 0 after loading. A queue that was created on the meta device gets the counter here."""
        if self.num_refused.is_meta:
            self.num_refused = torch.zeros_like(self.num_refused, device=self.queue_ptr.device)
        self.num_refused.zero_()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, K={self.K}, dtype={self.queue.dtype}, len={len(self)}"


def fill_with_unit_vectors(rows: Tensor) -> None:
    """Overwrite rows (K, D) with random unit vectors, in pieces, so that no second copy is in memory."""
    for part in rows.split(max(1, (1 << 18) // rows.shape[1])):
        part.copy_(F.normalize(torch.randn(part.shape, dtype=torch.float32, device=rows.device), dim=1))


def from_moco(queue: MoCoQueue, state_dict: dict[str, Any], prefix: str) -> None:
    """Convert a MoCo checkpoint, whose queue is (D, K) and always full, to the state dict of a `MoCoQueue`, in place."""
    stored = state_dict.get(prefix + "queue")
    if stored is None or prefix + "queue_len" in state_dict:
        return
    if tuple(stored.shape) == (queue.dim, queue.K):
        state_dict[prefix + "queue"] = stored.T.contiguous()  # with assign=True this tensor becomes the buffer
    state_dict[prefix + "queue_len"] = torch.full((1,), queue.K, dtype=torch.long)
    for kind in ("queue_ids", "queue_labels"):
        if getattr(queue, kind) is not None:
            state_dict.setdefault(prefix + kind, torch.full((queue.K,), -1, dtype=torch.long))


def wrong_counter(state_dict: Mapping[str, Any], prefix: str, K: int) -> str:
    """The problem with the counters of a saved queue of K rows, or "" if there is none."""
    limits = {"queue_ptr": K - 1, "queue_len": K}
    for name, most in limits.items():
        value = state_dict.get(prefix + name)
        if value is None:
            continue  # load_state_dict reports missing entries
        whole = (
            isinstance(value, Tensor) and value.numel() == 1 and not (value.is_floating_point() or value.is_complex())
        )
        if not whole or not 0 <= int(value) <= most:
            came = value.tolist() if isinstance(value, Tensor) and value.numel() == 1 else value
            return f"{prefix}{name} must be an integer from 0 to {most}, got {checks.describe(came)}"
    return ""
