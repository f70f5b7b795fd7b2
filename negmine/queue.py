"""MoCoQueue: the ring buffer of past keys that serves as negatives (He et al. 2020, moco/builder.py)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from negmine import checks


class MoCoQueue(nn.Module):
    """The last K keys, newest over oldest, with their ids and labels if wanted.

    dim: D. K: rows. dtype: of the stored keys (default: torch's default dtype); keys are converted as they enter.
    with_ids, with_labels: store an int64 id or label with each key; -1 where none was given.
    random_init: start full of random unit vectors, as MoCo does; False starts empty and grows.
    gather_distributed: enqueue the keys of every rank of process_group, in rank order, so that the queues stay identical.

    Buffers, all in state_dict: queue (K, D), queue_ptr (1,), queue_len (1,), queue_ids (K,), queue_labels (K,).
    `keys`, `ids`, `labels` are views of the valid rows: no copy, no host synchronisation. Enqueueing overwrites them in place,
    which is safe between forward and backward of negmine's losses as long as the keys are frozen, as they are here.
    load_state_dict takes a MoCo checkpoint too, whose queue is (D, K) and always full; `moco_state_dict` makes one.
    """

    queue: Tensor
    queue_ptr: Tensor
    queue_len: Tensor
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
        op = type(self).__name__
        checks.require_count(op, "dim", dim)
        checks.require_count(op, "K", K)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise checks.refuse(op, "dtype", "a floating torch.dtype or None", dtype, TypeError)
        for name, value in (
            ("with_ids", with_ids),
            ("with_labels", with_labels),
            ("random_init", random_init),
            ("gather_distributed", gather_distributed),
        ):
            checks.require_bool(op, name, value)
        self.dim, self.K = dim, K
        self.gather_distributed, self.process_group = gather_distributed, process_group
        start = F.normalize(torch.randn(K, dim), dim=1) if random_init else torch.zeros(K, dim)
        self.register_buffer("queue", start.to(dtype or torch.get_default_dtype()))  # (K, D)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_len", torch.full((1,), K if random_init else 0, dtype=torch.long))
        self.register_buffer("queue_ids", torch.full((K,), -1, dtype=torch.long) if with_ids else None)
        self.register_buffer("queue_labels", torch.full((K,), -1, dtype=torch.long) if with_labels else None)
        # The host's own copy of the two counters: reading the buffers would synchronise at every step.
        self._ptr, self._len = 0, K if random_init else 0
        self._first = 0  # the place in the ring of the first row stored here; a shard's is another

    @property
    def keys(self) -> Tensor:
        """The valid rows (len, D), no copy."""
        return self.queue[: self._held]

    @property
    def ids(self) -> Tensor | None:
        """Ids of the valid rows (len,), or None without with_ids."""
        return None if self.queue_ids is None else self.queue_ids[: self._held]

    @property
    def labels(self) -> Tensor | None:
        """Labels of the valid rows (len,), or None without with_labels."""
        return None if self.queue_labels is None else self.queue_labels[: self._held]

    @property
    def _held(self) -> int:
        """Valid rows among those stored here."""
        return min(max(self._len - self._first, 0), len(self.queue))

    def __len__(self) -> int:
        return self._len

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Overwrite the oldest rows with keys (B, D) of any B; of more than K keys the last K stay.

        ids (B,), labels (B,): whole numbers, with a queue that stores them; -1 is stored where none are given.
        Raises ValueError or TypeError for input that does not fit.
        """
        op = f"{type(self).__name__}.enqueue"
        checks.require_vectors(op, "keys", keys, "(B, D)", (2,), self.queue)
        tags = {"ids": (ids, self.queue_ids, "with_ids"), "labels": (labels, self.queue_labels, "with_labels")}
        for name, (given, stored, option) in tags.items():
            if given is None:
                continue
            if stored is None:
                raise checks.refuse(op, name, f"None, for a queue made without {option}=True", given)
            checks.require_tensor(op, name, given, self.queue)
            if given.shape != keys.shape[:1] or given.is_floating_point():
                raise checks.refuse(op, name, f"whole numbers of shape ({len(keys)},)", given)
        columns = [(self.queue, keys.detach().to(self.queue.dtype))]
        for given, stored, _ in tags.values():
            if stored is not None:
                fill = torch.full((len(keys),), -1, dtype=torch.long, device=keys.device)
                columns.append((stored, fill if given is None else given.long()))
        if self.gather_distributed and dist.is_available() and dist.is_initialized():
            columns = [(stored, gather(rows, self.process_group)) for stored, rows in columns]

        entering = len(columns[0][1])
        kept = min(entering, self.K)
        start = (self._ptr + entering - kept) % self.K
        before_end = min(kept, self.K - start)
        for stored, rows in columns:
            rows = rows[entering - kept :]
            for at, part in ((start, rows[:before_end]), (0, rows[before_end:])):
                low, high = max(at, self._first), min(at + len(part), self._first + len(stored))
                if low < high:
                    stored[low - self._first : high - self._first] = part[low - at : high - at]
        self._ptr = (self._ptr + entering) % self.K
        self._len = min(self.K, self._len + entering)
        self.queue_ptr.fill_(self._ptr)
        self.queue_len.fill_(self._len)

    def moco_state_dict(self) -> dict[str, Tensor]:
        """The queue as MoCo's builder stores it: queue (D, K), queue_ptr (1,). The queue must be full, as MoCo's always is."""
        if self._len < self.K:
            raise ValueError(f"MoCoQueue.moco_state_dict: the queue must be full, got {self._len} of {self.K} rows")
        return {"queue": self.queue.T.clone(), "queue_ptr": self.queue_ptr.clone()}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = prefix + "queue"
        stored = state_dict.get(name)
        if stored is not None and prefix + "queue_len" not in state_dict:  # a MoCo checkpoint
            if tuple(stored.shape) == (self.dim, self.K):
                state_dict[name] = stored.T
            state_dict[prefix + "queue_len"] = torch.full((1,), self.K, dtype=torch.long)
            for kind in ("queue_ids", "queue_labels"):
                if getattr(self, kind) is not None:
                    state_dict.setdefault(prefix + kind, torch.full((self.K,), -1, dtype=torch.long))
        limits = {"queue_ptr": self.K - 1, "queue_len": self.K}
        for counter, most in limits.items():
            value = state_dict.get(prefix + counter)
            if value is not None and not (value.numel() == 1 and 0 <= int(value) <= most):
                args[-1].append(f"{prefix}{counter} must be one number from 0 to {most}, got {value.tolist()}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ptr, self._len = int(self.queue_ptr), int(self.queue_len)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, K={self.K}, dtype={self.queue.dtype}, len={self._len}"


def gather(rows: Tensor, group: Any, counts: list[int] | None = None) -> Tensor:
    """The rows of every rank in rank order; ranks may hold different numbers of them, `counts` where they are known."""
    world = dist.get_world_size(group)
    if counts is None:
        size = torch.tensor([len(rows)], device=rows.device)
        sizes = [torch.zeros_like(size) for _ in range(world)]
        dist.all_gather(sizes, size, group=group)
        counts = [int(s) for s in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
