"""Communication between the ranks of a process group: agreement on a call, and gathering of rows in rank order.

If a collective function raised an error on one rank only, the other ranks would wait until the time-out of the group. Each
collective function therefore starts with an agreement: the ranks exchange whether all checks passed and whether all ranks make
the same call with the same options:

    with ranks.agreement("MoCoQueue.enqueue", keys.device) as call:
        ...                                      # checks; an error is reported to the other ranks
        call.facts = {"dtype": keys.dtype}       # values that must be equal on all ranks
        call.counters = {"ptr": self.queue_ptr}  # int64 tensors of one element that must be equal on all ranks
        call.count = len(keys)                   # the number of rows of this rank
    call.counts                                  # the numbers of rows of all ranks

The header that is exchanged has the same size for every function, so that ranks which call different functions raise an error
too. For tensors on the CPU, and with gloo for all tensors, the error is raised at once. For tensors on a GPU, the host does not
wait: the headers are compared on the device, and if they differ, a device assertion fails before the data are gathered. In that
case all ranks must have the same number of rows.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from negmine.ops.checks import MAX_DESCRIPTION

FINE, REFUSED, FAILED = range(3)  # the status of a rank
INVALID = (ValueError, TypeError)  # the exceptions of checks; any other exception is a failure
HEADER = 4  # int64 elements of a header on a GPU: a hash and up to three counters
TEXT_BYTES = 2048  # length of the description of a call, which is exchanged only if the ranks disagree


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


class Call:
    """What one rank states about its call in an agreement."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.counters: dict[str, Tensor] = {}
        self.count, self.flag = 0, False
        self.counts: list[int] = [0]
        self.any_flag = False  # whether `flag` is True on any rank

    def text(self, read_counters: bool) -> str:
        read = {name: int(value) for name, value in self.counters.items()} if read_counters else {}
        return "\n".join(f"{name}={value!r}" for name, value in (self.facts | read).items())


class SharedGroup:
    """Holds the process_group of a module. copy.deepcopy of the module shares it, so an EMA copy has the same process group."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGroup":
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError("negmine: a module with a process_group cannot be pickled; save its state_dict()")
        return SharedGroup, (None,)


class Ranks:
    """The ranks of a process group (None: the default group). Without torch.distributed, a group of one rank."""

    def __init__(self, process_group: Any = None) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.group = process_group
        self.size = dist.get_world_size(process_group) if together else 1
        self.rank = dist.get_rank(process_group) if together else 0
        if self.rank < 0:
            raise ValueError("process_group must be a group that this process belongs to")
        config = str(dist.get_backend_config(process_group)) if together else "cpu:"
        self.on_host = "cpu:" in config
        self.waits_on_gpu = "cuda:gloo" in config

    @property
    def device(self) -> torch.device:
        """The device on which the backend of the group exchanges tensors."""
        return torch.device("cpu") if self.on_host else torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def agreement(self, op: str, device: torch.device | None = None) -> Iterator[Call]:
        """Raise an error on every rank if the block raises on one, or if the ranks make different calls or state different facts.

        The rank whose block raised raises its own exception. The other ranks raise an exception that names that rank: ValueError
        if it rejected its input, else RuntimeError. device is that of the data that the function exchanges; with None the host
        always waits for the result.
        """
        call = Call()
        try:
            yield call
        except Exception as error:
            self._exchange(op, call, device, error)
            raise
        self._exchange(op, call, device, None)

    def _exchange(self, op: str, call: Call, device: torch.device | None, error: Exception | None) -> None:
        call.counts, call.any_flag = [call.count] * self.size, call.flag
        if self.size == 1:
            return
        status = FINE if error is None else REFUSED if isinstance(error, INVALID) else FAILED
        if device is not None and device.type == "cuda" and not self.waits_on_gpu:
            self._exchange_on_device(op, call, device, status)
            return
        text = call.text(read_counters=True)
        header = torch.tensor([status, _hash(op), _hash(text), call.count, call.flag], device="cpu")
        table = [part.tolist() for part in self.gather(header)]  # (W, 5)
        if all(row[:3] == [FINE, *table[0][1:3]] for row in table):
            call.counts, call.any_flag = [row[3] for row in table], any(row[4] for row in table)
            return
        description = f"{op}\n{text}" if error is None else f"{op}\n{type(error).__name__}: {error}"
        encoded = description.encode()[:TEXT_BYTES]
        padded = torch.zeros(TEXT_BYTES, dtype=torch.uint8, device="cpu")
        padded[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device="cpu")
        texts = [bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in self.gather(padded)]
        if error is None:
            raise _disagreement(op, table, texts)

    def _exchange_on_device(self, op: str, call: Call, device: torch.device, status: int) -> None:
        """Compare headers on the device, without copies to or from the host."""
        digest = _hash(f"{status} {op}\n{call.text(read_counters=False)} {call.count}")
        header = torch.full((1, HEADER), digest, device=device)
        for place, counter in enumerate(call.counters.values()):
            header[0, 1 + place] = counter.reshape(())
        table = header.new_empty(self.size, HEADER)
        dist.all_gather_into_tensor(table, header, group=self.group)
        if status == FINE:
            message = f"{op}: a rank rejected its input, or the ranks made different calls"
            torch._assert_async((table == header).all(), message)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in rank order. They must have the same shape."""
        if self.size == 1:
            return [tensor]
        sent = tensor if tensor.is_cuda else tensor.to(self.device)
        sent = sent.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return [part.to(tensor.device) for part in parts]

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows (counts[rank], ...) of all ranks, concatenated in rank order."""
        if self.size == 1:
            return rows
        if len(set(counts)) == 1:
            return torch.cat(self.gather(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(self.gather(padded), counts, strict=True)])

    def pass_on(self, rows: Tensor, tag: int = 0) -> Callable[[], Tensor]:
        """Start to send rows to the next rank and to receive those of the previous rank, which have the same shape and dtype.

        Returns a function that waits and returns the received rows.
        """
        sent = rows if rows.is_cuda else rows.to(self.device)
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        if self.group is None:
            following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        else:
            following, previous = (dist.get_global_rank(self.group, (self.rank + by) % self.size) for by in (1, -1))
        both = [
            dist.P2POp(dist.isend, sent, following, self.group, tag),
            dist.P2POp(dist.irecv, received, previous, self.group, tag),
        ]
        works = dist.batch_isend_irecv(both)

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received.to(rows.device)

        return wait

    def ring(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (rank, its rows) for every rank, beginning with this one. The next rows are received during each iteration."""
        for turn in range(self.size):
            receive = self.pass_on(rows) if turn + 1 < self.size else None
            yield (self.rank - turn) % self.size, rows
            if receive is not None:
                rows = receive()

    def mean(self, number: Tensor) -> Tensor:
        """The elementwise mean of the tensors of all ranks, which have the same shape."""
        total = number.detach().clone().to(self.device)
        dist.all_reduce(total, group=self.group)
        return (total / self.size).to(number.device)

    def gather_with_gradient(self, rows: Tensor, counts: list[int]) -> Tensor:
        """gather_rows with a gradient: the sum over the ranks of the gradients of their losses with respect to this rank's rows.

        If the gradients of the model are then averaged over the ranks, as DistributedDataParallel does, the result is the
        gradient of the mean of the ranks' losses.
        """
        return rows if self.size == 1 else _GatherRows.apply(rows, self, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: list[int]) -> Tensor:
        ctx.ranks, ctx.counts, ctx.dtype = ranks, counts, rows.dtype
        return ranks.gather_rows(rows, counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_all: Tensor) -> tuple[Tensor, None, None]:
        ranks, counts = ctx.ranks, ctx.counts
        total = d_all if d_all.dtype == torch.float64 else d_all.float()
        total = total.contiguous()  # (sum of counts, ...)
        # d_all may be used elsewhere, so it must not be reduced in place.
        total = total.clone() if total.data_ptr() == d_all.data_ptr() else total
        dist.all_reduce(total, group=ranks.group)
        first = sum(counts[: ranks.rank])
        return total[first : first + counts[ranks.rank]].to(ctx.dtype), None, None


def _disagreement(op: str, table: list[list[int]], texts: list[str]) -> Exception:
    """The exception for a rank whose own checks passed.

    table (W, 5): the headers of all ranks. texts: for each rank the name of the function, then a line for each fact or the error.
    """
    for rank, (status, *_) in enumerate(table):
        error = _cut(texts[rank].partition("\n")[2])
        if status == REFUSED:
            return ValueError(f"{op}: rank {rank} rejected its input, so every rank stops: {error}")
        if status == FAILED:
            return RuntimeError(f"{op}: rank {rank} failed, so every rank stops: {error}")
    other = next(rank for rank, row in enumerate(table) if row[1:3] != table[0][1:3])
    (other_op, *other_facts), (first_op, *first_facts) = (texts[rank].split("\n") for rank in (other, 0))
    if other_op != first_op:
        return ValueError(
            f"{op}: every rank must make the same call, but rank {other} calls {other_op} and rank 0 {first_op}"
        )
    different = [f for f in other_facts if f not in first_facts], [f for f in first_facts if f not in other_facts]
    values = " and rank 0 ".join(_cut(facts[0]) if facts else "nothing" for facts in different)
    return ValueError(f"{op}: every rank must give the same options and dtypes, but rank {other} gives {values}")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 3] + "..."
