"""What the ranks of a process group exchange: whether they all may go on, and rows of every rank in rank order.

A collective function that raises on one rank leaves the others waiting until the group's time-out. Each one therefore first
exchanges, in an agreement, whether every rank's checks passed and whether all make the same call with the same options:

    with ranks.agreement("MoCoQueue.enqueue", keys.device) as call:
        ...                                      # checks; what they raise is told to the other ranks
        call.facts = {"dtype": keys.dtype}       # what all ranks must say alike
        call.counters = {"ptr": self.queue_ptr}  # and int64 tensors of one entry that they must all hold
        call.count = len(keys)                   # rows of its own
    call.counts                                  # those of all ranks

The header of an agreement has one size for every function, so that ranks which call different functions raise too.
Tensors on the CPU, and any with gloo, are agreed on at once. On a GPU the host waits for nothing: the header is compared on the
device, and a device assertion fails before the data are gathered. There all ranks must bring equally many rows.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from negmine.ops.checks import MAX_DESCRIPTION

FINE, REFUSED, FAILED = range(3)  # what a rank says of itself
INVALID = (ValueError, TypeError)  # what a check raises; anything else is a failure
HEADER = 4  # int64 entries of a header: on a GPU a hash and up to three counters
TEXT_BYTES = 2048  # of what a rank says of its call, exchanged only where the ranks disagree


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


class Call:
    """One rank's part in an agreement."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.counters: dict[str, Tensor] = {}
        self.count, self.flag = 0, False
        self.counts: list[int] = [0]
        self.any_flag = False  # some rank raised its flag

    def text(self, read_counters: bool) -> str:
        read = {name: int(value) for name, value in self.counters.items()} if read_counters else {}
        return "\n".join(f"{name}={value!r}" for name, value in (self.facts | read).items())


class SharedGroup:
    """The process_group that a module was given, where copy.deepcopy takes it along: an EMA copy belongs to the same ranks."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGroup":
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError("negmine: a module with a process_group cannot be pickled; save its state_dict()")
        return SharedGroup, (None,)


class Ranks:
    """The ranks of a process group (None: the default one); a single process without torch.distributed is a group of one."""

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
        """Where tensors must be to be exchanged at once."""
        return torch.device("cpu") if self.on_host else torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def agreement(self, op: str, device: torch.device | None = None) -> Iterator[Call]:
        """Raise on every rank if the block raises on one, or if the ranks call different functions or state different facts.

        The rank whose block raised raises that; the others ValueError, or RuntimeError where it was no refusal of an input,
        naming the rank. device: of the data that the function exchanges; None agrees at once wherever they are.
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
        said = f"{op}\n{text}" if error is None else f"{op}\n{type(error).__name__}: {error}"
        encoded = said.encode()[:TEXT_BYTES]
        padded = torch.zeros(TEXT_BYTES, dtype=torch.uint8, device="cpu")
        padded[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device="cpu")
        texts = [bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in self.gather(padded)]
        if error is None:
            raise _disagreement(op, table, texts)

    def _exchange_on_device(self, op: str, call: Call, device: torch.device, status: int) -> None:
        """A fill, a gather and a comparison: nothing is copied to or from the host."""
        said = _hash(f"{status} {op}\n{call.text(read_counters=False)} {call.count}")
        header = torch.full((1, HEADER), said, device=device)
        for place, counter in enumerate(call.counters.values()):
            header[0, 1 + place] = counter.reshape(())
        table = header.new_empty(self.size, HEADER)
        dist.all_gather_into_tensor(table, header, group=self.group)
        if status == FINE:
            message = f"{op}: a rank refused its input, or the ranks made different calls"
            torch._assert_async((table == header).all(), message)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in rank order."""
        if self.size == 1:
            return [tensor]
        moved = tensor if tensor.is_cuda else tensor.to(self.device)
        moved = moved.contiguous()
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        dist.all_gather(parts, moved, group=self.group)
        return [part.to(tensor.device) for part in parts]

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Every rank's rows (counts[rank], ...), joined in rank order."""
        if self.size == 1:
            return rows
        if len(set(counts)) == 1:
            return torch.cat(self.gather(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(self.gather(padded), counts, strict=True)])

    def pass_on(self, rows: Tensor, tag: int = 0) -> Callable[[], Tensor]:
        """Sends rows to the next rank while the previous rank's, of one shape and dtype, arrive; the call waits for them."""
        there = rows if rows.is_cuda else rows.to(self.device)
        there = there.contiguous()
        arriving = torch.empty_like(there)
        if self.group is None:
            following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        else:
            following, previous = (dist.get_global_rank(self.group, (self.rank + by) % self.size) for by in (1, -1))
        both = [
            dist.P2POp(dist.isend, there, following, self.group, tag),
            dist.P2POp(dist.irecv, arriving, previous, self.group, tag),
        ]
        works = dist.batch_isend_irecv(both)

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return arriving.to(rows.device)

        return wait

    def ring(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The rows of each rank and its number, this rank's first; the next ones arrive meanwhile."""
        for turn in range(self.size):
            coming = self.pass_on(rows) if turn + 1 < self.size else None
            yield (self.rank - turn) % self.size, rows
            if coming is not None:
                rows = coming()

    def mean(self, number: Tensor) -> Tensor:
        """The mean of every rank's number, a tensor of one shape."""
        total = number.detach().clone().to(self.device)
        dist.all_reduce(total, group=self.group)
        return (total / self.size).to(number.device)

    def gather_with_gradient(self, rows: Tensor, counts: list[int]) -> Tensor:
        """gather_rows whose gradient is the sum of what every rank's loss gives to this rank's rows.

        A model whose gradients are then averaged over the ranks gets the gradient of the mean of the ranks' losses.
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
        total = (
            d_all.contiguous() if d_all.dtype == torch.float64 else d_all.float().contiguous()
        )  # (sum of counts, ...)
        total = total.clone() if total.data_ptr() == d_all.data_ptr() else total  # others may hold the gradient too
        dist.all_reduce(total, group=ranks.group)
        first = sum(counts[: ranks.rank])
        return total[first : first + counts[ranks.rank]].to(ctx.dtype), None, None


def _disagreement(op: str, table: list[list[int]], texts: list[str]) -> Exception:
    """The exception of a rank whose own checks passed. table (W, 5): headers; texts: the function's name, then what it says."""
    for rank, (status, *_) in enumerate(table):
        said = _cut(texts[rank].partition("\n")[2])
        if status == REFUSED:
            return ValueError(f"{op}: rank {rank} refused its input, so every rank stops: {said}")
        if status == FAILED:
            return RuntimeError(f"{op}: rank {rank} failed, so every rank stops: {said}")
    odd = next(rank for rank, row in enumerate(table) if row[1:3] != table[0][1:3])
    (other, *theirs), (first, *ours) = (texts[rank].split("\n") for rank in (odd, 0))
    if other != first:
        return ValueError(f"{op}: every rank must make the same call, but rank {odd} calls {other} and rank 0 {first}")
    alone = [fact for fact in theirs if fact not in ours], [fact for fact in ours if fact not in theirs]
    differs = " and rank 0 ".join(_cut(facts[0]) if facts else "no such" for facts in alone)
    return ValueError(f"{op}: every rank must give the same options and dtypes, but rank {odd} gives {differs}")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 3] + "..."
