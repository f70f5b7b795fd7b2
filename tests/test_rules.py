"""Rules that hold for all ops, on every backend: independent rows, NaN, overwritten queues, strides, determinism."""

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import Mix, Negatives, Select, Weight, reference
from tests.cases import ids, negatives, unit, whole
from tests.conftest import device_of

B, K, D = 6, 90, 12
OPTIONS = [{}, {"select": Select(0.02, 0.4)}, {"mix": Mix(8, 6, 4)}, {"weight": Weight(1.0, 0.001)}]


def inputs(backend, seed=0):
    device = device_of(backend)
    return [unit(n, D, device=device, seed=seed + i) for i, n in enumerate((B, B, K))]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_overwriting_the_queue_before_backward_changes_nothing(any_backend, options):
    grads = []
    for overwrite in (False, True):
        q, pos, keys = inputs(any_backend)
        q.requires_grad_()
        loss = negmine.info_nce(q, pos, keys, **options, backend=any_backend)
        if overwrite:
            keys.copy_(torch.randn_like(keys))
        loss.backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_a_bad_query_row_stays_in_its_row(any_backend, options, bad):
    q, pos, keys = inputs(any_backend)

    def run(q):
        leaf = q.clone().requires_grad_()
        rows = negmine.info_nce(leaf, pos, keys, **options, reduction="none", backend=any_backend)
        rows.sum().backward()
        return rows.detach(), leaf.grad, negmine.mine_hardest(q, keys, 5, backend=any_backend)

    clean = run(q)
    spoiled_q = q.clone()
    spoiled_q[2, 3] = bad
    spoiled = run(spoiled_q)
    others = [b for b in range(B) if b != 2]
    assert torch.equal(clean[0][others], spoiled[0][others])
    assert torch.equal(clean[1][others], spoiled[1][others])
    assert torch.equal(clean[2].index[others], spoiled[2].index[others])
    if bad != bad:
        assert bool(spoiled[0][2].isnan())
        assert bool((spoiled[2].index[2] == -1).all())  # columns with NaN scores are no candidates


def test_masked_rows_may_hold_anything(any_backend):
    q, pos, keys = inputs(any_backend)
    keep = torch.ones(K, dtype=torch.bool, device=keys.device)
    keep[10:40] = False
    spoiled = keys.clone()
    spoiled[10:40] = float("nan")
    grads = []
    for queue, mask in ((torch.cat([keys[:10], keys[40:]]), None), (spoiled, keep)):
        leaf = q.clone().requires_grad_()
        for options in OPTIONS[:2]:
            negmine.info_nce(leaf, pos, Negatives(queue, mask=mask), **options, backend=any_backend).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_a_query_alone_gives_what_it_gives_in_a_batch(any_backend, options):
    q, pos, keys = inputs(any_backend)
    rows = negmine.info_nce(q, pos, keys, **options, reduction="none", seed=5, backend=any_backend)
    mined = negmine.mine_hardest(q, keys, 7, backend=any_backend)
    for b in range(B):
        alone = negmine.info_nce(
            q[b : b + 1], pos[b : b + 1], keys, **options, reduction="none", seed=5, row_offset=b, backend=any_backend
        )
        torch.testing.assert_close(alone[0], rows[b], rtol=2e-6, atol=2e-6)
        assert torch.equal(negmine.mine_hardest(q[b : b + 1], keys, 7, backend=any_backend).index[0], mined.index[b])


def test_the_same_inputs_give_the_same_bits(any_backend):
    q, pos, keys = inputs(any_backend)
    q.requires_grad_()
    results = []
    for _ in range(3):
        loss = negmine.info_nce(q, pos, keys, mix=Mix(8, 6, 4), seed=1, backend=any_backend)
        results.append((loss.detach(), torch.autograd.grad(loss, q)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_strided_inputs(any_backend):
    q, pos, keys = inputs(any_backend)
    wide = torch.cat([keys, keys.flip(0)], 1)  # rows of 2 D
    every_other = torch.stack([q, q + 1], 1).flatten(0, 1)[::2]
    cases = [(q, pos, wide[:, :D]), (every_other, pos, keys), (q.T.contiguous().T, pos, keys.T.contiguous().T)]
    want = negmine.info_nce(q, pos, keys, backend=any_backend)
    for a, b, c in cases:
        got = negmine.info_nce(a, b, c, backend=any_backend)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # in the reference, matmul may depend on the layout
        assert any_backend == "reference" or torch.equal(got, want)


def test_all_equal_and_duplicate_rows_rank_by_index(any_backend):
    device = device_of(any_backend)
    q, keys = whole(3, 4, device=device), torch.ones(50, 4, device=device)
    mined = negmine.mine_hardest(q, keys, 20, backend=any_backend)
    assert bool((mined.index == torch.arange(20, device=device)).all())
    window = negmine.mine_hardest(q, keys, 20, select=Select(5, 12), backend=any_backend)
    assert bool((window.index[:, :7] == torch.arange(5, 12, device=device)).all()) and bool(
        (window.index[:, 7:] == -1).all()
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, where Triton is interpreted
@pytest.mark.parametrize("options", [*OPTIONS[:2], {"decoupled": True}], ids=lambda o: ",".join(o) or "plain")
def test_a_negative_of_infinite_score_makes_the_loss_infinite(any_backend, options):
    q, pos, keys = inputs(any_backend)
    keys[70, 4] = torch.inf
    nearer = q[:, 4] > 0  # (B,); the scores of the other queries are -inf
    rows = negmine.info_nce(q, pos, keys, **options, reduction="none", backend=any_backend)
    if "select" in options:  # ranks from 2 % on, without the infinite score
        assert bool(rows.isfinite().all())
        return
    assert torch.equal(rows.isposinf(), nearer) and torch.equal(rows.isfinite(), ~nearer)
    assert torch.equal(negmine.logsumexp(q, keys, temperature=0.1, backend=any_backend).isposinf(), nearer)


def test_huge_norms_and_small_temperatures_stay_right(any_backend):
    """Regression: with a large common offset, a plain exponential overflows at T = 0.01."""
    q, pos, keys = inputs(any_backend)
    for norm, temperature in ((30.0, 0.01), (1.0, 0.01), (1e-3, 0.01)):
        leaf = (q * norm).requires_grad_()
        rows = negmine.info_nce(
            leaf, pos * norm, keys * norm, temperature=temperature, reduction="none", backend=any_backend
        )
        exact = (q * norm).double().requires_grad_()
        truth, _ = reference.info_nce(exact, (pos * norm).double(), (keys * norm).double(), temperature=temperature)
        torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-4)
        want = torch.autograd.grad(truth.sum(), exact)[0]
        got = torch.autograd.grad(rows.sum(), leaf)[0]
        assert bool(got.isfinite().all())
        if norm <= 1:
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_solved_query_keeps_its_small_gradient(any_backend, dtype):
    """Regression: if p is close to 1, computing 1 - p in the storage dtype loses the whole gradient."""
    device = device_of(any_backend)
    q = unit(1, 16, dtype=dtype, device=device)
    keys = -q.repeat(5, 1)
    leaf = q.clone().requires_grad_()
    negmine.info_nce(leaf, q, keys, temperature=0.15, backend=any_backend).backward()
    exact = q.double().requires_grad_()
    reference.info_nce(exact, q.double(), keys.double(), temperature=0.15)[0].mean().backward()
    assert float(exact.grad.abs().max()) < 1e-3
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0.02, atol=float(exact.grad.abs().max()) * 0.02)


def test_every_optional_argument_changes_the_result(any_backend):
    q, pos, keys = inputs(any_backend)
    base = negmine.info_nce(q, pos, keys, backend=any_backend)
    changes = [
        {"temperature": 0.1},
        {"select": Select(0, 0.3)},
        {"mix": Mix(8, 6, 4)},
        {"weight": Weight(1.0)},
        ids(B, K, q.device),
        {"negative_mask": torch.arange(K, device=q.device) % 2 == 0},
        {"decoupled": True},
        {"reduction": "sum"},
    ]
    for change in changes:
        options = {name: value for name, value in change.items() if name not in ("negative_ids", "negative_mask")}
        changed = negmine.info_nce(q, pos, negatives(keys, change), **options, backend=any_backend)
        assert not torch.equal(changed, base), change
    mixed = {"mix": Mix(8, 6, 4), "backend": any_backend}
    draws = [
        negmine.info_nce(q, pos, keys, **mixed, **key) for key in ({}, {"seed": 1}, {"step": 1}, {"row_offset": 1})
    ]
    assert len({float(d) for d in draws}) == 4


def test_only_tensors_that_require_grad_get_gradients(any_backend):
    q, pos, keys = inputs(any_backend)
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((q, pos, keys))]
        negmine.info_nce(*leaves, backend=any_backend).backward()
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == wanted)
    assert not negmine.info_nce(q, pos, keys, backend=any_backend).requires_grad


def test_double_backward_is_refused(backend):
    q, pos, keys = inputs(backend)
    q.requires_grad_()
    grad = torch.autograd.grad(negmine.info_nce(q, pos, keys, backend=backend), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_reductions_and_an_empty_batch(any_backend):
    q, pos, keys = inputs(any_backend)
    rows = negmine.info_nce(q, pos, keys, reduction="none", backend=any_backend)
    torch.testing.assert_close(negmine.info_nce(q, pos, keys, backend=any_backend), rows.mean())
    torch.testing.assert_close(negmine.info_nce(q, pos, keys, reduction="sum", backend=any_backend), rows.sum())
    assert negmine.info_nce(q[:0], pos[:0], keys, backend=any_backend) == 0
    assert negmine.info_nce(q, pos, keys[:0], backend=any_backend) == 0
    assert negmine.mine_hardest(q, keys[:0], 3, backend=any_backend).index.tolist() == [[-1] * 3] * B


def test_info_nce_mixes_what_mix_negatives_shows(any_backend):
    q, pos, keys = inputs(any_backend)
    mix, key = Mix(8, 6, 4), {"seed": 9, "step": 4}
    h = negmine.mix_negatives(q, keys, mix, **key, backend=any_backend).vectors
    own = torch.cat([keys.expand(B, K, D), h], 1)
    want = negmine.info_nce(q, pos, own, backend="reference")
    torch.testing.assert_close(
        negmine.info_nce(q, pos, keys, mix=mix, **key, backend=any_backend), want, rtol=1e-5, atol=1e-5
    )


def test_hcl_gradients_attract_easy_negatives(any_backend):
    """d log R / d x_j = (1 + beta) softmax((1 + beta) x)_j - beta softmax(beta x)_j, negative for easy ones."""
    q, pos, keys = inputs(any_backend)
    keys.requires_grad_()
    negmine.info_nce(q, pos, keys, temperature=0.2, weight=Weight(2.0), reduction="sum", backend=any_backend).backward()
    x = (q @ keys.detach().T) / 0.2
    share = 3 * F.softmax(3 * x, 1) - 2 * F.softmax(2 * x, 1)
    log_r = torch.tensor(float(K)).log() + (3 * x).logsumexp(1) - (2 * x).logsumexp(1)
    p = torch.sigmoid(log_r - (q * pos).sum(1) / 0.2)
    torch.testing.assert_close(keys.grad, (p[:, None] * share / 0.2).T @ q, rtol=1e-4, atol=1e-4)
