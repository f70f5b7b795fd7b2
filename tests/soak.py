"""Run many training steps, during which memory must not grow: python -m tests.soak --steps 10000 [--ranks 2]

A step uses a queue, a window, synthetic negatives, mining, weights, gradients, and enqueue. After the first tenth, resident
memory may grow by LIMIT_MB in all.
"""

import argparse
import contextlib
import gc
import hashlib
import sys
import tempfile
from pathlib import Path

import torch

import negmine
from negmine import Mix, MoCoQueue, Select, Weight
from tests import long_run
from tests.peak import status_mib
from tests.ranks import run_ranks

B, K, D = 48, 2048, 32
LIMIT_MB = 8
OPTIONS = [
    {},
    {"select": Select(0.001, 0.05)},
    {"mix": Mix(64, 32, 8)},
    {"weight": Weight(1.0, 0.001)},
    {"decoupled": True},
]


def resident_mb() -> float:
    gc.collect()
    return status_mib("VmRSS")


def one_step(step: int, layer: torch.nn.Linear, queue: MoCoQueue) -> None:
    images = torch.randn(B - step % 5, D)  # different batch sizes, as at the end of an epoch
    ids = torch.arange(len(images))
    query, key = (torch.nn.functional.normalize(layer(images), dim=1) for _ in range(2))
    loss = negmine.info_nce(
        query,
        key.detach(),
        queue,
        **OPTIONS[step % len(OPTIONS)],
        query_ids=ids,
        step=step,
    )
    queue.enqueue(key.detach(), ids=ids)
    layer.zero_grad()
    loss.backward()
    if step % 7 == 0:
        negmine.mine_hardest(query, queue, 20)
        negmine.quantile(query, queue, [0.5, 0.99])
    if step % 50 == 0:  # an error must not leak memory
        with contextlib.suppress(ValueError):
            negmine.info_nce(query, key, queue.keys[:, 1:])


def growth_mb(steps: int, step=one_step) -> float:
    """Return by how many megabytes the process grows after the first tenth of the steps."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy cores, several threads wait for each other most of the time
    layer, queue = torch.nn.Linear(D, D), MoCoQueue(D, K, with_ids=True)
    before = 0.0
    for number in range(steps):
        if number == steps // 10:
            before = resident_mb()
        step(number, layer, queue)
    torch.set_num_threads(threads)
    return resident_mb() - before


def growth_of_rank(rank: int, world: int, steps: int) -> tuple[float, list[str]]:
    """Return by how many megabytes a rank grows after the first tenth of the steps, and hashes of its queue at ten steps."""
    job, before, hashes = long_run.Job(), 0.0, []
    for number in range(steps):
        if number == steps // 10:
            before = resident_mb()
        job.run_step()
        if number % max(1, steps // 10) == 0:
            state = b"".join(value.numpy().tobytes() for value in job.queue.state_dict().values())
            hashes.append(hashlib.blake2b(state).hexdigest())
    return resident_mb() - before, hashes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=1, help="processes that train together")
    steps, ranks = vars(parser.parse_args()).values()
    grown = growth_mb(steps) if ranks == 1 else 0.0
    if ranks > 1:
        with tempfile.TemporaryDirectory() as folder:
            answers = run_ranks(growth_of_rank, ranks, Path(folder), steps, timeout=86_400)
        grown = max(growth for growth, _ in answers)
        if any(hashes != answers[0][1] for _, hashes in answers):
            sys.exit("the ranks' queues are not the same")
    print(f"{steps} steps: {grown:+.1f} MB, at most {LIMIT_MB} allowed")
    sys.exit(grown > LIMIT_MB)
