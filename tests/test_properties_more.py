"""Every other public op over random problems, by hypothesis: on small integers the CPU kernels give the reference's bits.

An example that once failed stays: as an @example above its test.
"""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

import negmine
from negmine import Mix, MoCoQueue, backends
from tests import compare
from tests.cases import whole
from tests.test_properties import problems, windows

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)
quick = settings(max_examples=30, deadline=None)
EMPTY = (whole(3, 2), whole(0, 2), {})


def on_both(op, *tensors, **options):
    """The results of the CPU kernels and of the reference."""
    return [getattr(negmine, op)(*tensors, **options, backend=backend) for backend in ("cpu", "reference")]


def labels_of(q, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-1, 4, (len(t),), generator=generator) for t in (q, keys)]


@quick
@given(problems(), st.lists(st.integers(0, 500), min_size=1, max_size=4))
@example(EMPTY, [0])
def test_rank_thresholds(problem, ranks):
    q, keys, masks = problem
    compare.exact("scores", *on_both("rank_thresholds", q, keys, ranks, **masks))


@quick
@given(problems(), st.lists(st.floats(0, 1), min_size=1, max_size=3))
@example(EMPTY, [0.5])
def test_percentile(problem, wanted):
    q, keys, masks = problem
    torch.testing.assert_close(*on_both("percentile", q, keys, wanted, **masks), equal_nan=True, rtol=1e-6, atol=1e-6)


@quick
@given(problems(), st.none() | windows(), st.booleans())
@example(EMPTY, None, True)
def test_what_a_loss_counts(problem, select, decoupled):
    q, keys, masks = problem
    options = {"select": select, "decoupled": decoupled, "temperature": 5.0, "reduction": "none", "return_stats": True}
    (got, counted), (want, truth) = on_both("info_nce", q, q.flip(0), keys, **options, **masks)
    for name in ("positive_rank", "num_negatives", "num_empty"):
        compare.exact(name, getattr(counted, name), getattr(truth, name))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@quick
@given(problems(), st.integers(0, 99), st.sampled_from(["out", "in"]), st.sampled_from(["all", "negatives_only"]))
@example(EMPTY, 0, "in", "all")
def test_sup_con(problem, seed, positives, denominator):
    q, keys, _ = problem
    options = {"positives": positives, "denominator": denominator, "temperature": 5.0, "return_stats": True}
    (got, counted), (want, truth) = on_both("sup_con", q, keys, *labels_of(q, keys, seed), **options)
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
        "mine_triplets", q, keys, *labels_of(q, keys, seed), positive=positive, negative=negative, num_negatives=3
    )
    for name in got._fields:
        compare.exact(name, getattr(got, name), getattr(want, name))


@quick
@given(problems(), st.integers(1, 40), st.integers(0, 8), st.integers(0, 8), st.integers(0, 2**32 - 1))
@example(EMPTY, 5, 3, 2, 0)
def test_parents_of_mixes(problem, hard, pairs, with_query, seed):
    q, keys, masks = problem
    got, want = on_both("mix_negatives", q, keys, Mix(hard, pairs, with_query), seed=seed, **masks)
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
