"""mine_triplets: the reference compared with loops for every rule, every backend with the reference, ties and NaN."""

import math
import re

import pytest
import torch

from negmine import reference
from negmine.losses import distance_weighted, mine_triplets
from negmine.ops import philox
from tests import compare
from tests.cases import DTYPES, shapes_for, unit, whole
from tests.conftest import device_of, interpreted, skip_what_the_interpreter_repeats

P, N = 3, 4
RULES = [
    {"positive": "easy", "negative": "hardest"},
    {"positive": "easy", "negative": "semihard"},
    {"positive": "hard", "negative": "hardest", "num_negatives": N},
    {"positive": "hard", "negative": "easiest"},
    {"positive": "hard", "negative": "semihard_band", "margin": 2.0, "num_negatives": N},
    {"positive": "hard", "negative": "violating", "margin": 0.0, "num_negatives": N},
    {"positive": "semihard", "negative": "hardest"},
    {"positive": "semihard", "negative": "easiest"},
    {"positive": "all", "max_positives": P, "negative": "semihard_facenet"},
    {"positive": "all", "max_positives": P, "negative": "semihard_facenet", "num_negatives": N},
    {"positive": "all", "max_positives": P, "negative": "semihard_band", "margin": 3.0, "num_negatives": N},
    {"positive": "all", "max_positives": P, "negative": "violating", "margin": 1.0, "num_negatives": N},
    {
        "positive": "multi_similarity",
        "negative": "multi_similarity",
        "margin": 1.0,
        "max_positives": P,
        "num_negatives": N,
    },
]
RULE_NAMES = ["-".join(f"{v}" for v in rule.values()) for rule in RULES]


def labels(B, K, device="cpu", seed=0):
    """Labels of queries and keys, some unknown. Query 0 has no positive, and with a small K some queries have no negative."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-1, 4, (B,), generator=generator)
    q[:1] = 9
    return q.to(device), torch.randint(-1, 4, (K,), generator=generator).to(device)


def masks_of(B, K, device, seed):
    generator = torch.Generator().manual_seed(seed + 50)
    ids = torch.randint(0, 5, (B,), generator=generator), torch.randint(0, 5, (K,), generator=generator)
    columns, pairs = torch.rand(K, generator=generator) < 0.8, torch.rand(B, K, generator=generator) < 0.8
    return [
        {},
        {"query_ids": ids[0].to(device), "key_ids": ids[1].to(device), "key_mask": columns.to(device)},
        {"key_mask": pairs.to(device)},
    ]


def distance(s, kind):
    return {"cosine": -s, "euclidean": math.sqrt(max(0.0, 2 - 2 * s)), "squared_euclidean": 2 - 2 * s}[kind]


def by_loops(scores, same, other, rule, kind="cosine"):
    """The docstring of mine_triplets as loops over pairs, for one row: the set of (p, n), and their order."""
    margin, found = rule.get("margin", 0.2), []
    pos = sorted((k for k in range(len(scores)) if same[k]), key=lambda k: (-scores[k], k))
    neg = sorted((k for k in range(len(scores)) if other[k]), key=lambda k: (-scores[k], k))
    far = lambda ks: sorted(ks, key=lambda k: (scores[k], k))  # noqa: E731
    d = {k: distance(scores[k], kind) for k in pos + neg}
    if not pos or not neg:
        return []
    choice, count, width = rule["positive"], rule.get("max_positives", 1), rule.get("num_negatives", 1)
    if choice == "hard":
        pos_kept = far(pos)[:1]
    elif choice == "semihard":
        rival = neg[0] if rule["negative"] == "hardest" else far(neg)[0]
        pos_kept = far([p for p in pos if d[p] < d[rival]])[:1]
    elif choice == "multi_similarity":
        pos_kept = far([p for p in pos if d[p] + margin > min(d[n] for n in neg)])[:count]
    else:
        pos_kept = pos[:count]
    for p in pos_kept:
        kept = {
            "hardest": lambda p: neg,
            "easiest": lambda p: far(neg),
            "semihard": lambda p: [n for n in neg if d[n] > d[p]],
            "semihard_facenet": lambda p: [n for n in neg if d[n] > d[p]] or far(neg)[:1],
            "semihard_band": lambda p: [n for n in neg if 0 < d[n] - d[p] <= margin],
            "violating": lambda p: [n for n in neg if d[n] - d[p] <= margin],
            "multi_similarity": lambda p: [n for n in neg if d[n] - margin < max(d[p] for p in pos)],
        }[rule["negative"]](p)
        found += [(p, n) for n in kept[:width]]
    return found


def dense_pools(B, K, both, masks):
    """same and other (B, K), computed for each pair."""
    same, other = torch.zeros(B, K, dtype=torch.bool), torch.zeros(B, K, dtype=torch.bool)
    for b in range(B):
        for k in range(K):
            mask = masks.get("key_mask")
            usable = mask is None or bool(mask[k] if mask.dim() == 1 else mask[b, k])
            usable = usable and ("key_ids" not in masks or bool(masks["query_ids"][b] != masks["key_ids"][k]))
            equal = bool(both[0][b] == both[1][k]) and int(both[0][b]) >= 0
            same[b, k], other[b, k] = usable and equal, usable and not equal
    return same, other


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_the_reference_is_the_loop(rule):
    """Small integers in float64: distances, ties and margins are exact."""
    total = 0
    for seed, (B, K, D) in enumerate([(1, 1, 1), (0, 4, 3), (5, 9, 2), (40, 12, 3), (3, 0, 2)]):
        q, keys = whole(B, D, dtype=torch.float64, seed=seed), whole(K, D, dtype=torch.float64, seed=seed + 1)
        both = labels(B, K, seed=seed)
        for masks in masks_of(B, K, "cpu", seed):
            got = mine_triplets(q, keys, *both, **rule, **masks, backend="reference")
            same, other = dense_pools(B, K, both, masks)
            want = [by_loops((q[b] @ keys.T).tolist(), same[b], other[b], rule) for b in range(B)]
            anchor, p, n = (t.tolist() for t in got.compact())
            assert list(zip(anchor, p, n, strict=True)) == [(b, *pair) for b in range(B) for pair in want[b]]
            assert int(got.num_triplets) == sum(map(len, want))
            assert int(got.num_without) == sum(not found for found in want)
            assert bool((got.positive_score.isneginf() == (got.positive < 0)).all())
            assert bool((got.negative_score.isneginf() == (got.negative < 0)).all())
            for b, a_p, a_n in zip(anchor, p, n, strict=True):
                at = (got.negative[b] == a_n).nonzero()[0]
                assert float(got.negative_score[b, *at]) == float(q[b] @ keys[a_n])
                assert float(got.positive_score[b][got.positive[b] == a_p][0]) == float(q[b] @ keys[a_p])
            total += len(anchor)
    assert total > 5


def of_any_norm(count, D, dtype, seed):
    """Vectors with norms from 0.5 to 4, so that the largest inner product is rarely the smallest distance."""
    return (unit(count, D, dtype=torch.float64, seed=seed) * torch.linspace(0.5, 4, count)[:, None]).to(dtype)


@pytest.mark.parametrize("norm", ["unit", "any norm"])
@pytest.mark.parametrize("kind", ["euclidean", "squared_euclidean"])
@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_euclidean_distances(rule, kind, norm):
    rule = {**rule, "margin": 0.3}
    make = of_any_norm if norm == "any norm" else lambda count, D, dtype, seed: unit(count, D, dtype=dtype, seed=seed)
    q, keys = make(12, 4, torch.float64, 0), make(40, 4, torch.float64, 1)
    both = labels(12, 40)
    got = mine_triplets(q, keys, *both, **rule, distance=kind)
    same, other = dense_pools(12, 40, both, {})
    scores = 1 - torch.cdist(q, keys).square() / 2  # the inner products of unit vectors
    want = [(b, *pair) for b in range(12) for pair in by_loops(scores[b].tolist(), same[b], other[b], rule, kind)]
    assert list(zip(*(t.tolist() for t in got.compact()), strict=True)) == want
    found = got.negative >= 0
    b = torch.arange(12)[:, None, None].expand_as(found)
    torch.testing.assert_close(got.negative_score[found].double(), scores[b[found], got.negative[found]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_are_exact_on_integers_by_distance(backend, dtype):
    """With 16-bit vectors, norms are fp32, because 16 bits are not enough for squared norms up to 1,000."""
    device = device_of(backend)
    for seed, rule in enumerate((RULES[4], RULES[8], RULES[10], RULES[12])[: 1 if interpreted(backend) else 4]):
        q, keys = (16 * whole(n, 5, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((6, 50)))
        both, rule = labels(6, 50, device), {**rule, "distance": "squared_euclidean", "margin": 600.0}
        got = mine_triplets(q + 1, keys + 1, *both, **rule, backend=backend)
        want = mine_triplets(q.float() + 1, keys.float() + 1, *both, **rule, backend="reference")
        for name, k, t in zip(got._fields, got, want, strict=True):
            compare.exact(name, k, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_backends_are_exact_on_integers(backend, rule, dtype):
    skip_what_the_interpreter_repeats(backend, dtype)
    device = device_of(backend)
    shapes = (
        shapes_for(backend)[:4] if interpreted(backend) else [s for s in shapes_for(backend) if s[0] * s[1] < 10**5]
    )
    for seed, (B, K, D, _) in enumerate(shapes):
        q, keys = (whole(n, D, dtype=dtype, device=device, seed=seed + i) for i, n in enumerate((B, K)))
        both = labels(B, K, device, seed)
        for masks in masks_of(B, K, device, seed)[:: 2 if interpreted(backend) else 1]:
            got = mine_triplets(q, keys, *both, **rule, **masks, backend=backend)
            want = mine_triplets(q.float(), keys.float(), *both, **rule, **masks, backend="reference")
            for name, k, t in zip(got._fields, got, want, strict=True):
                compare.exact(f"{name} {B, K, D}", k, t)


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_backends_agree_on_unit_vectors(any_backend, rule):
    """With real scores, selected columns obey the rule for the true scores, up to rounding, and their scores are right."""
    device = device_of(any_backend)
    rule = {**rule, "margin": 0.2}
    q, keys = unit(6, 8, device=device), unit(60, 8, device=device, seed=1)
    both = labels(6, 60, device)
    got = mine_triplets(q, keys, *both, **rule, backend=any_backend)
    want = mine_triplets(q.double(), keys.double(), *both, **rule)
    assert torch.equal(got.negative < 0, want.negative < 0)
    for name in ("positive_score", "negative_score"):
        finite = getattr(want, name).isfinite()
        error = (getattr(got, name)[finite] - getattr(want, name)[finite]).abs()
        assert bool((error <= 1e-6).all()), name


def test_anchors_that_are_keys_leave_themselves_out(any_backend):
    device = device_of(any_backend)
    views, classes, own = (
        unit(12, 8, device=device),
        torch.arange(12, device=device) % 3,
        torch.arange(12, device=device),
    )
    got = mine_triplets(views, views, classes, classes, query_ids=own, key_ids=own, backend=any_backend)
    alone = mine_triplets(views, views, classes, classes, backend=any_backend)
    assert bool((alone.positive[:, 0] == own).all())  # without ids the nearest positive is the sample itself
    anchor, p, n = got.compact()
    assert len(anchor) and bool((anchor != p).all())
    assert bool((classes[anchor] == classes[p]).all()) and bool((classes[anchor] != classes[n]).all())


def test_a_row_alone_is_the_row_in_a_batch(backend):
    device = device_of(backend)
    q, keys = unit(5, 8, device=device), unit(40, 8, device=device, seed=1)
    both = labels(5, 40, device)
    rule = RULES[9]
    whole_batch = mine_triplets(q, keys, *both, **rule, backend=backend)
    for b in range(5):
        row = mine_triplets(q[b : b + 1], keys, both[0][b : b + 1], both[1], **rule, backend=backend)
        assert torch.equal(row.negative[0], whole_batch.negative[b])
        if not interpreted(backend):  # in the interpreter, NumPy's product depends on the shape of its operands
            assert torch.equal(row.negative_score[0], whole_batch.negative_score[b])


@pytest.mark.parametrize("rule", [RULES[1], RULES[8]], ids=["one positive", "several"])
def test_a_copy_of_the_positive_is_not_farther(backend, rule):
    """The bound is a score from another pass over the keys, which must be bit-identical."""
    if interpreted(backend):
        pytest.skip("triton: interpreted, where a score's last bit depends on the batch around it")
    device = device_of(backend)
    for D in (7, 64, 130):
        q, keys = unit(50, D, device=device, seed=D), unit(80, D, device=device, seed=D + 1)
        keys = torch.cat([keys, keys])  # every key twice, once with class 0 and once with class 1
        classes = torch.arange(80, device=device) % 2
        both = torch.zeros(50, dtype=torch.long, device=device), torch.cat([classes, 1 - classes])
        got = mine_triplets(q, keys, *both, **rule, backend=backend)
        assert bool((got.negative_score < got.positive_score[:, :, None]).all())
        assert int(got.num_triplets) == 50 * rule.get("max_positives", 1)


def test_nan_is_no_candidate_and_stays_in_its_row(any_backend):
    device = device_of(any_backend)
    q, keys = unit(4, 8, device=device), unit(30, 8, device=device, seed=1)
    both = torch.zeros(4, dtype=torch.long, device=device), torch.arange(30, device=device) % 2
    clean = mine_triplets(q, keys, *both, positive="hard", negative="hardest", backend=any_backend)
    spoiled_q, spoiled_keys = q.clone(), keys.clone()
    spoiled_q[1, 3] = torch.nan
    spoiled_keys[clean.negative[0, 0, 0]] = torch.nan
    got = mine_triplets(spoiled_q, spoiled_keys, *both, positive="hard", negative="hardest", backend=any_backend)
    assert int(got.num_without) == 1 and int(got.positive[1, 0]) == -1
    assert int(got.negative[0, 0, 0]) not in (-1, int(clean.negative[0, 0, 0]))
    assert torch.equal(got.positive[[0, 2, 3]], clean.positive[[0, 2, 3]])


def test_pairs_are_those_of_the_triplets():
    q, keys = whole(6, 3), whole(30, 3, seed=1)
    got = mine_triplets(q, keys, *labels(6, 30), **RULES[-1])
    a, p, n = got.compact()
    a1, p1, a2, n2 = got.pairs()
    assert set(zip(a1.tolist(), p1.tolist(), strict=True)) == set(zip(a.tolist(), p.tolist(), strict=True))
    assert sorted(zip(a2.tolist(), n2.tolist(), strict=True)) == sorted(set(zip(a.tolist(), n.tolist(), strict=True)))


def test_distance_weighted_draws_follow_the_published_weights():
    """One query, repeated in many rows: the frequencies are those of 1 / q(d), and nothing beyond 1.4 is drawn."""
    D, draws = 8, 4000
    q, keys = unit(1, D).double(), unit(12, D, seed=5).double()
    classes = torch.zeros(draws, dtype=torch.long), torch.arange(12) % 4
    got = mine_triplets(q.expand(draws, D), keys, *classes, negative="distance_weighted", seed=3)
    weight = torch.zeros(12, dtype=torch.float64)
    for k in range(12):
        d = max(math.sqrt(2 - 2 * float(q[0] @ keys[k])), 0.5)
        if int(classes[1][k]) != 0 and d < 1.4:
            weight[k] = d ** (2 - D) * (1 - d * d / 4) ** ((3 - D) / 2)
    expected = weight / weight.sum() * draws
    seen = torch.bincount(got.negative.flatten(), minlength=12).double()
    assert int((weight > 0).sum()) >= 3 and bool((seen[weight == 0] == 0).all())
    some = weight > 0
    chi_squared = ((seen - expected)[some] ** 2 / expected[some]).sum()
    assert chi_squared < 30  # at most 8 degrees of freedom: beyond the 0.9998 quantile


def test_distance_weighted_draws_do_not_depend_on_batch_or_position():
    q, keys = unit(6, 8), unit(50, 8, seed=1)
    both = torch.zeros(6, dtype=torch.long), torch.arange(50) % 2
    rule = {"negative": "distance_weighted", "num_negatives": 5, "seed": 2, "step": 7}
    together = mine_triplets(q, keys, *both, **rule)
    for b in range(6):
        row = mine_triplets(q[b : b + 1], keys, both[0][:1], both[1], **rule, row_offset=b)
        assert torch.equal(row.negative[0], together.negative[b])
    assert bool((together.negative.sort(2).values.diff(dim=2) > 0).all())  # no index twice
    again = mine_triplets(q, keys, *both, **{**rule, "step": 8})
    assert not torch.equal(again.negative, together.negative)


@pytest.mark.parametrize("N_drawn", [1, 6])
def test_distance_weighted_draws_are_those_of_the_reference(backend, N_drawn, monkeypatch):
    """With exact scores, all draws are the same: for any pieces, with ties, masks, NaN rows and too few candidates."""
    device = device_of(backend)
    rule = {"positive": "all", "max_positives": P, "negative": "distance_weighted", "num_negatives": N_drawn}
    key = {"seed": 2**32 - 1, "step": 9, "row_offset": 2**33 + 5}
    total = 0
    for seed, (B, K, D) in enumerate([(3, 0, 2), (0, 9, 3), (1, 1, 1), (5, 33, 7), (17, 200, 4)]):
        q, keys = (whole(n, D, device=device, seed=seed + i) / 4 for i, n in enumerate((B, K)))
        keys[3:5] = torch.nan
        both = labels(B, K, device, seed)
        for masks in masks_of(B, K, device, seed)[:: 2 if interpreted(backend) else 1]:
            if masks.get("key_mask") is not None and masks["key_mask"].dim() == 1:
                keys[~masks["key_mask"]] = torch.nan  # never read
            want = mine_triplets(q, keys, *both, **rule, **masks, **key, backend="reference")
            for piece in (1, 40, 1 << 16):
                monkeypatch.setattr(distance_weighted, "PIECE_ON_CPU", piece)
                monkeypatch.setattr(distance_weighted, "PIECE", piece)
                got = mine_triplets(q, keys, *both, **rule, **masks, **key, backend=backend)
                for name, k, t in zip(got._fields, got, want, strict=True):
                    compare.exact(f"{name} {B, K, D, piece}", k, t)
            total += int(want.num_triplets)
    assert total > 30


def test_gumbel_is_that_of_the_open_unit_interval():
    ends = philox.gumbel(torch.tensor([0, philox.MASK]))
    assert bool(ends.isfinite().all()) and ends[0] < -3 and ends[1] > 22
    assert (
        abs(float(philox.gumbel(philox.words(torch.arange(50_000), torch.arange(1), 0, 1, 2)[0]).mean()) - 0.5772)
        < 0.03
    )


def test_it_compiles_into_one_graph():
    torch._dynamo.reset()
    q, keys, both = unit(4, 8), unit(30, 8, seed=1), labels(4, 30)
    rule = {**RULES[8], "num_negatives": 2}
    compiled = torch.compile(lambda q, k: mine_triplets(q, k, *both, **rule), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, keys), mine_triplets(q, keys, *both, **rule), strict=True):
        assert torch.equal(got, want)


def test_score_farther_inverts_distance():
    s = torch.linspace(-1, 1, 21, dtype=torch.float64)
    for kind in ("cosine", "euclidean", "squared_euclidean"):
        moved = reference.triplets.score_farther(s, 0.25, kind)
        error = distance_of_any(moved, kind) - distance_of_any(s, kind) - 0.25
        assert error.abs().max() < 1e-12
    assert bool(reference.triplets.score_farther(torch.tensor([1.0, -torch.inf]), -0.1, "euclidean").isinf().all())


def distance_of_any(s, kind):
    """Also for distances larger than any on the unit sphere, where the formulas continue."""
    return -s if kind == "cosine" else (2 - 2 * s).sqrt() if kind == "euclidean" else 2 - 2 * s


q0, k0, lb, lk = torch.randn(3, 4), torch.randn(7, 4), torch.arange(3), torch.arange(7)
REFUSALS = [
    ((q0.long(), k0, lb, lk), {}, TypeError, "mine_triplets: query must be a floating tensor"),
    ((q0, k0[:, :2], lb, lk), {}, ValueError, "keys must be of shape (K, D) with query's D = 4"),
    ((q0, k0, None, lk), {}, TypeError, "query_labels must be a tensor, got None"),
    ((q0, k0, lb, lb), {}, ValueError, "key_labels must be of shape (7,)"),
    ((q0, k0, lb, lk), {"query_ids": lb}, ValueError, "key_ids must be given together with query_ids"),
    ((q0, k0, lb, lk), {"key_mask": torch.ones(7)}, TypeError, "key_mask must be a bool tensor"),
    ((q0, k0, lb, lk), {"positive": "hardest"}, ValueError, "positive must be 'easy' or 'hard' or"),
    ((q0, k0, lb, lk), {"negative": "semi-hard"}, ValueError, "negative must be 'hardest' or 'easiest' or 'semihard'"),
    ((q0, k0, lb, lk), {"distance": "l2"}, ValueError, "distance must be 'cosine' or 'euclidean'"),
    ((q0, k0, lb, lk), {"margin": -0.1}, ValueError, "margin must be a number of 0 or more, got -0.1"),
    (
        (q0, k0, lb, lk),
        {"negative": "multi_similarity"},
        ValueError,
        "positive must be 'multi_similarity' if",
    ),
    (
        (q0, k0, lb, lk),
        {"positive": "multi_similarity", "max_positives": 2},
        ValueError,
        "negative must be 'multi_similarity' if",
    ),
    (
        (q0, k0, lb, lk),
        {"positive": "semihard"},
        ValueError,
        "negative must be 'hardest' or 'easiest' if positive is",
    ),
    ((q0, k0, lb, lk), {"positive": "all"}, ValueError, "max_positives must be an int of 1 or more, got None"),
    ((q0, k0, lb, lk), {"max_positives": 2}, ValueError, "max_positives must be None if positive is 'easy'"),
    ((q0, k0, lb, lk), {"num_negatives": 0}, ValueError, "num_negatives must be an int of 1 or more"),
    ((q0, k0, lb, lk), {"seed": -1}, ValueError, "seed must be an int in [0, 2**32)"),
]


@pytest.mark.parametrize("arguments, options, error, words", REFUSALS, ids=[words[:50] for *_, words in REFUSALS])
def test_refusal(arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        mine_triplets(*arguments, **options)
