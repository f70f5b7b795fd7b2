"""Communication between the processes that share a corpus: each holds its own rows, in rank order.

A single process without a process group is treated as a group of size 1. Ranks exchange the parts that each has computed from its
rows (parts.py) and merge them all, so that every rank has the same, and rows of queries that one of them holds.
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
    """The ranks of a torch.distributed process group; of this process alone where group is None.

    Every exchange is agreed on first. A rank that fails between two exchanges joins the next one that the others begin, and
    tells them there, so that all stop whatever failed: a check, the disk, or memory in the middle of a scan.
    """

    def __init__(self, op: str, group: Any) -> None:
        self.op, self.rank, self.size = op, 0, 1
        self._told = False  # this rank's failure, or another's, is known to all
        self._group = group
        if self._is_group:
            self._ranks = Ranks(group)
            self.rank, self.size = self._ranks.rank, self._ranks.size

    @property
    def _is_group(self) -> bool:
        together = dist.is_available() and dist.is_initialized()
        return together and isinstance(self._group, dist.ProcessGroup) and dist.get_rank(self._group) >= 0

    def require_group(self) -> None:
        """Raise TypeError where what was given as a process group is none that this process belongs to."""
        if self._group is not None and not self._is_group:
            wanted = (
                "a process group of torch.distributed, such as torch.distributed.group.WORLD once it is initialised"
            )
            raise refuse(self.op, "process_group", wanted, self._group, TypeError)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises on one rank, raise on all of them, the others naming that rank."""
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
        """The tensor as it is exchanged; the ranks agree on the step, the dtype and the shape."""
        self._agree({"step": step, "dtype": tensor.dtype, "shape": tuple(tensor.shape)})
        return tensor.to(self._ranks.device).contiguous()

    def counts(self, count: int) -> list[int]:
        """The number that every rank gives, in rank order."""
        return [int(part) for part in self.gather(torch.tensor(count, device="cpu"))]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in rank order."""
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
        """Raise ValueError on every rank, naming what differs, unless all ranks state the same."""
        self._agree(facts)
