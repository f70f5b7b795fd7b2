"""triplet_loss, multi_similarity and their recipes: loops in float64, gradcheck, every backend, errors."""

import math
import pickle
import re

import pytest
import torch

import negmine
from negmine import Negatives, recipes, reference
from negmine.losses import multi_similarity
from tests import compare
from tests.cases import DTYPES, shapes_for, unit
from tests.conftest import device_of, skip_what_the_interpreter_repeats
from tests.test_triplets import P, dense_pools, distance, labels, masks_of

SEVERAL = {"positive": "all", "max_positives": P, "negative": "violating", "num_negatives": 4, "margin": 0.3}
LOSSES = [
    {"margin": 0.3},
    {"positive": "hard", "negative": "hardest", "margin": 0.0, "temperature": 0.1},
    SEVERAL,
    {**SEVERAL, "distance": "euclidean", "temperature": 0.5},
    {"positive": "hard", "negative": "hardest", "distance": "squared_euclidean", "margin": 1.0},
]
names = pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(str(v) for v in o.values()))


def value(s_p, s_n, options):
    """The loss of one triplet of unit vectors."""
    kind = options.get("distance", "cosine")
    v = distance(s_p, kind) - distance(s_n, kind) + options["margin"]
    return math.log1p(math.exp(v / options["temperature"])) if options.get("temperature") else max(0.0, v)


@names
def test_the_loss_is_the_loop(options):
    q, keys, both = unit(9, 4).double(), unit(40, 4, seed=1).double(), labels(9, 40)
    q, keys = (torch.nn.functional.normalize(t) for t in (q, keys))
    rows, found = negmine.triplet_loss(q, keys, *both, **options, reduction="none", return_stats=True)
    total, count = 0.0, 0
    for b, p, n in zip(*(t.tolist() for t in found.compact()), strict=True):
        want = value(float(q[b] @ keys[p]), float(q[b] @ keys[n]), options)
        at = (found.positive[b] == p).nonzero()[0, 0], (found.negative[b] == n).any(0).nonzero()[0, 0]
        assert abs(float(rows[b, at[0], at[1]]) - want) < 1e-9
        total, count = total + want, count + 1
    assert count == int(found.num_triplets) > 0 and bool((rows[found.negative < 0] == 0).all())
    for reduction, want in (("sum", total), ("mean", total / count)):
        assert abs(float(negmine.triplet_loss(q, keys, *both, **options, reduction=reduction)) - want) < 1e-9


@names
def test_gradcheck(options):
    q, keys, both = unit(5, 4).double(), unit(20, 4, seed=1).double(), labels(5, 20)
    leaves = [t.requires_grad_() for t in (q, keys)]
    assert torch.autograd.gradcheck(lambda q, k: negmine.triplet_loss(q, k, *both, **options), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@names
def test_values_and_gradients(backend, options, dtype):
    """The loss of the triplets that the kernels chose is compared with its definition."""
    skip_what_the_interpreter_repeats(backend, dtype)
    device = device_of(backend)
    for seed, (B, K, D, _) in enumerate(shapes_for(backend)[:4]):
        inputs = [unit(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, K))]
        both = labels(B, K, device, seed)
        leaves = [t.clone().requires_grad_() for t in inputs]
        rows, found = negmine.triplet_loss(
            *leaves, *both, **options, reduction="none", return_stats=True, backend=backend
        )
        got = [rows, *torch.autograd.grad(rows.double().sum(), leaves)]
        arithmetic = {k: options.get(k, v) for k, v in (("margin", 0.2), ("temperature", None), ("distance", "cosine"))}

        def run(cast, inputs=inputs, found=found, arithmetic=arithmetic):
            leaves = [t.to(cast).requires_grad_() for t in inputs]
            rows = reference.triplet_loss(*leaves, found.positive, found.negative, **arithmetic)
            return [rows, *torch.autograd.grad(rows.double().sum(), leaves)]

        for name, k, t, p in zip(("loss", "d_query", "d_keys"), got, run(torch.float64), run(dtype), strict=True):
            compare.rounded(f"{name} {B, K, D}", k, t, p, 2 / (options.get("temperature") or 1))


def test_frozen_keys_may_be_overwritten_and_get_no_gradient(any_backend):
    device = device_of(any_backend)
    q, keys, both = unit(6, 8, device=device), unit(30, 8, device=device, seed=1), labels(6, 30, device)
    grads = []
    for overwrite in (False, True):
        leaf, queue = q.clone().requires_grad_(), keys.clone()
        loss = negmine.triplet_loss(leaf, queue, *both, margin=0.5, backend=any_backend)
        if overwrite:
            queue.zero_()
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and bool((grads[0] != 0).any())


def test_no_positives_no_negatives_no_keys_and_masked_nan(any_backend):
    device = device_of(any_backend)
    q = unit(4, 8, device=device).requires_grad_()
    zeros = torch.zeros(4, dtype=torch.long, device=device)
    for keys, classes in (
        (unit(6, 8, device=device), torch.ones(6, dtype=torch.long, device=device)),  # no positive
        (unit(6, 8, device=device), torch.zeros(6, dtype=torch.long, device=device)),  # no negative
        (unit(0, 8, device=device), torch.zeros(0, dtype=torch.long, device=device)),  # no key
    ):
        for function in (negmine.triplet_loss, multi_similarity):
            loss, stats = function(q, keys, zeros, classes, return_stats=True, backend=any_backend)
            (grad,) = torch.autograd.grad(loss, q)
            assert float(loss.detach()) == 0 and not bool(grad.any())
            assert int(stats[-1]) == 4
    keys, classes = unit(8, 8, device=device).clone(), torch.arange(8, device=device) % 2
    keys[0] = torch.nan
    mask = torch.arange(8, device=device) > 0
    for function in (negmine.triplet_loss, multi_similarity):
        loss = function(q, keys, zeros, classes, key_mask=mask, backend=any_backend)
        want = function(q, keys[1:], zeros, classes[1:], backend=any_backend)
        assert float(loss.detach()) > 0 and abs(float((loss - want).detach())) < 1e-5
        assert bool(torch.autograd.grad(loss, q)[0].isfinite().all())


def test_equal_vectors_have_a_finite_euclidean_gradient():
    q = unit(3, 4).requires_grad_()
    keys = torch.cat([q.detach(), -q.detach()])
    classes = torch.arange(3), torch.arange(6) % 3 + torch.tensor([0, 0, 0, 3, 3, 3])
    negmine.triplet_loss(q, keys, *classes, distance="euclidean", margin=3.0).backward()
    assert bool(q.grad.isfinite().all())


def test_the_module_counts_its_steps():
    loss = negmine.TripletLoss(negative="distance_weighted", num_negatives=2, return_stats=True)
    q, keys, both = unit(4, 8), unit(40, 8, seed=1), (torch.zeros(4, dtype=torch.long), torch.arange(40) % 2)
    first, second = loss(q, keys, *both)[1].negative, loss(q, keys, *both)[1].negative
    assert not torch.equal(first, second)
    again = negmine.TripletLoss(negative="distance_weighted", num_negatives=2, return_stats=True)
    again.load_state_dict({"step": torch.tensor(1)})
    assert torch.equal(again(q, keys, *both)[1].negative, second)
    assert loss.state_dict()["step"] == 2 and "negative='distance_weighted'" in repr(loss)
    loss.eval()
    assert torch.equal(*(loss(q, keys, *both)[1].negative for _ in range(2)))


def test_every_option_changes_the_loss():
    """Other tests leave some options at their defaults, and would not notice an option that has no effect."""
    q, keys, both = unit(12, 8), unit(60, 8, seed=1), labels(12, 60)
    ids = torch.arange(12) % 5, torch.arange(60) % 5
    base = {"positive": "all", "max_positives": 3, "negative": "violating", "num_negatives": 3, "margin": 0.2}
    changes = [
        {"margin": 0.3},
        {"temperature": 1.0},
        {"distance": "euclidean"},
        {"distance": "squared_euclidean"},
        {"positive": "hard", "max_positives": None},
        {"negative": "semihard"},
        {"max_positives": 4},
        {"num_negatives": 4},
        {"query_ids": ids[0], "key_ids": ids[1]},
        {"key_mask": torch.arange(60) % 3 > 0},
        {"reduction": "sum"},
        {"negative": "distance_weighted"},
        {"negative": "distance_weighted", "seed": 1},
        {"negative": "distance_weighted", "step": 1},
        {"negative": "distance_weighted", "row_offset": 9},
    ]
    values = [float(negmine.triplet_loss(q, keys, *both, **{**base, **change})) for change in ({}, *changes)]
    assert len(set(values)) == len(values), values
    numbers = [{}, {"alpha": 3.0}, {"beta": 40.0}, {"base": 0.4}, {"epsilon": 0.0}, {"reduction": "sum"}]
    numbers += [{"query_ids": ids[0], "key_ids": ids[1]}, {"key_mask": torch.arange(60) % 3 > 0}]
    values = [float(multi_similarity(q, keys, *both, **change)) for change in numbers]
    assert len(set(values)) == len(values), values


# Multi-similarity -------------------------------------------------------------------------------------------------


MS = {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1}


def ms_by_loops(q, keys, same, other, alpha, beta, base, epsilon):
    rows = []
    for b in range(len(q)):
        s = [float(q[b] @ k) for k in keys]
        pos, neg = ([k for k in range(len(s)) if pool[b, k]] for pool in (same, other))
        kept_p = [p for p in pos if neg and s[p] - epsilon < max(s[n] for n in neg)]
        kept_n = [n for n in neg if pos and s[n] + epsilon > min(s[p] for p in pos)]
        pull = math.log1p(sum(math.exp(-alpha * (s[p] - base)) for p in kept_p)) / alpha
        push = math.log1p(sum(math.exp(beta * (s[n] - base)) for n in kept_n)) / beta
        rows.append((pull + push, len(kept_p), len(kept_n)))
    return rows


def test_multi_similarity_is_the_loop():
    q, keys, both = unit(9, 4).double(), unit(40, 4, seed=1).double(), labels(9, 40)
    for masks in masks_of(9, 40, "cpu", 0):
        rows, stats = multi_similarity(q, keys, *both, **masks, reduction="none", return_stats=True)
        want = ms_by_loops(q, keys, *dense_pools(9, 40, both, masks), **MS)
        assert [(int(p), int(n)) for p, n in zip(stats.num_positives, stats.num_negatives, strict=True)] == [
            row[1:] for row in want
        ]
        torch.testing.assert_close(
            rows, torch.tensor([row[0] for row in want], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        assert int(stats.num_empty) == sum(row[1] + row[2] == 0 for row in want) > 0
        total = float(multi_similarity(q, keys, *both, **masks, reduction="sum"))
        assert abs(total - sum(row[0] for row in want)) < 1e-9
    leaves = [t[:20].requires_grad_() for t in (q, keys)]
    few = both[0], both[1][:20]
    assert torch.autograd.gradcheck(lambda q, k: multi_similarity(q, k, *few), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_similarity_values_and_gradients(backend, dtype):
    skip_what_the_interpreter_repeats(backend, dtype)
    device = device_of(backend)
    for seed, (B, K, D, _) in enumerate(shapes_for(backend)):
        inputs = [unit(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, K))]
        both = labels(B, K, device, seed)

        def run(cast, chosen, inputs=inputs, both=both):
            leaves = [t.to(cast).detach().requires_grad_() for t in inputs]
            # Pairs close to a threshold of mining could differ between precisions; these inputs have none.
            if chosen == "dense":
                same = (both[0][:, None] == both[1]) & (both[0] >= 0)[:, None]
                rows = reference.multi_similarity(*leaves, same, ~same, **MS)[0]
            else:
                rows = multi_similarity(*leaves, *both, reduction="none", backend=chosen)
            return [rows, *torch.autograd.grad(rows.double().sum(), leaves)]

        truth, plain = run(torch.float64, "dense"), run(torch.float32, "dense")
        got = run(dtype, backend)
        for name, k, t, p in zip(("loss", "d_query", "d_keys"), got, truth, plain, strict=True):
            compare.rounded(f"{name} {B, K, D}", k, t, p, MS["beta"])


# Recipes ----------------------------------------------------------------------------------------------------------


def in_batch(device="cpu"):
    views, classes, own = (
        unit(12, 8, device=device),
        torch.arange(12, device=device) % 4,
        torch.arange(12, device=device),
    )
    s = views.double() @ views.double().T
    same = (classes[:, None] == classes) & (own[:, None] != own)
    return views, classes, own, s, same, classes[:, None] != classes


def test_recipes_are_their_formulas(any_backend):
    views, classes, own, s, same, other = in_batch(device_of(any_backend))
    call = (views, views, classes, classes)
    ids, on = {"query_ids": own, "key_ids": own}, {"backend": any_backend}
    easy = s.masked_fill(~same, -torch.inf).amax(1)  # (B,)
    hard = s.masked_fill(~same, torch.inf).amin(1)
    hardest = s.masked_fill(~other, -torch.inf).amax(1)
    semihard = s.masked_fill(~other | (s >= easy[:, None]), -torch.inf).amax(1)
    kept = semihard.isfinite()
    d_pairs, triplets = 2 - 2 * s, []
    for b in range(12):
        for p in same[b].nonzero()[:, 0]:
            farther = d_pairs[b][other[b] & (s[b] < s[b, p])]
            d_n = farther.min() if len(farther) else d_pairs[b][other[b]].max()
            triplets.append((d_pairs[b, p] - d_n + 0.2).clamp_min(0))
    softplus = torch.nn.functional.softplus
    want = {
        "ephn": softplus((hardest - easy) / 0.1).mean(),
        "epshn": softplus((semihard - easy)[kept] / 0.1).mean(),
        "batch_hard": (hardest - hard + 0.2).clamp_min(0).mean(),
        "soft": softplus((2 - 2 * hard).sqrt() - (2 - 2 * hardest).sqrt()).mean(),
        "facenet": torch.stack(triplets).mean(),
    }
    got = {
        "ephn": recipes.ephn(**on),
        "epshn": recipes.ephn(semihard=True, **on),
        "batch_hard": recipes.batch_hard(**on),
        "soft": recipes.batch_hard(0.0, temperature=1.0, distance="euclidean", **on),
        "facenet": recipes.facenet(4, **on),
    }
    for name, loss in got.items():
        assert abs(float(loss(*call, **ids)) - float(want[name])) < 1e-5, name
    ms = recipes.multi_similarity(**on)
    rows = ms_by_loops(views.double().cpu(), views.double().cpu(), same.cpu(), other.cpu(), **MS)
    assert abs(float(ms(*call, **ids)) - sum(row[0] for row in rows) / 12) < 1e-5
    assert "beta=50.0" in repr(ms)


def test_vse_plus_plus_is_both_directions(any_backend):
    device = device_of(any_backend)
    image, caption = unit(7, 8, device=device), unit(7, 8, device=device, seed=1)
    s = image.double() @ caption.double().T
    off = s.masked_fill(torch.eye(7, dtype=torch.bool, device=device), -torch.inf)
    want = (0.2 + off.amax(1) - s.diag()).clamp_min(0).sum() + (0.2 + off.amax(0) - s.diag()).clamp_min(0).sum()
    assert abs(float(recipes.vse_plus_plus(backend=any_backend)(image, caption) - want)) < 1e-5
    classes = torch.tensor([0, 0, 1, 2, 3, 4, 5], device=device)
    off = s.masked_fill(classes[:, None] == classes, -torch.inf)
    want = (0.2 + off.amax(1) - s.diag()).clamp_min(0).sum() + (0.2 + off.amax(0) - s.diag()).clamp_min(0).sum()
    assert abs(float(recipes.vse_plus_plus(backend=any_backend)(image, caption, classes) - want)) < 1e-5


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_simans_draws_by_its_kernel(kernel):
    """In the first draw of many rows, the frequency of each candidate is its published weight."""
    draws, D = 4000, 8
    q, pos, keys = unit(1, D), unit(1, D, seed=2), unit(30, D, seed=1)
    loss = recipes.simans(1, candidates=10, kernel=kernel, a=8.0, b=0.1, tau=6.0, seed=4)
    index = loss.sample(q.expand(draws, D), pos.expand(draws, D), keys, step=0)
    s, s_pos = (q @ keys.T)[0].double(), float(q[0] @ pos[0])
    top = s.argsort(descending=True)[:10]
    gap = s[top] - s_pos
    weight = (-8.0 * (gap - 0.1) ** 2).exp() if kernel == "gaussian" else (-6.0 * gap.abs()).exp()
    expected = weight / weight.sum() * draws
    seen = torch.bincount(index[:, 0], minlength=30).double()
    assert float(seen.sum()) == float(seen[top].sum()) == draws
    assert ((seen[top] - expected) ** 2 / expected).sum() < 33  # 9 degrees of freedom: beyond the 0.9998 quantile


def test_simans_is_info_nce_over_what_it_drew(any_backend):
    device = device_of(any_backend)
    q, pos, keys = (unit(n, 8, device=device, seed=i) for i, n in enumerate((5, 5, 40)))
    q.requires_grad_()
    mask = torch.arange(40, device=device) < 6  # fewer candidates than draws
    for columns, left in ((keys, 8), (Negatives(keys, mask=mask), 6)):
        loss = recipes.simans(8, candidates=20, temperature=0.1, backend=any_backend)
        index = loss.sample(q.detach(), pos, columns, step=0)
        assert bool(((index >= 0).sum(1) == left).all())
        got = loss(q, pos, columns)
        (grad,) = torch.autograd.grad(got, q)
        usable = torch.zeros(5, 41, dtype=torch.bool, device=device).scatter(1, index % 41, True)[:, :40]
        want = negmine.info_nce(q, pos, Negatives(keys, mask=usable), temperature=0.1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, torch.autograd.grad(want, q)[0], rtol=1e-4, atol=1e-5)
    assert loss.state_dict()["step"] == 1
    twin = pickle.loads(pickle.dumps(loss))
    assert twin.step == 1 and torch.equal(twin(q, pos, keys), loss(q, pos, keys))
    assert loss(q[:0], pos[:0], keys) == 0  # the loss of an empty batch is 0


def test_everything_compiles_into_one_graph():
    torch._dynamo.reset()
    q, keys, both = unit(4, 8), unit(30, 8, seed=1), labels(4, 30)

    def step(q, keys):
        return negmine.triplet_loss(q, keys, *both, margin=0.5) + multi_similarity(q, keys, *both)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(q, keys), step(q, keys))


q0, k0, lb, lk = torch.randn(3, 4), torch.randn(7, 4), torch.arange(3), torch.arange(7)
triplet, ms = negmine.triplet_loss, multi_similarity
REFUSALS = [
    (triplet, (q0, k0, lb, lk), {"temperature": 0.0}, ValueError, "triplet_loss: temperature must be a number above 0"),
    (triplet, (q0, k0, lb, lk), {"temperature": torch.ones(2)}, ValueError, "or None for the hinge"),
    (triplet, (q0, k0, lb, lk), {"reduction": "avg"}, ValueError, "triplet_loss: reduction must be"),
    (triplet, (q0, k0, lb, lk), {"return_stats": 1}, TypeError, "return_stats must be True or False"),
    (triplet, (q0, k0, lb, lk), {"step": 2**32}, ValueError, "step must be an int in [0, 2**32)"),
    (ms, (q0, k0, lb, lk), {"alpha": 0.0}, ValueError, "multi_similarity: alpha must be a number above 0, got 0.0"),
    (ms, (q0, k0, lb, lk), {"beta": -1}, ValueError, "beta must be a number above 0"),
    (ms, (q0, k0, lb, lk), {"epsilon": math.inf}, ValueError, "epsilon must be a finite number"),
    (ms, (q0, k0, lb, lk), {"reduction": "avg"}, ValueError, "multi_similarity: reduction must be"),
    (ms, (q0, k0, lb, lk), {"return_stats": 1}, TypeError, "return_stats must be True or False"),
    (negmine.TripletLoss, (-1.0,), {}, ValueError, "TripletLoss: margin must be a number of 0 or more"),
    (negmine.TripletLoss, (), {"reduction": "avg"}, ValueError, "TripletLoss: reduction must be"),
    (negmine.TripletLoss, (), {"temperature": -1.0}, ValueError, "TripletLoss: temperature must be a number above 0"),
    (negmine.TripletLoss, (), {"seed": 0.5}, ValueError, "TripletLoss: seed must be an int"),
    (negmine.MultiSimilarityLoss, (), {"base": None}, ValueError, "MultiSimilarityLoss: base must be a finite number"),
    (negmine.MultiSimilarityLoss, (), {"reduction": 1}, ValueError, "MultiSimilarityLoss: reduction must be"),
    (recipes.vse_plus_plus, (-0.2,), {}, ValueError, "margin must be a number of 0 or more, got -0.2"),
    (recipes.vse_plus_plus(), ("x", k0), {}, TypeError, "vse_plus_plus: image must be a tensor, got a str"),
    (recipes.vse_plus_plus(), (k0, k0[:1]), {}, ValueError, "vse_plus_plus: caption must be of image's shape"),
    (recipes.vse_plus_plus(), (k0, k0, "x"), {}, TypeError, "vse_plus_plus: labels must be a tensor, got a str"),
    (recipes.vse_plus_plus(), (k0, k0, k0), {}, ValueError, "vse_plus_plus: labels must be of shape (B,)"),
    (recipes.vse_plus_plus, (), {"reduction": "none"}, ValueError, "vse_plus_plus: reduction must be 'mean' or 'sum'"),
    (recipes.simans, (0,), {}, ValueError, "simans: num_negatives must be an int of 1 or more"),
    (recipes.simans, (), {"candidates": 0}, ValueError, "simans: candidates must be an int of 1 or more"),
    (recipes.simans, (5,), {"candidates": 4}, ValueError, "candidates must be at least num_negatives=5, got 4"),
    (recipes.simans, (), {"kernel": "box"}, ValueError, "kernel must be 'gaussian' or 'laplace'"),
    (recipes.simans, (), {"tau": -1}, ValueError, "tau must be a number of 0 or more"),
    (recipes.simans, (), {"b": "x"}, ValueError, "b must be a finite number"),
    (recipes.simans, (), {"temperature": 0}, ValueError, "simans: temperature must be a number above 0"),
    (recipes.simans, (), {"reduction": "avg"}, ValueError, "simans: reduction must be"),
    (recipes.simans, (), {"seed": -1}, ValueError, "simans: seed must be an int"),
    (recipes.simans(), (q0, k0, k0), {}, ValueError, "simans: positive_key must be of query's shape"),
    (recipes.simans(), (q0, q0, k0), {"row_offset": -1}, ValueError, "simans: row_offset must be an int in [0, 2**63)"),
]


@pytest.mark.parametrize("function, arguments, options, error, words", REFUSALS, ids=[r[-1][:50] for r in REFUSALS])
def test_refusal(function, arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        function(*arguments, **options)
