"""On a GPU, mining and ranks compute as many scores if many keys are equal as if all are different.

The cut of a scan may be between columns with equal scores, so a row with many duplicates keeps as few columns as any other row,
and its scores are not computed a second time. Triton's kernels run in the interpreter, and the CUDA C++ kernels in
tests/emulator.
"""

import importlib
import math

import pytest
import torch

from negmine import reference
from negmine.ops import sort_key
from negmine.ops.pool import Pool
from tests import emulated_mining, emulated_ranking
from tests.cases import unit, whole
from tests.compare import exact
from tests.conftest import _reason_not_here, interpreted
from tests.emulate import pool_of
from tests.queues import queue

pytestmark = pytest.mark.gpu_sim
KINDS = ("all equal", "two values", "clustered", "shuffled clusters")
B, K, D, N, LEAST_SAMPLE = 16, 2048, 8, 40, 256
RANKS = (K // 100, K // 2)


def inputs(kind, dtype):
    q = whole(B, D, dtype=dtype).abs() + 1
    return q, (unit(K, D, seed=5) if kind == "random" else queue(kind, K, D, LEAST_SAMPLE)).to(dtype)


def check(op, q, keys, got):
    scores, index = reference.mine_hardest(q.float(), keys.float(), K, None)
    if op == "mine_hardest":
        exact("scores", got[0], scores[:, :N])
        exact("index", got[1], index[:, :N])
    else:
        exact("sort keys", got, sort_key.pack(scores, index)[:, RANKS])


def triton_cost(op, kind, monkeypatch):
    """Return how many scores a call computes, divided by the number of pairs of a query and a key."""
    ops = importlib.import_module("negmine.kernels.triton")
    count = 0

    def counting(score_tile):
        def counted(*arguments):
            nonlocal count
            s = score_tile(*arguments)
            count += math.prod(int(n) for n in s.shape)
            return s

        return counted

    q, keys = inputs(kind, torch.float32)
    with monkeypatch.context() as patch:
        for name in ("sample", "scan", "exact_search"):
            module = importlib.import_module(f"negmine.kernels.triton.{name}")
            patch.setattr(module, "score_tile", counting(module.score_tile))
        if op == "mine_hardest":
            got = ops.mine_hardest(q, keys, N, False, *Pool())
        else:
            got = ops.rank_thresholds(q, keys, torch.tensor([RANKS] * B), *Pool())
    if kind != "random":
        check(op, q, keys, got)
    return count / (B * K)


def cuda_cost(op, kind):
    q, keys = inputs(kind, torch.bfloat16)
    if op == "mine_hardest":
        kernel = emulated_mining.emulated("emulated")
        before = kernel.terms()
        got = kernel(q, keys, N, pool_of(q, keys), LEAST_SAMPLE)
    else:
        kernel = emulated_ranking.emulated("emulated")
        before = kernel.terms()
        got = kernel(q, keys, torch.tensor([RANKS] * B), pool_of(q, keys), LEAST_SAMPLE)
    if kind != "random":
        check(op, q, keys, got)
    return (kernel.terms() - before) / (128 * K * 64)  # blocks have 128 queries, and D is padded to 64


@pytest.mark.parametrize("op", ["mine_hardest", "rank_thresholds"])
@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_equal_keys_are_scored_no_more_often_than_others(language, op, monkeypatch):
    if language == "triton" and (_reason_not_here("triton") or not interpreted("triton")):
        pytest.skip("scores are counted where kernels are interpreted")
    cost = (
        (lambda kind: triton_cost(op, kind, monkeypatch))
        if language == "triton"
        else (lambda kind: cuda_cost(op, kind))
    )
    plain = cost("random")
    assert 1 < plain < 1.3  # scores of the sample, and of one pass over the queue
    for kind in KINDS:
        own = cost(kind)
        print(f"{language} {op}, {kind}: {own:.3f} scores a pair, {plain:.3f} of random keys")
        assert own <= 1.01 * plain, kind
