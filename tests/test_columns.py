"""Ops over lists of columns, samples, keys (B, M, D) and false negatives, on every backend."""

import pytest
import torch

import negmine
from negmine import FalseNegatives, Mix, Negatives, Select, Weight, reference
from negmine.ops import backends
from negmine.ops.vectors import for_kernels
from tests import compare
from tests.cases import DTYPES, dense_mask, ids, masks, negatives, tags, unit, whole
from tests.conftest import device_of, interpreted, skip_what_the_interpreter_repeats
from tests.test_kernels import gradients

SHAPES = [(1, 1, 1, 1), (0, 4, 3, 2), (3, 5, 7, 9), (5, 3, 0, 8), (4, 50, 40, 24), (3, 9, 70, 130)]  # B, K, M, D


def launcher(backend, op):
    return next(row for row in backends.BACKENDS if row.name == backend).functions.get(op) or pytest.skip(
        f"{backend} has no {op}"
    )


def a_list(B, K, M, device, seed):
    """A list of columns for each query, in any order, with duplicates and gaps; the first query has no columns."""
    index = torch.randint(-1, K, (B, M), generator=torch.Generator().manual_seed(seed)).to(device)
    index[:1] = -1
    return index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_ops(backend, dtype):
    skip_what_the_interpreter_repeats(backend, dtype)
    device = device_of(backend)
    lse, grad_keys = launcher(backend, "gathered_logsumexp"), launcher(backend, "gathered_grad_keys")
    for seed, (B, K, M, D) in enumerate(SHAPES):
        index = a_list(B, K, M, device, seed)
        whole_q, whole_keys = (
            whole(n, D, dtype=dtype, device=device, seed=seed + i).T.contiguous().T for i, n in enumerate((B, K))
        )
        scale = torch.tensor(5.0, device=device)
        scores, _, mean = lse(for_kernels(whole_q), for_kernels(whole_keys), index, scale, False)
        want = reference.gathered_logsumexp(whole_q.float(), whole_keys.float(), index, scale)
        compare.exact(f"scores {B, K, M, D}", scores, want[0])
        assert mean.shape == (0, D)
        q, keys = (unit(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, K)))
        got = lse(q, keys, index, scale, True)
        truth = reference.gathered_logsumexp(q.double(), keys.double(), index, 5.0)
        plain = reference.gathered_logsumexp(q.float(), keys.float(), index, scale)
        for name, k, t, p in zip(("scores", "lse", "mean"), got, truth, plain, strict=True):
            compare.rounded(f"{name} {B, K, M, D}", k, t, p, 5.0)
        weight = torch.randn(B, M, device=device).masked_fill(index < 0, torch.nan)  # NaN in gaps must not be read
        got = grad_keys(q, index, weight, K)
        truth = reference.gathered_grad_keys(q.double(), index, weight.double(), K)
        compare.rounded(f"grad_keys {B, K, M, D}", got, truth, truth.float(), 4.0)


def test_gathered_ops_refuse_what_would_read_elsewhere():
    lse, grad_keys = launcher("cpu", "gathered_logsumexp"), launcher("cpu", "gathered_grad_keys")
    q, keys, one = unit(2, 4), unit(3, 4), torch.tensor(1.0)
    for bad in (3, -2):
        index = torch.tensor([[0, 1], [2, bad]])
        with pytest.raises(RuntimeError, match=rf"index must hold rows in \[0, 3\), or -1, got {bad} at \(1, 1\)"):
            lse(q, keys, index, one, True)
        with pytest.raises(RuntimeError, match="index must hold rows"):
            grad_keys(q, index, torch.ones(2, 2), 3)
    with pytest.raises(RuntimeError, match="weight must have the shape of index"):
        grad_keys(q, torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 3), 3)
    with pytest.raises(RuntimeError, match="K must not be negative"):
        grad_keys(q, torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2), -1)


def views(B, V, D, dtype, device):
    return unit(B, V, D, dtype=dtype, device=device, seed=77)


CASES = [  # options, masks, own keys
    ({"select": Select(0.1, sample=9, replace=True), "weight": Weight(0.5)}, "everything", False),
    ({"mix": Mix(6, 9, 5, detach=False)}, "ids", False),
    ({"mix": Mix(4, 0, 7, detach=False), "select": Select(0, 9, sample=4, replace=True)}, "columns", False),
    ({"select": Select(sample=3), "mix": Mix(3, 2, 2, detach=False)}, "nothing left", False),
    ({}, "none", True),
    ({"temperature": 0.05, "decoupled": True}, "pairs", True),
    ({"select": Select(0.1, 0.8)}, "columns", True),
    ({"select": Select(1, 9, absolute_margin=-0.1), "weight": Weight(0.5)}, "none", True),
    ({"select": Select(0, 0.9, sample=5), "mix": Mix(5, 4, 3)}, "pairs", True),
    ({"select": Select(2, 30, sample=4, replace=True), "mix": Mix(5, 4, 3, detach=False)}, "none", True),
    ({"false_negatives": FalseNegatives(3, 0.1)}, "ids", False),
    ({"false_negatives": FalseNegatives(4, 0.05, mode="attract")}, "columns", False),
    ({"false_negatives": FalseNegatives(None, 0.1, mode="attract"), "decoupled": True}, "labels", False),
    ({"false_negatives": FalseNegatives(None, 0.1, reduce="mean"), "select": Select(0, 0.5, sample=6)}, "pairs", False),
    ({"false_negatives": FalseNegatives(500, 0.1, reduce="mean", mode="attract")}, "none", False),
    ({"false_negatives": FalseNegatives(2, None), "weight": Weight(1.0), "mix": Mix(4, 3, 2)}, "none", False),
    ({"false_negatives": FalseNegatives(3, 0.0, mode="attract")}, "pairs", True),
    ({"false_negatives": FalseNegatives(None, 0.1)}, "columns", True),
    ({"false_negatives": FalseNegatives(5, None, mode="attract")}, "nothing left", False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options, kind, own", CASES, ids=lambda v: ",".join(v) if isinstance(v, dict) else str(v))
def test_loss_and_every_gradient(backend, options, kind, own, dtype):
    if interpreted(backend) and dtype != torch.float32:
        pytest.skip("triton: interpreted, where the listed ops and the losses of test_kernels.py show the other dtypes")
    device = device_of(backend)
    T = options.get("temperature", 0.2)
    for seed, (B, K, D) in enumerate([(1, 1, 1), (0, 4, 3), (3, 7, 8), (6, 90, 24), *[(70, 300, 130)] * (not own)]):
        if interpreted(backend) and B != 3:
            continue
        inputs = [
            unit(*shape, dtype=dtype, device=device, seed=seed + i)
            for i, shape in enumerate(((B, D), (B, D), (B, K, D) if own else (K, D)))
        ]
        given = masks(kind, B, K, device)
        allowed = dense_mask(inputs[0], inputs[2], given)
        keywords = {name: value for name, value in options.items() if name != "temperature"} | {
            "seed": 9,
            "row_offset": 4,
        }
        support = views(B, 3, D, dtype, device) if "false_negatives" in options else None

        def run(cast, function, inputs=inputs, keywords=keywords, support=support, given=(), **more):
            leaves = [t.to(cast).detach().requires_grad_() for t in inputs]
            wide = torch.promote_types(cast, torch.float32)
            leaves.append(torch.tensor(T, dtype=wide, device=device).requires_grad_())
            more["support"] = None if support is None else support.to(wide if function is reference.info_nce else cast)
            columns = negatives(leaves[2], given) if given else leaves[2]
            rows, stats = function(*leaves[:2], columns, temperature=leaves[3], **keywords, **more)
            return [rows, *gradients(rows, leaves)], stats

        call = {"reduction": "none", "return_stats": True, "backend": backend}
        got, stats = run(dtype, negmine.info_nce, given=given, **tags(given), **call)
        truth, want = run(torch.float64, reference.info_nce, usable=allowed)
        plain, _ = run(torch.float32, reference.info_nce, usable=allowed)
        # Both are differences of a term of the positive and a term of the negatives, which may cancel.
        terms = {"d_query": truth[2], "d_T": (inputs[0].double() * inputs[1]).sum() / T**2}
        for name, k, t, p in zip(("loss", "d_query", "d_positive", "d_keys", "d_T"), got, truth, plain, strict=True):
            if k is not None:
                compare.rounded(f"{name} {B, K, D}", k, t, p, 1 / T, terms.get(name))
        for name in ("num_negatives", "num_empty"):
            compare.exact(f"{name} {B, K, D}", getattr(stats, name), torch.as_tensor(want[name]))


@pytest.mark.parametrize("replace", [False, True], ids=["once", "replace"])
@pytest.mark.parametrize("window", [(0, None), (3, 40), (0.1, 0.6), (0.2, 60), (2, 0.5), (0.0, 0.001)], ids=str)
def test_samples_are_those_of_the_reference(backend, window, replace):
    """With integer vectors, many scores are equal; still both keep the same columns, each the same number of times."""
    if interpreted(backend) and window not in ((0, None), (0.1, 0.6)):
        pytest.skip("triton: interpreted, where windows end at ranks that are not computed by its kernels")
    device = device_of(backend)
    for B, K, D in ((0, 5, 3), (4, 1, 3), (6, 70, 8), *[(66, 9000, 8)] * (not interpreted(backend))):
        if interpreted(backend) and K != 70:
            continue
        q, keys, pos = (whole(n, D, device=device, seed=i) for i, n in enumerate((B, K, B)))
        keys[: K // 8] = torch.nan  # no candidates
        given = ids(B, K, device)
        select = Select(*window, sample=7, replace=replace, max_score=None if K == 70 else 20.0)
        key = {"seed": 2**32 - 1, "step": 3, "row_offset": 2**31 - 2}
        call = {"select": select, **tags(given), **key, "backend": backend}
        _, stats = negmine.info_nce(q, pos, negatives(keys, given), **call, return_stats=True)
        allowed = dense_mask(q, keys, given)
        times = reference.multiplicity(q @ keys.T, (q * pos).sum(1), select, allowed, *key.values())
        compare.exact(f"num_negatives {B, K}", stats.num_negatives, times.sum(1))
        scores = (q @ keys.T / 0.07).masked_fill(times == 0, -torch.inf) + times.log()
        want = torch.cat([(q * pos).sum(1, keepdim=True) / 0.07, scores], 1).double().logsumexp(1)
        torch.testing.assert_close(stats.logsumexp.double(), want, rtol=1e-6, atol=1e-4)
        if not replace:
            for N in (3, 12):
                mined = negmine.mine_hardest(q, negatives(keys, given), N, positive_key=pos, **call)
                compare.exact(f"index {B, K}", mined.index, reference.mine_hardest(q, keys, N, times > 0)[1])


def test_a_sample_of_the_whole_window_is_the_window(backend):
    device = device_of(backend)
    q, pos, keys = unit(5, 16, device=device), unit(5, 16, device=device, seed=1), unit(60, 16, device=device, seed=2)
    for select, sampled in (
        (Select(2, 30), Select(2, 30, sample=28)),
        (Select(0.2, 0.7), Select(0.2, 0.7, sample=99)),
        (None, Select(sample=60)),
    ):
        want = negmine.info_nce(q, pos, keys, select=select, reduction="none", return_stats=True, backend=backend)
        got = negmine.info_nce(q, pos, keys, select=sampled, reduction="none", return_stats=True, backend=backend)
        torch.testing.assert_close(got, want)


def test_own_negatives_are_the_shared_ones_repeated(backend):
    device = device_of(backend)
    q, pos, keys = (whole(n, 8, device=device, seed=n) / 8 for n in (5, 5, 40))
    support = whole(5, 2, 8, device=device, seed=3) / 8
    given = ids(5, 40, device)
    for options in (
        {},
        {"select": Select(0.1, 0.6)},
        {"select": Select(2, 20, sample=6)},
        {"select": Select(2, 20, sample=6, replace=True), "seed": 4},
        {"mix": Mix(6, 5, 4), "seed": 4},
        {"weight": Weight(1.0)},
        {"false_negatives": FalseNegatives(3, 0.1, mode="attract"), "support": support},
    ):
        results = []
        for own in (False, True):
            leaf = keys.clone().requires_grad_()
            columns = Negatives(
                leaf.expand(5, 40, 8) if own else leaf,
                ids=given["negative_ids"].expand(5, 40) if own else given["negative_ids"],
            )
            call = {**options, **tags(given), "reduction": "none", "return_stats": True, "backend": backend}
            loss, stats = negmine.info_nce(q, pos, columns, **call)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad, *stats))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("select", [Select(8, absolute_margin=-0.5), Select(0, 0.5, relative_margin=0.1)], ids=repr)
def test_a_margin_below_a_positive_that_is_nan_keeps_nothing(any_backend, select):
    """Regression: all keys of each query's own were kept."""
    device = device_of(any_backend)
    q, pos, keys = (unit(n, 5, seed=i, device=device) for i, n in enumerate((3, 3, 16)))
    pos[1, 2] = torch.nan
    for columns in (keys, keys.expand(3, 16, 5)):
        _, stats = negmine.info_nce(q, pos, columns, select=select, return_stats=True, backend=any_backend)
        assert stats.num_negatives[1] == 0


def test_elimination_is_the_mask_of_what_is_found(backend):
    device = device_of(backend)
    q, pos, keys = (whole(n, 8, device=device, seed=n) for n in (5, 5, 40))
    support = whole(5, 3, 8, device=device, seed=3)  # many equal scores
    given = masks("columns", 5, 40, device)
    keys[~given["negative_mask"]] = torch.nan  # masked rows may have any values
    clean = keys.nan_to_num()
    for options in (
        FalseNegatives(3, None),
        FalseNegatives(3, 5.0, reduce="mean"),
        FalseNegatives(None, 6.0),
        FalseNegatives(64, 6.0),
    ):
        allowed = given["negative_mask"].expand(5, 40)
        found = reference.false_negatives_found(support, clean, options, allowed)
        leaf = q.clone().requires_grad_()
        call = {"temperature": 8.0, "reduction": "none", "return_stats": True, "backend": backend}
        columns = negatives(keys, given)
        got, stats = negmine.info_nce(leaf, pos, columns, false_negatives=options, support=support, **call)
        want, want_stats = negmine.info_nce(q, pos, Negatives(clean, mask=allowed & ~found), **call)
        compare.exact("loss", got.detach(), want)
        compare.exact("num_negatives", stats.num_negatives, want_stats.num_negatives)
        got.sum().backward()
        assert bool(leaf.grad.isfinite().all())


def test_a_nan_view_is_ignored(any_backend):
    device = device_of(any_backend)
    q, pos, keys = (unit(n, 8, device=device, seed=n) for n in (4, 4, 30))
    support = unit(4, 2, 8, device=device, seed=3)
    spoiled = torch.cat([support, torch.full_like(support[:, :1], torch.nan)], 1)
    for top_k in (3, None):
        options = FalseNegatives(top_k, 0.2)
        call = {"false_negatives": options, "reduction": "none", "backend": any_backend}
        want = negmine.info_nce(q, pos, keys, support=support, **call)
        compare.exact("max", negmine.info_nce(q, pos, keys, support=spoiled, **call), want)
        nothing = {**call, "false_negatives": FalseNegatives(top_k, 0.2, reduce="mean")}
        plain = negmine.info_nce(q, pos, keys, reduction="none", backend=any_backend)
        torch.testing.assert_close(negmine.info_nce(q, pos, keys, support=spoiled, **nothing), plain)


FROZEN = [
    {"select": Select(0, 0.5, sample=5)},
    {"mix": Mix(5, 4, 3, detach=False)},
    {"false_negatives": FalseNegatives(3, 0.1, mode="attract")},
    {"false_negatives": FalseNegatives(None, 0.1, mode="attract")},
]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("options", FROZEN, ids=lambda o: ",".join(o))
def test_the_queue_may_be_overwritten_before_backward(backend, options, own):
    device = device_of(backend)
    q, pos = unit(4, 8, device=device), unit(4, 8, device=device, seed=1)
    keys = unit(*((4, 30, 8) if own else (30, 8)), device=device, seed=2)
    support = {"support": unit(4, 2, 8, device=device, seed=3)} if "false_negatives" in options else {}
    grads = []
    for overwrite in (False, True):
        leaf, queue = q.clone().requires_grad_(), keys.clone()
        loss = negmine.info_nce(leaf, pos, queue, **options, **support, backend=backend)
        if overwrite:
            queue.fill_(torch.nan)
        loss.backward()
        grads.append(leaf.grad)
    compare.exact("d_query", *grads)


@pytest.mark.parametrize(
    "options", [*FROZEN, {"select": Select(2, 20, sample=9, replace=True)}], ids=lambda o: ",".join(o)
)
def test_a_query_alone_is_what_it_is_in_a_batch(backend, options):
    device = device_of(backend)
    q, pos, keys = (unit(n, 8, device=device, seed=n) for n in (4, 4, 30))
    q[3] = torch.nan  # must not affect other rows
    support = unit(4, 2, 8, device=device, seed=3)

    def rows(part, offset):
        leaf = q[part].clone().requires_grad_()
        more = {"support": support[part]} if "false_negatives" in options else {}
        loss = negmine.info_nce(
            leaf, pos[part], keys, **options, **more, row_offset=offset, reduction="none", backend=backend
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    together = rows(slice(0, 4), 0)
    assert bool(together[0][:3].isfinite().all())
    for b in range(3):
        for a, c in zip(rows(slice(b, b + 1), b), together, strict=True):
            compare.exact(f"row {b}", a[0], c[b])


def test_mixed_vectors_differentiate(backend):
    """mix_negatives(detach=False): the gradient of a linear function of the vectors, compared with the reference in float64."""
    device = device_of(backend)
    mix, key = Mix(6, 9, 5, detach=False), {"seed": 3, "step": 1, "row_offset": 8}
    inputs = unit(4, 12, device=device), unit(30, 12, device=device, seed=1)
    pull = torch.randn(4, 14, 12, device=device)

    def grads(cast, function):
        q, keys = (t.to(cast).requires_grad_() for t in inputs)
        return torch.autograd.grad((function(q, keys)[0] * pull).sum(), (q, keys))

    got = grads(torch.float32, lambda q, keys: negmine.mix_negatives(q, keys, mix, **key, backend=backend))
    plain, truth = (
        grads(cast, lambda q, keys: reference.mix_negatives(q, keys, mix, **key))
        for cast in (torch.float32, torch.float64)
    )
    for name, k, t, p in zip(("d_query", "d_keys"), got, truth, plain, strict=True):
        compare.rounded(name, k, t, p, 4.0)


def test_key_gradients_repeat_their_bits(backend):
    device = device_of(backend)
    q, pos, keys = unit(20, 8, device=device), unit(20, 8, device=device, seed=1), unit(50, 8, device=device, seed=2)
    for options in ({"select": Select(sample=30, replace=True)}, {"mix": Mix(20, 30, 10, detach=False)}):
        grads = []
        for _ in range(3):
            leaf = keys.clone().requires_grad_()
            negmine.info_nce(q, pos, leaf, **options, backend=backend).backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
