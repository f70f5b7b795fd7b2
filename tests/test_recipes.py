"""Each recipe against its published formula, written out dense in float64, on every backend that covers it."""

import math

import pytest
import torch

import negmine
from negmine import recipes
from tests.cases import unit
from tests.conftest import device_of

B, K, D = 5, 200, 8


def logits(T):
    q, pos, keys = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    return (q, pos, keys), (q.double() * pos.double()).sum(1) / T, q.double() @ keys.double().T / T


def ranks(x, first, end):
    return x.sort(1, descending=True).values[:, first:end]


def plain(x_pos, x):
    return torch.cat([x_pos[:, None], x], 1).logsumexp(1) - x_pos


def debiased_sum(x_pos, R, tau, T):
    return torch.maximum((R - tau * K * x_pos.exp()) / (1 - tau), torch.tensor(K * math.exp(-1 / T)).double())


def hcl_sum(x, beta):
    importance = (beta * x).exp()
    return (importance * x.exp()).sum(1) / importance.mean(1)


CASES = [
    (recipes.moco_v1(), 0.07, plain),
    (recipes.moco_v2(), 0.2, plain),
    (recipes.hardest(), 0.2, lambda p, x: plain(p, ranks(x, 0, 10))),
    (recipes.hardest(0.05, skip=0.01), 0.2, lambda p, x: plain(p, ranks(x, 2, 10))),
    (recipes.easiest(), 0.2, lambda p, x: plain(p, ranks(x, 10, K))),
    (recipes.ring(), 0.07, lambda p, x: plain(p, ranks(x, 2, 20))),
    (recipes.ring(recipes.linear(1.0, 0.5, 2)), 0.07, lambda p, x: plain(p, ranks(x, 20, K))),
    (recipes.debiased(), 0.5, lambda p, x: torch.log1p(debiased_sum(p, x.exp().sum(1), 0.01, 0.5) / p.exp())),
    (recipes.hcl(), 0.5, lambda p, x: torch.log1p(debiased_sum(p, hcl_sum(x, 1.0), 0.01, 0.5) / p.exp())),
    (recipes.hcl(2.0, 0.0), 0.5, lambda p, x: torch.log1p(hcl_sum(x, 2.0) / p.exp())),
    (recipes.decoupled(), 0.1, lambda p, x: x.logsumexp(1) - p),
    (recipes.margin_pos(), 0.02, lambda p, x: plain(p, x.masked_fill(x * 0.02 > p[:, None] * 0.02 - 0.05, -math.inf))),
    (
        recipes.margin_pos(-0.1),
        0.02,
        lambda p, x: plain(p, x.masked_fill(x * 0.02 > p[:, None] * 0.02 + 0.1, -math.inf)),
    ),
    (
        recipes.perc_pos(),
        0.02,
        lambda p, x: plain(p, x.masked_fill(x > p[:, None] - p[:, None].abs() * 0.05, -math.inf)),
    ),
]


@pytest.mark.parametrize("loss, T, formula", CASES, ids=lambda v: None)
def test_recipe_is_its_formula(any_backend, loss, T, formula):
    vectors, x_pos, x = logits(T)
    options = {**loss.at(0), "reduction": "none", "backend": any_backend}
    got = negmine.info_nce(*(v.to(device_of(any_backend)) for v in vectors), **options)
    torch.testing.assert_close(got.double().cpu(), formula(x_pos, x), rtol=1e-4, atol=1e-5)


def test_a_window_is_not_batch_wide():
    """Two queries keep different columns: the hardest 5 % of each, not of all pairs."""
    (q, pos, keys), *_ = logits(0.2)
    q = torch.cat([q[:1], q[1:] / 10])  # one query would hold all of a batch-wide window
    _, stats = recipes.hardest(return_stats=True)(q, pos, keys)
    assert stats.num_negatives.tolist() == [10] * B


def test_mochi_warms_up_and_draws_anew():
    (q, pos, keys), *_ = logits(0.2)
    loss, base = recipes.mochi(20, 12, 4, warmup_steps=2), recipes.moco_v2()
    values = [float(loss(q, pos, keys)) for _ in range(5)]
    assert values[:2] == [float(base(q, pos, keys))] * 2
    assert len(set(values[2:])) == 3 and min(values[2:]) > values[0]


def test_false_negative_cancellation_takes_support_views():
    (q, pos, keys), *_ = logits(0.1)
    keys[7] = pos[0]
    value, stats = recipes.false_negative_cancellation(return_stats=True)(q, pos, keys, support=pos[:, None])
    assert stats.num_negatives[0] < K and bool(value.isfinite())


def test_sup_con_recipe():
    (q, _, keys), *_ = logits(0.07)
    both = torch.arange(B) % 2, torch.arange(K) % 3
    assert torch.equal(recipes.sup_con("in")(q, keys, *both), negmine.sup_con(q, keys, *both, positives="in"))


def test_linear_schedule():
    outer = recipes.linear(1.0, 0.1, 10)
    assert [round(outer(s), 6) for s in (0, 5, 10, 99)] == [1.0, 0.55, 0.1, 0.1]
