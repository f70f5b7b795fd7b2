"""Identities and limits of the published formulas, on every backend: options without effect, closed forms, extreme values."""

import math

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import Mix, Negatives, Select, Weight, reference
from tests import compare
from tests.cases import unit
from tests.conftest import device_of

B, K, D, T = 5, 70, 6, 0.2


@pytest.fixture
def vectors(any_backend):
    return [unit(n, D, seed=i, device=device_of(any_backend)) for i, n in enumerate((B, B, K))]


def rows_and_grads(vectors, backend, ids=None, mask=None, **options):
    leaves = [v.clone().requires_grad_() for v in vectors]
    columns = Negatives(leaves[2], ids=ids, mask=mask)
    rows = negmine.info_nce(
        *leaves[:2], columns, **{"temperature": T, "reduction": "none", "backend": backend} | options
    )
    return [rows.detach(), *torch.autograd.grad(rows.sum(), leaves)]


def truth_of(vectors, **options):
    return rows_and_grads([v.double() for v in vectors], "reference", **options)


NEUTRAL = [
    {"select": Select()},
    {"select": Select(0.0, 1.0)},
    {"select": Select(0, K)},
    {"select": Select(0, 2**40)},
    {"select": Select(min_score=-2.0, max_score=2.0)},
    {"select": Select(sample=K)},
    {"mix": Mix(9, 0, 0)},
    {"weight": Weight()},
    {"weight": Weight(detach=True)},
    {"mask": torch.ones(K, dtype=torch.bool)},
    {"query_ids": torch.arange(B), "ids": torch.arange(K) + B},
    {"query_ids": torch.full((B,), -1), "ids": torch.full((K,), -1)},  # unknown ids equal nothing
]


@pytest.mark.parametrize("options", NEUTRAL, ids=repr)
def test_an_option_that_keeps_everything_changes_nothing(any_backend, vectors, options):
    options = {n: v.to(vectors[0].device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    got, truth = rows_and_grads(vectors, any_backend, **options), truth_of(vectors)
    plain = rows_and_grads(vectors, "reference")
    for part, k, t, p in zip(("rows", "d_query", "d_positive", "d_keys"), got, truth, plain, strict=True):
        compare.rounded(part, k, t, p, condition=1 / T)


def test_positives_above_and_below_every_negative(any_backend, vectors):
    """The loss is close to 0; or the rank of the positive is K, and the loss is the difference of the logits."""
    q, _, keys = vectors
    for pos, rank in ((q, 0), (-q, K)):
        case = [q, pos, keys]
        _, stats = negmine.info_nce(*case, temperature=T, backend=any_backend, return_stats=True)
        assert stats.positive_rank.tolist() == [rank] * B
        got, truth, plain = rows_and_grads(case, any_backend), truth_of(case), rows_and_grads(case, "reference")
        for part, k, t, p in zip(("rows", "d_query", "d_positive", "d_keys"), got, truth, plain, strict=True):
            compare.rounded(part, k, t, p, condition=1 / T)


def test_the_hardest_alone_and_the_weight_that_goes_to_infinity(any_backend, vectors):
    """Select(0, 1) is the triplet form softplus((s_n - s_p) / T); HCL's R goes to N exp(max x)."""
    q, pos, keys = (v.double() for v in vectors)
    top, s_pos = (q @ keys.T).amax(1) / T, (q * pos).sum(1) / T
    call = {"temperature": T, "reduction": "none", "backend": any_backend}
    torch.testing.assert_close(
        negmine.info_nce(*vectors, select=Select(0, 1), **call).double(), F.softplus(top - s_pos), rtol=1e-5, atol=1e-6
    )
    sharp = negmine.info_nce(*vectors, weight=Weight(500.0), **call).double()
    torch.testing.assert_close(sharp, F.softplus(math.log(K) + top - s_pos), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weight", [Weight(0.0, 1e-3), Weight(1.0, 1e-3), Weight(2.0)], ids=repr)
def test_weights_are_finite_where_plain_exponentials_overflow(any_backend, vectors, weight):
    """At T = 0.01, exp(x) overflows fp32, so the sums must be computed as logarithms."""
    assert math.exp(1 / 0.01) > torch.finfo(torch.float32).max
    options = {"temperature": 0.01, "weight": weight}
    got, truth = rows_and_grads(vectors, any_backend, **options), truth_of(vectors, **options)
    plain = rows_and_grads(vectors, "reference", **options)
    for part, k, t, p in zip(("rows", "d_query", "d_positive", "d_keys"), got, truth, plain, strict=True):
        compare.rounded(part, k, t, p, condition=100.0 * (1 + weight.beta))


def test_mixes_have_their_closed_forms(any_backend, vectors):
    """The score of a pair needs s_a, s_b and n_a . n_b; that of a mix with the query s_b alone, and it is at least s_b."""
    q, _, keys = vectors
    mixed = negmine.mix_negatives(q, keys, Mix(12, 60, 40), backend=any_backend)
    got = torch.einsum("bd,bsd->bs", q.double(), mixed.vectors.double())
    s, c = q.double() @ keys.double().T, mixed.coefficients.double()
    a, b = mixed.parents.unbind(2)
    s_b = s.gather(1, b)
    s_a = torch.where(a < 0, 1.0, s.gather(1, a.clamp_min(0)))
    between = torch.where(a < 0, s_b, (keys.double()[a.clamp_min(0)] * keys.double()[b]).sum(2))
    straight = c * s_a + (1 - c) * s_b
    want = straight / (c**2 + (1 - c) ** 2 + 2 * c * (1 - c) * between).sqrt()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pairs = slice(0, 60)
    assert bool((a[:, pairs] >= 0).all() & (a[:, 60:] == -1).all())
    assert bool((got[:, 60:] >= s_b[:, 60:] - 1e-6).all())
    longer = straight[:, pairs] >= 0  # ||m|| <= 1, so normalizing a mix can only raise a positive score
    assert bool((got[:, pairs] >= straight[:, pairs] - 1e-6)[longer].all())


def test_a_mix_of_a_row_with_itself_is_the_row(any_backend, vectors):
    q, _, keys = vectors
    mixed = negmine.mix_negatives(q, keys, Mix(1, 9, 0, distinct=False), backend=any_backend)
    hardest = keys[negmine.mine_hardest(q, keys, 1, backend=any_backend).index]  # (B, 1, D)
    torch.testing.assert_close(mixed.vectors, hardest.expand(B, 9, D), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_opposite_parents_give_nothing_and_nothing_infinite(any_backend, detach):
    """With n_b = -n_a and a share of 1/2, or a negative opposite to the query, the mix is 0. Normalizing it must not give inf."""
    q = torch.eye(2, 4, device=device_of(any_backend))
    keys = torch.stack([q[0], -q[0]])  # query 0 and its opposite
    mix = Mix(2, 3, 3, pair_range=(0.5, 0.5), query_range=(0.5, 0.5), detach=detach)
    mixed = negmine.mix_negatives(q, keys, mix, backend=any_backend)
    assert not mixed.vectors[:, :3].any() and bool(mixed.vectors.isfinite().all())
    leaves = [v.clone().requires_grad_() for v in (q, keys)]
    loss = negmine.info_nce(leaves[0], q, leaves[1], mix=mix, temperature=T, reduction="none", backend=any_backend)
    truth, _ = reference.info_nce(q.double(), q.double(), keys.double(), temperature=T, mix=mix)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert bool(gradient.isfinite().all())


def test_a_loss_without_an_incoming_gradient_has_no_gradient(any_backend, vectors):
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    leaves = [v.clone().requires_grad_() for v in (*vectors, torch.tensor(T, device=vectors[0].device))]
    rows = negmine.info_nce(*leaves[:3], temperature=leaves[3], reduction="none", backend=any_backend)
    (Drop.apply(rows).sum() + sum(leaf.sum() for leaf in leaves)).backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.ones_like(leaf))
