"""late_interaction and mine_late_interaction: loops in float64, gradcheck, the dense definition, mining, refusals."""

import re
import sys

import pytest
import torch

import negmine
from negmine import Negatives, Select
from negmine.losses import late_interaction, mine_late_interaction
from negmine.ops.backends import BackendUnavailable
from tests import compare
from tests.cases import unit, whole

B, K, TOKENS, J, D, T = 4, 11, 3, 5, 6, 0.4
LENGTHS = {
    "query_lengths": torch.tensor([3, 1, 0, 2]),
    "positive_lengths": torch.tensor([5, 2, 1, 4]),
    "negative_lengths": torch.tensor([5, 1, 0, 3, 2, 5, 4, 5, 1, 2, 3]),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three documents and two queries in a block."""
    late = sys.modules[late_interaction.__module__]
    monkeypatch.setattr(late, "DOCUMENT_TOKENS", 3 * J)
    monkeypatch.setattr(late, "PIECE", {"cpu": 2 * TOKENS * 3 * J})


def tokens(make=unit, dtype=torch.float64):
    """query, positive and documents; what stands past a length is NaN."""
    query, positive, documents = (
        make(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(B, TOKENS, D), (B, J, D), (K, J, D)])
    )
    for vectors, lengths in zip((query, positive, documents), LENGTHS.values(), strict=True):
        vectors[torch.arange(vectors.shape[1]) >= lengths[:, None]] = torch.nan
    return query, positive, documents


def maxsim_by_loop(query, length, document, document_length):
    return sum(max(float(q @ d) for d in document[:document_length]) for q in query[:length])


IDS = torch.tensor([3, 0, 2, 3])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("select", [None, Select(1, 5)])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_loss_by_loops(backend, select, decoupled):
    query, positive, documents = tokens()
    bias = torch.linspace(-1, 1, K).double()
    given = Negatives(documents, ids=torch.arange(K) % 4, bias=bias, select=select)
    loss, stats = late_interaction(
        query, positive, given, **LENGTHS, temperature=T, query_ids=IDS, decoupled=decoupled, reduction="none",
        backend=backend, return_stats=True,
    )  # fmt: skip
    lengths = [each.tolist() for each in LENGTHS.values()]
    for b in range(B):
        s_positive = maxsim_by_loop(query[b], lengths[0][b], positive[b], lengths[1][b])
        pool = {
            k: maxsim_by_loop(query[b], lengths[0][b], documents[k], lengths[2][k])
            for k in range(K)
            if lengths[2][k] and k % 4 != IDS[b]
        }
        kept = sorted(pool, key=lambda k, pool=pool: (-pool[k], k))[slice(None) if select is None else slice(1, 5)]
        logits = [pool[k] / T + float(bias[k]) for k in kept] + ([] if decoupled else [s_positive / T])
        total = torch.tensor(logits, dtype=torch.float64).logsumexp(0)
        torch.testing.assert_close(loss[b], total - s_positive / T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(stats.logsumexp[b], total, rtol=1e-10, atol=1e-10)
        assert stats.num_negatives[b] == len(kept)
        assert stats.positive_rank[b] == sum(score > s_positive for score in pool.values())


def test_gradcheck():
    few = 5
    query, positive, documents = (torch.where(v.isnan(), 0.0, v)[:few, :, :3] for v in tokens())
    numbers = torch.tensor(T, dtype=torch.float64), torch.randn(few, dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in (query, positive, documents, *numbers)]
    lengths = LENGTHS | {"negative_lengths": LENGTHS["negative_lengths"][:few]}

    def loss(query, positive, documents, temperature, bias):
        given = Negatives(documents, bias=bias, mask=torch.arange(few) != 4)
        return late_interaction(query, positive, given, **lengths, temperature=temperature, reduction="none")

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_batch", [False, True])
def test_it_is_the_dense_definition(dtype, in_batch):
    """Gradients to both sides, rounded once, with what stands past a length, and whole hidden documents, not even finite."""
    vectors = tokens(dtype=dtype)
    vectors[2][7] = torch.nan
    mask = torch.arange(K) != 7

    def graded(dtype, backend):
        query, positive, documents = (v.to(dtype, copy=True).requires_grad_() for v in vectors)
        given = {"temperature": T, "backend": backend, "query_lengths": LENGTHS["query_lengths"]}
        given["positive_lengths"] = LENGTHS["positive_lengths"]
        if in_batch:
            loss = late_interaction(query, positive, None, **given, query_labels=torch.tensor([1, 2, -1, 1]))
            return loss, *torch.autograd.grad(loss, [query, positive])
        pool = Negatives(documents, mask=mask)
        loss = late_interaction(query, positive, pool, **given, negative_lengths=LENGTHS["negative_lengths"])
        return loss, *torch.autograd.grad(loss, [query, positive, documents])

    got, truth, plain = graded(dtype, None), graded(torch.float64, "reference"), graded(dtype, "reference")
    for name, g, t, p in zip(("loss", "query", "positive", "documents"), got, truth, plain, strict=False):
        assert t.isfinite().all() and t.any()
        compare.rounded(name, g, t, p, condition=4.0)


def test_frozen_documents_may_be_overwritten():
    query, positive, documents = (torch.where(v.isnan(), 0.0, v) for v in tokens())
    query.requires_grad_()
    want = torch.autograd.grad(late_interaction(query, positive, documents), query)[0]
    loss = late_interaction(query, positive, documents)
    documents.fill_(torch.nan), positive.fill_(torch.nan)
    assert torch.equal(torch.autograd.grad(loss, query)[0], want)


@pytest.mark.parametrize(
    "select", [None, Select(2, 7), Select(0, 0.5, absolute_margin=0.0), Select(sample=3)], ids=repr
)
def test_mining_is_exact(select):
    """Small integers, so that ties are many: they go to the lower index."""
    query, positive, documents = tokens(whole, torch.float32)
    given = Negatives(documents, mask=torch.arange(K) != 5)
    mined = mine_late_interaction(query, given, 8, positive_key=positive, **LENGTHS, select=select)
    lengths = LENGTHS["query_lengths"], LENGTHS["negative_lengths"]
    scores = negmine.reference.maxsim(query, documents, *lengths)  # (B, K)
    allowed = ((lengths[1] > 0) & given.mask).expand(B, K)
    if select is not None:
        s_positive = negmine.reference.maxsim_of_pairs(query, positive, lengths[0], LENGTHS["positive_lengths"])
        allowed = negmine.reference.multiplicity(scores, s_positive, select, allowed, 0, 0, 0) > 0
    for b in range(B):
        order = sorted((k for k in range(K) if allowed[b, k]), key=lambda k, b=b: (-float(scores[b, k]), k))[:8]
        assert mined.index[b].tolist() == order + [-1] * (8 - len(order))
        assert mined.scores[b].tolist() == [float(scores[b, k]) for k in order] + [-torch.inf] * (8 - len(order))


def test_no_documents():
    query, positive, _ = (torch.where(v.isnan(), 0.0, v).requires_grad_() for v in tokens(dtype=torch.float32))
    loss, stats = late_interaction(query, positive, torch.empty(0, J, D), return_stats=True)
    loss.backward()
    assert loss == 0 and not query.grad.any() and stats.num_empty == B
    assert (mine_late_interaction(query, torch.empty(0, J, D), 2).index == -1).all()


q, docs = torch.ones(3, 2, 4), torch.ones(5, 6, 4)
REFUSALS = [
    ((q[0], q, docs, {}), ValueError, "late_interaction: query must be of shape (B, I, D)"),
    ((q, docs, docs, {}), ValueError, "positive_key must be of shape (B, J, D) with query's B = 3"),
    ((q, q, docs[:, :0], {}), ValueError, "negative_keys must be of shape (K, J, D) with one token or more"),
    ((q, q, docs, {"negative_lengths": torch.ones(3).long()}), ValueError, "negative_lengths must be whole numbers of"),
    (
        (q, q, None, {"negative_lengths": torch.ones(3).long()}),
        ValueError,
        "negative_lengths must be None for in-batch",
    ),
    (
        (q, q, docs, {"query_ids": torch.arange(3)}),
        ValueError,
        "negative_keys.ids must be given together with query_ids",
    ),
    ((q, q, docs, {"backend": "cpu"}), BackendUnavailable, "backend 'cpu' has no kernel for it"),
    ((q, q, docs, {"select": Select(sample=2, replace=True)}), ValueError, "select must be without replace"),
]


@pytest.mark.parametrize("call, error, words", REFUSALS, ids=[words[:40] for *_, words in REFUSALS])
def test_refusal(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        late_interaction(*call[:3], **call[3])
