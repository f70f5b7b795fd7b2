"""Run a function on several ranks, one process each, on this machine, and collect the results."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import processes


def _rank(work: Callable, rank: int, world: int, store: Path, arguments: tuple, out: Any) -> None:
    torch.set_num_threads(1)
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    # The time limit ends a test in which a rank waits for another one forever.
    dist.init_process_group("gloo", **place, timeout=timedelta(seconds=120))
    # Sent by value, because a tensor would be in shared memory that disappears when its sender ends.
    out.put((rank, pickle.dumps(work(rank, world, *arguments))))
    dist.barrier()
    dist.destroy_process_group()


def kill_ranks(work: Callable, world: int, folder: Path, *arguments: Any) -> None:
    """Run work(rank, world, *arguments) until the last rank kills itself; then kill the other ranks, as a launcher does."""
    context = processes.context()
    out = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, folder / "killed", arguments, out))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    ranks[-1].join(300)
    for process in ranks:
        process.kill()
        process.join()


def run_ranks(work: Callable, world: int, folder: Path, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Return the results of work(rank, world, *arguments) on all ranks of a gloo group, which uses a file in `folder`."""
    context = processes.context()
    out = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, folder / "store", arguments, out))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    got = sorted((out.get(timeout=timeout) for _ in ranks), key=lambda answer: answer[0])
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    return [pickle.loads(answer) for _, answer in got]
