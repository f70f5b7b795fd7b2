"""late_interaction and mine_late_interaction: loops in float64, gradcheck, the reference, mining, errors, maxsim."""

import re
import sys

import pytest
import torch

import negmine
from negmine import Negatives, Select
from negmine.losses import late_interaction, mine_late_interaction
from negmine.ops import backends
from tests import compare
from tests.cases import unit, whole
from tests.conftest import DEVICE, interpreted

B, K, TOKENS, J, D, T = 4, 11, 3, 5, 6, 0.4
LENGTHS = {
    "query_lengths": torch.tensor([3, 1, 0, 2], device=DEVICE),
    "positive_lengths": torch.tensor([5, 2, 1, 4], device=DEVICE),
    "negative_lengths": torch.tensor([5, 1, 0, 3, 2, 5, 4, 5, 1, 2, 3], device=DEVICE),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use blocks of three documents and two queries."""
    late = sys.modules[late_interaction.__module__]
    monkeypatch.setattr(late, "DOCUMENT_TOKENS", {DEVICE: 3 * J})
    monkeypatch.setattr(late, "PIECE", {DEVICE: 2 * TOKENS * 3})


def functions(name):
    return next(row for row in backends.BACKENDS if row.name == name).functions


def tokens(make=unit, dtype=torch.float64):
    """query, positive and documents, with NaN after the length of each."""
    query, positive, documents = (
        make(*shape, dtype=dtype, device=DEVICE, seed=i)
        for i, shape in enumerate([(B, TOKENS, D), (B, J, D), (K, J, D)])
    )
    for vectors, lengths in zip((query, positive, documents), LENGTHS.values(), strict=True):
        vectors[torch.arange(vectors.shape[1], device=DEVICE) >= lengths[:, None]] = torch.nan
    return query, positive, documents


def maxsim_by_loop(query, length, document, document_length):
    return sum(max(float(q @ d) for d in document[:document_length]) for q in query[:length])


IDS = torch.tensor([3, 0, 2, 3], device=DEVICE)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("select", [None, Select(1, 5)])
def test_the_loss_by_loops(any_backend, select, decoupled):
    """Small integers, so that kernels compute the same scores as float64."""
    dense = any_backend == "reference"
    query, positive, documents = tokens(*((unit, torch.float64) if dense else (whole, torch.float32)))
    bias = torch.linspace(-1, 1, K, dtype=query.dtype, device=DEVICE)
    close = {"rtol": 1e-10, "atol": 1e-10} if dense else {"rtol": 1e-6, "atol": 2e-5, "check_dtype": False}
    given = Negatives(documents, ids=torch.arange(K, device=DEVICE) % 4, bias=bias, select=select)
    loss, stats = late_interaction(
        query, positive, given, **LENGTHS, temperature=T, query_ids=IDS, decoupled=decoupled, reduction="none",
        backend=any_backend, return_stats=True,
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
        total = torch.tensor(logits, dtype=torch.float64, device=DEVICE).logsumexp(0)
        torch.testing.assert_close(loss[b], total - s_positive / T, **close)
        torch.testing.assert_close(stats.logsumexp[b], total, **close)
        assert stats.num_negatives[b] == len(kept)
        assert stats.positive_rank[b] == sum(score > s_positive for score in pool.values())


def test_gradcheck():
    few = 5
    query, positive, documents = (torch.where(v.isnan(), 0.0, v)[:few, :, :3] for v in tokens())
    numbers = torch.tensor(T, dtype=torch.float64), torch.randn(few, dtype=torch.float64, device=DEVICE)
    leaves = [leaf.clone().requires_grad_() for leaf in (query, positive, documents, *numbers)]
    lengths = LENGTHS | {"negative_lengths": LENGTHS["negative_lengths"][:few]}

    def loss(query, positive, documents, temperature, bias):
        given = Negatives(documents, bias=bias, mask=torch.arange(few, device=DEVICE) != 4)
        return late_interaction(query, positive, given, **lengths, temperature=temperature, reduction="none")

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["masked", "in_batch", "selected"])
def test_it_is_the_dense_definition(backend, dtype, case):
    """Gradients of all arguments, rounded once. Tokens after a length and hidden documents are not finite."""
    vectors = tokens(dtype=dtype)
    vectors[2][7] = torch.nan
    mask = torch.arange(K, device=DEVICE) != 7

    def graded(dtype, backend):
        query, positive, documents = (v.to(dtype, copy=True).requires_grad_() for v in vectors)
        wide = torch.promote_types(dtype, torch.float32)
        temperature = torch.tensor(T, dtype=wide, requires_grad=True)
        bias = torch.linspace(-1, 1, K, dtype=wide, device=DEVICE, requires_grad=True)
        given = {"temperature": temperature, "backend": backend, "query_lengths": LENGTHS["query_lengths"]}
        given["positive_lengths"] = LENGTHS["positive_lengths"]
        if case == "in_batch":
            loss = late_interaction(
                query, positive, None, **given, query_labels=torch.tensor([1, 2, -1, 1], device=DEVICE)
            )
            return loss, *torch.autograd.grad(loss, [query, positive, temperature])
        select = Select(1, 6) if case == "selected" else None
        pool = Negatives(documents, mask=mask, bias=bias, select=select)
        loss = late_interaction(query, positive, pool, **given, negative_lengths=LENGTHS["negative_lengths"])
        return loss, *torch.autograd.grad(loss, [query, positive, temperature, bias, documents])

    got, truth, plain = graded(dtype, backend), graded(torch.float64, "reference"), graded(dtype, "reference")
    names = ("loss", "query", "positive", "temperature", "bias", "documents")
    for name, g, t, p in zip(names, got, truth, plain, strict=False):
        assert t.isfinite().all() and t.any()
        compare.rounded(name, g, t, p, condition=4.0)


# B, I, K, J, D: fewer lanes than a vector; more than a block; documents longer than a chunk, and of one token; odd widths
SHAPES = [(2, 3, 5, 4, 16), (3, 33, 4, 7, 6), (2, 2, 3, 150, 5), (3, 40, 9, 1, 8)]


@pytest.mark.parametrize("types", ["float32 float32", "bfloat16 bfloat16", "float16 bfloat16", "float16 float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maxsim(backend, shape, types):
    """Scores and the first best tokens are exact for small integers. Tokens that do not count are NaN, and rows have strides."""
    maxsim = functions(backend)["maxsim"]
    B, tokens, K, J, D = shape
    dtypes = [getattr(torch, name) for name in types.split()]
    if interpreted(backend) and types != "float32 float32":
        pytest.skip("triton: interpreted, where storage is widened on load")
    query = whole(B, tokens, D + 1, dtype=dtypes[0], device=DEVICE)[..., :D]
    documents = whole(K, J, D + 1, dtype=dtypes[1], device=DEVICE, seed=1)[..., :D]
    lengths = [torch.randint(-1, most + 2, (rows,), device=DEVICE) for rows, most in ((B, tokens), (K, J))]
    for given in (None, None), lengths:
        for vectors, length in zip((query, documents), given, strict=True):
            if length is not None:
                vectors[torch.arange(vectors.shape[1], device=DEVICE) >= length[:, None]] = torch.nan
        inner = torch.einsum("bid,kjd->bikj", query.double(), documents.double())
        inner = inner.nan_to_num(nan=-torch.inf)  # a token that does not count
        best = inner.amax(3)  # (B, I, K)
        index = (inner == best[..., None]).int().argmax(3) + J * torch.arange(K, device=DEVICE)
        scores, found = maxsim(query, documents, *given, True)
        assert torch.equal(found, index.masked_fill(best == -torch.inf, -1))
        compare.exact("scores", scores, negmine.reference.maxsim(query.double(), documents.double(), *given))
        alone, nothing = maxsim(query, documents, *given, False)
        assert torch.equal(alone, scores) and nothing.shape == (0, tokens, K)


def test_a_nan_token_that_counts_is_in_its_scores_alone(backend):
    """A NaN token that counts affects only scores of its own document or query; the best token is then any token.

    A query without tokens has scores of 0.
    """
    maxsim = functions(backend)["maxsim"]
    query, documents = unit(3, 4, 8, device=DEVICE), unit(5, 6, 8, device=DEVICE, seed=1)
    lengths = torch.tensor([4, 2, 0], device=DEVICE)
    want, broken = maxsim(query, documents, lengths, None, False)[0], documents.clone()
    broken[2, 3, 1], broken[4, :, 1] = torch.nan, torch.nan
    got, index = maxsim(query, broken, lengths, None, True)
    assert got[:2, [2, 4]].isnan().all() and not got[2].any()
    assert torch.equal(got[:, [0, 1, 3]], want[:, [0, 1, 3]])
    counts = torch.arange(4, device=DEVICE) < lengths[:, None]  # (B, I)
    assert torch.equal(torch.where(counts[..., None], torch.arange(5, device=DEVICE), -1), index // 6)


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
    """Small integers, so that many scores are equal: the lower index comes first."""
    query, positive, documents = tokens(whole, torch.float32)
    given = Negatives(documents, mask=torch.arange(K, device=DEVICE) != 5)
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
    loss, stats = late_interaction(query, positive, torch.empty(0, J, D, device=DEVICE), return_stats=True)
    loss.backward()
    assert loss == 0 and not query.grad.any() and stats.num_empty == B
    assert (mine_late_interaction(query, torch.empty(0, J, D, device=DEVICE), 2).index == -1).all()


q, docs = torch.ones(3, 2, 4), torch.ones(5, 6, 4)
REFUSALS = [
    ((q[0], q, docs, {}), ValueError, "late_interaction: query must be of shape (B, I, D)"),
    ((q, docs, docs, {}), ValueError, "positive_key must be of shape (B, J, D) with query's B = 3"),
    ((q, q, docs[:, :0], {}), ValueError, "negative_keys must be of shape (K, J, D) with at least one token"),
    (
        (q, q, docs, {"negative_lengths": torch.ones(3).long()}),
        ValueError,
        "negative_lengths must be an integer tensor of",
    ),
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
    ((q, q, docs, {"backend": "gpu"}), ValueError, "backend must be None, 'cuda', 'triton', 'cpu'"),
    ((q, q, docs, {"select": Select(sample=2, replace=True)}), ValueError, "select must be without replace"),
]


@pytest.mark.parametrize("call, error, words", REFUSALS, ids=[words[:40] for *_, words in REFUSALS])
def test_refusal(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        late_interaction(*call[:3], **call[3])
