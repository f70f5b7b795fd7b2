"""Runs a function on several ranks on this machine, one process each, and collects the results."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(work: Callable, rank: int, world: int, store: Path, arguments: tuple, out: Any) -> None:
    torch.set_num_threads(1)
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
    dist.init_process_group("gloo", **place, timeout=timedelta(seconds=120))  # what waits for another rank fails then
    # By value: a tensor sent as itself lives in memory that its sender takes along when it ends.
    out.put((rank, pickle.dumps(work(rank, world, *arguments))))
    dist.barrier()
    dist.destroy_process_group()


def kill_ranks(work: Callable, world: int, folder: Path, *arguments: Any) -> None:
    """Run work(rank, world, *arguments) until the last rank has killed itself, then kill the others, as a launcher does."""
    context = mp.get_context("spawn")
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
    """What work(rank, world, *arguments) returns on each rank of a gloo group that meets in a file of `folder`."""
    context = mp.get_context("spawn")
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
