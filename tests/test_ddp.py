"""Data-parallel training on gloo: the ranks together compute the same as one process with the concatenated batch.

    gradient = sum over ranks of (rank's batch / global batch) * gradient of rank's mean loss

DDP averages gradients with equal weights, which is the mean over the global batch only where the ranks' batches are equal; the
last batch of an epoch is ragged. Here every rank scales its "sum" by world / global batch, so that DDP's plain average is
right for any split. row_offset makes the draws those of the global rows.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import negmine
from negmine import Mix, MoCoQueue, Select
from tests.cases import unit
from tests.ranks import run_ranks

STEPS, IN, D, K = 5, 6, 8, 40
# The batch sizes of the ranks at each step, which differ at the last step.
BATCHES = [[4, 4, 4], [4, 4, 4], [4, 4, 4], [4, 4, 4], [4, 1, 2]]
OPTIONS = {"plain": {}, "mix": {"mix": Mix(9, 7, 5), "seed": 3}, "select": {"select": Select(0.05, 0.5)}}


def encoder():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(IN, 12), nn.Tanh(), nn.Linear(12, D))


class Trainer:
    """MoCo on one of several ranks, or in a single process with the rows of all ranks."""

    def __init__(self, options, gather):
        self.options, self.step = options, 0
        self.model, self.target = encoder(), encoder()
        self.net = DistributedDataParallel(self.model) if gather else self.model
        torch.manual_seed(11)
        self.queue = MoCoQueue(D, K, with_ids=True, gather_distributed=gather)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)

    def run(self, steps, rows_of, world):
        """Return the gradients of every step. rows_of(counts) -> this rank's slice of the global batch."""
        seen = []
        for _ in range(steps):
            counts = BATCHES[self.step][: max(world, 1)]
            image, mine = unit(sum(counts), IN, seed=100 + self.step), rows_of(counts)
            number = torch.arange(sum(counts)) % 7 + self.step  # some ids are equal to those of recent batches
            q = nn.functional.normalize(self.net(image[mine]), dim=1)
            with torch.no_grad():
                k = nn.functional.normalize(self.target(image[mine] * 0.9), dim=1)
            loss = negmine.info_nce(
                q, k, self.queue, temperature=0.2, reduction="sum", step=self.step, row_offset=mine.start,
                query_ids=number[mine], **self.options,
            )  # fmt: skip
            self.queue.enqueue(k, ids=number[mine])
            self.optimiser.zero_grad()
            share = 1 if self.net is self.model else world  # DDP divides by the world
            (loss * share / sum(counts)).backward()
            seen.append([p.grad.clone() for p in self.model.parameters()])
            self.optimiser.step()
            self.step += 1
        return seen

    def state(self):
        parts = (self.model.state_dict(), self.queue.state_dict(), self.optimiser.state_dict(), self.step)
        file = io.BytesIO()
        torch.save(parts, file)
        return file.getvalue()

    def load(self, state):
        model, queue, optimiser, self.step = torch.load(io.BytesIO(state))
        self.model.load_state_dict(model)
        self.queue.load_state_dict(queue)
        self.optimiser.load_state_dict(optimiser)


def work(rank, world):
    def rows_of(counts):
        return slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    results = {}
    for name, options in OPTIONS.items():
        straight = Trainer(options, gather=True)
        seen = straight.run(STEPS, rows_of, world)
        half = Trainer(options, gather=True)
        half.run(2, rows_of, world)
        resumed = Trainer(options, gather=True)
        resumed.run(2, rows_of, world)  # DDP rebuilds its buckets at the second step, which changes rounding
        resumed.queue.enqueue(unit(3, D, seed=rank))  # must be overwritten by loading
        resumed.load(half.state())
        again = resumed.run(STEPS - 2, rows_of, world)
        results[name] = {"gradients": seen, "resumed": again, "queue": dict(straight.queue.state_dict())}
        results[name]["queue resumed"] = dict(resumed.queue.state_dict())
    return results, cached(rank)


def cached(rank):
    """Return the gradients of grad_cache with one encoder for two inputs, and the gradient buckets that DDP reduced."""
    model, reduced = encoder(), []
    net = DistributedDataParallel(model)

    def hook(_, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)

    net.register_comm_hook(None, hook)
    loss = negmine.InfoNCELoss(0.2, gather_distributed=True)
    inputs = [unit(5, IN, seed=2 * rank), unit(5, IN, seed=2 * rank + 1)]
    negmine.losses.grad_cache(loss, net, inputs, 2)
    return [p.grad for p in model.parameters()], reduced


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_do_what_one_process_does(world, tmp_path):
    got = run_ranks(work, world, tmp_path)
    for name, options in OPTIONS.items():
        single = Trainer(copy.deepcopy(options), gather=False)
        want = single.run(STEPS, lambda counts: slice(0, sum(counts)), world)
        for rank in range(world):
            mine = got[rank][0][name]
            for step in range(STEPS):
                for a, b in zip(mine["gradients"][step], want[step], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
            for a, b in zip(mine["gradients"][2:], mine["resumed"], strict=True):  # bit for bit
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), name
            for key, value in mine["queue"].items():
                assert torch.equal(value, got[0][0][name]["queue"][key]), (name, rank, key)
                assert torch.equal(value, mine["queue resumed"][key]), (name, rank, key)
            torch.testing.assert_close(mine["queue"]["queue"], single.queue.queue)
            assert torch.equal(mine["queue"]["queue_ids"], single.queue.queue_ids)
    model = encoder()
    q, k = (model(torch.cat([unit(5, IN, seed=2 * rank + side) for rank in range(world)])) for side in (0, 1))
    negmine.info_nce(q, k, temperature=0.2).backward()
    for _, (gradients, reduced) in got:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=2e-6)
        assert len(reduced) == len(set(reduced)) > 0  # each bucket once, at the last chunk
