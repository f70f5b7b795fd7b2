"""Tests that need a GPU: CUDA graphs, compiled steps, no synchronisation, the exact search, determinism, large offsets.

Nothing here runs without a GPU. Each test takes a few seconds on one.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import InfoNCELoss, Mix, MoCoQueue, Negatives, Select, Weight, reference
from negmine.ops import compiled, sort_key
from tests import compare
from tests.cases import ids, negatives, tags, unit
from tests.queues import sampled_columns

pytestmark = pytest.mark.gpu
B, K, D = 130, 20_001, 64
OPTIONS = {
    "plain": {},
    "window": {"select": Select(0.001, 0.05)},
    "filters": {"select": Select(0, 500, absolute_margin=0.02, min_score=-0.5)},
    "mix": {"mix": Mix(100, 60, 30, concentration=0.5)},
    "weight": {"weight": Weight(1.0, 0.01)},
    "decoupled": {"decoupled": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


WITHOUT_CUDA = pytest.mark.skipif(bool(compiled.CUDA_REFUSAL), reason=compiled.CUDA_REFUSAL or "-")
each_miner = pytest.mark.parametrize("miner", ["triton", pytest.param("cuda", marks=WITHOUT_CUDA)])


@pytest.fixture(autouse=True)
def _as_users_run():
    """Switch off deterministic mode, which fills new memory and would hide a missing write during capture."""
    torch.use_deterministic_algorithms(False)


def tensors(dtype=torch.bfloat16, seed=0):
    return [unit(n, D, dtype=dtype, device="cuda", seed=seed + i) for i, n in enumerate((B, B, K))]


def loss_step(q, pos, keys, **options):
    """Return a function without arguments that computes the loss and the gradient of these tensors."""
    given = ids(B, K, "cuda")

    def step():
        leaf = q.detach().requires_grad_()
        loss = negmine.info_nce(leaf, pos, negatives(keys, given), temperature=0.2, **options, **tags(given))
        loss.backward()
        return loss.detach(), leaf.grad

    return step


def captured(step):
    """Capture the step as a CUDA graph; return it and the tensors of its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


@each_option
def test_a_loss_step_is_captured_and_replayed_on_new_data(options):
    q, pos, keys = tensors()
    graph, out = captured(loss_step(q, pos, keys, **options))
    for seed in (10, 20):
        for old, new in zip((q, pos, keys), tensors(seed=seed), strict=True):
            old.copy_(new)
        graph.replay()
        for name, got, want in zip(("loss", "gradient"), out, loss_step(q, pos, keys, **options)(), strict=True):
            compare.exact(name, got, want)


@each_miner
def test_a_captured_step_is_exact_where_the_certificate_fails(miner):
    """The exact fallback is always launched. A graph that was captured with easy data is replayed with data that needs it."""
    q, _, keys = tensors()
    graph, out = captured(lambda: negmine.mine_hardest(q, keys, 500, backend=miner))
    keys.copy_(keys[:1].expand_as(keys))  # all equal, so the sample is misleading
    graph.replay()
    compare.exact("index", out.index, torch.arange(500, device="cuda").expand(B, 500))


@each_option
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_compiles_a_step_into_one_graph(options, dynamic):
    torch._dynamo.reset()
    q, pos, keys = tensors(torch.float32)
    given = ids(B, K, "cuda")

    def loss_of(q, pos, keys):
        return negmine.info_nce(q, pos, negatives(keys, given), temperature=0.2, **options, **tags(given))

    grads = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, dynamic=dynamic)):
        leaf = q.detach().requires_grad_()
        loss = function(leaf, pos, keys)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@each_option
def test_nothing_waits_for_the_device(options):
    queue = MoCoQueue(D, K, dtype=torch.bfloat16, with_ids=True, random_init=True).cuda()  # full from the start
    loss_of = InfoNCELoss(0.2, **options, return_stats=True)
    q, pos, keys = tensors()
    own = torch.arange(B, device="cuda")

    def train():
        leaf = q.detach().requires_grad_()
        loss, _ = loss_of(leaf, pos, queue, query_ids=own)
        queue.enqueue(pos, ids=own)
        loss.backward()
        negmine.mine_hardest(q, keys, 100)
        negmine.mine_hardest(q, queue, 100, query_ids=own)
        if not compiled.CUDA_REFUSAL:
            negmine.mine_hardest(q, keys, 100, backend="cuda")
            negmine.rank_thresholds(q, keys, [0, 7], backend="cuda")
            negmine.info_nce(q, pos, keys, temperature=0.2, select=Select(0.01, 0.5), backend="cuda")
        negmine.rank_thresholds(q, keys, [0, 7])
        negmine.quantile(q, keys, [0.05, 0.95])

    train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_option
def test_autocast_changes_no_bit(options):
    step = loss_step(*tensors(torch.float32), **options)
    want = step()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = step()
    for name, a, b in zip(("loss", "gradient"), got, want, strict=True):
        compare.exact(name, a, b)


@each_option
def test_a_hundred_runs_give_the_same_bits(options):
    step = loss_step(*tensors(), **options)
    want = step()
    for _ in range(100):
        for name, a, b in zip(("loss", "gradient"), step(), want, strict=True):
            compare.exact(name, a, b)


def test_key_gradients_repeat_their_bits():
    q, pos, keys = tensors()
    grads = []
    for _ in range(20):
        leaf = keys.detach().requires_grad_()
        negmine.info_nce(q, pos, leaf, temperature=0.2).backward()
        grads.append(leaf.grad)
    for again in grads[1:]:
        compare.exact("gradient of the keys", again, grads[0])


def test_a_side_stream_is_the_one_that_runs():
    """Inputs are written late on a side stream; kernels on another stream would read zeros."""
    q, _, keys = tensors()
    want = negmine.mine_hardest(q, keys, 50)
    late = torch.zeros_like(keys)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(keys)
        got = negmine.mine_hardest(q, late, 50)
    torch.cuda.current_stream().wait_stream(side)
    compare.exact("index", got.index, want.index)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_tensors_on_a_second_card():
    q, pos, keys = tensors()
    want = loss_step(q, pos, keys)()
    leaf, far = q.to("cuda:1").requires_grad_(), [x.to("cuda:1") for x in (pos, keys)]
    given = ids(B, K, "cuda:1")
    loss = negmine.info_nce(leaf, far[0], negatives(far[1], given), temperature=0.2, **tags(given))
    loss.backward()
    compare.exact("loss", loss.detach().cpu(), want[0].cpu())
    compare.exact("gradient", leaf.grad.cpu(), want[1].cpu())


def clustered(rows):
    """Forty tight clusters of neighbouring rows, as in the queue of a corpus that is sorted by class, or of a slow encoder."""
    centre = unit(40, D, device="cuda").repeat_interleave(rows // 40 + 1, 0)[:rows]
    return F.normalize(centre + 0.01 * torch.randn(rows, D, device="cuda"), dim=1)


QUEUES = {
    "random": lambda: unit(K, D, device="cuda"),
    "clustered": lambda: clustered(K),
    "all equal": lambda: unit(1, D, device="cuda").expand(K, D).contiguous(),
    "two values": lambda: unit(2, D, device="cuda")[torch.arange(K, device="cuda") % 2],
    "hard between samples": lambda: between_samples(),
    "ten rows at the end": lambda: F.pad(unit(10, D, device="cuda"), (0, 0, K - 10, 0)),
}


def between_samples():
    """Keys are near the query except at the 2,048 columns of the sample, so the cut of the sample keeps far too many."""
    keys = F.normalize(unit(1, D, device="cuda") + 0.05 * torch.randn(K, D, device="cuda"), dim=1)
    keys[sampled_columns(K, 2048).cuda()] *= -1
    return keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", QUEUES.values(), ids=QUEUES)
def test_selection_is_exact_on_any_queue(make, dtype, monkeypatch):
    """Compared with complete rows of scores of the same kernel, sorted by torch. Also checks how many rows need the fallback."""
    from negmine.kernels.triton import tiles
    from negmine.kernels.triton.launch import score_tile
    from negmine.kernels.triton.pool import EVERYTHING
    from negmine.kernels.triton.sample import sort_keys

    failed = []

    def counting(original):
        def find_missing(query, negative_keys, missing, *rest):
            failed.append(int((missing >= 0).any(1).sum()))
            return original(query, negative_keys, missing, *rest)

        return find_missing

    for name in ("mine_hardest", "rank_thresholds"):
        module = importlib.import_module(f"negmine.kernels.triton.{name}")  # the attribute is the launcher
        monkeypatch.setattr(module, "find_missing", counting(module.find_missing))
    q, keys = unit(B, D, dtype=dtype, device="cuda", seed=9), make().to(dtype)
    q[: B // 2] = unit(1, D, dtype=dtype, device="cuda")  # half of the queries are near the clusters
    N = 700
    every = (
        sort_keys(q, keys, score_tile(q, keys, EVERYTHING), EVERYTHING).sort(dim=1, descending=True).values
    )  # (B, K)
    assert not tiles.is_dense(K, N, 90)
    mined = negmine.mine_hardest(q, keys, N, backend="triton")
    scores, index = sort_key.unpack(every[:, :N])
    compare.exact("index", mined.index, index)
    compare.exact("scores", mined.scores, scores)
    ranks = [20, 1000, K // 2, K - 1]
    got = negmine.rank_thresholds(q, keys, ranks, backend="triton")
    compare.exact("thresholds", got, sort_key.unpack(every[:, ranks])[0])
    many = [*range(0, K, K // 99), 0, K - 1]
    assert tiles.is_sorted(K, len(many), 90)
    got = negmine.rank_thresholds(q, keys, many, backend="triton")
    compare.exact("many thresholds", got, sort_key.unpack(every[:, many])[0])
    print(f"rows that needed the fallback, by pass: {failed} of {B}")
    if make is QUEUES["random"]:
        assert sum(failed) == 0  # one in a million is expected
    if make in (QUEUES["all equal"], QUEUES["two values"]):
        assert sum(failed) == 0
    if make is QUEUES["hard between samples"]:
        assert max(failed) > 0


@WITHOUT_CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", QUEUES.values(), ids=QUEUES)
def test_the_cuda_selection_is_exact_on_any_queue(make, dtype):
    """Compared with its own scores, mined completely from short parts of the queue and sorted by torch."""
    q, keys = unit(B, D, dtype=dtype, device="cuda", seed=9), make().to(dtype)
    q[: B // 2] = unit(1, D, dtype=dtype, device="cuda")  # half of the queries are near the clusters
    every = torch.full((B, K), torch.nan, device="cuda")
    for start in range(0, K, 4096):
        part = negmine.mine_hardest(q, keys[start : start + 4096], len(keys[start : start + 4096]), backend="cuda")
        every.scatter_(1, start + part.index, part.scores)
    truth = q.double() @ keys.double().T
    torch.testing.assert_close(every.double(), truth, rtol=0, atol=1e-5)
    places = sort_key.pack(every, torch.arange(K, device="cuda")).sort(dim=1, descending=True).values  # (B, K)
    for N in (1, 700, 4096):
        scores, index = sort_key.unpack(places[:, :N])
        mined = negmine.mine_hardest(q, keys, N, backend="cuda")
        compare.exact("index", mined.index, index)
        compare.exact("scores", mined.scores, scores)
    given = ids(B, K, "cuda")
    mined = negmine.mine_hardest(q, negatives(keys, given), 700, **tags(given), backend="cuda")
    hidden = given["query_ids"][:, None] == given["negative_ids"]
    wanted = sort_key.pack(every, torch.arange(K, device="cuda")).masked_fill(hidden, sort_key.NOWHERE)
    compare.exact("index without ids", mined.index, sort_key.unpack(wanted.topk(700, dim=1).values)[1])


def test_queries_and_scores_past_two_to_the_31():
    """B * K and B * W exceed 2^31: the last rows are as right as the first."""
    q, keys = (
        unit(40_000, 16, dtype=torch.bfloat16, device="cuda"),
        unit(65_536, 16, dtype=torch.bfloat16, device="cuda", seed=1),
    )
    tail = slice(len(q) - 3, len(q))
    mined = negmine.mine_hardest(q, keys, 16)
    compare.exact("index", mined.index[tail], negmine.mine_hardest(q[tail], keys, 16).index)
    mask = torch.ones(len(q), len(keys), dtype=torch.bool, device="cuda")
    mask[-1, mined.index[-1, 0]] = False
    again = negmine.mine_hardest(q, Negatives(keys, mask=mask), 15)
    compare.exact("masked", again.index[-1], mined.index[-1, 1:])
    rows = negmine.info_nce(q, q, Negatives(keys, mask=mask), reduction="none")
    # With only three queries, the queue is split into more parts, whose sums are rounded differently.
    truth, plain = (
        negmine.info_nce(
            last, last, Negatives(keys.to(last.dtype), mask=mask[tail]), reduction="none", backend="reference"
        )
        for last in (q[tail].double(), q[tail].float())
    )
    compare.rounded("loss", rows[tail], truth, plain, 1 / 0.07)


@each_miner
def test_a_million_keys(miner):
    """A queue of a million keys: the mined scores are those of a plain matrix product."""
    q, keys = (unit(n, 256, dtype=torch.bfloat16, device="cuda", seed=i) for i, n in enumerate((64, 1_048_576)))
    mined = negmine.mine_hardest(q, keys, 1024, backend=miner)
    truth = q.float() @ keys.float().T
    want = truth.topk(1024, dim=1).values
    torch.testing.assert_close(mined.scores, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(truth.gather(1, mined.index), mined.scores, rtol=0, atol=1e-5)
    got = negmine.quantile(q, keys, [0.95, 0.999])
    level = torch.tensor([0.95, 0.999], dtype=torch.float64, device="cuda")
    wanted = reference.quantile(q[:2].float(), keys.float(), level, None)
    torch.testing.assert_close(got[:2], wanted.float(), rtol=0, atol=1e-5)
