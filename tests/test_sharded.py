"""A queue distributed over 1, 2 and 3 ranks (gloo), compared with one process; also with uneven and empty batches.

With small integers, scores are exact and many are equal, so selections must be identical. Losses, gradients and log-sum-exps,
whose sums have another order, are compared with compare.rounded.
"""

import copy
import itertools
import pickle
import threading

import pytest
import torch

import negmine
from negmine import MoCoQueue, Select, Weight
from negmine.ops import backends, sort_key
from negmine.ops.pool import Pool
from negmine.queues import ShardedMoCoQueue, sharded_ops
from tests import compare
from tests.cases import ids, unit, whole
from tests.ranks import run_ranks

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)
K, D = 101, 6
BATCHES = [[4, 1, 3], [0, 5, 2], [7, 7, 7]]  # batch sizes of the ranks at each step
# Number of enqueued keys: the ring has wrapped around; some shards are empty.
FILL = {"full": 230, "growing": 41, "one row": 1}
AT_ONCE = {"full": 3, "growing": 2, "one row": 1024}  # scores exchanged at once: several small rounds, and one
SELECTS = {
    "all": None,
    "hardest 5 %": Select(0, 0.05),
    "middle": Select(0.1, 0.55),
    "easiest": Select(0.6, 1.0),
    "ranks": Select(3, 40),
    "past the end": Select(90, 2000),
    "scores": Select(min_score=-3.0, max_score=2.0),
    "scores and ranks": Select(2, 0.5, max_score=3.0),
    "margin": Select(0, 0.7, absolute_margin=1.0),
}


def selects(fill):
    """The windows to test: fewer for a queue with a single row."""
    return list(SELECTS.items())[:: 1 if fill == "full" else 3]


def filled(queue, keys):
    """Enqueue keys in batches of several sizes, with repeated ids and labels."""
    number = torch.arange(len(keys))
    for start in range(0, len(keys), 23):
        part = slice(start, start + 23)
        queue.enqueue(keys[part], ids=number[part] % 9, labels=number[part] % 5)
    return queue


def single(fill, dtype=torch.float32):
    """The whole queue in one process."""
    return filled(
        MoCoQueue(D, K, dtype=dtype, with_ids=True, with_labels=True, random_init=False), whole(FILL[fill], D, seed=9)
    )


def batch(step, world, make=whole):
    """The global batch of a step: queries, positives, ids, labels, and the first row of each rank."""
    counts = BATCHES[step][:world]
    tags = ids(sum(counts), 0, seed=step)["query_ids"]
    starts = list(itertools.accumulate(counts, initial=0))
    return make(sum(counts), D, seed=50 + step), make(sum(counts), D, seed=60 + step), tags, starts


def losses(queue, q, pos, tags, **options):
    """Loss rows, statistics, and the gradients of the query, the positive and the temperature."""
    leaves = q.clone().requires_grad_(), pos.clone().requires_grad_(), torch.tensor(0.7).requires_grad_()
    call = dict(
        temperature=leaves[2], reduction="none", return_stats=True, query_ids=tags, query_labels=tags % 5, **options
    )
    if isinstance(queue, ShardedMoCoQueue):
        rows, stats = queue.info_nce(*leaves[:2], **call)
    else:
        rows, stats = negmine.info_nce(*leaves[:2], queue, **call)
    if isinstance(queue, ShardedMoCoQueue):
        queue.enqueue(pos.detach()[:0])  # a collective between forward and backward
    grads = torch.autograd.grad(rows.double().sum(), leaves)
    return [rows.detach(), *stats[:4], *grads]


def work(rank, world, whole_states):
    results = {}
    for fill in FILL:
        queue = ShardedMoCoQueue(D, K, with_ids=True, with_labels=True, random_init=False)
        queue.load_state_dict(pickle.loads(whole_states[fill]))
        sharded_ops.AT_ONCE = AT_ONCE[fill]
        for step, (name, select) in enumerate(selects(fill)):
            q, pos, tags, starts = batch(step % 3, world)
            own = slice(starts[rank], starts[rank + 1])
            mined = queue.mine_hardest(
                q[own], 9, positive_key=pos[own], select=select, query_ids=tags[own], query_labels=tags[own] % 5
            )
            made = losses(queue, q[own], pos[own], tags[own], select=select)
            results[fill, name] = [list(mined), made]
        q, pos, tags, starts = batch(2, world, unit)
        own = slice(starts[rank], starts[rank + 1])
        results[fill, "weight"] = losses(queue, q[own], pos[own], tags[own], weight=Weight(1.0, 0.01))
        results[fill, "decoupled"] = losses(queue, q[own], pos[own], tags[own], decoupled=True)
    fresh = filled_by_ranks(ShardedMoCoQueue(D, K, with_ids=True, random_init=False), rank, world)
    half = ShardedMoCoQueue(D, K, dtype=torch.bfloat16)
    half.enqueue(unit(3 + rank, D, seed=rank))
    results["states"] = [dict(fresh.state_dict()), dict(half.state_dict())]
    results["refusals"] = refusals(fresh, rank, world)
    return results


def filled_by_ranks(queue, rank, world):
    for step in range(9):
        count = (step + rank) % 4
        number = torch.arange(count) + 10 * step + 100 * rank
        queue.enqueue(number[:, None].float().expand(count, D), ids=number)
    return queue


def refusals(queue, rank, world):
    """Return the errors that a mistake on one rank raises on all ranks. No rank may hang."""
    q = unit(2, D)
    calls = {
        "one rank is wrong": lambda: queue.mine_hardest(q if rank else q.long(), 3),
        "others ask otherwise": lambda: queue.mine_hardest(q, 3 + (rank == world - 1)),
        "after them all is well": lambda: queue.mine_hardest(q, 3),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except (ValueError, TypeError) as refusal:
            said[name] = str(refusal)
    return said


def concatenated(got, key, place):
    """Concatenate the results of all ranks in rank order."""
    columns = zip(*((rank[key][place] if place is not None else rank[key]) for rank in got), strict=True)
    return [torch.cat(c) if c[0].dim() else torch.stack(c).sum() for c in columns]


def judge(name, made, want, truth, exact):
    """Compare results of `losses`: made by the shards, want of one process, truth of the reference in float64."""
    for i in range(2, 5) if exact else (3,):
        compare.exact(f"{name}[{i}]", made[i], want[i])
    for i in (0, 1, 5, 6, 7):
        compare.rounded(f"{name}[{i}]", made[i], truth[i].to(torch.float64), want[i], 8.0, truth[0])


def in_double(queue):
    twin = copy.deepcopy(queue)
    return twin.double()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_do_what_one_process_does(world, tmp_path):
    got = run_ranks(work, world, tmp_path, {fill: pickle.dumps(single(fill).state_dict()) for fill in FILL})
    for fill in FILL:
        queue = single(fill)
        exact_queue = in_double(queue)
        for step, (name, select) in enumerate(selects(fill)):
            q, pos, tags, _ = batch(step % 3, world)
            want = negmine.mine_hardest(
                q, queue, 9, positive_key=pos, select=select, query_ids=tags, query_labels=tags % 5, backend="cpu"
            )
            plain = losses(queue, q, pos, tags, select=select)
            truth = losses(exact_queue, q.double(), pos.double(), tags, select=select)
            mined = concatenated(got, (fill, name), 0)
            compare.exact(f"{fill} {name} scores", mined[0], want.scores)
            compare.exact(f"{fill} {name} index", mined[1], want.index)
            judge(f"{fill} {name}", concatenated(got, (fill, name), 1), plain, truth, exact=True)
        q, pos, tags, _ = batch(2, world, unit)
        for name, options in {"weight": {"weight": Weight(1.0, 0.01)}, "decoupled": {"decoupled": True}}.items():
            plain = losses(queue, q, pos, tags, **options)
            truth = losses(exact_queue, q.double(), pos.double(), tags, **options)
            judge(f"{fill} {name}", concatenated(got, (fill, name), None), plain, truth, exact=False)

    twin = MoCoQueue(D, K, with_ids=True, random_init=False)
    for step in range(9):
        for rank in range(world):
            count = (step + rank) % 4
            number = torch.arange(count) + 10 * step + 100 * rank
            twin.enqueue(number[:, None].float().expand(count, D), ids=number)
    states, halves = ([rank["states"][i] for rank in got] for i in range(2))
    assert torch.equal(torch.cat([s["queue"] for s in states]), twin.queue)
    assert torch.equal(torch.cat([s["queue_ids"] for s in states]), twin.queue_ids)
    one = ShardedMoCoQueue(D, K, with_ids=True)  # another number of ranks: one
    one.load_shards(reversed(states))
    assert torch.equal(one.keys, twin.keys) and torch.equal(one.ids, twin.ids) and len(one) == len(twin)
    back = MoCoQueue(D, K, with_ids=True)
    back.load_state_dict({name: value for name, value in one.state_dict().items() if name != "queue_range"})
    back.enqueue(unit(5, D))
    one.enqueue(unit(5, D))
    assert torch.equal(one.keys, back.keys)
    fresh = torch.cat([s["queue"] for s in halves])
    entered = torch.cat([unit(3 + rank, D, seed=rank) for rank in range(world)]).bfloat16()
    assert torch.equal(fresh[: len(entered)], entered)
    assert torch.equal(fresh[len(entered) :], ShardedMoCoQueue(D, K, dtype=torch.bfloat16).queue[len(entered) :])

    if world > 1:
        said = [rank["refusals"] for rank in got]
        assert "query must be a floating tensor" in said[0]["one rank is wrong"]
        for other in said[1:]:
            assert "rank 0 rejected its input, so every rank stops: TypeError: Sharded" in other["one rank is wrong"]
        for every in said:
            assert f"but rank {world - 1} gives N=4 and rank 0 N=3" in every["others ask otherwise"]
            assert every["after them all is well"] == ""


def shard_of(first, end, total=K, **changes):
    """The state of the shard [first, end), as saved by another number of ranks."""
    queue = single("full")
    state = {name: getattr(queue, name)[first:end] for name in ("queue", "queue_ids", "queue_labels")}
    counters = {"queue_ptr": queue.queue_ptr, "queue_len": queue.queue_len}
    return {**state, **counters, "queue_range": torch.tensor([first, end, total]), **changes}


def test_shards_of_any_number_of_ranks_load():
    queue = ShardedMoCoQueue(D, K, with_ids=True, with_labels=True)
    queue.load_shards(shard_of(a, b) for a, b in ((50, 60), (0, 50), (60, K)))
    assert torch.equal(queue.queue, single("full").queue) and torch.equal(queue.labels, single("full").labels)
    assert copy.deepcopy(queue).queue_ptr == pickle.loads(pickle.dumps(queue)).queue_ptr == single("full").queue_ptr


@pytest.mark.parametrize(
    "states, said",
    [
        ([(0, 50)], "cover rows 0 to 101 once"),
        ([(0, 50), (49, K)], "cover rows 0 to 101 once"),
        ([], "cover rows"),
        ([(0, 50), (50, K, 200)], "for a queue of K = 101"),
    ],
)
def test_shards_that_do_not_fit_are_refused(states, said):
    queue = ShardedMoCoQueue(D, K, with_ids=True, with_labels=True)
    before = queue.queue.clone()
    with pytest.raises(ValueError, match=said):
        queue.load_shards(shard_of(*state) for state in states)
    other = shard_of(50, K, queue_ptr=torch.tensor([3]))
    with pytest.raises(ValueError, match="must have been saved at one step"):
        queue.load_shards([shard_of(0, 50), other])
    with pytest.raises(ValueError, match="each of states must have queue_ids"):
        queue.load_shards([{n: v for n, v in shard_of(0, K).items() if n != "queue_ids"}])
    assert torch.equal(queue.queue, before)
    with pytest.raises(RuntimeError, match="use load_shards to load the states of another number"):
        queue.load_state_dict(shard_of(0, 50))


def test_a_moco_checkpoint_is_cut():
    queue = ShardedMoCoQueue(D, K, with_ids=True)
    queue.load_state_dict({"queue": unit(K, D, seed=3).T, "queue_ptr": torch.tensor([7])})
    assert torch.equal(queue.queue, unit(K, D, seed=3)) and queue.ids.tolist() == [-1] * K
    with pytest.raises(ValueError, match="no rank stores the whole queue; load the shards"):
        queue.moco_state_dict()


def test_invalid_calls_of_a_sharded_queue_raise_errors():
    queue, q = ShardedMoCoQueue(D, 40), unit(3, D)
    for error, said, call in [
        (ValueError, "K must be an int of 1 or more, got 0", lambda: ShardedMoCoQueue(D, 0)),
        (ValueError, "K must be at most 4294967295", lambda: ShardedMoCoQueue(D, 2**32)),
        (
            ValueError,
            "query_ids must be None, because the queue was created without",
            lambda: queue.info_nce(q, q, query_ids=torch.ones(3)),
        ),
        (ValueError, "select must be without sample", lambda: queue.info_nce(q, q, select=Select(sample=3))),
        (
            ValueError,
            "positive_key must be given if",
            lambda: queue.mine_hardest(q, 3, select=Select(absolute_margin=0.1)),
        ),
        (
            backends.BackendUnavailable,
            "the reference backend does not support sharded queues",
            lambda: queue.info_nce(q.double(), q.double()),
        ),
        (
            backends.BackendUnavailable,
            "no kernel runs this call",
            lambda: queue.mine_hardest(q, 3, backend="reference"),
        ),
        (TypeError, "select must be a negmine.Select", lambda: queue.info_nce(q, q, select=0.5)),
        (ValueError, "ShardedMoCoQueue.enqueue: keys must be of shape", lambda: queue.enqueue(unit(3, D + 1))),
    ]:
        with pytest.raises(error, match=said):
            call()
    assert "rows=0 to 40" in repr(queue)


def test_bounds_move_between_ring_and_shard():
    """A bound before a shard, in it or after it keeps the same columns, also for equal and infinite scores."""
    scores = torch.tensor([-torch.inf, -2.0, -0.0, 0.0, 1.5, torch.inf]).repeat_interleave(8)
    index = torch.arange(8).repeat(6) + 10  # a shard of rows 10 to 17
    places = sort_key.pack(scores, index)
    local = sort_key.pack(scores, index - 10)
    assert torch.equal(sharded_ops.to_queue(local, 10), places)
    for score, at in itertools.product(
        (-torch.inf, -2.0, 0.0, 1.5, torch.inf), (0, 9, 10, 13, 17, 18, sort_key.LAST_INDEX)
    ):
        bound = sort_key.pack(torch.tensor(score), at)
        upper, lower = sharded_ops.upper_in_shard(bound, 10), bound + 10
        assert torch.equal(local <= upper, places <= bound), (score, at)
        assert torch.equal(local >= lower, places >= bound), (score, at)


class Together(sharded_ops.Merging):
    """Simulates ranks as threads of this process, which exchange data through a list."""

    def __init__(self, rank, counts, board, barrier):
        self.rank, self.counts, self.world, self.want_mean = rank, counts, len(counts), True
        self.board, self.barrier, self.rounds = board, barrier, 0

    def exchange(self, mine):
        self.board[self.rank] = mine
        self.barrier.wait(30)
        everyones = list(self.board)
        self.barrier.wait(30)
        return everyones

    def all_rows(self, rows):
        return torch.cat(self.exchange(rows))

    def parts(self, partial):
        return torch.stack([part.split(self.counts)[self.rank] for part in self.exchange(partial)])

    def any(self, *flags):
        self.rounds += 1
        return [any(raised) for raised in zip(*self.exchange([bool(flag.any()) for flag in flags]), strict=True)]


# Where the hard keys are. This may affect the speed of the search, but not its result.
SPREADS = {
    "even": lambda keys: keys,
    "one hot shard": lambda keys: keys[(keys @ torch.ones(D)).argsort(descending=True)],
    "coldest first": lambda keys: keys[(keys @ torch.ones(D)).argsort()],
    "all equal": lambda keys: torch.ones_like(keys),
    "NaN in one": lambda keys: torch.cat([keys[: 2 * K] * torch.nan, keys[2 * K :]]),
}


@pytest.mark.parametrize("at_once", [1, 5, 64])
@pytest.mark.parametrize("spread", SPREADS)
def test_ranks_over_shards_are_exact_wherever_the_hard_keys_are(spread, at_once, monkeypatch):
    monkeypatch.setattr(sharded_ops, "AT_ONCE", at_once)
    total, counts = 7 * K, [2, 0, 1, 3]
    B, W = sum(counts), len(counts)
    keys = SPREADS[spread](whole(total, D, seed=4))
    q = torch.ones(B, D) + whole(B, D, seed=5) * (spread == "even")
    wanted = torch.stack([torch.tensor([0, 3, total // 20, total - 1, total, -1])] * B) + torch.arange(B)[:, None]
    want = cpu.functions["rank_thresholds"](q, keys, wanted, *Pool())
    starts = [0, 11, 12, 5 * K, total]  # shards of very different sizes
    board, barrier, got, rounds = [None] * W, threading.Barrier(W), [None] * W, [0] * W

    def work(rank):
        try:
            ranks = Together(rank, counts, board, barrier)
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            ops = sharded_ops.ShardedKernels(backends.Kernels(**cpu.functions), ranks, q[own], total, starts[rank])
            got[rank] = ops.rank_thresholds(q[own], keys[starts[rank] : starts[rank + 1]], wanted[own], *Pool())
            rounds[rank] = ranks.rounds
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(W)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compare.exact("places", torch.cat(got), want)
    assert len(set(rounds)) == 1 and rounds[0] <= 16, rounds


def test_a_shard_of_infinite_score_makes_the_sum_infinite():
    counts, keys, q = [2, 1], unit(2 * K, D, seed=1), unit(3, D)
    keys[K + 3] = torch.inf * q[1].sign()  # in the second shard
    q[0], q[2] = q[1] * 0.5, q[1]  # a positive multiple of it
    board, barrier, got = [None] * 2, threading.Barrier(2), [None] * 2

    def work(rank):
        ranks, own = Together(rank, counts, board, barrier), slice(2 * rank, 2 + rank)
        ops = sharded_ops.ShardedKernels(backends.Kernels(**cpu.functions), ranks, q[own], 2 * K, K * rank)
        held = keys[K * rank : K * rank + K]
        got[rank] = ops.logsumexp(q[own], held, torch.tensor([5.0]), None, True, 0, None, *Pool())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bool(torch.cat([lse for lse, *_ in got], 1).isposinf().all()), got
