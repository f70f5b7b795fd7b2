"""More misprints and traps of public code, as in tests/test_misprints.py: parents, triplets, sums and unknown labels."""

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import recipes
from tests.test_misprints import OUT, B, D, K, case_of, told_apart


@pytest.fixture
def case(any_backend):
    return case_of(any_backend)


def test_a_masked_row_is_no_parent(case):
    """A public top-N larger than the number of valid rows returns masked ones, scored -inf, and mixes them."""
    backend, q, _, keys, *_ = case
    keep = torch.arange(K, device=q.device) % 20 == 3  # 4 rows, where 30 are asked for
    mixed = negmine.mix_negatives(q, keys, negmine.Mix(30, 40, 20), negative_mask=keep, backend=backend)
    masked = q.double() @ keys.double().T
    wrong = masked.masked_fill(~keep, OUT).topk(30, dim=1).indices
    assert not bool(keep[wrong].all()) and bool(keep[mixed.parents[mixed.parents >= 0]].all())
    _, stats = negmine.info_nce(
        q, q, keys, mix=negmine.Mix(30, 40, 20), negative_mask=keep, backend=backend, return_stats=True
    )
    assert stats.num_negatives.tolist() == [4] * B


def test_facenets_semi_hard_has_no_band(case):
    """tensorflow/addons documents a margin that bounds the negative; its code takes the nearest beyond the positive."""
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
    band = negmine.mine_triplets(q, keys, labels, key_labels, positive="all", max_positives=1, negative="semihard_band",
                                 margin=0.01, distance="squared_euclidean", backend=backend)  # fmt: skip
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
    assert int(found.num_triplets) == B and int(band.num_triplets) < B, "the band keeps as many here"


def test_easy_positives_below_0_stay(case):
    """The public EPHN code marks "none" by -1 and drops what is at or below 0 with it."""
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
    """The public code takes the last candidates where the positive's score is exactly 0."""
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
    """VSE++ and SigLIP: VSE++ adds over the batch, SigLIP adds over columns and takes the mean over rows."""
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
    """The label queue starts at -1: such rows are negatives of every query, and of a query whose own label is -1 too."""
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
