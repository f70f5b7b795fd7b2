"""The number of launches of a call on Triton: of its own kernels and of PyTorch's. They dominate the time of small batches.

Launches are only counted and not run. This works because no launcher reads what a kernel wrote.
"""

import pytest
import torch

import negmine
from negmine import Mix, Select, Weight
from negmine.ops.pool import Pool
from tests.aot import OnDevice
from tests.cases import ids, negatives, tags, unit
from tests.conftest import _reason_not_here, interpreted

ops = pytest.importorskip("negmine.kernels.triton", exc_type=ImportError)
pytestmark = [
    pytest.mark.skipif(bool(_reason_not_here("triton")), reason=_reason_not_here("triton") or "-"),
    pytest.mark.skipif(not interpreted("triton"), reason="launches are counted where kernels are interpreted"),
]
B, K, D = 20, 200, 16


def training(given=None, **options):
    """Return a function that computes a loss and its gradient. given: mask arguments."""
    q, pos, keys = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    q.requires_grad_()
    columns, options = negatives(keys, given or {}), options | tags(given or {})
    return lambda: negmine.info_nce(q, pos, columns, **options, backend="triton").backward()


def step(ranks=None, hard=0, pool=Pool()):  # noqa: B008
    """Return a function that calls the op info_nce."""
    q, pos, keys = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    draws = (4, 4, 0.0, 1.0, 0.0, 0.5, True, None, 0, None, None)
    scale, ranks = torch.tensor(14.0), None if ranks is None else torch.tensor([ranks] * B)
    return lambda: ops.info_nce(q, pos, keys, scale, None, True, False, ranks, hard, 0, *draws, *pool)


def sums():
    """Return a function that computes a log-sum-exp at two scales."""
    q, keys = unit(B, D), unit(K, D, seed=1)
    return lambda: ops.logsumexp(q, keys, torch.tensor([14.0, 28.0]), None, True, 0, None, *Pool())


def mining(want_count=False):
    q, keys = unit(B, D), unit(K, D, seed=1)
    return lambda: ops.mine_hardest(q, keys, 10, want_count, *Pool())


def launches(call, monkeypatch) -> tuple[int, int]:
    """Return how many Triton kernels and PyTorch ops a call launches."""
    from triton.runtime.interpreter import GridExecutor

    call()
    kernels = []
    with monkeypatch.context() as patch, OnDevice() as torch_ops:
        patch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: kernels.append(self.fn))
        call()
    return len(kernels), torch_ops.count


@pytest.mark.parametrize(
    ("call", "kernels", "torch_ops"),
    [
        (training(), 2, 5),
        (training(select=Select(0.01, 0.5)), 8, 8),
        (training(ids(B, K), select=Select(0.01, 0.5)), 9, 20),  # two of them because an id of -1 equals nothing
        (training(weight=Weight(1.0, 0.01)), 2, 81),  # one of them copies the positive for backward
        (training(mix=Mix(8, 4, 4)), 10, 7),
        (step(), 2, 0),
        (step(pool=Pool(**ids(B, K))), 2, 0),
        (step(ranks=(2, 90)), 8, 1),
        (step(hard=8), 10, 2),
        (sums(), 2, 0),
        (mining(), 7, 2),
        (mining(want_count=True), 8, 3),
    ],
    ids=[
        "info_nce",
        "window",
        "window and ids",
        "HCL",
        "MoCHi",
        "the op",
        "the op with ids",
        "the op with ranks",
        "the op with mixes",
        "two scales",
        "mine_hardest",
        "mine_hardest and count",
    ],
)
def test_a_call_launches_no_more_than_this(call, kernels, torch_ops, monkeypatch):
    """The limits are the current numbers. Lower them after a change that needs fewer launches; raise them only deliberately."""
    got = launches(call, monkeypatch)
    assert got[0] == kernels
    assert got[1] <= torch_ops


def test_a_larger_sample_launches_no_more(monkeypatch):
    """Regression: a scan of the queue was launched for every two ranks of select.sample."""
    few, many = (launches(training(select=Select(0.01, 0.5, sample=n)), monkeypatch) for n in (16, 64))
    assert many == few
