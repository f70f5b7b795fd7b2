"""sup_con on every backend compared with the reference: values, all gradients, batches and queues, errors."""

import functools
import re
import sys

import pytest
import torch

import negmine
from negmine import reference
from tests import compare
from tests.cases import DTYPES, shapes_for, unit
from tests.conftest import device_of, skip_what_the_interpreter_repeats

T = 0.2


def labels(B, K, device, seed):
    """Labels of queries and keys, some unknown, with one query label that no key has."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-1, 4, (B,), generator=generator)
    q[:1] = 9
    return q.to(device), torch.randint(-1, 4, (K,), generator=generator).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("denominator", ["all", "own_positive", "negatives_only"])
def test_values_and_gradients(backend, positives, denominator, dtype, monkeypatch):
    skip_what_the_interpreter_repeats(backend, dtype)
    monkeypatch.setattr(sys.modules["negmine.losses.sup_con"], "PIECE", 300)  # several pieces even for short queues
    device = device_of(backend)
    options = {"positives": positives, "denominator": denominator}
    for seed, (B, K, D, _) in enumerate(shapes_for(backend)):
        inputs = [unit(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, K))]
        both = labels(B, K, device, seed)
        mask = torch.rand(K, generator=torch.Generator().manual_seed(seed)).to(device) < 0.8

        def run(cast, function, inputs=inputs, both=both, device=device, **more):
            leaves = [t.to(cast).detach().requires_grad_() for t in inputs]
            wide = torch.promote_types(cast, torch.float32)
            leaves.append(torch.tensor(T, dtype=wide, device=device, requires_grad=True))
            rows, stats = function(*leaves[:2], *both, temperature=leaves[2], **options, **more)
            return [rows, *torch.autograd.grad(rows.double().sum(), leaves)], stats

        allowed = mask.expand(B, K)
        got, stats = run(dtype, negmine.sup_con, key_mask=mask, reduction="none", return_stats=True, backend=backend)
        truth, want = run(torch.float64, reference.sup_con, usable=allowed)
        plain, _ = run(dtype, reference.sup_con, usable=allowed)
        names = ("loss", "d_query", "d_keys", "d_temperature")
        # Two gradients are differences of terms of positives and negatives. Sizes of these terms: 1 / T, and the logits / T.
        logits = inputs[0].double() @ inputs[1].double().T / T  # (B, K)
        terms = {"d_query": torch.tensor(1 / T), "d_temperature": logits.abs().mean(1).sum() / T}
        if denominator == "negatives_only":  # the loss itself is a difference of logits
            terms["loss"] = logits
        for name, k, t, p in zip(names, got, truth, plain, strict=True):
            compare.rounded(f"{name} {B, K, D}", k, t, p, 1 / T, terms.get(name))
        compare.exact(f"num_positives {B, K, D}", stats.num_positives, want["num_positives"])
        compare.exact(f"num_without_positive {B, K, D}", stats.num_without_positive, want["num_without_positive"])


def test_in_is_at_most_out_and_every_denominator_runs(any_backend):
    device = device_of(any_backend)
    q, keys = unit(6, 8, device=device), unit(60, 8, device=device, seed=1)
    both = torch.arange(6, device=device) % 3, torch.arange(60, device=device) % 4 - 1
    for denominator in ("all", "own_positive", "negatives_only"):
        out, inside = (
            negmine.sup_con(q, keys, *both, positives=p, denominator=denominator, reduction="none", backend=any_backend)
            for p in ("out", "in")
        )
        assert bool((inside <= out + 1e-5).all())


def test_in_batch_form_excludes_the_sample_itself(any_backend):
    """As in HobbitLong's code: both views of all images are queries and keys, and a view is excluded from its own keys by id."""
    device = device_of(any_backend)
    views = unit(10, 8, device=device).requires_grad_()
    classes, own = torch.arange(10, device=device) % 3, torch.arange(10, device=device)
    loss = negmine.sup_con(
        views, views, classes, classes, query_ids=own, key_ids=own, temperature=0.5, backend=any_backend
    )
    exact = views.detach().double().requires_grad_()
    x = exact @ exact.T / 0.5
    others = ~torch.eye(10, dtype=torch.bool, device=device)
    same = others & (classes[:, None] == classes)
    log_p = x - x.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    want = (-(log_p * same).sum(1) / same.sum(1)).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(loss, views)[0]
    torch.testing.assert_close(got.double(), torch.autograd.grad(want, exact)[0], rtol=1e-4, atol=1e-6)


def test_one_positive_is_info_nce(any_backend):
    device = device_of(any_backend)
    q, pos, keys = (unit(n, 8, device=device, seed=i) for i, n in enumerate((5, 5, 40)))
    own = torch.arange(5, device=device)
    # Each query has one positive. Positives of other queries are negatives here, so info_nce gets them as negatives too.
    columns = torch.cat([pos, keys])
    key_labels = torch.cat([own, torch.full((40,), -1, device=device)])
    got = negmine.sup_con(q, columns, own, key_labels, reduction="none", backend=any_backend)
    others = negmine.Negatives(columns, labels=key_labels)
    want = negmine.info_nce(q, pos, others, query_labels=own, reduction="none", backend=any_backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("denominator", ["all", "own_positive"])
def test_the_module_and_overwriting(any_backend, denominator):
    device = device_of(any_backend)
    q, keys = unit(4, 8, device=device), unit(30, 8, device=device, seed=1)
    both = torch.zeros(4, dtype=torch.long, device=device), torch.arange(30, device=device) % 2
    module = negmine.SupConLoss(T, positives="in", denominator=denominator, backend=any_backend)
    grads = []
    for overwrite in (False, True):
        leaf, queue = q.clone().requires_grad_(), keys.clone()
        loss = module(leaf, queue, *both)
        if overwrite:
            queue.zero_()
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("denominator", ["all", "own_positive"])
def test_it_compiles_into_one_graph(denominator):
    torch._dynamo.reset()
    q, keys = unit(4, 8), unit(30, 8, seed=1)
    both = torch.zeros(4, dtype=torch.long), torch.arange(30) % 2
    loss = functools.partial(negmine.sup_con, denominator=denominator)
    compiled = torch.compile(lambda q, k: loss(q, k, *both), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, keys), loss(q, keys, *both))


def test_negatives_far_below_and_above_their_positive(any_backend):
    """Denominators with one positive are finite if exp overflows or underflows, and masked NaN is not read."""
    device = device_of(any_backend)
    q, keys = (
        torch.ones(2, 1, device=device, requires_grad=True),
        torch.tensor([[9.0], [-9.0], [torch.nan]], device=device),
    )
    mask, both = torch.tensor([True, True, False], device=device), torch.tensor([0, 1], device=device)
    for positives in ("out", "in"):
        loss = negmine.sup_con(
            q, keys, both, torch.tensor([0, 1, 0], device=device), key_mask=mask, positives=positives, temperature=0.01,
            denominator="own_positive", reduction="none", backend=any_backend,
        )  # fmt: skip
        torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 1800.0], device=device))
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), q)[0], torch.tensor([[0.0], [1800.0]], device=device)
        )


q0, k0, lb, lk = torch.randn(3, 4), torch.randn(7, 4), torch.arange(3), torch.arange(7)
REFUSALS = [
    ((q0.long(), k0, lb, lk), {}, TypeError, "sup_con: query must be a floating tensor"),
    ((q0, k0[:, :2], lb, lk), {}, ValueError, "keys must be of shape (K, D) with query's D = 4"),
    ((q0, k0, None, lk), {}, TypeError, "query_labels must be given, or else positive_mask or"),
    ((q0, k0, lb, None), {}, TypeError, "key_labels must be given, or else positive_mask or"),
    ((q0, k0, lb, lb), {}, ValueError, "key_labels must be of shape (7,)"),
    ((q0, k0, lb.float(), lk), {}, TypeError, "query_labels must be an integer tensor"),
    ((q0, k0, lb, lk), {"positives": "both"}, ValueError, "positives must be 'out' or 'in', got 'both'"),
    (
        (q0, k0, lb, lk),
        {"denominator": "own"},
        ValueError,
        "denominator must be 'all' or 'own_positive' or 'negatives_only'",
    ),
    ((q0, k0, lb, lk), {"temperature": 0.0}, ValueError, "temperature must be a number above 0"),
    ((q0, k0, lb, lk), {"reduction": "avg"}, ValueError, "reduction must be"),
    ((q0, k0, lb, lk), {"return_stats": 1}, TypeError, "return_stats must be True or False"),
    ((q0, k0, lb, lk), {"query_ids": lb}, ValueError, "key_ids must be given together with query_ids"),
    ((q0, k0, lb, lk), {"key_mask": torch.ones(7)}, TypeError, "key_mask must be a bool tensor"),
]


@pytest.mark.parametrize("arguments, options, error, words", REFUSALS, ids=[words[:50] for *_, words in REFUSALS])
def test_refusal(arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        negmine.sup_con(*arguments, **options)


def test_module_refusals():
    with pytest.raises(ValueError, match="SupConLoss: denominator must be"):
        negmine.SupConLoss(denominator="x")


def simclr(views, temperature):
    """The formula of NT-Xent for views (B, V, D), with the mean over positives outside of the logarithm."""
    (b, v, _), flat = views.shape, views.reshape(-1, views.shape[-1])
    x = (flat @ flat.T / temperature).fill_diagonal_(-torch.inf)
    image = torch.arange(b).repeat_interleave(v)
    same = (image[:, None] == image) & ~torch.eye(b * v, dtype=torch.bool)
    gap = x.logsumexp(1, keepdim=True) - x
    return torch.where(same, gap, 0.0).sum(1).div(v - 1).mean()


def test_views_against_themselves_are_simclr(any_backend):
    views = unit(5, 3, 8, device=device_of(any_backend)).requires_grad_()
    got = negmine.sup_con(views, None, temperature=0.5, backend=any_backend)
    want = simclr(views.double().cpu(), 0.5)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(value, views, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    rows, stats = negmine.sup_con(views, None, reduction="none", return_stats=True, backend=any_backend)
    assert rows.shape == stats.num_positives.shape == (5, 3) and bool((stats.num_positives == 2).all())
    labels = torch.tensor([0, 1, 0, 2, -1], device=views.device)
    _, stats = negmine.sup_con(views, None, labels, return_stats=True, backend=any_backend)
    assert stats.num_positives[:, 0].tolist() == [5, 2, 5, 2, 0]


@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("denominator", ["all", "own_positive", "negatives_only"])
def test_positives_by_mask_and_by_weight(any_backend, positives, denominator):
    """A mask equals labels, equal weights equal the mask, and other weights equal a loop."""
    device = device_of(any_backend)
    query, keys = unit(5, 8, device=device), unit(20, 8, device=device, seed=1)
    labels, key_labels = torch.arange(5, device=device) % 3, torch.arange(20, device=device) % 4
    usable = torch.arange(20, device=device) % 5 > 0
    options = {
        "positives": positives,
        "denominator": denominator,
        "temperature": 0.3,
        "key_mask": usable,
        "reduction": "none",
    }
    mask = labels[:, None] == key_labels
    weighted = any_backend if denominator != "own_positive" and positives == "out" else None
    results = []
    for given, backend in (
        ({"query_labels": labels, "key_labels": key_labels}, any_backend),
        ({"positive_mask": mask}, any_backend),
        ({"positive_weights": mask * 0.25}, weighted),
    ):
        leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
        rows = negmine.sup_con(*leaves, **given, **options, backend=backend)
        results.append([rows, *torch.autograd.grad(rows.sum(), leaves)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
    weights = torch.rand(5, 20, device=device) * (torch.rand(5, 20, device=device) < 0.4)
    weights[0] = 0
    got = negmine.sup_con(query, keys, positive_weights=weights, **options, backend=weighted)
    x, w = (query @ keys.T / 0.3).double().cpu(), weights.double().cpu()
    for b in range(5):
        columns = [k for k in range(20) if usable[k]]
        kept = [k for k in columns if w[b, k] > 0]
        total, mass, negatives = 0.0, sum(w[b, k] for k in kept), sum(x[b, k].exp() for k in columns if w[b, k] == 0)
        for p in kept:
            below = {"all": sum(x[b, k].exp() for k in columns), "negatives_only": negatives}.get(
                denominator, negatives + x[b, p].exp()
            )
            ratio = x[b, p].exp() / below
            total = total + w[b, p] / mass * (ratio if positives == "in" else -ratio.log())
        want = 0.0 if not kept else (-torch.log(total) if positives == "in" else total)
        assert float(got[b]) == pytest.approx(float(want), rel=1e-4, abs=1e-5)


def test_views_share_their_masks(any_backend):
    device = device_of(any_backend)
    views, keys = unit(4, 2, 8, device=device), unit(9, 8, device=device, seed=1)
    mask = torch.rand(4, 9, device=device) < 0.4
    got = negmine.sup_con(views, keys, positive_mask=mask, reduction="none", backend=any_backend)
    for v in range(2):
        want = negmine.sup_con(views[:, v], keys, positive_mask=mask, reduction="none", backend=any_backend)
        torch.testing.assert_close(got[:, v], want)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "query_labels must be given, or else positive_mask or"),
        ({"positive_mask": torch.ones(4, 9)}, "positive_mask must be a bool tensor"),
        ({"positive_mask": torch.ones(4, 8) > 0}, r"positive_mask must be of shape \(4, 9\)"),
        ({"positive_weights": torch.ones(4, 9) > 0}, "positive_weights must be a floating tensor"),
        (
            {"positive_mask": torch.ones(4, 9) > 0, "query_labels": torch.arange(4)},
            "query_labels must be None if positive_mask",
        ),
        (
            {"positive_weights": torch.ones(4, 9), "positive_mask": torch.ones(4, 9) > 0},
            "positive_weights must be None if positive_mask",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals_of_positives(given, said):
    with pytest.raises((ValueError, TypeError), match=f"sup_con: {said}"):
        negmine.sup_con(unit(4, 8), unit(9, 8), **given)


@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("denominator", ["all", "own_positive", "negatives_only"])
def test_pools_are_one_queue(any_backend, positives, denominator):
    """The batch without the sample itself, and a queue that is half full, give the result of one joined queue."""
    device = device_of(any_backend)
    q, batch, older = (unit(n, 8, device=device, seed=i) for i, n in enumerate((5, 5, 30)))
    sample = torch.arange(5, device=device)
    both = torch.tensor([0, 1, 2, -1, 9], device=device), torch.arange(30, device=device) % 5 - 1
    queue = negmine.MoCoQueue(8, 64, with_labels=True, random_init=False).to(device)
    queue.enqueue(older, labels=both[1])
    options = {"positives": positives, "denominator": denominator, "reduction": "none", "return_stats": True}

    def graded(dtype, joined):
        leaves = [v.to(dtype).requires_grad_() for v in (q, batch)]
        if joined:
            keys, labels = torch.cat([leaves[1], older.to(dtype)]), torch.cat(both)
            ids = torch.cat([sample, torch.full((30,), -1, device=device)])
            given = {"key_labels": labels, "key_ids": ids, "backend": "reference"}
        else:
            keys, given = [negmine.Negatives(leaves[1], labels=both[0], ids=sample), queue], {"backend": any_backend}
        rows, stats = negmine.sup_con(leaves[0], keys, both[0], query_ids=sample, temperature=T, **options, **given)
        return [rows, *torch.autograd.grad(rows.sum(), leaves)], stats

    (got, stats), (truth, want), (plain, _) = (
        graded(torch.float32, False),
        graded(torch.float64, True),
        graded(torch.float32, True),
    )
    for name, k, t, p in zip(("loss", "d_query", "d_keys"), got, truth, plain, strict=True):
        assert t.any()
        compare.rounded(name, k, t, p, condition=1 / T, terms=torch.tensor(1 / T))
    assert torch.equal(stats.num_positives, want.num_positives)
    torch.testing.assert_close(stats.logsumexp.double(), want.logsumexp, rtol=1e-5, atol=1e-5)


def test_pools_that_are_refused():
    q, keys, tags = unit(3, 4), unit(5, 4), torch.arange(5)
    for pools, options, words in [
        ([keys], {}, "keys[0].labels must be given together with query_labels"),
        (
            [negmine.Negatives(keys, labels=tags)],
            {"key_mask": tags > 0},
            "key_mask must be None if keys is a MoCoQueue",
        ),
        (
            negmine.Negatives(keys, labels=tags, bias=tags.float()),
            {},
            "keys.bias must be None, because sup_con has no option bias",
        ),
        (
            [negmine.Negatives(keys, labels=tags), None],
            {},
            "keys[1] must be a tensor, a MoCoQueue or a Negatives, got None",
        ),
        (
            negmine.Negatives(keys, labels=tags),
            {"query_ids": tags[:3]},
            "query_ids must be None, because no pool of keys has ids",
        ),
        ([], {}, "keys must be a list of at least one pool"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            negmine.sup_con(q, pools, tags[:3], **options)
