"""A training job over several ranks that saves its state after every step and can be resumed, with many features combined.

MoCo with MoCHi, bf16 autocast, accumulation, two moving averages, activation checkpointing and DistributedDataParallel.
"""

import contextlib
import copy
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import negmine
from negmine import Mix, MoCoQueue
from tests.cases import unit

IN, D, K, B = 6, 8, 64, 4
STEPS, KILLED_AT = 6, 3


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(IN, 16), nn.Linear(16, D)

    def forward(self, image):
        hidden = checkpoint(lambda x: torch.tanh(self.first(x)), image, use_reentrant=False)
        return nn.functional.normalize(self.second(hidden).float(), dim=1)


class Job:
    """The modules of one rank. Everything except the batches is the same on all ranks."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = Encoder()
        self.target = copy.deepcopy(self.model)  # moving average for the keys
        self.average = copy.deepcopy(self.model)  # moving average for evaluation
        self.queue = MoCoQueue(D, K, with_ids=True, gather_distributed=True)
        self.loss = negmine.InfoNCELoss(0.2, mix=Mix(12, 8, 4), seed=3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)
        self.net, self.step = DistributedDataParallel(self.model), 0

    @property
    def parts(self):
        return {"model": self.model, "target": self.target, "average": self.average, "queue": self.queue,
                "loss": self.loss, "optimizer": self.optimizer}  # fmt: skip

    def state(self):
        return {name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step}

    def load(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]

    def run_step(self):
        rank = dist.get_rank()
        for part in range(2):  # two batches whose gradients are accumulated
            number = torch.arange(B) + B * rank + 10 * (self.step % 3)  # some ids are equal to older ones
            image = unit(B, IN, seed=1000 * rank + 2 * self.step + part)
            with self.net.no_sync() if part == 0 else contextlib.nullcontext():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    query = self.net(image)
                    with torch.no_grad():
                        key = self.target(image * 0.9)
                    loss = self.loss(query, key, self.queue, query_ids=number, row_offset=rank * B)
                self.queue.enqueue(key, ids=number)
                (loss / 2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for moving, share in ((self.target, 0.9), (self.average, 0.99)):
                for old, new in zip(moving.parameters(), self.model.parameters(), strict=True):
                    old.lerp_(new, 1 - share)
        self.step += 1


def run(rank, world, folder, killed):
    """Run up to step STEPS, from the state in `folder` if there is one. killed: kill this process within step KILLED_AT."""
    job, saved = Job(), Path(folder, "state.pt")
    if saved.exists():
        job.load(torch.load(saved))
    while job.step < STEPS:
        if killed and rank == world - 1 and job.step == KILLED_AT:
            job.queue.enqueue(unit(B, D))  # a collective, so that the other ranks are in the middle of the step too
            os.kill(os.getpid(), signal.SIGKILL)
        job.run_step()
        if rank == 0:
            torch.save(job.state(), saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    return job.state()
