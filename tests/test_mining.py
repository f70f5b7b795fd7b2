"""mine_hard_negatives compared with dense loops: semantics, splits, mistakes of other miners, memory, padding, errors.

With integer embeddings, scores are exact, so the indices must equal those of the loop, also for equal scores. With float
embeddings, results must be bit-identical for all batch sizes, chunks and shards.
"""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import negmine
from negmine import NegativeIndex, Select
from negmine.ops import backends
from tests.cases import unit, whole
from tests.compare import same_result, selected
from tests.conftest import device_of, interpreted
from tests.peak import peak_mib

mine = negmine.mine_hard_negatives
Q, K, D = 9, 61, 5


def some_lists(count: int, most: int, seed: int, least: int = 1) -> list[list[int]]:
    """`count` lists of least..most distinct rows of K."""
    rng = np.random.default_rng(seed)
    return [rng.choice(K, rng.integers(least, most + 1), replace=False).tolist() for _ in range(count)]


def loop(
    q,
    c,
    positives,
    exclude=None,
    *,
    select,
    range_mode="filtered",
    positive_aggregation="min",
    n=3,
    dedup="none",
):
    """Return (indices, scores, positive_scores) for sampling_strategy="top", computed for one query and one row at a time."""
    rows, kind = c.tolist(), {}
    first = [kind.setdefault(tuple(row), k) if dedup == "exact" else k for k, row in enumerate(rows)]
    aggregate = {"min": min, "max": max, "mean": lambda s: sum(s) / len(s)}[positive_aggregation]
    indices, scores, anchors = [], [], []
    for b, query in enumerate(q.tolist()):
        s = [sum(x * y for x, y in zip(query, row, strict=True)) for row in rows]
        hidden = {first[k] for k in positives[b] + (exclude[b] if exclude else [])}
        anchor = aggregate([s[k] for k in positives[b]])
        top = select.highest_score(torch.tensor([anchor])).item()
        ranked = sorted((k for k in range(len(rows)) if first[k] == k), key=lambda k: (-s[k], k))
        low = -math.inf if select.min_score is None else select.min_score

        def allowed(k, s=s, hidden=hidden, low=low, top=top):
            return k not in hidden and low <= s[k] <= top

        if range_mode == "filtered":
            ranked = [k for k in ranked if allowed(k)]
        begin, end = (int(x) for x in select.window(torch.tensor([len(ranked)])))
        kept = [k for k in ranked[begin:end] if allowed(k)][:n]
        indices.append(kept + [-1] * (n - len(kept)))
        scores.append([s[k] for k in kept] + [-math.inf] * (n - len(kept)))
        anchors.append(anchor)
    return np.array(indices), np.array(scores, np.float32), np.array(anchors, np.float32)


SELECTS = [
    Select(),
    Select(4, 9),
    Select(0.1, 0.5),
    Select(2, 0.9, max_score=6.0),
    Select(absolute_margin=1.0, min_score=-5.0),
    Select(relative_margin=0.25),
    Select(0.25, 0.75, relative_margin=0.25, max_score=7.0),
    Select(50, 500),
]


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("range_mode", ["filtered", "raw"])
@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_loops(select, range_mode, dedup, any_backend):
    if range_mode == "raw" and select.range_max is None:
        pytest.skip("raw windows have an end")
    if interpreted(any_backend) and (dedup == "exact" or select not in SELECTS[2:5]):
        pytest.skip("triton: interpreted, on fewer cases")
    device = device_of(any_backend)
    q, c = whole(Q, D, device=device, seed=1), whole(K, D, device=device, seed=2)
    c[40:44] = c[3]
    positives, exclude = some_lists(Q, 3, 0), some_lists(Q, 4, 1, least=0)
    positives[0] = [3]
    for how, n, with_exclude in (("min", 3, True), ("max", 40, True), ("mean", 7, False)):
        options = {"select": select, "range_mode": range_mode, "positive_aggregation": how}
        exclude_now = exclude if with_exclude else None
        got = mine(
            *(q, c, positives),
            **options,
            num_negatives=n,
            exclude=exclude_now,
            deduplicate=dedup,
            backend=any_backend,
            batch_size=4,
            corpus_chunk_size=23,
        )
        indices, scores, anchors = loop(q, c, positives, exclude_now, **options, n=n, dedup=dedup)
        np.testing.assert_array_equal(got.positive_scores, anchors)
        np.testing.assert_array_equal(got.indices, indices)
        np.testing.assert_array_equal(got.scores, scores)
        np.testing.assert_array_equal(got.num_valid, (indices >= 0).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["top", "random", "weighted"])
@pytest.mark.parametrize("range_mode", ["filtered", "raw"])
def test_any_split_gives_the_same_bits(dtype, strategy, range_mode):
    q, c = unit(50, 67, dtype=dtype, seed=1), unit(700, 67, dtype=dtype, seed=2)
    c[300:310] = c[5]
    positives = [[b, 5 + b] for b in range(50)]
    for select in (Select(1, 40, absolute_margin=0.01), Select(0.01, 0.2, relative_margin=0.05)):
        options = {"select": select, "sampling_strategy": strategy, "range_mode": range_mode, "num_negatives": 6}
        options |= {"seed": 11, "exclude": list(range(100, 150)), "deduplicate": "exact"}
        whole_run = mine(q, c, positives, **options)
        assert (whole_run.num_valid == 6).any()
        for batch, chunk, cuts in ((7, 33, [1, 1, 400]), (50, 699, [350]), (1, 700, []), (None, None, [699])):
            shards = [c[i:j] for i, j in itertools.pairwise([0, *cuts, 700])]
            halves = [q[:13], q[13:]]
            got = mine(halves, shards, positives, batch_size=batch, corpus_chunk_size=chunk, **options)
            same_result(got, whole_run)
            assert got.config["content"] == whole_run.config["content"]


def test_arrays_tensors_files_and_forms_of_lists(tmp_path):
    q, c = unit(6, 8, seed=1).numpy(), unit(40, 8, seed=2).numpy()
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "a.npy", c[:11])
    np.save(tmp_path / "b.npy", np.asfortranarray(c[11:]))
    before = (tmp_path / "a.npy").read_bytes()
    lists = [[3], [4, 5], [], [6], [7], [8, 9, 39]]
    csr = (np.array([0, 1, 3, 3, 4, 5, 8]), np.array([3, 4, 5, 6, 7, 8, 9, 39]))
    want = mine(q, c, lists)
    readonly = c.copy()
    readonly.flags.writeable = False
    strided = torch.from_numpy(np.ascontiguousarray(c.T)).T
    same_result(mine(str(tmp_path / "q.npy"), [tmp_path / "a.npy", str(tmp_path / "b.npy")], csr), want)
    same_result(
        mine(torch.from_numpy(q).requires_grad_(), [readonly[:5], strided[5:]], [np.array(p, int) for p in lists]), want
    )
    same_result(mine(q[::-1][::-1], c[::-1][::-1], tuple(map(torch.tensor, csr))), want)
    assert np.isnan(want.positive_scores).tolist() == [False, False, True, False, False, False]
    assert (tmp_path / "a.npy").read_bytes() == before
    flat = [3, 4, 0, 6, 7, 8]
    for form in (np.array(flat), torch.tensor(flat), tuple(flat), [np.int64(p) for p in flat]):
        same_result(mine(q, c, form), mine(q, c, [[p] for p in flat]))


def test_random_draws_as_the_reference_samples():
    q, c = unit(20, 16, seed=1), unit(300, 16, seed=2)
    positives = torch.arange(20)
    others = negmine.Negatives(c, ids=torch.arange(300))
    for window, filters in (((2, 30), {}), ((0.1, 0.4), {"absolute_margin": 0.1})):
        got = mine(
            *(q, c, positives), select=Select(*window, **filters), sampling_strategy="random", num_negatives=5, seed=3
        )
        select = Select(*window, **filters, sample=5)
        options = {"positive_key": c[:20], "select": select, "query_ids": positives, "seed": 3}
        want = negmine.mine_hardest(q, others, 5, **options, backend="reference")
        np.testing.assert_array_equal(got.indices, want.index.numpy())
        other = mine(
            q, c, positives, select=Select(*window, **filters), sampling_strategy="random", num_negatives=5, seed=4
        )
        assert (other.indices != got.indices).any()


def test_an_open_window_is_drawn_from_its_first_ranks():
    q, c = unit(200, 16, seed=1), unit(300, 16, seed=2)
    positives = list(range(200))
    window = mine(q, c, positives, select=Select(5), num_negatives=20)
    drawn = mine(q, c, positives, select=Select(5), num_negatives=2, sampling_strategy="random")
    drawn_at = [
        pool.index(k) for row, pool in zip(drawn.indices.tolist(), window.indices.tolist(), strict=True) for k in row
    ]
    assert set(drawn_at) == set(range(20))
    assert (np.diff(drawn.scores) <= 0).all(), "hardest first"


@pytest.mark.parametrize("strategy", ["random", "weighted"])
def test_frequencies(strategy):
    copies = 4000
    q, c = torch.ones(copies, 1), torch.tensor([[0.5], [0.4], [0.2], [9.0]])
    got = mine(q, c, [3] * copies, sampling_strategy=strategy, sampling_temperature=0.2, num_negatives=1)
    chance = torch.softmax(c[:3, 0] / 0.2, 0).numpy() if strategy == "weighted" else np.full(3, 1 / 3)
    seen = np.bincount(got.indices[:, 0], minlength=4) / copies
    assert seen[3] == 0
    assert (np.abs(seen[:3] - chance) < 4 * np.sqrt(chance * (1 - chance) / copies)).all()


def test_margin_of_a_negative_positive_stays_below_it():
    q, c = torch.ones(1, 1), torch.tensor([[-2.0], [-1.95], [-2.05], [-2.2], [-3.0]])
    got = mine(q, c, [0], select=Select(relative_margin=0.05))
    assert got.indices.tolist() == [[3, 4, -1]]  # -2.05 and -1.95 are above -2 - 0.1


def test_positives_take_no_place_of_a_filtered_window():
    c = torch.arange(20, 0, -1.0)[:, None]
    positives = [list(range(8))]  # the eight hardest rows
    got = mine(torch.ones(1, 1), c, positives, select=Select(0, 5), num_negatives=5)
    assert got.indices.tolist() == [[8, 9, 10, 11, 12]]
    got = mine(torch.ones(1, 1), c, positives, select=Select(0, 10), range_mode="raw", num_negatives=5)
    assert got.indices.tolist() == [[8, 9, -1, -1, -1]]


def test_small_and_empty_inputs():
    q, c = whole(3, 4, seed=1), whole(2, 4, seed=2)
    got = mine(q, c, [0, 1, 0], num_negatives=5)
    assert got.num_valid.tolist() == [1, 1, 1] and (got.indices[:, 1:] == -1).all()
    assert np.isneginf(got.scores[:, 1:]).all()
    nothing = mine(q, c, [0, 1, 0], select=Select(max_score=-1e6), num_negatives=2)
    assert (nothing.indices == -1).all() and nothing.skipped["max_score"] == 3
    assert mine(q, c[:0], [[], [], []]).num_valid.tolist() == [0, 0, 0]
    assert mine(q[:0], c, []).indices.shape == (0, 3)
    assert (
        mine(q[:0], c, [], select=Select(0.1, 0.5, max_score=1.0), sampling_strategy="random").skipped["positive"] == 0
    )
    for result in (nothing, mine(q[:0], c, [])):
        assert "queries" in result.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_positives_and_candidates_are_scored_alike(dtype):
    """A copy of the positive has exactly the score of the positive: it is kept without a margin, and dropped with any margin."""
    q, c = unit(40, 130, dtype=dtype, seed=1), unit(500, 130, dtype=dtype, seed=2)
    c[260:300] = c[:40]
    positives = list(range(40))
    kept = mine(q, c, positives, select=Select(absolute_margin=0.0), num_negatives=1, corpus_chunk_size=64)
    np.testing.assert_array_equal(kept.indices[:, 0], np.arange(260, 300))
    np.testing.assert_array_equal(kept.scores[:, 0], kept.positive_scores)
    below = mine(q, c, positives, select=Select(absolute_margin=1e-6), num_negatives=500, batch_size=3)
    assert not (below.indices == np.arange(260, 300)[:, None]).any()
    once = mine(q, c, positives, select=Select(absolute_margin=0.0), num_negatives=500, deduplicate="exact")
    assert not (once.indices == np.arange(260, 300)[:, None]).any()


def test_unnormalised_and_broken_rows():
    q, c = 1e4 * unit(4, 8, seed=1), 1e4 * unit(50, 8, seed=2)
    assert np.isfinite(mine(q, c, [0, 1, 2, 3]).scores).all()
    clean = mine(q, c, [0, 1, 2, 3], select=Select(absolute_margin=1.0))
    c[20], q[3] = torch.nan, torch.nan
    with pytest.warns(UserWarning, match="contain NaN or infinity"):
        got = mine(q, c, [0, 1, 2, 3], select=Select(absolute_margin=1.0))
    assert got.num_valid[3] == 0 and not (got.indices == 20).any() and np.isnan(got.positive_scores[3])
    untouched = ~(clean.indices[:3] == 20).any(1)
    np.testing.assert_array_equal(got.indices[:3][untouched], clean.indices[:3][untouched])


def test_equal_rows_by_value():
    c = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [2.0, 0.0], [2.0, -0.0], [1.0, 1.0], [2.0, 0.0]])
    got = mine(torch.tensor([[1.0, 1.0]]), c, [1], exclude=[5], num_negatives=6, deduplicate="exact")
    assert got.indices.tolist() == [[4, -1, -1, -1, -1, -1]]
    masks = {"positive": 1, "exclude": 3, "own_text": 0, "equal_to_positive": 1, "duplicate": 0}
    assert got.skipped == masks | {"not_finite": 0}


def test_counters():
    q, c = whole(Q, D, seed=1), whole(K, D, seed=2)
    positives, exclude = some_lists(Q, 3, 0), some_lists(Q, 4, 1, least=0)
    select = Select(absolute_margin=2.0, min_score=-3.0)
    got = mine(q, c, positives, exclude=exclude, select=select, batch_size=2, corpus_chunk_size=7)
    scores = (q @ c.T).numpy()
    hidden = [set(p) | set(e) for p, e in zip(positives, exclude, strict=True)]
    pool = np.array([[k not in hidden[b] for k in range(K)] for b in range(Q)])
    assert got.skipped == {
        "positive": sum(map(len, positives)),
        "exclude": int((~pool).sum()) - sum(map(len, positives)),
        "own_text": 0,
        "equal_to_positive": 0,
        "duplicate": 0,
        "not_finite": 0,
        "min_score": int((pool & (scores < -3)).sum()),
        "absolute_margin": int((pool & (scores >= -3) & (scores > got.positive_scores[:, None] - 2)).sum()),
    }
    assert set(mine(q, c, positives, select=select, count_skipped=False).skipped) == {
        "positive",
        "exclude",
        "own_text",
        "equal_to_positive",
        "duplicate",
        "not_finite",
    }


def test_a_single_filter_needs_no_additional_pass(monkeypatch):
    """No other op reads the corpus, and the negatives are the same as without counting."""
    cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
    q, c, positives = unit(200, 24, seed=1), unit(900, 24, seed=2), list(range(200))
    dropped = (q @ c.T > (q * c[:200]).sum(1, keepdim=True) - 0.1).fill_diagonal_(False).sum()

    def refused(*arguments):
        raise AssertionError("a pass of its own")

    monkeypatch.setitem(cpu.functions, "count_negatives", refused)
    options = {"select": Select(absolute_margin=0.1), "backend": "cpu", "corpus_chunk_size": 333}
    counted = mine(q, c, positives, **options)
    uncounted = mine(q, c, positives, **options, count_skipped=False)
    np.testing.assert_array_equal(counted.indices, uncounted.indices)
    np.testing.assert_array_equal(counted.scores, uncounted.scores)
    assert counted.skipped["absolute_margin"] == int(dropped) > 1000
    # With two filters, one pass does not tell how many each drops.
    with pytest.raises(AssertionError, match="a pass of its own"):
        mine(q, c, positives, select=Select(absolute_margin=0.1, max_score=0.5), backend="cpu")


def test_counters_of_a_raw_window():
    c = torch.arange(20, 0, -1.0)[:, None]
    got = mine(
        *(torch.ones(2, 1), c, [[0, 15], [4]]),
        query_ids=[0, 1],
        select=Select(2, 10, max_score=15.5),
        range_mode="raw",
        exclude=[6, 19],
    )
    assert got.indices.tolist() == [[5, 7, 8], [5, 6, 7]]
    masks = {"positive": 3, "exclude": 2, "own_text": 0, "equal_to_positive": 0, "duplicate": 0, "not_finite": 0}
    assert got.skipped == masks | {"max_score": 3 + 2}


def test_progress_bar(capsys):
    options = {"batch_size": 2, "corpus_chunk_size": 8, "select": Select(0.1, 0.5, max_score=9.0)}
    got = mine(unit(4, 8), unit(30, 8), [0, 1, 2, 3], show_progress_bar=True, **options)
    assert "16 of 16 chunks" in capsys.readouterr().err  # 2 batches of 4 chunks, for counting and for the scan
    same_result(mine(unit(4, 8), unit(30, 8), [0, 1, 2, 3], **options), got)


def test_real_embeddings():
    from benchmarks import wordnet

    task = wordnet.load()
    q, positives = task.queries[:64], task.positives[:64]
    c = torch.cat([task.corpus[:9000], task.corpus[positives]])
    answers = torch.arange(9000, 9064)
    got = mine(q, c, answers, exclude=[[int(p)] if p < 9000 else [] for p in positives], num_negatives=10)
    truth = q.double() @ c.double().T  # (64, 9064)
    usable = torch.ones_like(truth, dtype=torch.bool)
    usable[torch.arange(64), answers] = False
    inside = positives < 9000
    usable[torch.arange(64)[inside], positives[inside]] = False
    selected("wordnet", torch.from_numpy(got.scores), torch.from_numpy(got.indices), truth, usable)


def small_and_large_run():
    q, c = torch.randn(4096, 32), torch.randn(150_000, 32)
    options = {"select": Select(5, 200, absolute_margin=0.1), "sampling_strategy": "weighted", "num_negatives": 20}
    options |= {"max_memory_bytes": 32 << 20, "count_skipped": False}
    small, large = (q[:64], c[:5000], list(range(64))), (q, c, [[b, b + 1] for b in range(4096)])
    return lambda inputs: mine(*inputs, **options), small, large


def test_memory_is_bounded():
    """All scores would need 2.4 GB. In addition to the 32 MiB, there are the kernels' buffers for each thread, and the result."""
    assert peak_mib(small_and_large_run) < 32 + 16


def test_config_says_what_ran():
    q, c = unit(4, 8, seed=1), unit(30, 8, seed=2)
    config = mine(q, c, [0, 1, 2, 3], select=Select(0.1, 5), seed=7).config
    assert json.loads(json.dumps(config)) == config
    assert config["arguments"]["seed"] == 7 and config["arguments"]["select"]["range_min"] == 0.1
    assert (config["queries"], config["corpus_rows"], config["dimension"]) == (4, 30, 8)
    assert config["versions"]["negmine"] == negmine.__version__
    changed = c.clone()
    changed[29, 7] += 1e-6
    other = mine(q, changed, [0, 1, 2, 3]).config["content"]
    assert [key for key in other if other[key] != config["content"][key]] == ["corpus_embeddings"]


ROWS_3, ROWS_7 = unit(3, 4), unit(7, 4)


def call(query=ROWS_3, corpus=ROWS_7, positives=(0, 1, 2), **options):
    return lambda: mine(query, corpus, positives, **options)


REFUSALS = [
    (
        call(query=3),
        TypeError,
        "query_embeddings must be an array, a tensor, the path of a .npy, .safetensors or .parquet file, or a list of those",
    ),
    (call(query=torch.ones(3, 4).long()), TypeError, "query_embeddings must be float32, float16, bfloat16 or float64"),
    (call(query=np.ones((3, 4), ">f4")), TypeError, "native byte order, got >f4"),
    (
        call(query=torch.ones(3)),
        ValueError,
        "query_embeddings must be of shape (rows, D) with D >= 1, got (3,)",
    ),
    (call(corpus=torch.ones(7, 5)), ValueError, "corpus_embeddings must be of query_embeddings' D = 4, got (7, 5)"),
    (call(corpus=[]), ValueError, "corpus_embeddings must be an array"),
    (
        call(corpus=[unit(3, 4), unit(3, 4).half()]),
        ValueError,
        "corpus_embeddings[1] must be of the D and dtype of the first",
    ),
    (
        call(corpus="missing.npy"),
        ValueError,
        "corpus_embeddings must be the path of an existing .npy, .safetensors or .parquet file",
    ),
    (call(positives=[0, 1]), ValueError, "positives must be of 3 entries, one for each query, got 2 entries"),
    (
        call(positives=[0, 1, 7]),
        ValueError,
        "positives must be row numbers of the corpus, in [0, 7), got 7 for query 2",
    ),
    (call(positives=[[0], [-1], []]), ValueError, "in [0, 7), got -1 for query 1"),
    (call(positives=[0.0, 1.0, 2.0]), TypeError, "positives must be a flat sequence of ints"),
    (call(positives=[[0], 1, [2]]), TypeError, "positives[1] must be a flat sequence of ints"),
    (call(positives="012"), TypeError, "positives must be one row number per query"),
    (call(positives=([0, 1, 3], [0, 1, 2])), ValueError, "positives's indptr must be ascending from 0"),
    (call(exclude=[1]), ValueError, "exclude must be of 3 entries, one for each query"),
    (call(positives=[[0], [], [1]], select=Select(absolute_margin=0.1)), ValueError, "got none for query 1"),
    (call(select=0.5), TypeError, "select must be a negmine.Select or None"),
    (call(select=Select(sample=2)), ValueError, "select must be without sample"),
    (call(range_mode="raw"), ValueError, "select.range_max must be given if range_mode is 'raw', got None"),
    (call(range_mode="rank"), ValueError, "range_mode must be 'filtered' or 'raw', got 'rank'"),
    (call(sampling_strategy="tpo"), ValueError, "sampling_strategy must be 'top' or 'random' or 'weighted', got 'tpo'"),
    (call(positive_aggregation="median"), ValueError, "positive_aggregation must be 'min' or 'max' or 'mean'"),
    (call(deduplicate=True), ValueError, "deduplicate must be 'none' or 'exact' or 'near', got True"),
    (call(sampling_temperature=0), ValueError, "sampling_temperature must be a number above 0, got 0"),
    (call(num_negatives=0), ValueError, "num_negatives must be an int of 1 or more, got 0"),
    (call(seed=-1), ValueError, "seed must be an int in [0, 2**32), got -1"),
    (call(count_skipped=1), TypeError, "count_skipped must be True or False, got 1"),
    (call(batch_size=0), ValueError, "batch_size must be an int of 1 or more, got 0"),
    (call(corpus_chunk_size=2.0), ValueError, "corpus_chunk_size must be an int of 1 or more, got 2.0"),
    (call(max_memory_bytes=100), ValueError, "max_memory_bytes must be at least"),
    (call(device="nowhere"), ValueError, "device must be a device that torch can use here"),
    (call(backend="gpu"), ValueError, "backend must be None"),
    (call(corpus=ROWS_7[:0]), ValueError, "positives must be row numbers of the corpus, in [0, 0)"),
    (call(index=""), TypeError, "index must be 'exact', a FAISS factory string, or a NegativeIndex, got ''"),
    (call(index=NegativeIndex.build(ROWS_3)), ValueError, "must be the rows of the index, 3 of D = 4"),
    (
        call(near_duplicate_score=1.0),
        ValueError,
        "near_duplicate_score must be a cosine above 0 and below 1, got 1.0",
    ),
    (call(min_recall=2), ValueError, "min_recall must be a share in [0, 1], got 2"),
    (
        call(index="Flat", select=Select(0.1, 0.5, max_score=0.9)),
        ValueError,
        "select's range must be in ranks if select has filters and index is not 'exact'",
    ),
]


@pytest.mark.parametrize("refused,error,words", REFUSALS, ids=[words[:50] for _, _, words in REFUSALS])
def test_refusals(refused, error, words):
    with pytest.raises(error, match="^mine_hard_negatives: .*" + re.escape(words)):
        refused()


def test_a_corpus_of_two_to_the_32_rows_raises_an_error():
    corpus = np.broadcast_to(np.ones((1, 4), np.float32), (2**32, 4))  # needs the memory of one row
    with pytest.raises(ValueError, match="corpus_embeddings must be of fewer than 4294967295 rows, got 4294967296"):
        negmine.mine_hard_negatives(np.ones((1, 4), np.float32), corpus, [0])


def test_an_unknown_kind_of_index_is_refused():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="index must be 'exact', 'cagra', or a factory string that FAISS takes"):
        call(index="no such kind")()


QUERIES, ROWS = unit(6, 8, seed=1).numpy(), unit(40, 8, seed=2).numpy()
WITH_NAN = ROWS.copy()
WITH_NAN[20:25] = np.nan
PADDED = [
    ("an empty corpus", {"corpus": ROWS[:0], "positives": [[]] * 6}, [0] * 6),
    ("a corpus smaller than k", {"corpus": ROWS[:4], "positives": [0, 1, 2, 3, 0, 1]}, [3] * 6),
    ("NaN rows", {"corpus": WITH_NAN, "num_negatives": 40}, [34] * 6),
    ("rows of infinity", {"corpus": np.where(np.isnan(WITH_NAN), np.inf, ROWS), "num_negatives": 40}, [34] * 6),
    ("a NaN query", {"query": np.concatenate([QUERIES[:5], QUERIES[:1] * np.nan]), "num_negatives": 9}, [9] * 5 + [0]),
    ("an infinite query", {"query": np.concatenate([QUERIES[:5], QUERIES[:1] * np.inf])}, [7] * 5 + [0]),
    ("no positives", {"positives": [[]] * 6, "num_negatives": 45}, [40] * 6),
    ("everything filtered", {"select": Select(max_score=-9.0)}, [0] * 6),
    ("everything excluded", {"exclude": [list(range(40))] * 6}, [0] * 6),
    ("everything near a positive", {"deduplicate": "near", "near_duplicate_score": 1e-9, "corpus": abs(ROWS)}, [0] * 6),
]


@pytest.mark.filterwarnings("ignore:.*contain NaN or infinity:UserWarning")
@pytest.mark.parametrize("options,valid", [line[1:] for line in PADDED], ids=[line[0] for line in PADDED])
@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_padded_and_counted(options, valid, index):
    options = {"num_negatives": 7, **options}
    corpus, positives = options.pop("corpus", ROWS), options.pop("positives", [3, 4, 5, 6, 7, 8])
    if index == "Flat" and not len(corpus):
        pytest.skip("FAISS holds no empty index")
    if index == "Flat":
        pytest.importorskip("faiss")
    got = mine(options.pop("query", QUERIES), corpus, positives, index=index, min_recall=0.0, **options)
    assert got.num_valid.tolist() == valid and ((got.indices >= 0).sum(1) == valid).all()
    assert np.isneginf(got.scores[got.indices < 0]).all() and np.isfinite(got.scores[got.indices >= 0]).all()
