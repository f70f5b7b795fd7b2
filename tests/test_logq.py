"""The logQ correction, its frequency estimator and the guide recipe, against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import Negatives, recipes
from negmine.losses import FrequencyEstimator
from tests import compare
from tests.cases import unit

B, K, D, T = 6, 40, 8, 0.2


def inputs():
    query, positive, keys = (unit(n, D, seed=i) for i, n in enumerate((B, B, K)))
    generator = torch.Generator().manual_seed(4)
    q_pos, q_neg = (0.01 + 0.2 * torch.rand(n, generator=generator) for n in (B, K))
    return query, positive, keys, q_pos.log(), q_neg.log()


def scores(query, positive, keys):
    return (query.double() * positive.double()).sum(1) / T, query.double() @ keys.double().T / T


def test_log_q_is_subtracted():
    """Two public libraries add it instead, which doubles the bias against frequent items."""
    query, positive, keys, log_q_pos, log_q = inputs()
    x_pos, x = scores(query, positive, keys)
    right, wrong = (
        F.softplus((x + sign * log_q).logsumexp(1) - (x_pos + sign * log_q_pos.double())) for sign in (-1, 1)
    )
    loss = recipes.logq(temperature=T, reduction="none")
    ours = loss(query, positive, keys, positive_log_q=log_q_pos, log_q=log_q)
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)
    assert bool(((ours.double() - wrong).abs() > 0.1).any())
    scaled = loss(query, positive, keys, positive_log_q=log_q_pos + 3.0, log_q=log_q + 3.0)
    torch.testing.assert_close(scaled, ours, rtol=1e-5, atol=1e-6)


def test_the_corrected_form_takes_the_positive_for_no_sample():
    query, positive, keys, log_q_pos, log_q = inputs()
    leaf = query.clone().requires_grad_()
    loss = recipes.logq(temperature=T, reduction="none", corrected=True)
    ours = loss(leaf, positive, keys, positive_log_q=log_q_pos, log_q=log_q)
    x_pos, x = scores(query, positive, keys)
    # (B, K) probabilities given that the sample is not the positive.
    log_q_negative = log_q.double() - torch.log1p(-log_q_pos.double().exp())[:, None]
    p = x_pos.exp() / (x_pos.exp() + (x - log_q_negative).exp().mean(1))
    right = (1 - p) * ((x - log_q_negative).logsumexp(1) - x_pos)
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), leaf)
    # The gradient of a softmax whose partition sum is estimated by the positive and the mean over samples.
    leaf = query.double().requires_grad_()
    x_pos, x = (leaf * positive.double()).sum(1) / T, leaf @ keys.double().T / T
    columns = torch.cat([x_pos[:, None], x - log_q_negative - math.log(K)], 1)
    (want,) = torch.autograd.grad((columns.logsumexp(1) - x_pos).sum(), leaf)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("corrected", [False, True])
def test_in_batch_items_are_their_own_negatives(corrected):
    """One tensor may be positives and negatives. Negatives keep ids, mask and bias; a row's own item is left out."""
    query, positive, _, log_q, _ = inputs()
    loss = recipes.logq(temperature=T, reduction="none", corrected=corrected)
    items = torch.tensor([3, 3, 5, 7, 8, 9])
    got = loss(query, positive, None, positive_log_q=log_q, query_ids=items)
    listed = Negatives(positive, ids=items)
    torch.testing.assert_close(got, loss(query, positive, listed, positive_log_q=log_q, log_q=log_q, query_ids=items))
    biased = Negatives(None, bias=torch.ones(B))
    moved = loss(query, positive, biased, positive_log_q=log_q, log_q=log_q + 1.0, query_ids=items)
    torch.testing.assert_close(moved, got)


def test_gist_leaves_out_what_the_guide_scores_above_the_positive():
    query, positive, keys, *_ = inputs()
    guide = [t[:, :3].contiguous() for t in (query, positive, keys)]
    x_pos, x = scores(query, positive, keys)
    g_pos, g = (guide[0] * guide[1]).sum(1), guide[0] @ guide[2].T
    names = dict(zip(("guide_query", "guide_positive", "guide_keys"), guide, strict=True))
    for margin, relative in ((0.05, False), (0.2, True)):
        limit = g_pos - (g_pos.abs() * margin if relative else margin)
        kept = g <= limit[:, None]
        right = torch.where(kept.any(1), F.softplus(x.masked_fill(~kept, -torch.inf).logsumexp(1) - x_pos), 0.0)
        ours = recipes.gist(margin, relative=relative, temperature=T, reduction="none")(query, positive, keys, **names)
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)
    assert bool((g_pos < 0).any())  # then g_pos (1 - margin) would be above the positive


def test_frequencies_are_those_of_the_algorithm():
    """Arrays A and B of the paper's algorithm, item by item, also if an item occurs twice in a batch."""
    batches = [[4, 7], [4, 9], [7, 7, 4], [9, 4], [-1, 4], [5, 7]]
    estimator = FrequencyEstimator(1 << 16, alpha=0.3)
    last, interval = {}, {}
    for t, batch in enumerate(batches, 1):
        estimator.update(torch.tensor(batch))
        for item in set(batch) - {-1}:
            interval[item] = 0.7 * interval.get(item, 0.0) + 0.3 * (t - last.get(item, 0))
            last[item] = t
    items = sorted(interval)
    want = torch.tensor([-math.log(max(1.0, interval[item])) for item in items])
    torch.testing.assert_close(estimator.log_probability(torch.tensor(items)), want)
    assert float(estimator.log_probability(torch.tensor([-1]))) == 0.0


def test_frequencies_find_the_rate_of_a_stream():
    estimator = FrequencyEstimator(1 << 12, alpha=0.05, num_hashes=2)
    for step in range(2000):
        estimator(torch.tensor([1] * (step % 4 == 0) + [2] * (step % 20 == 0) + [3]))
    got = estimator.eval()(torch.tensor([1, 2, 3])).exp()
    torch.testing.assert_close(got, torch.tensor([0.25, 0.05, 1.0]), rtol=0.15, atol=0.0)
    again = FrequencyEstimator(1 << 12, alpha=0.05, num_hashes=2)
    again.load_state_dict(estimator.state_dict())
    compare.exact("state", again.eval()(torch.tensor([1, 2, 3])).exp(), got)
    assert int(again.step) == 2000  # evaluation does not count


def test_several_hashes_separate_items_of_one_bucket():
    rare, items = torch.tensor([12345]), torch.arange(64)
    crowded, spread = (FrequencyEstimator(128, alpha=0.05, num_hashes=n, seed=3) for n in (1, 4))
    for estimator in (crowded, spread):
        for step in range(400):
            estimator.update(torch.cat([items[step % 2 :: 2], rare[: step % 50 == 0]]))
    assert float(spread.log_probability(rare)) <= float(crowded.log_probability(rare))


def test_refusals():
    query, positive, keys, log_q_pos, log_q = inputs()
    loss = recipes.logq()
    with pytest.raises(ValueError, match="logq: log_q must be given, except for in-batch negatives, got None"):
        loss(query, positive, keys, positive_log_q=log_q_pos)
    with pytest.raises(ValueError, match=r"logq: positive_log_q must be a floating tensor of shape \(6,\), got"):
        loss(query, positive, keys, positive_log_q=log_q, log_q=log_q)
    with pytest.raises(ValueError, match=r"logq: negative_keys.bias must be a floating tensor of shape \(40,\)"):
        loss(query, positive, keys, positive_log_q=log_q_pos, log_q=log_q_pos)
    with pytest.raises(ValueError, match=r"gist: negative_keys.guide must be None, because gist creates it"):
        guided = Negatives(keys, guide=negmine.Guide(query, positive, keys))
        recipes.gist()(query, positive, guided, guide_query=query, guide_positive=positive, guide_keys=keys)
    with pytest.raises(ValueError, match=r"FrequencyEstimator: alpha must be a number in \(0, 1\], got 2.0"):
        FrequencyEstimator(8, alpha=2.0)
    with pytest.raises(
        ValueError, match=r"FrequencyEstimator: ids must be an integer tensor of shape \(n,\), got float32"
    ):
        FrequencyEstimator(8).update(torch.zeros(3))
