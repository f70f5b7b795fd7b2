"""Communication between the processes that share a corpus: each holds its own rows, in rank order.

A single process without a process group is treated as a group of size 1. Only tensors are exchanged: sort keys, counts, bits of
scores, rows. Every exchange is a sum of integers, a sum in which only one rank has values other than zero, or a gather, so that
results do not depend on how the corpus is divided.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each."""
        if self.size == 1:
            return tensor
        moved = self._moved("sum", tensor)
        moved = moved.clone() if moved is tensor else moved
        dist.all_reduce(moved, group=self._ranks.group)
        return moved.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in rank order."""
        if self.size == 1:
            return [tensor]
        return [part.to(tensor.device) for part in self._ranks.gather(self._moved("gather", tensor))]

    def gather_rows(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Every rank's (rows[rank], ...) int64, joined."""
        padded = tensor.new_zeros(max(rows, default=0), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat([part[:count] for part, count in zip(self.gather(padded), rows, strict=True)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor."""
        if self.size == 1:
            return tensor
        moved = self._moved("broadcast", tensor)
        dist.broadcast(moved, dist.get_global_rank(self._ranks.group, 0), group=self._ranks.group)
        return moved.to(tensor.device)

    def combined_hash(self, digest: str) -> str:
        """A hash of the hashes of all ranks; of a single process, its own."""
        if self.size == 1:
            return digest
        parts = self.gather(torch.tensor(list(bytes.fromhex(digest)), device="cpu"))
        return hashlib.blake2b(b"".join(bytes(part.tolist()) for part in parts), digest_size=16).hexdigest()

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every rank, naming what differs, unless all ranks state the same."""
        self._agree(facts)
