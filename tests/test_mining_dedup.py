"""deduplicate="near" compared with a loop over one window at a time, and with itself for other splits."""

import itertools

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining.dedup import fixed_order_sum, near_pairs
from tests.cases import DTYPES, unit
from tests.compare import same_result

mine = negmine.mine_hard_negatives
Q, K, D = 12, 300, 6  # few dimensions, so that many rows are near duplicates


def loop(q, c, positives, select, n, threshold, wanted, exclude=()):
    """Return indices (Q, n) and the counts of dropped rows, for sampling_strategy="top"."""
    q, c = q.double(), c.double()
    cosine = (c @ c.T) / (c.norm(dim=1)[:, None] * c.norm(dim=1))
    out, dropped = [], {"near_positive": 0, "near_negative": 0}
    for b, query in enumerate(q):
        scores = c @ query
        top = float(select.highest_score(min(scores[p] for p in positives[b]).reshape(1)))
        rank = [k for k in scores.argsort(descending=True, stable=True).tolist() if scores[k] <= top]
        rank = [k for k in rank if k not in positives[b] and k not in exclude]
        first, end = (int(x) for x in select.window(torch.tensor([len(rank)])))
        kept = []
        for k in rank[first:end]:
            if len(kept) == wanted:
                break
            if any(cosine[k, p] >= threshold for p in positives[b]):
                dropped["near_positive"] += 1
            elif any(cosine[k, h] >= threshold for h in kept):
                dropped["near_negative"] += 1
            else:
                kept.append(k)
        out.append(kept[:n] + [-1] * (n - len(kept)))
    return np.array(out), dropped


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("select", [Select(), Select(4), Select(2, 25), Select(absolute_margin=0.2)], ids=str)
def test_loops(select, threshold):
    q, c = unit(Q, D, seed=1), unit(K, D, seed=2) * (1 + torch.arange(K) % 7)[:, None]
    c[250:] = c[:50] * 0.5  # the same directions with other norms
    positives = [[b, 30 + b] for b in range(Q)]
    for n in (1, 5, 20):
        got = mine(q, c, positives, select=select, num_negatives=n, deduplicate="near", near_duplicate_score=threshold)
        want, dropped = loop(q, c, positives, select, n, threshold, n)
        np.testing.assert_array_equal(got.indices, want)
        assert {name: got.skipped[name] for name in dropped} == dropped
        assert (got.num_valid == (want >= 0).sum(1)).all()


SPLIT = [("top", dtype) for dtype in DTYPES] + [("random", torch.float32), ("weighted", torch.bfloat16)]


@pytest.mark.parametrize("strategy, dtype", SPLIT, ids=str)
def test_any_split_gives_the_same_bits(strategy, dtype):
    q, c = unit(Q, 33, dtype=dtype, seed=1), unit(K, 33, dtype=dtype, seed=2)
    c[100:200] = torch.nn.functional.normalize(c[:100].float() + 0.05 * unit(100, 33, seed=3), dim=1).to(dtype)
    positives = list(range(Q))
    for select, mode in ((Select(2), "filtered"), (Select(0.01, 0.3), "filtered"), (Select(1, 60), "raw")):
        options = {"select": select, "range_mode": mode, "sampling_strategy": strategy, "deduplicate": "near"}
        options |= {"near_duplicate_score": 0.3, "num_negatives": 6, "seed": 2}
        want = mine(q, c, positives, **options)
        for batch, chunk in ((1, 300), (7, 31), (Q, 299)):
            same_result(
                mine(q, [c[:77], c[77:]], positives, batch_size=batch, corpus_chunk_size=chunk, **options), want
            )
        for row, kept in enumerate(want.indices):
            rows = c[[k for k in kept if k >= 0]].double()
            others = torch.cat([rows, c[row : row + 1].double()])
            cosine = (rows @ others.T) / (rows.norm(dim=1)[:, None] * others.norm(dim=1))
            assert (cosine - torch.eye(*cosine.shape)).max() < 0.3 + 1e-6


def test_near_finds_what_exact_finds():
    q, c = unit(5, 16, seed=1), unit(200, 16, seed=2)
    c[100:] = c[:100]
    got = mine(q, c, [0, 1, 2, 3, 4], num_negatives=99, deduplicate="near", near_duplicate_score=1 - 1e-9)
    want = mine(q, c, [0, 1, 2, 3, 4], num_negatives=99, deduplicate="exact")
    np.testing.assert_array_equal(got.indices, want.indices)


def test_a_row_of_zeros_is_near_nothing():
    c = torch.zeros(6, 3)
    c[0] = torch.tensor([1.0, 0, 0])
    got = mine(torch.ones(1, 3), c, [0], num_negatives=5, deduplicate="near")
    assert got.indices.tolist() == [[1, 2, 3, 4, 5]]


def test_cosines_near_the_threshold_are_summed_in_a_fixed_order():
    """At the threshold, the result for a pair does not depend on the other rows."""
    a = torch.randn(1, 40, 77, dtype=torch.float64)
    alone = fixed_order_sum(a[0, :1] * a[0, 1:2])
    threshold = float(alone / (fixed_order_sum(a[0, 0] ** 2).sqrt() * fixed_order_sum(a[0, 1] ** 2).sqrt()))
    for t in (threshold, np.nextafter(threshold, 1), np.nextafter(threshold, -1), threshold + 1e-16):
        together = near_pairs(a, a, t)
        for m, p in itertools.product(range(0, 40, 3), range(40)):
            assert near_pairs(a[:, m : m + 1], a[:, p : p + 1], t).item() == together[0, m, p].item()
    torch.testing.assert_close(fixed_order_sum(a), a.sum(-1))


def test_the_memory_limit_does_not_change_the_result():
    q, c = unit(40, 33, seed=1), unit(K, 33, seed=2)
    options = {"deduplicate": "near", "near_duplicate_score": 0.4, "num_negatives": 6, "sampling_strategy": "random"}
    want = mine(q, c, list(range(40)), **options)
    for index in ("exact", "Flat"):
        if index == "Flat":
            pytest.importorskip("faiss")
        got = mine(q, c, list(range(40)), **options, index=index, max_memory_bytes=400_000)
        np.testing.assert_array_equal(got.indices, want.indices)
