"""Communication between processes that share a corpus. Each rank has its own rows; the corpus is all rows in rank order.

A single process without a process group counts as a group of size 1. The ranks exchange the parts that they compute from their
rows (parts.py), and each rank merges all of them, so all ranks have the same result. They also exchange rows of queries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from negmine.collectives import Ranks
from negmine.ops.checks import refuse


class ProcessRanks:
    """The ranks of a torch.distributed process group; only this process if group is None.

    Before each exchange the ranks report whether they are ready. A rank that has failed since the last exchange reports its
    error there, so that all ranks stop, whatever the reason: an invalid argument, a full disk, or no memory during a scan.
    """

    def __init__(self, op: str, group: Any) -> None:
        self.op, self.rank, self.size = op, 0, 1
        self._told = False  # True once all ranks know of an error
        self._group = group
        if self._is_group:
            self._ranks = Ranks(group)
            self.rank, self.size = self._ranks.rank, self._ranks.size

    @property
    def _is_group(self) -> bool:
        together = dist.is_available() and dist.is_initialized()
        return together and isinstance(self._group, dist.ProcessGroup) and dist.get_rank(self._group) >= 0

    def require_group(self) -> None:
        """Raise TypeError if the argument process_group is not a process group to which this process belongs."""
        if self._group is not None and not self._is_group:
            wanted = (
                "a process group of torch.distributed, such as torch.distributed.group.WORLD once it is initialised"
            )
            raise refuse(self.op, "process_group", wanted, self._group, TypeError)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises on one rank, raise on all ranks; the errors of the other ranks name that rank."""
        try:
            yield
        except Exception as error:
            if not self._told:
                self._agree({}, error)
            raise
        self._agree({"step": "end"})

    def _agree(self, facts: dict[str, Any], error: Exception | None = None) -> None:
        if self.size == 1:
            return
        try:
            with self._ranks.agreement(self.op) as call:
                call.facts = facts
                if error is not None:
                    raise error
        except Exception:
            self._told = True
            if error is None:
                raise

    def _moved(self, step: str, tensor: Tensor) -> Tensor:
        """The tensor in the form that is exchanged. Raises unless all ranks have the same step, dtype and shape."""
        self._agree({"step": step, "dtype": tensor.dtype, "shape": tuple(tensor.shape)})
        return tensor.to(self._ranks.device).contiguous()

    def counts(self, count: int) -> list[int]:
        """The `count` of every rank, in rank order."""
        return [int(part) for part in self.gather(torch.tensor(count, device="cpu"))]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order. All must have the same shape."""
        if self.size == 1:
            return [tensor]
        return [part.to(tensor.device) for part in self._ranks.gather(self._moved("gather", tensor))]

    def gather_bytes(self, content: bytes, what: str) -> list[bytes]:
        """The bytes of every rank, in rank order."""
        self._agree({"step": f"gather {what}"})
        counts = self.counts(len(content))
        padded = torch.zeros(max(counts), dtype=torch.uint8, device="cpu")
        padded[: len(content)] = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        parts = self.gather(padded)
        return [part[:count].numpy().tobytes() for part, count in zip(parts, counts, strict=True)]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor."""
        if self.size == 1:
            return tensor
        moved = self._moved("broadcast", tensor)
        dist.broadcast(moved, dist.get_global_rank(self._ranks.group, 0), group=self._ranks.group)
        return moved.to(tensor.device)

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every rank unless `facts` are equal on all ranks. The message names the difference."""
        self._agree(facts)
