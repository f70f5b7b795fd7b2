"""Properties of the public ops with random inputs from hypothesis: the CPU kernels equal the reference, and identities.

An input that failed once is kept as an @example of its test.
"""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

import negmine
from negmine import Mix, MoCoQueue, Select, reference
from negmine.losses import mine_triplets
from negmine.ops import backends
from tests import compare
from tests.cases import DTYPES, dense_mask, ids, negatives, tags, whole

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)
DIMS = [1, 2, 3, 7, 8, 17, 96, 130]


@st.composite
def problems(draw):
    B, K, D = draw(st.integers(0, 70)), draw(st.integers(0, 400)), draw(st.sampled_from(DIMS))
    seed = draw(st.integers(0, 2**20))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    q, keys = whole(B, D, dtype=dtypes[0], seed=seed), whole(K, D, dtype=dtypes[1], seed=seed + 1)
    if K and draw(st.booleans()):  # duplicates and constant rows
        keys[: K // 2] = keys[0].clone()
    masks = ids(B, K, seed=seed) if draw(st.booleans()) else {}
    if masks and draw(st.booleans()):  # unknown ids, which are equal to nothing
        masks = {name: value - 1 for name, value in masks.items()}
    if draw(st.booleans()):
        masks["negative_mask"] = torch.rand(K, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
    return q, keys, masks


@st.composite
def windows(draw):
    fraction = draw(st.booleans())
    low = draw(st.floats(0, 0.99) if fraction else st.integers(0, 50))
    high = draw(st.none() | (st.floats(0.01, 1.0) if fraction else st.integers(1, 400)))
    if high is not None and high <= low:
        low, high = (0.0 if fraction else 0), high
    return Select(low, high)


@settings(max_examples=150, deadline=None)
@given(problems(), windows(), st.integers(1, 300))
def test_selection_is_exact(problem, select, N):
    q, keys, masks = problem
    allowed = dense_mask(q, keys, masks)
    got = negmine.mine_hardest(q, negatives(keys, masks), N, select=select, **tags(masks), backend="cpu")
    scores = q.float() @ keys.float().T
    times = reference.multiplicity(scores, None, select, allowed, 0, 0, 0)
    want = reference.mine_hardest(q.float(), keys.float(), N, times > 0)
    compare.exact("scores", got.scores, want[0])
    compare.exact("index", got.index, want[1])


@settings(max_examples=80, deadline=None)
@given(problems(), windows(), st.integers(1, 50), st.booleans(), st.integers(0, 2**31))
def test_samples_are_exact(problem, window, size, replace, seed):
    q, keys, masks = problem
    select = Select(window.range_min, window.range_max, sample=size, replace=replace)
    allowed = dense_mask(q, keys, masks)
    scores = q.float() @ keys.float().T  # (B, K)
    times = reference.multiplicity(scores, None, select, allowed, seed, 1, 2)
    call = {"select": select, "seed": seed, "step": 1, "row_offset": 2, **tags(masks), "backend": "cpu"}
    _, stats = negmine.info_nce(q, q, negatives(keys, masks), temperature=4.0, **call, return_stats=True)
    compare.exact("num_negatives", stats.num_negatives, times.sum(1))
    if not replace:
        got = negmine.mine_hardest(q, negatives(keys, masks), size, **call)
        compare.exact("index", got.index, reference.mine_hardest(q.float(), keys.float(), size, times > 0)[1])


@settings(max_examples=200, deadline=None)
@given(windows(), st.integers(0, 3000))
def test_no_pool_has_a_wider_window_than_promised(select, K):
    first, end = select.window(torch.arange(K + 1))
    assert int((end - first).clamp_min(0).max()) <= select.widest(K)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.01, 0.99))
def test_complementary_windows_add_up(problem, cut):
    q, keys, masks = problem
    if len(keys) * cut < 1:
        return  # the two windows overlap, because a window of fractions keeps at least one
    q, keys = q.float() / 30, keys.float() / 30
    allowed = dense_mask(q, keys, masks)
    if allowed is not None and bool((allowed.sum(1) * cut < 1).any()):
        return

    def lse(select):
        call = {"decoupled": True, "return_stats": True, "backend": "cpu"}
        return negmine.info_nce(q, q, negatives(keys, masks), select=select, **tags(masks), **call)[1]

    parts = lse(Select(0.0, cut)), lse(Select(cut, 1.0))
    full = lse(None)
    assert torch.equal(parts[0].num_negatives + parts[1].num_negatives, full.num_negatives)
    torch.testing.assert_close(torch.logaddexp(parts[0].logsumexp, parts[1].logsumexp), full.logsumexp)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 40), st.integers(0, 12), st.integers(0, 12), st.integers(0, 20), st.booleans())
def test_mixes_of_a_batch_are_those_of_its_parts(problem, hard, pairs, with_query, skip, distinct):
    q, keys, masks = problem
    mix = Mix(hard, pairs, with_query, skip=skip, distinct=distinct)
    columns = negatives(keys, masks)
    full = negmine.mix_negatives(q, columns, mix, seed=3, **tags(masks), backend="cpu")
    cut = len(q) // 2
    for rows, offset in ((slice(0, cut), 0), (slice(cut, None), cut)):
        own = {name: value[rows] for name, value in tags(masks).items()}
        part = negmine.mix_negatives(q[rows], columns, mix, seed=3, row_offset=offset, **own, backend="cpu")
        for a, b in zip(part, full, strict=True):
            assert torch.equal(a, b[rows])


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2**31))
def test_permuting_the_queue_changes_nothing(problem, seed):
    q, keys, masks = problem
    q, keys = q.float() / 30, keys.float() / 30
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    moved = {name: value if name == "query_ids" else value[order] for name, value in masks.items()}
    call = {**tags(masks), "reduction": "none", "backend": "cpu"}
    a, b = (negmine.info_nce(q, q, negatives(k, m), **call) for k, m in ((keys, masks), (keys[order], moved)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    q, keys = torch.randn(70, 24), torch.randn(20_000, 24)
    before = torch.get_num_threads()

    def run():
        leaf = q.clone().requires_grad_()
        loss = negmine.info_nce(leaf, q, keys, select=Select(3, 0.2), mix=Mix(9, 8, 7), backend="cpu")
        loss.backward()
        return loss.detach(), leaf.grad, negmine.mine_hardest(q, keys, 100, backend="cpu").scores

    want = run()
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    finally:
        torch.set_num_threads(before)


quick = settings(max_examples=30, deadline=None)
EMPTY = (whole(3, 2), whole(0, 2), {})


def on_both(function, *tensors, **options):
    """Return the results of the CPU kernels and of the reference."""
    return [function(*tensors, **options, backend=backend) for backend in ("cpu", "reference")]


def labels_of(q, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-1, 4, (len(t),), generator=generator) for t in (q, keys)]


@quick
@given(problems(), st.lists(st.integers(0, 500), min_size=1, max_size=4))
@example(EMPTY, [0])
def test_rank_thresholds(problem, ranks):
    q, keys, masks = problem
    compare.exact("scores", *on_both(negmine.rank_thresholds, q, negatives(keys, masks), ranks, **tags(masks)))


@quick
@given(problems(), st.lists(st.floats(0, 1), min_size=1, max_size=3))
@example(EMPTY, [0.5])
def test_quantile(problem, wanted):
    q, keys, masks = problem
    both = on_both(negmine.quantile, q, negatives(keys, masks), wanted, **tags(masks))
    torch.testing.assert_close(*both, equal_nan=True, rtol=1e-6, atol=1e-6)


@quick
@given(problems(), st.none() | windows(), st.booleans())
@example(EMPTY, None, True)
def test_statistics_of_a_loss_match_the_reference(problem, select, decoupled):
    q, keys, masks = problem
    options = {"select": select, "decoupled": decoupled, "temperature": 5.0, "reduction": "none", "return_stats": True}
    columns = negatives(keys, masks)
    (got, counted), (want, truth) = on_both(negmine.info_nce, q, q.flip(0), columns, **options, **tags(masks))
    for name in ("positive_rank", "num_negatives", "num_empty"):
        compare.exact(name, getattr(counted, name), getattr(truth, name))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@quick
@given(problems(), st.integers(0, 99), st.sampled_from(["out", "in"]), st.sampled_from(["all", "negatives_only"]))
@example(EMPTY, 0, "in", "all")
def test_sup_con(problem, seed, positives, denominator):
    q, keys, _ = problem
    options = {"positives": positives, "denominator": denominator, "temperature": 5.0, "return_stats": True}
    (got, counted), (want, truth) = on_both(negmine.sup_con, q, keys, *labels_of(q, keys, seed), **options)
    compare.exact("num_positives", counted.num_positives, truth.num_positives)
    compare.exact("num_without_positive", counted.num_without_positive, truth.num_without_positive)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@quick
@given(
    problems(),
    st.integers(0, 99),
    st.sampled_from(["easy", "hard"]),
    st.sampled_from(["hardest", "semihard", "easiest"]),
)
@example(EMPTY, 0, "easy", "semihard")
def test_mine_triplets(problem, seed, positive, negative):
    q, keys, _ = problem
    got, want = on_both(
        mine_triplets, q, keys, *labels_of(q, keys, seed), positive=positive, negative=negative, num_negatives=3
    )
    for name in got._fields:
        compare.exact(name, getattr(got, name), getattr(want, name))


@quick
@given(problems(), st.integers(1, 40), st.integers(0, 8), st.integers(0, 8), st.integers(0, 2**32 - 1))
@example(EMPTY, 5, 3, 2, 0)
def test_parents_of_mixes(problem, hard, pairs, with_query, seed):
    q, keys, masks = problem
    mix = Mix(hard, pairs, with_query)
    got, want = on_both(negmine.mix_negatives, q, negatives(keys, masks), mix, seed=seed, **tags(masks))
    compare.exact("parents", got.parents, want.parents)
    compare.exact("coefficients", got.coefficients, want.coefficients.float())


@quick
@given(problems(), st.integers(1, 6), st.integers(1, 50), st.integers(1, 50))
def test_a_corpus_in_any_pieces(problem, N, batch, chunk):
    q, keys, _ = problem
    if not (len(q) and len(keys)):
        return
    q, keys = q.float(), keys.float()
    positives = torch.arange(len(q)) % len(keys)
    whole_corpus = negmine.mine_hard_negatives(q, keys, positives, num_negatives=N)
    cut = len(keys) // 2
    pieces = [part for part in (keys[:cut], keys[cut:]) if len(part)]
    options = {"num_negatives": N, "batch_size": batch, "corpus_chunk_size": chunk}
    parts = negmine.mine_hard_negatives(q, pieces, positives, **options)
    for name in ("indices", "scores", "num_valid"):
        assert (getattr(parts, name) == getattr(whole_corpus, name)).all(), name


@quick
@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=8))
def test_a_ring_holds_the_last_keys(K, batches):
    queue, entered = MoCoQueue(1, K, with_ids=True, random_init=False), 0
    for count in batches:
        number = torch.arange(entered, entered + count)
        queue.enqueue(number[:, None].float(), ids=number)
        entered += count
    assert sorted(queue.ids.tolist()) == list(range(max(0, entered - K), entered))
    assert queue.keys[:, 0].tolist() == queue.ids.tolist() and int(queue.queue_ptr) == entered % K


@st.composite
def pools(draw):
    """query, positives, and one to three pools of any form, with masks, ids, biases and options; integer vectors."""
    B, D, seed = draw(st.integers(1, 9)), draw(st.sampled_from([2, 5, 16])), draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    vectors = [whole(B, D, seed=seed + i) for i in (0, 1)]
    with_ids, listed = draw(st.booleans()), []
    for place in range(draw(st.integers(1, 3))):
        K, form = draw(st.integers(0, 30)), draw(st.sampled_from(["shared", "own", "batch"]))
        shape = {"shared": (K,), "own": (B, K), "batch": (B,)}[form]
        options = {"bias": torch.randn(shape, generator=generator)} if draw(st.booleans()) else {}
        if form != "batch" and with_ids:
            options["ids"] = torch.randint(-1, 4, shape, generator=generator)
        if draw(st.booleans()):
            options["mask"] = torch.rand(shape, generator=generator) < 0.7
        options["select"] = draw(st.none() | windows())
        options["weight"] = draw(st.sampled_from([None, negmine.Weight(0.5), negmine.Weight(tau_plus=0.1)]))
        keys = None if form == "batch" else whole(*shape, D, seed=seed + 2 + place)
        listed.append(negmine.Negatives(keys, **options))
    tagged = any(pool.ids is not None or pool.keys is None for pool in listed)
    query_ids = torch.randint(-1, 4, (B,), generator=generator) if with_ids and tagged else None
    return vectors, listed, query_ids


@settings(max_examples=60, deadline=None)
@given(pools(), st.booleans(), st.sampled_from([None, (1, 2), (2,)]))
def test_mixtures_of_pools_and_options(problem, decoupled, widths):
    """Kernels equal the reference in info_nce and, with several widths, in matryoshka, with many equal scores."""
    (q, positive), listed, query_ids = problem
    options = {"temperature": 8.0, "decoupled": decoupled, "query_ids": query_ids, "reduction": "none"}
    loss = negmine.info_nce
    if widths is not None:
        loss, options["widths"] = negmine.losses.matryoshka, widths
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference"), (torch.float32, "reference")):
        leaves = [v.to(dtype).requires_grad_() for v in (q, positive)]
        rows = loss(*leaves, listed if len(listed) > 1 else listed[0], **options, backend=backend)
        results.append([rows, *torch.autograd.grad(rows.sum(), leaves, allow_unused=True)])
    for name, got, truth, plain in zip(("loss", "query", "positive"), *results, strict=True):
        compare.rounded(name, got, truth, plain, condition=16.0, terms=torch.tensor(4.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**20), windows())
def test_late_interaction_is_its_definition(B, K, tokens, most, seed, select):
    generator = torch.Generator().manual_seed(seed)
    query, positive, documents = (
        whole(*shape, 4, seed=seed + i) for i, shape in enumerate([(B, tokens), (B, most), (K, most)])
    )
    lengths = {
        "query_lengths": torch.randint(0, tokens + 1, (B,), generator=generator),
        "positive_lengths": torch.randint(1, most + 1, (B,), generator=generator),
        "negative_lengths": torch.randint(0, most + 1, (K,), generator=generator),
    }
    given_ = {"temperature": 16.0, "select": select, "reduction": "none", **lengths}
    results = []
    for dtype, backend in ((torch.float32, None), (torch.float64, "reference"), (torch.float32, "reference")):
        leaves = [v.to(dtype).requires_grad_() for v in (query, positive, documents)]
        rows = negmine.losses.late_interaction(*leaves, **given_, backend=backend)
        results.append([rows, *torch.autograd.grad(rows.sum(), leaves)])
    for name, got, truth, plain in zip(("loss", "query", "positive", "documents"), *results, strict=True):
        compare.rounded(name, got, truth, plain, condition=16.0, terms=torch.tensor(4.0))
    mined = negmine.losses.mine_late_interaction(query, documents, 4, positive_key=positive, select=select, **lengths)
    scores = reference.maxsim(query, documents, lengths["query_lengths"], lengths["negative_lengths"])
    allowed = (lengths["negative_lengths"] > 0).expand(B, K)
    kept = reference.multiplicity(scores, None, select, allowed, 0, 0, 0) > 0
    index, count = reference.ranking(scores, kept)
    want = index[:, :4].masked_fill(torch.arange(min(K, 4)) >= count[:, None], -1)
    assert torch.equal(mined.index[:, : want.shape[1]], want) and bool((mined.index[:, want.shape[1] :] == -1).all())
