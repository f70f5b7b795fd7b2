"""Training steps without end, in one process that must not grow: python -m tests.soak --steps 10000

A step scores a queue, takes a window, mixes, mines and weighs, differentiates, and enqueues. After the first tenth, resident
memory may grow by LIMIT_MB in all.
"""

import argparse
import contextlib
import gc
import sys

import torch

import negmine
from negmine import Mix, MoCoQueue, Select, Weight
from tests.peak import status_mib

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
    images = torch.randn(B - step % 5, D)  # ragged, as the last batch of an epoch is
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
    if step % 50 == 0:  # a refusal leaves nothing behind
        with contextlib.suppress(ValueError):
            negmine.info_nce(query, key, queue.keys[:, 1:])


def growth_mb(steps: int, step=one_step) -> float:
    """Megabytes that the process gains between a tenth of the steps and the last."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several on busy cores wait for each other most of the time
    layer, queue = torch.nn.Linear(D, D), MoCoQueue(D, K, with_ids=True)
    before = 0.0
    for number in range(steps):
        if number == steps // 10:
            before = resident_mb()
        step(number, layer, queue)
    torch.set_num_threads(threads)
    return resident_mb() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    grown = growth_mb(steps)
    print(f"{steps} steps: {grown:+.1f} MB, at most {LIMIT_MB} allowed")
    sys.exit(grown > LIMIT_MB)
