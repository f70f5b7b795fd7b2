"""MoCoQueue as a ring buffer: any batch size, ids and labels, checkpoints, several ranks."""

import copy
import pickle

import pytest
import torch

import negmine
from negmine import FalseNegatives, Mix, MoCoQueue, Negatives, Select, Weight, recipes
from tests.cases import unit
from tests.conftest import device_of, interpreted
from tests.ranks import run_ranks


class ListQueue:
    """The same queue as a Python list."""

    def __init__(self, K):
        self.rows, self.ptr, self.K = [None] * K, 0, K

    def enqueue(self, rows):
        for row in rows:
            self.rows[self.ptr] = row
            self.ptr = (self.ptr + 1) % self.K

    @property
    def valid(self):
        return [row for row in self.rows if row is not None]


@pytest.mark.parametrize("K", [1, 7, 16])
def test_ring_of_any_batch_size(K):
    queue = MoCoQueue(3, K, with_ids=True, with_labels=True, random_init=False)
    twin, start = ListQueue(K), 0
    for batch in (4, 0, 1, K, K + 3, 2, 2 * K, 5):
        number = torch.arange(start, start + batch)
        keys = number[:, None].float().expand(batch, 3)
        queue.enqueue(keys, ids=number, labels=number % 3)
        twin.enqueue(number.tolist())
        start += batch
        assert queue.ids.tolist() == twin.valid and len(queue) == len(twin.valid)
        assert queue.keys[:, 0].tolist() == twin.valid
        assert queue.labels.tolist() == [n % 3 for n in twin.valid]
        assert int(queue.queue_ptr) == twin.ptr and int(queue.queue_len) == len(twin.valid)


def test_keys_are_a_view_and_random_rows_are_unit():
    queue = MoCoQueue(8, 20)
    assert queue.keys.data_ptr() == queue.queue.data_ptr() and len(queue) == 20
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(20))
    assert MoCoQueue(8, 20, random_init=False).keys.shape == (0, 8)
    assert queue.ids is None and queue.labels is None


def test_unnamed_ids_are_minus_one():
    queue = MoCoQueue(2, 4, with_ids=True, random_init=False)
    queue.enqueue(torch.ones(2, 2), ids=torch.tensor([5, 6]))
    queue.enqueue(torch.ones(1, 2))
    assert queue.ids.tolist() == [5, 6, -1]


def test_storage_dtype_and_conversion():
    queue = MoCoQueue(4, 6, dtype=torch.bfloat16, random_init=False)
    keys = unit(3, 4)
    queue.enqueue(keys)
    assert torch.equal(queue.keys, keys.bfloat16())


@pytest.mark.parametrize("steps", [1, 3])
def test_save_and_load_in_mid_run(steps):
    def fill(queue, seeds):
        for seed in seeds:
            queue.enqueue(unit(3, 4, seed=seed), ids=torch.arange(3) + 3 * seed)

    straight = MoCoQueue(4, 10, with_ids=True, random_init=False)
    fill(straight, range(steps + 4))
    half = MoCoQueue(4, 10, with_ids=True, random_init=False)
    fill(half, range(steps))
    resumed = MoCoQueue(4, 10, with_ids=True)
    resumed.load_state_dict(half.state_dict())
    for again in (resumed, copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        assert len(again) == len(half)
        fill(again, range(steps, steps + 4))
        assert torch.equal(again.keys, straight.keys) and torch.equal(again.ids, straight.ids)


def test_the_gradient_survives_enqueue():
    queue = MoCoQueue(4, 8)
    q = unit(3, 4).requires_grad_()
    loss = negmine.info_nce(q, unit(3, 4, seed=1), queue, backend=None)
    queue.enqueue(unit(8, 4, seed=2))
    loss.backward()
    assert bool(q.grad.isfinite().all())


# Every public function that takes a queue, as a function of query, positive, negatives, ids of the queries, and backend.
OVER_A_QUEUE = {
    "info_nce": lambda q, p, n, **given: negmine.info_nce(q, p, n, **given),
    "window": lambda q, p, n, **given: negmine.info_nce(q, p, n, select=Select(0.2, 0.7), **given),
    "sample": lambda q, p, n, **given: negmine.info_nce(q, p, n, select=Select(0, 0.9, sample=3), seed=1, **given),
    "mix": lambda q, p, n, **given: negmine.info_nce(q, p, n, mix=Mix(4, 3, 2), **given),
    "followed mix": lambda q, p, n, **given: negmine.info_nce(q, p, n, mix=Mix(4, 3, 2, detach=False), **given),
    "weight": lambda q, p, n, **given: negmine.info_nce(q, p, n, weight=Weight(1.0, 0.01), **given),
    "false negatives": lambda q, p, n, **given: negmine.info_nce(
        q, p, n, false_negatives=FalseNegatives(2, 0.0, mode="attract"), support=p.detach()[:, None], **given
    ),
    "siglip": lambda q, p, n, **given: negmine.siglip(q, p, n, bias=-1.0, **given),
    "logsumexp": lambda q, p, n, **given: negmine.logsumexp(q, n, **given).sum(),
    "synco": lambda q, p, n, **given: recipes.synco(4, 2, 2, 2, 1, 1, 1, backend=given.pop("backend"))(
        q, p, n, **given
    ),
    "mine_hardest": lambda q, p, n, **given: negmine.mine_hardest(q, n, 9, **given).index,
    "mined window": lambda q, p, n, **given: negmine.mine_hardest(q, n, 9, select=Select(0.1, 0.8), **given).index,
    "rank_thresholds": lambda q, p, n, **given: negmine.rank_thresholds(q, n, [0, 4, 9], **given),
    "quantile": lambda q, p, n, **given: negmine.quantile(q, n, [0.0, 0.3, 1.0], **given),
    "mix_negatives": lambda q, p, n, **given: negmine.mix_negatives(q, n, Mix(4, 3, 2), **given).parents,
}


@pytest.mark.parametrize("op", OVER_A_QUEUE)
def test_a_growing_queue_is_its_valid_rows(any_backend, op):
    """Rows that are not filled yet are no candidates and are not read. In this test, they are NaN and have ids of queries."""
    device = device_of(any_backend)
    dtype = torch.float64 if any_backend == "reference" else torch.float32
    for count in (0, 7) if interpreted(any_backend) else (0, 1, 7, 12):  # of 12 rows
        queue = MoCoQueue(4, 12, dtype=dtype, with_ids=True, random_init=False).to(device)
        queue.enqueue(unit(count, 4, dtype=dtype, seed=3, device=device), ids=torch.arange(count, device=device) % 3)
        queue.queue[count:] = torch.nan
        queue.queue_ids[count:] = 1
        for tags in ({}, {"query_ids": torch.arange(5, device=device) % 3}):
            results = []
            for negatives in (queue, Negatives(queue.keys, ids=queue.ids if tags else None)):
                leaves = [unit(5, 4, dtype=dtype, seed=i, device=device).requires_grad_() for i in range(2)]
                made = OVER_A_QUEUE[op](*leaves, negatives, **tags, backend=any_backend)
                grads = torch.autograd.grad(made, leaves, allow_unused=True) if made.requires_grad else ()
                results.append([made.detach(), *(g for g in grads if g is not None)])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def work(rank, world):
    queue = MoCoQueue(2, 9, with_ids=True, random_init=False, gather_distributed=True)
    for step in range(4):
        count = 2 + (rank + step) % 2  # different batch sizes
        number = torch.arange(count) + 10 * step + 100 * rank
        queue.enqueue(number[:, None].float().expand(count, 2), ids=number)
    return queue.ids.tolist(), queue.keys[:, 0].tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_queues_are_identical_on_all_ranks_in_rank_order(world, tmp_path):
    got = run_ranks(work, world, tmp_path)
    twin = ListQueue(9)
    for step in range(4):
        for rank in range(world):
            twin.enqueue([n + 10 * step + 100 * rank for n in range(2 + (rank + step) % 2)])
    for ids, keys in got:
        assert ids == twin.valid and keys == twin.valid
