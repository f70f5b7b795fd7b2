"""Recipes: each against its published formula, dense in float64, on every backend that covers it; schedules, warm-ups, rings,
oracle labels, pickling; and refusals.
"""

import inspect
import math
import pickle
from dataclasses import dataclass

import pytest
import torch

import negmine
from negmine import Negatives, Select, recipes
from negmine.recipes.schedules import scheduled
from tests.cases import feed, unit
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
    """Two queries keep different columns: the hardest 5 % of each query, not of all pairs."""
    (q, pos, keys), *_ = logits(0.2)
    q = torch.cat([q[:1], q[1:] / 10])  # a window over all pairs would be entirely in one query
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


@pytest.mark.parametrize("name, T", [("qwen3_embedding", 0.02), ("gte", 0.01)])
def test_both_sides_of_the_batch_are_negatives(any_backend, name, T):
    """Compared with loops. Rows 1 and 3 are one document, the id of row 2 is unknown, and the margin masks some negatives."""
    q, pos = (unit(n, D, seed=i).double() for i, n in enumerate((B, B)))
    hard = unit(B, 4, D, seed=2).double()
    hard[0, 1] = q[0]  # above the positive by more than the margin
    ids, masked = [5, 7, -1, 7, 6], 0
    device = device_of(any_backend)
    loss = getattr(recipes, name)(backend=any_backend, reduction="none")
    got = loss(*(v.float().to(device) for v in (q, pos, hard)), query_ids=torch.tensor(ids, device=device))
    for i in range(B):
        positive = float(q[i] @ pos[i])
        others = [j for j in range(B) if j != i and ids[j] != ids[i]]
        scores = [float(v) for v in hard[i] @ q[i]]
        for j in others:
            scores += [float(q[i] @ pos[j]), float(q[i] @ q[j]), float(pos[i] @ pos[j])]
            scores += [float(pos[i] @ q[j])] if name == "gte" else []
        kept = [s for s in scores if name == "gte" or s <= positive + 0.1]
        masked += len(scores) - len(kept)
        want = torch.tensor([positive, *kept], dtype=torch.float64).div(T).logsumexp(0) - positive / T
        torch.testing.assert_close(got[i].double().cpu(), want, rtol=1e-4, atol=1e-4)
    assert (masked > 0) == (name == "qwen3_embedding")


def test_linear_schedule():
    outer = recipes.linear(1.0, 0.1, 10)
    assert [round(outer(s), 6) for s in (0, 5, 10, 99)] == [1.0, 0.55, 0.1, 0.1]


SCHEDULES = ("linear", "cosine", "exponential", "step", "whole")
NOT_RECIPES = {*SCHEDULES, "Kinds", "mixed_inputs"}
RECIPES = [name for name in recipes.__all__ if name not in NOT_RECIPES]


def inputs():
    return [unit(n, D, seed=i) for i, n in enumerate((B, B, K))]


def call(loss, name):
    """Call the module of any recipe with the inputs that it needs."""
    tensors, given = feed(name, *inputs())
    return loss(*tensors, **given)


@dataclass(frozen=True)
class held:
    """A constant schedule."""

    value: float

    def __call__(self, step):
        return self.value


def test_schedules():
    for make, start, end in ((recipes.linear, 1.0, 0.1), (recipes.cosine, 1.0, 0.1), (recipes.step, 1.0, 0.1)):
        values = [make(start, end, 40)(s) for s in range(60)]
        assert values[0] == start and abs(values[40] - end) < 1e-12 and values[59] == values[40]
        assert values == sorted(values, reverse=True)
    assert abs(recipes.linear(1.0, 0.1, 10)(5) - 0.55) < 1e-12
    assert abs(recipes.cosine(1.0, 0.1, 40)(10) - (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)) < 1e-12
    assert abs(recipes.cosine(0.0, 8.0, 40)(20) - 4.0) < 1e-12


def test_the_published_step_schedules():
    """Ring: 1.0, 0.9, .. 0.1, equally many steps each. HCL --anneal down: linspace(beta, 0, 9), a ninth of the steps each."""
    ring = recipes.step(1.0, 0.1, 100)
    assert [round(ring(s), 12) for s in range(0, 100, 10)] == [round(1 - i / 10, 12) for i in range(10)]
    assert ring(9) == 1.0 and round(ring(10), 12) == 0.9
    hcl = recipes.step(1.0, 0.0, 90, 9)
    assert [hcl(s) for s in range(0, 90, 10)] == torch.linspace(1, 0, 9).tolist()


def test_the_published_exponential_schedule_is_over_at_once():
    """It decays per iteration: 0.9 exp(-0.1 step) + 0.1 reaches 99 % of its change after 45 iterations."""
    public = recipes.exponential(1.0, 0.1)
    assert [public(s) for s in (0, 7)] == [1.0, 0.1 + 0.9 * math.exp(-0.7)]
    reached = next(s for s in range(1000) if public(s) - 0.1 < 0.01)
    assert reached == 45
    by_epoch = recipes.exponential(1.0, 0.1, every=391)
    assert by_epoch(45) > 0.98 and abs(by_epoch(7 * 391) - public(7)) < 1e-12


REFUSALS = [
    (lambda: recipes.linear(1.0, 0.1, 0), "linear: steps must be an int of 1 or more, got 0"),
    (lambda: recipes.cosine("1", 0.1, 3), "cosine: start must be a finite number, got '1'"),
    (lambda: recipes.exponential(1.0, 0.1, -1.0), "exponential: decay must be a number of 0 or more, got -1.0"),
    (lambda: recipes.exponential(1.0, 0.1, every=0), "exponential: every must be an int of 1 or more"),
    (lambda: recipes.step(1.0, 0.1, 9, 1), "step: levels must be an int of 2 or more, got 1"),
    (lambda: recipes.ring(inner_of="both"), "ring: inner_of must be 'outer' or 'all', got 'both'"),
    (lambda: recipes.ring(0.1, 0.5, inner_of="all"), "range_min must be below range_max=0.1"),
    (lambda: recipes.synco(hard=0), "hard must be an int of 1 or more, got 0"),
    (lambda: recipes.synco(noised=-1), "noised must be an int of 0 or more, got -1"),
    (lambda: recipes.synco(sigma=-0.1), "sigma must be a number of 0 or more, got -0.1"),
    (lambda: recipes.siglip(scale=0.0), "SigLIPLoss: scale must be a number above 0, got 0.0"),
    (lambda: recipes.siglip(bias="low"), "SigLIPLoss: bias must be a finite number or a 0-d floating tensor"),
    (lambda: call(recipes.rince(r=2.0), ""), "rince: r must be a number in (0, 1], got 2.0"),
    (lambda: call(recipes.rince(lam=0.0), ""), "rince: lam must be a number above 0, got 0.0"),
    (lambda: call(recipes.ifm(epsilon=math.nan), ""), "ifm: epsilon must be a finite number"),
    (lambda: call(recipes.ifm(alpha=-1.0), ""), "ifm: alpha must be a number of 0 or more"),
    (lambda: call(recipes.hardness_added(-1.0), ""), "hardness_added: alpha must be a number of 0 or more"),
    (lambda: call(recipes.decoupled_weighted(0.0), ""), "decoupled_weighted: sigma must be a number above 0"),
    (
        lambda: call(recipes.dual_temperature(0.1, 0.0), ""),
        "dual_temperature: temperature_ratio must be a number above",
    ),
    (lambda: call(recipes.rince(reduction="avg"), ""), "rince: reduction must be 'mean' or 'sum' or 'none'"),
    (lambda: call(recipes.rince(temperature=0.0), ""), "rince: temperature must be a number above 0"),
    (
        lambda: call(recipes.rince(negative_mark=1), ""),
        "rince: there is no argument negative_mark; its arguments are temperature, r, lam, reduction",
    ),
    (lambda: recipes.mixed_inputs(torch.arange(3)), "mixed_inputs: inputs must be a floating tensor of shape (B, ...)"),
    (lambda: recipes.mixed_inputs(torch.ones(3), concentration=0), "concentration must be a number above 0"),
    (lambda: recipes.i_mix()(*inputs(), share=torch.ones(3), partner=torch.arange(B)), "i_mix: share must be floating"),
    (lambda: recipes.i_mix()(*inputs(), share=torch.ones(B), partner=torch.ones(B)), "i_mix: partner must be int64"),
    (
        lambda: recipes.un_mix()(*inputs(), mixed_query=torch.ones(3, D), share=0.5),
        "un_mix: mixed_query must be of query's shape (5, 8)",
    ),
    (
        lambda: recipes.un_mix()(*inputs(), mixed_query=unit(B, D), share=1.5),
        "un_mix: share must be a number in [0, 1], got 1.5",
    ),
    (
        lambda: recipes.un_mix()(*inputs(), mixed_query=unit(B, D), share=torch.ones(B)),
        "un_mix: share must be a number of 0 or more, got",
    ),
    (lambda: recipes.un_mix(reduction="avg")(*inputs(), mixed_query=unit(B, D), share=0), "un_mix: reduction must be"),
    (lambda: call(recipes.adco(0.1, 0.0), ""), "adco: memory_temperature must be a number above 0, got 0.0"),
    (lambda: call(recipes.mixgcf(0), ""), "mixgcf: candidates must be an int of 1 or more, got 0"),
    (lambda: call(recipes.mixgcf(layers=3), ""), "mixgcf: layers must be a divisor of query's D = 8, got 3"),
    (
        lambda: recipes.mixgcf()(*inputs()[:2], Negatives(unit(K, D), select=Select(0, 9))),
        "mixgcf: negative_keys.select must be None, because mixgcf has no option select",
    ),
    (lambda: negmine.siglip(*inputs(), scale=torch.ones(2)), "siglip: scale must be a finite number or a 0-d floating"),
    (
        lambda: negmine.losses.softplus_sum(*inputs()[1:], bias=None),
        "softplus_sum: bias must be a finite number or a 0-d",
    ),
    (lambda: negmine.logsumexp(*inputs()[1:], temperature=0), "logsumexp: temperature must be a number above 0"),
    (
        lambda: negmine.logsumexp(*inputs()[1:], select=Select(absolute_margin=0.1)),
        "logsumexp: positive_key must be given if select has a margin, got None",
    ),
    (lambda: negmine.logsumexp(*inputs()[1:], seed=-1), "logsumexp: seed must be an int in [0, 2**32), got -1"),
]


@pytest.mark.parametrize("make, sentence", REFUSALS, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_refusals(make, sentence):
    with pytest.raises((ValueError, TypeError)) as refusal:
        make()
    assert sentence in str(refusal.value)


def test_kinds_of_another_type_are_refused():
    from negmine.losses.synco import synco

    with pytest.raises(TypeError, match=r"synco: kinds must be a negmine.recipes.Kinds, got 7"):
        synco(*inputs(), kinds=7)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_is_pickled_with_its_schedules(name):
    make = getattr(recipes, name)
    takes = inspect.signature(make).parameters
    moving = {
        "fraction": recipes.linear(0.9, 0.1, 4),
        "outer": recipes.cosine(1.0, 0.1, 4),
        "beta": recipes.step(1.0, 0.0, 8, 2),
        "tau_plus": recipes.linear(0.0, 0.01, 3),
        "temperature": recipes.exponential(0.5, 0.2),
        "margin": recipes.linear(0.5, 0.3, 3),
        "alpha": recipes.linear(1.0, 2.0, 3),
        "warmup_steps": 1,
    }
    options = {option: value for option, value in moving.items() if option in takes}
    options |= {"max_positives": 3} if "max_positives" in takes else {}
    loss = make(**options)
    values = [call(loss, name).detach() for _ in range(4)]
    assert all(bool(value.isfinite()) for value in values)
    if options.keys() & moving.keys():
        assert len(set(map(float, values))) > 1  # the schedule changes the loss
    again = pickle.loads(pickle.dumps(make(**options)))
    for value in values:
        assert torch.equal(call(again, name).detach(), value)


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_may_be_a_schedule(name):
    """A constant schedule gives bit-identical results for every option, also for counts."""
    make = getattr(recipes, name)
    fixed = {"max_positives": 3} if "max_positives" in inspect.signature(make).parameters else {}
    want = call(make(**fixed), name)
    numbers = {
        option: fixed.get(option, parameter.default)
        for option, parameter in inspect.signature(make).parameters.items()
        if isinstance(fixed.get(option, parameter.default), (int, float))
        and not isinstance(parameter.default, bool)
        and option not in ("seed", "warmup_steps")
        and name != "siglip"  # its numbers are learned
    }
    for option, value in numbers.items():
        assert torch.equal(call(make(**fixed | {option: held(value)}), name), want), option
    if numbers:
        everything = make(**{option: held(value) for option, value in numbers.items()})
        assert torch.equal(call(pickle.loads(pickle.dumps(everything)), name), want)


def test_ranks_move_in_whole_numbers_and_counts_do_not():
    steps = recipes.whole(recipes.linear(64, 128, 100))
    assert [steps(s) for s in (0, 1, 99, 200)] == [64, 65, 127, 128]
    assert recipes.hardest(steps).at(99)["select"] == Select(0.0, 127)
    with pytest.raises(ValueError, match=r"pairs must be an int of 0 or more, got 0.0 .*cannot be schedules"):
        recipes.mochi(5, recipes.linear(0, 8, 4))
    kinds = recipes.synco(sigma=recipes.linear(0.1, 0.0, 4)).at(1)
    assert kinds["kinds"] == recipes.Kinds(sigma=0.1 * 0.75)


def test_a_warm_up_adds_nothing_before_its_end():
    tensors = inputs()
    for make in (
        lambda w: recipes.mochi(6, 5, 4, warmup_steps=w),
        lambda w: recipes.synco(6, 2, 2, 2, 2, 2, 2, warmup_steps=w),
    ):
        warm, plain = make(2), make(0)
        for step in range(4):
            loss = plain(*tensors, step=step) if step >= 2 else recipes.moco_v2()(*tensors)
            torch.testing.assert_close(warm(*tensors), loss)


def test_a_schedule_of_one_keyword_leaves_the_others():
    moving = scheduled(Select, range_min=0.0, range_max=recipes.linear(1.0, 0.5, 2))
    assert [moving(s) for s in (0, 1, 9)] == [Select(0.0, 1.0), Select(0.0, 0.75), Select(0.0, 0.5)]
    assert scheduled(Select, range_max=0.5) == Select(range_max=0.5)


def test_ring_inner_of_outer_and_of_all():
    """K = 65,536, outer 0.1, inner 0.1: ranks 655 to 6,552 in the published default. inner_of="all" differs."""
    first, end = recipes.ring().at(0)["select"].window(torch.tensor([65_536]))
    assert (int(first), int(end), int(end - first)) == (655, 6_553, 5_898)
    first, end = recipes.ring(0.2, 0.05, inner_of="all").at(0)["select"].window(torch.tensor([1000]))
    assert (int(first), int(end)) == (50, 200)
    moving = recipes.ring(recipes.step(1.0, 0.1, 100))
    assert [moving.at(s)["select"].range_max for s in (0, 99)] == [1.0, pytest.approx(0.1)]


def test_ring_samples_with_replacement_count_twice():
    q, pos, keys = inputs()
    loss = recipes.ring(0.5, 0.1, sample=400, replace=True, temperature=0.2, return_stats=True)
    _, stats = loss(q, pos, keys)
    assert stats.num_negatives.tolist() == [400] * B  # more than the 90 columns of the ring
    _, stats = recipes.ring(0.5, 0.1, sample=30, return_stats=True)(q, pos, keys)
    assert stats.num_negatives.tolist() == [30] * B


def test_the_sampled_partition_is_not_rescaled():
    """The mean over draws of the sum over 30 of 90 columns is a third of the sum over the ring; it is not multiplied by 3."""
    q, _, keys = inputs()
    ring = Select(0.05, 0.5)
    whole = negmine.logsumexp(q, keys, temperature=1.0, select=ring).exp()
    draws = [
        negmine.logsumexp(q, keys, temperature=1.0, select=Select(0.05, 0.5, sample=30), step=s).exp()
        for s in range(200)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0) / whole, torch.full((B,), 1 / 3), rtol=0.01, atol=0)


def test_mochi_oracle_labels_leave_before_mining():
    """Rows of the same class are neither parents nor in the denominator, as if they were not in the queue."""
    q, pos, keys = inputs()
    labels, key_labels = torch.zeros(B, dtype=torch.int64), torch.arange(K) % 2
    same = key_labels == 0
    keys[same] = q[torch.arange(int(same.sum())) % B]  # the hardest rows are false negatives
    loss = recipes.mochi(20, 12, 6)
    columns = Negatives(keys, labels=key_labels)
    got = loss(q, pos, columns, step=3, query_labels=labels)
    assert torch.allclose(got, loss(q, pos, keys[~same], step=3))
    mix = loss.at(3)["mix"]
    mixed = negmine.mix_negatives(q, columns, mix, query_labels=labels)
    parents = mixed.parents[mixed.parents >= 0]
    assert parents.numel() and not bool(same[parents].any())


def test_mochi_skip_leaves_the_hardest_out_as_parents():
    q, _, keys = inputs()
    _, hardest = negmine.mine_hardest(q, keys, 10)
    for skip, banned in ((0, False), (10, True)):
        mix = recipes.mochi(5, 200, 100, skip=skip).at(0)["mix"]
        parents = negmine.mix_negatives(q, keys, mix).parents
        among = (parents[:, :, :, None] == hardest[:, None, None]).any()
        assert bool(among) != banned


def test_debiased_reports_the_clamped_share():
    """With tau_plus = 0.1, T = 0.2 and almost random rows, all sums are clamped and have no gradient. Statistics show this."""
    q = unit(B, 128)
    keys = unit(4096, 128, seed=3)
    for tau_plus, clamped in ((0.1, True), (1e-3, False)):
        leaf = keys.clone().requires_grad_()
        loss, stats = recipes.debiased(tau_plus, temperature=0.2, return_stats=True)(q, q, leaf)
        loss.backward()
        assert stats.clamped.tolist() == [clamped] * B
        assert bool(leaf.grad.any()) != clamped
