"""Properties over random shapes, masks and windows, by hypothesis: the CPU kernels against the reference, and identities."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import negmine
from negmine import Mix, Select, backends, reference
from negmine.pool import check_pool, usable
from tests import compare
from tests.cases import DTYPES, ids, whole

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
    allowed = usable(check_pool("test", q, keys, **masks), q, keys)
    got = negmine.mine_hardest(q, keys, N, select=select, **masks, backend="cpu")
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
    allowed = usable(check_pool("test", q, keys, **masks), q, keys)
    scores = q.float() @ keys.float().T  # (B, K)
    times = reference.multiplicity(scores, None, select, allowed, seed, 1, 2)
    call = {"select": select, "seed": seed, "step": 1, "row_offset": 2}
    _, stats = negmine.info_nce(q, q, keys, temperature=4.0, **call, **masks, return_stats=True, backend="cpu")
    compare.exact("num_negatives", stats.num_negatives, times.sum(1))
    if not replace:
        got = negmine.mine_hardest(q, keys, size, **call, **masks, backend="cpu")
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
        return  # a fraction window keeps at least one: the two overlap
    q, keys = q.float() / 30, keys.float() / 30
    allowed = usable(check_pool("test", q, keys, **masks), q, keys)
    if allowed is not None and bool((allowed.sum(1) * cut < 1).any()):
        return

    def lse(select):
        return negmine.info_nce(q, q, keys, select=select, decoupled=True, return_stats=True, **masks, backend="cpu")[1]

    parts = lse(Select(0.0, cut)), lse(Select(cut, 1.0))
    full = lse(None)
    assert torch.equal(parts[0].num_negatives + parts[1].num_negatives, full.num_negatives)
    torch.testing.assert_close(torch.logaddexp(parts[0].logsumexp, parts[1].logsumexp), full.logsumexp)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 40), st.integers(0, 12), st.integers(0, 12), st.integers(0, 20), st.booleans())
def test_mixes_of_a_batch_are_those_of_its_parts(problem, hard, pairs, with_query, skip, distinct):
    q, keys, masks = problem
    mix = Mix(hard, pairs, with_query, skip=skip, distinct=distinct)
    full = negmine.mix_negatives(q, keys, mix, seed=3, **masks, backend="cpu")
    cut = len(q) // 2
    for rows, offset in ((slice(0, cut), 0), (slice(cut, None), cut)):
        own = {name: value[rows] if name == "query_ids" else value for name, value in masks.items()}
        part = negmine.mix_negatives(q[rows], keys, mix, seed=3, row_offset=offset, **own, backend="cpu")
        for a, b in zip(part, full, strict=True):
            assert torch.equal(a, b[rows])


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2**31))
def test_permuting_the_queue_changes_nothing(problem, seed):
    q, keys, masks = problem
    q, keys = q.float() / 30, keys.float() / 30
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    moved = {name: value if name == "query_ids" else value[order] for name, value in masks.items()}
    a = negmine.info_nce(q, q, keys, **masks, reduction="none", backend="cpu")
    b = negmine.info_nce(q, q, keys[order], **moved, reduction="none", backend="cpu")
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
