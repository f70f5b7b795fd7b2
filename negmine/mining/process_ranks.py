"""Communication between the processes that share a corpus: each holds its own rows, in rank order.

A single process without a process group is treated as a group of size 1. Only tensors are exchanged: sort keys, counts, bits of
scores, rows. Every exchange is a sum of integers, a sum in which only one rank has values other than zero, or a gather, so that
results do not depend on how the corpus is divided.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from negmine.ops.checks import refuse


class ProcessRanks:
    """The ranks of a torch.distributed process group; of this process alone where group is None."""

    def __init__(self, op: str, group: Any) -> None:
        self.group, self.rank, self.size = group, 0, 1
        self.device = torch.device("cpu")
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized()) or not isinstance(group, dist.ProcessGroup):
            wanted = (
                "a process group of torch.distributed, such as torch.distributed.group.WORLD once it is initialised"
            )
            raise refuse(op, "process_group", wanted, group, TypeError)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise refuse(op, "process_group", "a group that this process belongs to", group)
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())  # where its tensors must live

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on each."""
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        moved = moved.clone() if moved is tensor else moved
        dist.all_reduce(moved, group=self.group)
        return moved.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in rank order."""
        if self.size == 1:
            return [tensor]
        moved = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        dist.all_gather(parts, moved, group=self.group)
        return [part.to(tensor.device) for part in parts]

    def gather_rows(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Every rank's (rows[rank], ...) int64, joined."""
        padded = tensor.new_zeros(max(rows, default=0), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat([part[:count] for part, count in zip(self.gather(padded), rows, strict=True)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor."""
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        dist.broadcast(moved, dist.get_global_rank(self.group, 0), group=self.group)
        return moved.to(tensor.device)

    def combined_hash(self, digest: str) -> str:
        """A hash of the hashes of all ranks; of a single process, its own."""
        if self.size == 1:
            return digest
        parts = self.gather(torch.tensor(list(bytes.fromhex(digest))))
        return hashlib.blake2b(b"".join(bytes(part.tolist()) for part in parts), digest_size=16).hexdigest()

    def require_same(self, op: str, description: dict) -> None:
        """Raise ValueError on every rank unless all ranks have the same description."""
        text = json.dumps(description, sort_keys=True).encode()
        digest = torch.tensor(list(hashlib.blake2b(text, digest_size=16).digest()))
        parts = self.gather(digest)
        for rank, other in enumerate(parts):
            if not torch.equal(other, parts[0]):
                raise ValueError(f"{op}: rank {rank} was called with other queries, positives or options than rank 0")

    @contextmanager
    def fail_together(self, op: str, what: str) -> Iterator[None]:
        """If the block raises on one rank, raise on all, so that none waits forever; the others raise RuntimeError."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = [int(flag) for flag in self.gather(torch.tensor([int(failure is not None)]))]
        if failure is not None:
            raise failure
        if any(failed):
            raise RuntimeError(f"{op}: rank {failed.index(1)} {what}; its own error says why")
