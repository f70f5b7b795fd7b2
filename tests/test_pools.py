"""Several pools in one loss, biases, and guides: the reference compared with loops, and kernels with the reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import FalseNegatives, Guide, Mix, MoCoQueue, Negatives, Select, Weight, reference
from negmine.ops import backends
from negmine.ops.negatives import check_negatives
from negmine.ops.pool import usable
from tests import compare
from tests.cases import unit, whole
from tests.conftest import device_of

B, K, M, D, T = 5, 40, 9, 12, 0.5


def tensors(device="cpu", dtype=torch.float32):
    """query, positive, a queue, keys of each query's own, and a bias for each of the two."""
    shapes = ((B, D), (B, D), (K, D), (B, M, D))
    vectors = [unit(*shape, seed=i, device=device).to(dtype) for i, shape in enumerate(shapes)]
    generator = torch.Generator().manual_seed(9)
    return vectors + [torch.randn(shape, generator=generator).to(device, dtype) for shape in ((K,), (B, M))]


def three_pools(keys, own, bias, own_bias, **more):
    """A queue with ids and a bias, own keys with a mask and a bias, and the batch."""
    device = keys.device
    mask = torch.arange(B * M, device=device).view(B, M) % 4 > 0
    return [
        Negatives(keys, ids=torch.arange(K, device=device) % 7, bias=bias, **more),
        Negatives(own, mask=mask, bias=own_bias, **more),
        Negatives(None, **more),
    ]


def as_defined(vectors, options, **more):
    """Loss rows of the reference for three_pools, and the statistics of each pool."""
    query, positive, keys, own, bias, own_bias = vectors
    ids = torch.arange(B, device=query.device) % 3
    usable = [
        ids[:, None] != torch.arange(K, device=query.device) % 7,
        torch.arange(B * M, device=query.device).view(B, M) % 4 > 0,
        ids[:, None] != ids,
    ]
    treated = {name: options.get(name) for name in ("select", "mix", "weight")}
    pools = [
        reference.Columns(k, mask, b, **treated)
        for k, mask, b in zip((keys, own, positive), usable, (bias, own_bias, None), strict=True)
    ]
    rest = {name: value for name, value in options.items() if name not in treated}
    return reference.info_nce_of_pools(query, positive, pools, temperature=T, **rest, **more)


def insisted(backend):
    """The backend to ask for, or None if its kernels take no bias of shared keys."""
    return backend if backend in backends.TAKE_EXTRAS else None


OPTIONS = [
    {},
    {"decoupled": True},
    {"select": Select(0.1, 0.6)},
    {"select": Select(1, 9, absolute_margin=0.01)},  # compares scores without the bias
    {"select": Select(0, 9, sample=3)},
    {"select": Select(0, 9, sample=20, replace=True)},
    {"mix": Mix(6, 5, 4)},
    {"mix": Mix(6, 5, 4, detach=False), "select": Select(0, 4)},
    {"weight": Weight(1.0, 0.001)},
    {"weight": Weight(0.5, detach=True)},
    {"weight": Weight(0.0, 0.01), "select": Select(0.0, 0.5)},
    {"false_negatives": FalseNegatives(3, 0.1)},
    {"false_negatives": FalseNegatives(3, 0.1, mode="attract")},
    {"false_negatives": FalseNegatives(None, 0.2, mode="attract"), "decoupled": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_three_pools_are_their_definition(backend, options):
    device = device_of(backend)
    vectors, support = tensors(device), unit(B, 2, D, seed=5, device=device)
    key = {"seed": 3, "step": 2, "row_offset": 11}

    def run(dtype, defined):
        leaves = [t.to(dtype).requires_grad_() for t in vectors]
        given = options | ({"support": support.to(dtype)} if "false_negatives" in options else {})
        if defined:
            rows, stats = as_defined(leaves, given, **key)
        else:
            rows, stats = negmine.info_nce(
                *leaves[:2], three_pools(*leaves[2:]), temperature=T, query_ids=torch.arange(B, device=device) % 3,
                reduction="none", return_stats=True, backend=insisted(backend), **given, **key,
            )  # fmt: skip
        return [rows, *torch.autograd.grad(rows.double().sum(), leaves, allow_unused=True)], stats

    got, stats = run(torch.float32, False)
    truth, want = run(torch.float64, True)
    plain, _ = run(torch.float32, True)
    names = ("loss", "d_query", "d_positive", "d_keys", "d_own", "d_bias", "d_own_bias")
    for name, k, t, p in zip(names, got, truth, plain, strict=True):
        compare.rounded(name, k, t, p, 4.0, truth[2] if name == "d_query" else None)
    assert len(stats) == 3
    for ours, theirs in zip(stats, want, strict=True):
        for name in ("positive_rank", "num_negatives", "clamped", "num_empty"):
            compare.exact(name, getattr(ours, name), theirs[name])
        torch.testing.assert_close(ours.logsumexp.double(), theirs["logsumexp"], rtol=1e-5, atol=1e-5)


def test_the_definition_is_a_loop_over_rows_and_pools():
    """Ranks, weights and counts of each pool, written out for one row at a time."""
    query, positive, keys, own, bias, own_bias = tensors(dtype=torch.float64)
    pools = [
        reference.Columns(keys, None, bias, Select(1, 9), None, Weight(1.0, 0.01)),
        reference.Columns(own, None, own_bias, Select(0.0, 0.5), None, None),
        reference.Columns(positive, ~torch.eye(B, dtype=torch.bool), None, None, None, Weight(0.0, 0.02)),
    ]
    rows, stats = reference.info_nce_of_pools(query, positive, pools, temperature=T)
    for b in range(B):
        x_pos = float(query[b] @ positive[b]) / T
        total = 0.0
        for (name, tau, beta, window), k, c in zip(
            (("queue", 0.01, 1.0, (1, 9)), ("own", None, None, (0, M // 2)), ("batch", 0.02, 0.0, (0, None))),
            (keys, own[b], positive[torch.arange(B) != b]),
            (bias, own_bias[b], torch.zeros(B - 1)),
            strict=True,
        ):
            scores = (k @ query[b]).tolist()
            order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[slice(*window)]
            terms = [math.exp(scores[j] / T + float(c[j])) for j in order]
            if tau is None:
                total += sum(terms)
                continue
            importance = [math.exp(beta * scores[j] / T) for j in order]
            N = len(order)
            raw = N * sum(i * t for i, t in zip(importance, terms, strict=True)) / sum(importance)
            total += max((raw - tau * N * math.exp(x_pos)) / (1 - tau), N * math.exp(-1 / T))
            assert int(stats[("queue", "own", "batch").index(name)]["num_negatives"][b]) == N
        assert float(rows[b]) == pytest.approx(math.log(math.exp(x_pos) + total) - x_pos, rel=1e-10)


def test_gradients_of_the_definition():
    sizes = (2, 3), (2, 3), (4, 3), (2, 3, 3), (4,), (2, 3)
    vectors = [unit(*size, seed=i).double().requires_grad_() for i, size in enumerate(sizes)]
    ids = torch.arange(2)

    def loss(query, positive, keys, own, bias, own_bias, temperature):
        queue = Negatives(keys, ids=torch.arange(4), bias=bias, select=Select(0, 0.9), weight=Weight(1.0, 0.01))
        pools = [queue, Negatives(own, bias=own_bias), None]
        mix = Mix(4, 3, 2, detach=False)  # detach=True has no gradient to compare with
        return negmine.info_nce(query, positive, pools, temperature=temperature, mix=mix, query_ids=ids)

    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (*vectors, temperature))


@pytest.mark.parametrize("options", [{}, {"select": Select(0, 4)}, {"mix": Mix(6, 5, 4)}], ids=str)
def test_a_list_of_one_pool_is_the_pool(any_backend, options):
    query, positive, keys, *_ = tensors(device_of(any_backend))
    call = options | {"backend": any_backend, "return_stats": True, "seed": 4}
    alone, stats = negmine.info_nce(query, positive, keys, **call)
    for given in ([keys], [Negatives(keys)], [Negatives(keys, **options)]):
        listed, same = negmine.info_nce(query, positive, given, **call)
        assert torch.equal(alone, listed) and all(torch.equal(*pair) for pair in zip(stats, same, strict=True))


def test_pools_without_options_are_one_pool(any_backend):
    """If ranks are not used, it does not matter which pool a key is in."""
    query, positive, keys, *_ = tensors(device_of(any_backend))
    mask = torch.arange(K, device=query.device) % 5 > 0
    call = {"temperature": T, "reduction": "none", "backend": any_backend}
    together = negmine.info_nce(query, positive, Negatives(keys, mask=mask), **call)
    pools = [Negatives(keys[:7], mask=mask[:7]), keys[:0], Negatives(keys[7:], mask=mask[7:])]
    torch.testing.assert_close(negmine.info_nce(query, positive, pools, **call), together)
    own = keys[7:].expand(B, -1, -1)
    pools = [Negatives(keys[:7], mask=mask[:7]), Negatives(own, mask=mask[7:].expand(B, -1))]
    torch.testing.assert_close(negmine.info_nce(query, positive, pools, **call), together)
    scale = {"scale": 5.0, "bias": -2.0, "reduction": "none", "backend": any_backend}
    together = negmine.siglip(query, positive, Negatives(keys, mask=mask), **scale)
    torch.testing.assert_close(negmine.siglip(query, positive, pools, **scale), together)


def test_pools_can_opt_out_of_the_options_of_a_call(any_backend):
    query, positive, keys, own, *_ = tensors(device_of(any_backend))
    common = {"select": Select(0, 3), "mix": Mix(4, 3, 2), "weight": Weight(1.0)}
    neutral = {"select": Select(), "mix": Mix(pairs=0, with_query=0), "weight": Weight()}
    call = {"temperature": T, "reduction": "none", "backend": any_backend}
    for name in common:
        opted = negmine.info_nce(
            query, positive, [keys, Negatives(own, **{name: neutral[name]})], **{name: common[name]}, **call
        )
        said = negmine.info_nce(query, positive, [Negatives(keys, **{name: common[name]}), own], **call)
        torch.testing.assert_close(opted, said)
        assert not torch.allclose(opted, negmine.info_nce(query, positive, [keys, own], **{name: common[name]}, **call))


def test_each_pool_draws_by_its_number(any_backend):
    """Pool 0 draws the same as a single pool; equal pools draw different samples and mixes."""
    query, positive, keys, *_ = tensors(device_of(any_backend))
    nothing, call = keys[:0], {"reduction": "none", "seed": 5, "backend": any_backend}
    for options in ({"select": Select(sample=6)}, {"mix": Mix(20, 6, 6)}):
        alone = negmine.info_nce(query, positive, keys, **options, **call)
        first = negmine.info_nce(query, positive, [keys, nothing], **options, **call)
        second = negmine.info_nce(query, positive, [nothing, keys], **options, **call)
        torch.testing.assert_close(alone, first)
        assert not torch.isclose(alone, second).any()


def test_a_bias_moves_no_rank(any_backend):
    query, positive, keys, *_ = tensors(device_of(any_backend))
    bias = torch.linspace(-9.0, 9.0, K, device=query.device)
    backend, call = insisted(any_backend), {"temperature": T, "reduction": "none"}
    scores = query @ keys.T
    window = scores.topk(4, dim=1).indices  # (B, 4)
    x = (scores / T + bias).gather(1, window)
    pool = Negatives(keys, bias=bias)
    rows, stats = negmine.info_nce(
        query, positive, pool, select=Select(0, 4), return_stats=True, backend=backend, **call
    )
    s_pos = (query * positive).sum(1)
    torch.testing.assert_close(rows, F.softplus(x.logsumexp(1) - s_pos / T))
    assert torch.equal(stats.positive_rank, (scores > s_pos[:, None]).sum(1))
    mined = negmine.mine_hardest(query, pool, 4, backend=any_backend)
    assert torch.equal(mined.index, negmine.mine_hardest(query, keys, 4, backend=any_backend).index)
    lse = negmine.logsumexp(query, pool, temperature=T, select=Select(0, 4), backend=backend)
    torch.testing.assert_close(lse, x.logsumexp(1))


def test_a_bias_of_own_keys_reaches_every_sum(backend):
    """logsumexp and softplus_sum with windows and samples: values and gradients against float64."""
    query, _, _, own, _, bias = tensors(device_of(backend))
    for op, numbers in (("logsumexp", {"temperature": T}), ("softplus_sum", {"scale": 2.0, "bias": -1.0})):
        function = getattr(negmine, op, None) or getattr(negmine.losses, op)
        for select in (None, Select(0.0, 0.5), Select(1, 8, sample=3), Select(0, 1, min_score=9.0)):
            results = []
            for dtype, name in ((torch.float32, backend), (torch.float64, "reference"), (torch.float32, "reference")):
                leaves = [t.detach().to(dtype).requires_grad_() for t in (query, own, bias)]
                pool = Negatives(leaves[1], bias=leaves[2])
                rows = function(leaves[0], pool, select=select, seed=2, backend=name, **numbers)
                grads = torch.autograd.grad(rows.masked_fill(rows == -torch.inf, 0.0).double().sum(), leaves)
                results.append([rows, *grads])
            for part, k, t, p in zip(("sum", "d_query", "d_own", "d_bias"), *results, strict=True):
                compare.rounded(f"{op} {part}", k, t, p, 4.0)


@pytest.mark.parametrize("margin, relative", [(0.0, False), (2.0, False), (-1.0, False), (0.25, True), (-0.5, True)])
def test_a_guide_is_its_dense_mask(any_backend, margin, relative):
    """For integers, where many scores equal the limit, no key more and none less: shared, own and in-batch keys."""
    device = device_of(any_backend)
    query, positive, keys = whole(B, D, device=device), whole(B, D, seed=1, device=device), whole(K, D, device=device)
    own = whole(B, M, D, seed=3, device=device)
    g, g_pos, g_keys, g_own = (
        whole(*s, seed=i, device=device) for i, s in enumerate(((B, 3), (B, 3), (K, 3), (B, M, 3)))
    )
    call = {"temperature": 9.0, "reduction": "none", "return_stats": True}

    def loss(negatives, backend=any_backend, dtype=torch.float32):
        return negmine.info_nce(query.to(dtype), positive.to(dtype), negatives, backend=backend, **call)

    for vectors, guides in ((keys, g_keys), (own, g_own), (None, None)):
        guide = Guide(g, g_pos, guides, margin=margin, relative=relative)
        want = reference.guide_mask(guide)
        assert 0 < int(want.sum()) < want.numel()
        _, pool = check_negatives("test", query, positive, Negatives(vectors, guide=guide), own_keys=True)
        compare.exact(
            "mask", usable(pool._replace(query_ids=None), query, positive if vectors is None else vectors), want
        )
        columns = None if guides is None else guides.double()
        doubled = Guide(g.double(), g_pos.double(), columns, margin=margin, relative=relative)
        by_mask, stats = loss(Negatives(vectors, mask=want))
        plain, _ = loss(Negatives(vectors, mask=want), "reference")
        wide = None if vectors is None else vectors.double()
        truth, _ = loss(Negatives(wide, mask=want), "reference", torch.float64)
        for each in (guide, doubled):
            by_guide, found = loss(Negatives(vectors, guide=each))
            compare.exact("num_negatives", found.num_negatives, stats.num_negatives)
            if any_backend == "triton":  # has smaller tiles with a guide, and adds exponentials in another order
                compare.rounded("loss", by_guide, truth, plain)
            else:
                compare.exact("loss", by_guide, by_mask)


def test_a_guide_is_a_loop():
    g, g_pos, g_keys = whole(B, 3).double(), whole(B, 3, seed=1).double(), whole(K, 3, seed=2).double()
    g_keys[4] = math.nan
    g_pos[2, 1] = math.nan
    for margin, relative in ((1.0, False), (0.5, True)):
        mask = reference.guide_mask(Guide(g, g_pos, g_keys, margin=margin, relative=relative))
        for b in range(B):
            limit = float(g[b] @ g_pos[b])
            limit -= abs(limit) * margin if relative else margin
            assert mask[b].tolist() == [not float(g[b] @ n) > limit for n in g_keys]
    assert mask[2].all() and mask[:, 4].all()  # a NaN masks nothing


def test_a_guide_spares_the_positive_at_every_rank():
    """With keys gathered from ranks, a public loss protects column b of row b, which is a document of another rank on rank 1."""
    ranks, margin = 2, 0.05
    documents = unit(ranks * B, D, seed=1)
    for rank in range(ranks):
        rows = torch.arange(B) + rank * B  # rows of this rank's documents
        query = F.normalize(documents[rows] + 0.1 * unit(B, D, seed=2), dim=1)
        guide = Guide(query, documents[rows], documents, margin=margin)
        pool = Negatives(documents, ids=torch.arange(ranks * B), guide=guide)
        loss, stats = negmine.info_nce(
            query, documents[rows], pool, query_ids=rows, temperature=0.05, return_stats=True
        )
        assert bool(loss.isfinite()) and int(stats.num_empty) == 0
        scores = query @ documents.T
        keep = scores <= scores[range(B), rows][:, None] - margin
        wrong = (scores / 0.05).masked_fill(~keep, -torch.inf)  # the positive is masked by its own margin
        assert bool(wrong[range(B), rows].isinf().all())
        right = F.softplus(wrong.logsumexp(1) - scores[range(B), rows] / 0.05).mean()
        torch.testing.assert_close(loss, right)


def test_a_pool_may_be_overwritten_before_backward(any_backend):
    grads = []
    for overwrite in (False, True):
        query, positive, keys, own, *_ = tensors(device_of(any_backend))
        query.requires_grad_()
        loss = negmine.info_nce(query, positive, [keys, Negatives(own, select=Select(0, 3))], backend=any_backend)
        if overwrite:
            keys.fill_(math.nan)
            own.fill_(math.nan)
        loss.backward()
        grads.append(query.grad)
    assert torch.equal(*grads)


def test_rows_without_negatives_in_some_or_all_pools(any_backend):
    query, positive, keys, own, *_ = tensors(device_of(any_backend))
    leaves = [t.requires_grad_() for t in (query, positive, keys, own)]
    some = torch.ones(B, K, dtype=torch.bool, device=query.device)
    some[0], some[2] = False, False
    mask = torch.ones(B, M, dtype=torch.bool, device=query.device)
    mask[1], mask[2] = False, False
    for options in (
        {},
        {"decoupled": True},
        {"mix": Mix(4, 3, 2)},
        {"weight": Weight(1.0, 0.01)},
        {"select": Select(0, 3)},
    ):
        rows, stats = negmine.info_nce(
            query, positive, [Negatives(keys, mask=some), Negatives(own, mask=mask)], temperature=T, reduction="none",
            return_stats=True, backend=any_backend, **options,
        )  # fmt: skip
        assert float(rows[2]) == 0.0 and bool((rows[[0, 1, 3, 4]] != 0).all())
        assert [int(each.num_empty) for each in stats] == [2, 2]
        grads = torch.autograd.grad(rows.sum(), leaves)
        assert all(bool(g.isfinite().all()) for g in grads)
        assert not grads[0][2].any() and not grads[1][2].any() and not grads[3][2].any()
        only = negmine.info_nce(
            query[:1], positive[:1], own[:1], temperature=T, reduction="none", backend=any_backend, **options
        )
        if "mix" not in options:
            torch.testing.assert_close(rows[:1], only)


def test_a_queue_is_a_pool_with_its_ids(any_backend):
    device = device_of(any_backend)
    query, positive, keys, own, *_ = tensors(device)
    queue = MoCoQueue(D, K + 8, with_ids=True, random_init=False).to(device)
    queue.enqueue(keys, ids=torch.arange(K, device=device) % 7)
    ids, call = torch.arange(B, device=device), {"temperature": T, "backend": any_backend}
    got = negmine.info_nce(query, positive, [queue, own], query_ids=ids, **call)
    mask = ids[:, None] != torch.arange(K, device=device) % 7
    torch.testing.assert_close(got, negmine.info_nce(query, positive, [Negatives(keys, mask=mask), own], **call))


@pytest.mark.parametrize("options", [{"select": Select(0, 4), "weight": Weight(1.0)}, {"mix": Mix(6, 5, 4)}], ids=str)
def test_two_pools_compile_into_one_graph(options):
    torch._dynamo.reset()
    query, positive, keys, own, _, bias = tensors()

    def step(q, keys, own, bias):
        pools = [keys, Negatives(own, bias=bias), None]
        return negmine.info_nce(q, positive, pools, **options) + negmine.siglip(q, positive, pools[:2])

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (query, keys, own, bias)]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


q, k = unit(3, 4), unit(7, 4)
REFUSALS = [
    ([], ValueError, r"info_nce: negative_keys must be a list of at least one pool, got \[\]"),
    ([k, [k]], TypeError, r"info_nce: negative_keys\[1\] must be a tensor, a MoCoQueue, .*, got a list"),
    ([k, k[:, :2]], ValueError, r"info_nce: negative_keys\[1\] must be of shape \(K, D\)"),
    ([k, "x"], TypeError, r"info_nce: negative_keys\[1\] must be a tensor, a MoCoQueue, a Negatives"),
    ([k, Negatives(k, mask=torch.ones(3).bool())], ValueError, r"info_nce: negative_keys\[1\].mask must be of shape"),
    ([k, Negatives(k, bias=torch.ones(3))], ValueError, r"negative_keys\[1\].bias must be a floating tensor of shape \(7,\)"),
    (Negatives(k, bias=torch.ones(3, 7)), ValueError, r"negative_keys.bias must be a floating tensor of shape \(7,\)"),
    (Negatives(k, bias=torch.ones(7).long()), ValueError, r"negative_keys.bias must be a floating tensor of shape \(7,\)"),
    (Negatives(k[None].expand(3, -1, -1), bias=torch.ones(7)), ValueError, r"bias must be a floating tensor of shape \(3, 7\)"),
    (Negatives(k, guide=Guide(k, k, k)), ValueError, r"negative_keys.guide.query must be of shape \(B, G\) with query's B = 3"),
    (Negatives(k, guide=Guide(q, q, q)), ValueError, r"negative_keys.guide.keys must be of shape \(7, 4\), one row for each key"),
    (Negatives(k, guide=Guide(q, q, None)), TypeError, r"negative_keys.guide.keys must be a tensor, got None"),
]  # fmt: skip


@pytest.mark.parametrize("given, error, words", REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_invalid_pools_raise_errors(given, error, words):
    with pytest.raises(error, match=words):
        negmine.info_nce(q, q, given)


def test_options_that_a_function_ignores_raise_errors():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="query_ids must be None, because no pool of negative_keys has ids"):
        negmine.info_nce(q, q, [k, k], query_ids=ids)
    with pytest.raises(
        ValueError, match=r"siglip: negative_keys\[1\].mix must be None, because siglip has no option mix"
    ):
        negmine.siglip(q, q, [k, Negatives(k, mix=Mix())])
    with pytest.raises(
        ValueError, match=r"logsumexp: negative_keys\.weight must be None, because logsumexp has no option weight"
    ):
        negmine.logsumexp(q, Negatives(k, weight=Weight()))
    with pytest.raises(ValueError, match=r"quantile: negative_keys\.select must be None"):
        negmine.quantile(q, Negatives(k, select=Select()), 0.5)
    with pytest.raises(TypeError, match="logsumexp: negative_keys must be a tensor, a MoCoQueue, a Negatives"):
        negmine.logsumexp(q, [k, k])


GUIDES = [
    (lambda: Guide([1], q, k), TypeError, "Guide: query must be a tensor, got a list, which torch.as_tensor converts"),
    (lambda: Guide(q, q.long(), k), TypeError, "Guide: positive must be a floating tensor, got int64 tensor"),
    (lambda: Guide(q.long(), q, k), TypeError, "Guide: query must be a floating tensor, got int64 tensor"),
    (
        lambda: Guide(q, q[:2], k),
        ValueError,
        r"Guide: positive must be of query's shape \(3, 4\), got float32 tensor of shape \(2, 4\)",
    ),
    (lambda: Guide(q, q, k[:, :2]), ValueError, r"Guide: keys must be of shape \(K, G\) or \(B, M, G\)"),
    (lambda: Guide(q, q, k, margin=math.nan), ValueError, "margin must be a finite number, got nan"),
    (lambda: Guide(q, q, k, relative=1), ValueError, "relative must be True or False, got 1"),
    (lambda: Negatives(k, guide=k), TypeError, "Negatives: guide must be a negmine.Guide or None, got float32 tensor"),
    (lambda: Negatives(k, select=Mix()), TypeError, "Negatives: select must be a negmine.Select or None, got Mix"),
    (lambda: Negatives(k, bias=1.0), TypeError, "Negatives: bias must be a tensor or None, got a float"),
]


@pytest.mark.parametrize("make, error, words", GUIDES, ids=[words for _, _, words in GUIDES])
def test_invalid_guides_and_pools_raise_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_guide_of_mixed_dtypes_masks_as_the_widest(any_backend):
    """With small integers, the scores are exact in every dtype."""
    device = device_of(any_backend)
    q, p, k, guide_q, guide_p, guide_k = (whole(n, 8, device=device, seed=i) for i, n in enumerate((5, 5, 40) * 2))
    losses = [
        negmine.info_nce(
            q, p, Negatives(k, guide=Guide(guide_q.to(a), guide_p.to(b), guide_k.to(c))), temperature=8.0,
            backend=any_backend,
        )
        for a, b, c in itertools.product((torch.float32, torch.bfloat16, torch.float64), repeat=3)
    ]  # fmt: skip
    assert len({float(loss) for loss in losses}) == 1
