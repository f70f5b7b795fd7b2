"""Misprints in papers and errors in public code, with a test for each: our result is that of the right formula.

`right` is the correct formula in float64, `wrong` the printed formula or that of the code. `told_apart` checks that our result
agrees with `right` and that `wrong` gives another result.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import FalseNegatives, Negatives, recipes, reference
from negmine.losses import methods, mine_triplets
from negmine.losses.mixgcf import mixgcf
from negmine.losses.synco import synco_vectors
from negmine.ops import philox
from negmine.recipes import Kinds
from tests.cases import unit
from tests.conftest import device_of

B, K, D = 6, 80, 6
OUT = -torch.inf


def told_apart(ours, right, wrong, least=1e-2):
    """Check that ours equals right within fp32 rounding, and that wrong differs by at least `least` of the largest entry."""
    ours, right, wrong = (x.detach().double().cpu() for x in (ours, right, wrong))
    torch.testing.assert_close(ours, right, rtol=2e-4, atol=2e-5)
    assert (wrong - right).abs().max() > least * right.abs().max(), "the wrong version is not wrong here"


def case_of(backend):
    """Return the backend, query, positive, keys, and in float64 the scores of positives (B,) and keys (B, K)."""
    q, pos, keys = (unit(n, D, seed=i, device=device_of(backend)) for i, n in enumerate((B, B, K)))
    pos = F.normalize(q + 0.6 * pos, dim=1)
    return backend, q, pos, keys, (q.double() * pos.double()).sum(1), q.double() @ keys.double().T


@pytest.fixture
def case(any_backend):
    return case_of(any_backend)


def rows_of(recipe, case, **given):
    backend, q, pos, keys, *_ = case
    options = recipe.at(0) | {"reduction": "none", "backend": backend}
    keys = Negatives(keys, mask=given.pop("mask", None))
    if isinstance(recipe, negmine.InfoNCELoss):
        return negmine.info_nce(q, pos, keys, **options, **given)
    return recipe.method(q, pos, keys, **options, **given)


def over(Ng, x_pos):
    return torch.log1p(Ng / x_pos.exp())


def test_debiased_floor_has_the_factor_N(case):
    """The figure in the HCL paper, and copies of it, clamp the sum at e^(-1/T); the right limit is N e^(-1/T)."""
    s_pos, s = case[4:]
    T, tau = 0.2, 0.1  # every row is clamped
    raw = ((s / T).exp().sum(1) - tau * K * (s_pos / T).exp()) / (1 - tau)
    right, wrong = (over(raw.clamp_min(floor * math.exp(-1 / T)), s_pos / T) for floor in (K, 1))
    told_apart(rows_of(recipes.debiased(tau, temperature=T), case), right, wrong)


def hcl_parts(case, beta, T):
    s_pos, s = (v / T for v in case[4:])
    importance = (beta * s).exp()
    return s_pos, s, (importance * s.exp()).sum(1) / importance.mean(1)


def test_hcl_subtracts_the_positive_once(case):
    """N tau pos is subtracted from the sum over negatives; inside the sum, it would be subtracted N times."""
    tau, beta = 1e-3, 1.0
    x_pos, _, R = hcl_parts(case, beta, 0.5)
    floor = K * math.exp(-2.0)
    right = over(((R - tau * K * x_pos.exp()) / (1 - tau)).clamp_min(floor), x_pos)
    wrong = over(((R - tau * K * K * x_pos.exp()) / (1 - tau)).clamp_min(floor), x_pos)
    told_apart(rows_of(recipes.hcl(beta, tau), case), right, wrong)


def test_hcl_weight_is_an_exponential_over_its_own_mean(case):
    """Printed: (beta neg) / mean(neg), a linear weight. The code has exp(beta x) / mean exp(beta x)."""
    x_pos, x, R = hcl_parts(case, 2.0, 0.5)
    printed = (2.0 * x.exp() / x.exp().mean(1, keepdim=True) * x.exp()).sum(1)
    told_apart(rows_of(recipes.hcl(2.0, 0.0), case), over(R, x_pos), over(printed, x_pos))


def test_hcl_beta_multiplies_the_logit(case):
    """In the code, beta multiplies s / T, not the cosine."""
    x_pos, x, R = hcl_parts(case, 1.0, 0.2)
    raw = (case[5]).exp()
    wrong = (raw * x.exp()).sum(1) / raw.mean(1)
    told_apart(rows_of(recipes.hcl(1.0, 0.0, temperature=0.2), case), over(R, x_pos), over(wrong, x_pos))


def test_hn_nce_is_hcl_without_a_prior(case):
    """DiHT's negatives, N e^(beta x) / sum e^(beta x), are HCL's R; without the factor N they are not."""
    x_pos, x, _ = hcl_parts(case, 0.5, 0.5)
    share = (0.5 * x).softmax(1)
    right, wrong = (over(n * (share * x.exp()).sum(1), x_pos) for n in (K, 1))
    told_apart(rows_of(recipes.hcl(0.5, 0.0), case), right, wrong)


def test_mochi_mixes_each_query_with_its_own_hard_set(case):
    """A public port omits the offset of the row, so that all queries mix the hardest negatives of query 0."""
    backend, q, _, keys, _, s = case
    mix = recipes.mochi(5, 40, 10).at(0)["mix"]
    mixed = negmine.mix_negatives(q, keys, mix, backend=backend)
    own = s.topk(5, dim=1).indices  # (B, 5)
    for b in range(B):
        parents = mixed.parents[b][mixed.parents[b] >= 0]
        assert torch.isin(parents, own[b]).all()
        assert b == 0 or not torch.isin(parents, own[0]).all()


def test_mochi_query_has_the_smaller_share(case):
    """m = c q + (1 - c) n with c below 0.5. A README swaps the two, so that the query dominates."""
    backend, q, _, keys, *_ = case
    mixed = negmine.mix_negatives(q, keys, negmine.Mix(5, 0, 200), backend=backend)
    n = keys[mixed.parents[:, :, 1]].double()  # (B, S, D)
    c = mixed.coefficients.double()[:, :, None]
    assert bool((c < 0.5).all()) and float(c.max()) > 0.45
    right, wrong = (F.normalize(a * q.double()[:, None] + (1 - a) * n, dim=2) for a in (c, 1 - c))
    told_apart(mixed.vectors, right, wrong)


def test_decoupled_is_one_log_sum_exp(case):
    """lightly adds one log-sum-exp for each half of the negatives; the paper has one over all negatives."""
    s_pos, s = (v / 0.1 for v in case[4:])
    right = s.logsumexp(1) - s_pos
    wrong = s[:, : K // 2].logsumexp(1) + s[:, K // 2 :].logsumexp(1) - s_pos
    told_apart(rows_of(recipes.decoupled(), case), right, wrong)


def test_info_nce_gradient_is_the_decoupled_one_times_one_less_p(case):
    backend, q, pos, keys, s_pos, s = case
    gradients = []
    for recipe in (recipes.moco_v2(), recipes.decoupled(0.2)):
        leaf = q.clone().requires_grad_()
        (g,) = torch.autograd.grad(rows_of(recipe, (backend, leaf, pos, keys)).sum(), leaf)
        gradients.append(g)
    p = torch.cat([s_pos[:, None], s], 1).div(0.2).softmax(1)[:, :1]  # (B, 1)
    told_apart(gradients[0], (1 - p) * gradients[1].double(), gradients[1])


def test_a_masked_column_weighs_nothing_at_a_small_temperature(case):
    """A public port masks by adding log(1e-45) = -103, which is not enough for the logits at T below 0.01."""
    s_pos, s = case[4:]
    keep = torch.ones_like(s, dtype=torch.bool).scatter(1, s.topk(K // 2, dim=1).indices, False)
    x = s / 0.005
    right = x.masked_fill(~keep, OUT).logsumexp(1) - s_pos / 0.005
    wrong = (x + (~keep) * math.log(1e-45)).logsumexp(1) - s_pos / 0.005
    ours = rows_of(recipes.decoupled(0.005), case, mask=keep)
    told_apart(ours, right, wrong, least=1e-4)


def detached_or_not(case, recipe, formula):
    """Return gradients with respect to the query: ours, that of the formula with detach, and that without."""
    backend, q, pos, keys, *_ = case
    found = []
    leaf = q.clone().requires_grad_()
    found.append(torch.autograd.grad(rows_of(recipe, (backend, leaf, pos, keys)).sum(), leaf)[0])
    for held in (lambda t: t.detach(), lambda t: t):
        leaf = q.double().requires_grad_()
        rows = formula((leaf * pos.double()).sum(1), leaf @ keys.double().T, held)
        found.append(torch.autograd.grad(rows.sum(), leaf)[0])
    return found


def test_decoupled_weights_carry_no_gradient(case):
    """A public port lets the gradient through w = 2 - B softmax(s_pos / sigma)."""

    def formula(s_pos, s, held):
        w = 2 - B * held(s_pos / 0.5).softmax(0)
        return (s / 0.1).logsumexp(1) - w * s_pos / 0.1

    told_apart(*detached_or_not(case, recipes.decoupled_weighted(), formula))


def test_decoupled_weights_are_of_the_batch(case):
    """The softmax is over the queries, not over the columns of a query, and is multiplied by B."""
    s_pos, s = case[4:]
    lse, x = (s / 0.1).logsumexp(1), s_pos / 0.1
    right = lse - (2 - B * (s_pos / 0.5).softmax(0)) * x
    told_apart(rows_of(recipes.decoupled_weighted(), case), right, lse - (2 - (s_pos / 0.5).softmax(0)) * x)


def test_hardness_is_added_without_gradient(case):
    def formula(s_pos, s, held):
        return F.softplus((s / 0.1 + 9.0 * held(s)).logsumexp(1) - s_pos / 0.1)

    told_apart(*detached_or_not(case, recipes.hardness_added(9.0, temperature=0.1), formula))


def test_hardness_is_not_divided_by_the_temperature(case):
    s_pos, s = case[4:]
    right, wrong = (F.softplus((s / 0.1 + a * s).logsumexp(1) - s_pos / 0.1) for a in (9.0, 9.0 / 0.1))
    told_apart(rows_of(recipes.hardness_added(9.0, temperature=0.1), case), right, wrong)


def test_dual_temperature_weight_carries_no_gradient(case):
    def formula(s_pos, s, held):
        near, far = (F.softplus((s / T).logsumexp(1) - s_pos / T) for T in (0.1, 1.0))
        return held((1 - (-far).exp()) / (1 - (-near).exp())) * near

    told_apart(*detached_or_not(case, recipes.dual_temperature(), formula))


def test_ifm_moves_scores_before_the_temperature(case):
    s_pos, s = case[4:]
    gap = s.div(0.2).logsumexp(1) - s_pos / 0.2
    right, wrong = ((F.softplus(gap) + F.softplus(gap + m)) / 2 for m in (2 * 0.1 / 0.2, 2 * 0.1))
    told_apart(rows_of(recipes.ifm(), case), right, wrong)


def test_rince_lambda_is_inside_the_power(case):
    s_pos, s = (v / 0.5 for v in case[4:])
    both = s_pos.exp() + s.exp().sum(1)
    right, wrong = (-(s_pos.exp() ** 0.5) / 0.5 + term / 0.5 for term in ((0.01 * both) ** 0.5, 0.01 * both**0.5))
    told_apart(rows_of(recipes.rince(), case), right, wrong)


def test_i_mix_has_the_batch_among_its_columns(case):
    backend, q, pos, keys, _, s = case
    share, partner = torch.full((B,), 0.7, device=q.device), torch.arange(B, device=q.device).roll(1)
    x = torch.cat([q.double() @ pos.double().T, s], 1) / 0.2  # (B, B + K)
    pull = 0.7 * x[range(B), range(B)] + 0.3 * x[range(B), partner.tolist()]
    ours = methods.i_mix(q, pos, keys, share=share, partner=partner, reduction="none", backend=backend)
    told_apart(ours, x.logsumexp(1) - pull, x[:, B:].logsumexp(1) - pull)


def test_un_mix_pairs_the_mirrored_mix_with_the_key(case):
    """The term of 1 - share has the mixed queries in reverse order; otherwise both terms would attract to the same key."""
    backend, q, pos, keys, s_pos, s = case
    mixed = F.normalize(q + 0.5 * q.flip(0), dim=1)
    m_pos, m = (mixed.double() * pos.double()).sum(1), mixed.double() @ keys.double().T
    r_pos = (mixed.flip(0).double() * pos.double()).sum(1)
    plain, own, mirrored = (
        over((n / 0.2).exp().sum(1), p / 0.2) for p, n in ((s_pos, s), (m_pos, m), (r_pos, m.flip(0)))
    )
    ours = methods.un_mix(q, pos, keys, mixed_query=mixed, share=0.3, reduction="none", backend=backend)
    told_apart(ours, plain + 0.3 * own + 0.7 * mirrored, plain + own)


@pytest.mark.parametrize("wrong", ["the loss's temperature", "not divided by the norm", "the sum over the batch"])
def test_adco_updates_its_memory_at_a_temperature_of_its_own(case, wrong):
    """The public update of the memory, which is normalized on use, has temperature mem_t, not moco_t, and a batch mean."""
    backend, q, pos, keys, s_pos, s = case
    memory = (3.0 * keys).requires_grad_()
    options = {"temperature": 0.5, "memory_temperature": 0.1, "backend": backend}
    methods.adco(q, pos, F.normalize(memory, dim=1), **options).backward()

    def update(T):
        p = torch.cat([s_pos[:, None], s], 1).div(T).softmax(1)[:, 1:]  # (B, K)
        return (p.T @ q.double() / B - (p * s).mean(0)[:, None] * keys.double()) / 3.0 / T

    wrongs = {"the loss's temperature": update(0.5), "not divided by the norm": 3 * update(0.1)}
    told_apart(memory.grad, update(0.1), wrongs.get(wrong, B * update(0.1)))


def test_mixgcf_mixes_a_layer_with_one_share(case):
    """With a different share for each candidate, the hardest mix would mostly be that of the largest share."""
    backend, q, pos, keys, s_pos, s = case
    a = philox.unit(philox.words(torch.arange(B), torch.arange(K), philox.STREAM_PARTNER, 0, 0)[0], None).double()
    right, wrong = (over((c.to(s) * s_pos[:, None] + (1 - c.to(s)) * s).amax(1).exp(), s_pos) for c in (a[:, :1], a))
    told_apart(mixgcf(q, pos, keys, candidates=4000, reduction="none", backend=backend), right, wrong)


def test_siglip_bias_has_the_sign_of_the_code(case):
    """Printed: 1 / (1 + exp(z (-t s + b))), whose logit is t s - b. The code has t s + b."""
    backend, q, pos, keys, s_pos, s = case
    right, wrong = ((-(10 * s_pos + b)).exp().log1p() + (10 * s + b).exp().log1p().sum(1) for b in (-5.0, 5.0))
    told_apart(negmine.siglip(q, pos, keys, bias=-5.0, reduction="none", backend=backend), right, wrong)


def test_perc_pos_of_a_negative_positive(case):
    """If s_pos is negative, p s_pos is greater than s_pos, so that negatives harder than the positive would stay."""
    backend, q, pos, keys, s_pos, s = case
    far = (backend, q, -pos, keys, -s_pos, s)
    assert bool((far[4] < 0).all())
    x = s / 0.02
    right, wrong = (
        F.softplus(x.masked_fill(s > limit[:, None], OUT).logsumexp(1) - far[4] / 0.02).nan_to_num(nan=0.0)
        for limit in (far[4] - far[4].abs() * 0.2, 0.8 * far[4])
    )
    told_apart(rows_of(recipes.perc_pos(0.8), far), right, wrong)


def test_cancelled_negatives_are_never_masked_ones(case):
    """If top_k exceeds the number of candidates, a masked column could become a false negative and attract the query."""
    backend, q, pos, keys, *_ = case
    if backend not in ("reference", "cpu"):
        pytest.skip(f"{backend}: the search for false negatives is the same code")
    keep = torch.zeros(K, dtype=torch.bool, device=q.device)
    keep[:4] = True
    options = {"support": pos[:, None], "temperature": 0.1, "reduction": "none", "backend": backend}
    attract = FalseNegatives(10, None, mode="attract")
    got = negmine.info_nce(q, pos, Negatives(keys, mask=keep), false_negatives=attract, **options)
    only = negmine.info_nce(q, pos, keys[:4], false_negatives=attract, **options)
    torch.testing.assert_close(got, only)


def test_synco_switches_are_not_crossed(case):
    """In the public code, n4 = 0 switches off kind 5, and n5 = 0 switches off kind 4."""
    _, q, _, keys, *_ = case
    index = reference.mine_hardest(q, keys, 20)[1]
    graded = synco_vectors(q, keys, index, Kinds(20, 0, 0, 0, 0, 9, 0, delta=0.5), (0, 0, 0))
    noised = synco_vectors(q, keys, index, Kinds(20, 0, 0, 0, 9, 0, 0, sigma=0.5), (0, 0, 0))
    source = keys[index]  # (B, 20, D)

    def along_query(h):
        """The smallest component of h outside of the plane of q and a possible source, over all sources."""
        n = F.normalize(source + 0.5 * q[:, None], dim=2)  # (B, 20, D)
        return torch.einsum("bsd,bkd->bsk", h, n).amax(2)

    assert bool((along_query(graded) > 1 - 1e-5).all()) and not bool((along_query(noised) > 1 - 1e-5).any())


def test_synco_steps_along_the_gradient(case):
    """A version of the public code steps along noise of 1e-5 instead of the gradient, so the negatives hardly change."""
    _, q, _, keys, *_ = case
    index = reference.mine_hardest(q, keys, 1)[1]
    n, delta, epsilon = keys[index[:, 0]].double(), 0.01, 1e-5
    noise = torch.randn(B, D, dtype=torch.float64, device=q.device) * epsilon
    slope = (2 * (q.double() * noise).sum(1) / (2 * epsilon))[:, None]
    right = F.normalize(n + delta * q.double(), dim=1)
    wrong = F.normalize(n + delta * slope * noise, dim=1)
    ours = synco_vectors(q, keys, index, Kinds(1, 0, 0, 0, 0, 1, 0), (0, 0, 0))[:, 0]
    told_apart(ours, right, wrong, least=1e-3)
    assert (wrong - n).abs().max() < 1e-6


def test_the_queue_starts_with_unit_rows():
    """The public queue of SynCo is (K, D) and normalized over K, so the initial norm of its rows is sqrt(D / K)."""
    queue = negmine.MoCoQueue(dim=16, K=4096)
    wrong = F.normalize(torch.randn(4096, 16), dim=0).norm(dim=1)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(4096))
    assert wrong.mean() < 0.1


def test_the_ring_is_of_the_queue_not_of_the_batch(case):
    """A public implementation uses the batch size as the size of the bank; and it sorts over the batch, not for each query."""
    s_pos, s = (v / 0.07 for v in case[4:])
    inside = s.sort(1, descending=True).values
    right, wrong = (F.softplus(inside[:, int(0.05 * n) : int(0.5 * n)].logsumexp(1) - s_pos) for n in (K, B))
    told_apart(rows_of(recipes.ring(0.5, 0.1), case), right, wrong)


def test_sup_con_takes_the_maximum_over_its_own_columns(case):
    """If the maximum of a row includes the sample itself, all other exponentials are 0 at a small temperature."""
    backend, _, _, keys, *_ = case
    vectors, T = keys[:12], 0.002
    labels, ids = torch.arange(12, device=keys.device) // 2, torch.arange(12, device=keys.device)
    call = {"query_ids": ids, "key_ids": ids, "temperature": T, "reduction": "none", "backend": backend}
    ours = negmine.sup_con(vectors, vectors, labels, labels, **call)
    x = vectors.double() @ vectors.double().T / T
    right = x.masked_fill(ids[:, None] == ids, OUT).logsumexp(1) - x[ids, ids ^ 1]
    shifted = (x - x.amax(1, keepdim=True)).float().exp() * (ids[:, None] != ids)
    wrong = shifted.sum(1).log().double() + x.amax(1) - x[ids, ids ^ 1]
    torch.testing.assert_close(ours.double(), right, rtol=2e-4, atol=1e-3)
    assert bool(wrong.isinf().any())


def test_a_masked_row_is_no_parent(case):
    """If N exceeds the number of valid rows, a public top-N returns masked rows with score -inf, and mixes them."""
    backend, q, _, keys, *_ = case
    keep = torch.arange(K, device=q.device) % 20 == 3  # 4 rows, where 30 are asked for
    mix, columns = negmine.Mix(30, 40, 20), Negatives(keys, mask=keep)
    mixed = negmine.mix_negatives(q, columns, mix, backend=backend)
    masked = q.double() @ keys.double().T
    wrong = masked.masked_fill(~keep, OUT).topk(30, dim=1).indices
    assert not bool(keep[wrong].all()) and bool(keep[mixed.parents[mixed.parents >= 0]].all())
    _, stats = negmine.info_nce(q, q, columns, mix=mix, backend=backend, return_stats=True)
    assert stats.num_negatives.tolist() == [4] * B


def test_facenets_semi_hard_has_no_band(case):
    """tensorflow/addons documents that the margin bounds the negative; its code takes the nearest one beyond the positive."""
    backend, q, _, keys, *_ = case
    labels, key_labels = torch.arange(B, device=q.device), torch.full((K,), 99, device=q.device)
    keys = torch.cat([q, -q[:, [1, 0, *range(2, D)]], keys[:2]])  # the positive at distance 0, negatives well apart
    key_labels = torch.cat([labels, key_labels[: B + 2]])
    loss, found = negmine.triplet_loss(
        q, keys, labels, key_labels, positive="all", max_positives=1, negative="semihard_facenet", margin=0.01,
        distance="squared_euclidean", backend=backend, return_stats=True,
    )  # fmt: skip
    s = (q.double() @ keys.double().T).masked_fill(labels[:, None] == key_labels, OUT)
    right = (0.01 - (2 - 2 * s.amax(1))).clamp_min(0).mean()
    band = mine_triplets(
        q, keys, labels, key_labels, positive="all", max_positives=1, negative="semihard_band", margin=0.01,
        distance="squared_euclidean", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
    assert int(found.num_triplets) == B and int(band.num_triplets) < B, "the band keeps as many here"


def test_easy_positives_below_0_stay(case):
    """The public EPHN code marks missing ones by -1, and drops all scores at or below 0."""
    backend, q, *_ = case
    labels, key_labels = torch.zeros(B, dtype=torch.int64, device=q.device), torch.tensor([0, 1, 1], device=q.device)
    far = F.normalize(-q.sum(0), dim=0)
    keys = torch.stack([far, F.normalize(far + 0.1 * q[0], dim=0), -far])
    s = q.double() @ keys.double().T
    s_p, s_n = s[:, 0], s[:, 1:].amax(1)
    rows = F.softplus((s_n - s_p) / 0.1)
    kept = (s_p > 0) & (s_n > 0)
    assert 0 < int(kept.sum()) < B or not bool(kept.any())
    ours = recipes.ephn(backend=backend)(q, keys, labels, key_labels)
    wrong = rows[kept].mean() if bool(kept.any()) else torch.zeros(()).double()
    told_apart(ours[None], rows.mean()[None], wrong[None])


def test_simans_of_a_positive_at_0_draws_as_any_other(case):
    """If the score of the positive is exactly 0, the public code takes the last candidates."""
    backend, _, _, keys, *_ = case
    q = torch.zeros(B, D, device=keys.device)
    q[:, 0] = 1.0
    pos = torch.zeros_like(q)
    pos[:, 1] = 1.0
    loss = recipes.simans(3, candidates=70, a=2e4, backend=backend)
    index = loss.sample(q, pos, keys, step=0)
    s = keys[:, 0].double()
    candidates = s.argsort(descending=True)[:70]
    near = candidates[s[candidates].abs().argsort()[:12]]
    last = candidates[-3:]
    assert bool(torch.isin(index, near).all()) and not bool(torch.isin(last, near).all())


def test_the_sum_over_pairs_is_a_sum(case):
    """VSE++ adds over the batch; SigLIP adds over columns and takes the mean over rows."""
    backend, q, pos, keys, s_pos, s = case
    both = q.double() @ pos.double().T
    off = both.masked_fill(torch.eye(B, dtype=torch.bool, device=q.device), OUT)
    parts = [(0.5 + off.amax(d) - s_pos).clamp_min(0) for d in (0, 1)]
    told_apart(recipes.vse_plus_plus(0.5, backend=backend)(q, pos)[None], sum(p.sum() for p in parts)[None],
               sum(p.mean() for p in parts)[None])  # fmt: skip
    rows = F.softplus(-(10 * s_pos - 5)) + F.softplus(10 * s - 5).sum(1)
    mean = F.softplus(-(10 * s_pos - 5)) + F.softplus(10 * s - 5).mean(1)
    told_apart(negmine.siglip(q, pos, keys, bias=-5.0, backend=backend)[None], rows.mean()[None], mean.mean()[None])


def test_unknown_labels_are_not_one_class(case):
    """The label queue starts with -1. Such rows are negatives of all queries, also of queries whose label is -1."""
    backend, q, _, keys, _, s = case
    labels = torch.tensor([0, 0, 1, 1, -1, -1], device=q.device)
    key_labels = torch.where(torch.arange(K, device=q.device) % 4 == 0, torch.arange(K, device=q.device) // 4 % 2, -1)
    x = s / 0.2
    rows = []
    for known in (True, False):
        same = (labels[:, None] == key_labels) & ((labels >= 0)[:, None] | (not known))
        mean = (x * same).sum(1) / same.sum(1).clamp_min(1)
        rows.append(torch.where(same.any(1), x.logsumexp(1) - mean, 0.0))
    ours = negmine.sup_con(q, keys, labels, key_labels, temperature=0.2, reduction="none", backend=backend)
    told_apart(ours, *rows)
