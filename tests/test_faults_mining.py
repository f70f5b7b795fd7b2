"""Regression tests for faults of mining, with the right values, and for related containers and arguments."""

import re
import warnings

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import MiningResult
from negmine.ops.checks import describe

mine = negmine.mine_hard_negatives
rng = np.random.default_rng(0)
C = rng.standard_normal((500, 32)).astype("f4")
C /= np.linalg.norm(C, axis=1, keepdims=True)
X, P = C[:40].copy(), np.arange(40)
D, Q = [f"doc {i}" for i in range(500)], [f"q{i}" for i in range(40)]
PERM = rng.permutation(500)


def test_1a_copies_of_a_text_with_other_bits():
    nearly = C[:40] * np.float32(1 + 1e-7) + rng.standard_normal((40, 32)).astype("f4") * np.float32(1e-8)
    corpus, texts = np.concatenate([C, nearly]), D + [f" doc  {i}\n" for i in range(40)]
    assert (mine(X, corpus, P, deduplicate="exact").indices >= 500).any()  # "exact" finds only equal values
    got = mine(X, corpus, P, num_negatives=99, corpus_texts=texts)
    assert not (got.indices >= 500).any()
    assert got.skipped["equal_to_positive"] == 40 and got.skipped["duplicate"] == 40 * 39
    report = negmine.hardness_report(X, corpus, P, backend="reference")
    (advice,) = [line for line in report.advice() if "deduplicate" in line]
    assert 'mine with deduplicate="near"' in advice and '"exact" does not see copies of a text' in advice
    report = negmine.hardness_report(X, corpus, P, corpus_texts=texts, backend="reference")
    assert any("mine with corpus_texts=" in line for line in report.advice())
    assert report.facts["near_duplicates"][0]["same_text"]


def test_1b_rows_of_one_query_share_their_positives():
    second = int(mine(X, C, P).indices[0, 0])
    for given in ({"query_ids": [7, 7]}, {"query_texts": ["a b", " a\tb"]}, {}):
        if given:
            got = mine(X[[0, 0]], C, [0, second], **given)
        else:
            with pytest.warns(UserWarning, match="2 rows of query_embeddings are equal to rows with other positives"):
                got = mine(X[[0, 0]].astype("f8"), C, [0, second])
        assert not np.isin(got.indices, [0, second]).any() and got.skipped["positive"] == 4
        np.testing.assert_allclose(got.positive_scores, X[0] @ C[second], rtol=1e-5)  # the lower of the two scores
    apart = mine(X[[0, 0]], C, [0, second], query_ids=["a", "b"])
    assert apart.indices[:, 0].tolist() == [second, 0]


def test_1c_the_own_text_of_a_query():
    got = mine(X, C, [[] for _ in P], query_texts=[text.replace(" ", "\u00a0 ") for text in D[:40]], corpus_texts=D)
    assert not (got.indices == P[:, None]).any() and got.skipped["own_text"] == 40
    blank = mine(X[:2], C, [9, 9], query_texts=["", " "], corpus_texts=["", *D[1:]])
    assert blank.indices[0, 0] == 0 and blank.skipped["own_text"] == 0 and blank.skipped["positive"] == 2


def containers():
    texts = [D[row] for row in PERM]
    yield "list", texts, texts
    yield "numpy", np.array(texts), np.array(texts, object)
    arrow = pytest.importorskip("pyarrow")
    yield "arrow", arrow.array(texts), arrow.chunked_array([texts[:100], texts[100:]])
    yield "dictionary", arrow.array(texts).dictionary_encode(), tuple(texts)
    try:
        import pandas
    except ImportError:
        pass
    else:
        series = pandas.Series(D).iloc[PERM]
        yield "pandas", series, pandas.Index(texts)
        yield "labels", series.astype("category"), pandas.Series(texts, index=texts)
    try:
        import polars
    except ImportError:
        pass
    else:
        yield "polars", polars.Series(texts), polars.DataFrame({"text": texts})["text"]
    try:
        import datasets
    except ImportError:
        pass
    else:
        table = datasets.Dataset.from_dict({"text": texts, "n": list(range(500))})
        yield "datasets", table, table["text"]


def test_1d_taken_by_position(tmp_path):
    positives = np.argsort(PERM)[P]
    want = mine(X, C, P)
    for name, *pair in containers():
        for texts in pair:
            result = mine(X, C[PERM], positives, corpus_texts=texts, query_texts=Q)
            np.testing.assert_array_equal(PERM[result.indices], want.indices, err_msg=name)
            result.to_jsonl(tmp_path / "a.jsonl")
            lines = [eval(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
            assert [line["pos"] for line in lines] == [[f"doc {i}"] for i in range(40)], name
            assert [line["neg"] for line in lines] == [[D[row] for row in rows] for rows in want.indices], name
            ids = mine(X, C[PERM], [f"doc {i}" for i in range(40)], corpus_ids=texts) if name != "datasets" else result
            np.testing.assert_array_equal(ids.indices, result.indices)
    shuffled = [D[row] for row in PERM]
    report = negmine.hardness_report(X, C[PERM], positives, corpus_texts=np.array(shuffled, object), corpus_ids=PERM)
    for record in report.facts["often_hard"]:
        assert record["row_text"] == f"doc {PERM[record['row']]}" == f"doc {record['row_id']}"
    with pytest.raises(TypeError, match=r"to_jsonl: corpus_texts must be texts, one per row, in a list.*got a dict"):
        want.to_jsonl(tmp_path / "x", Q, dict(enumerate(D)))
    with pytest.raises(TypeError, match=r"to_jsonl: corpus_texts must be texts, .*got a str"):
        want.to_jsonl(tmp_path / "x", Q, "".join(D))


@pytest.mark.parametrize("entry", [None, float("nan"), {"text": "x"}, b"x", 5], ids=str)
def test_1e_entries_that_are_no_strings(entry, tmp_path):
    broken = [*D[:7], entry, *D[8:]]
    kind = type(entry).__name__
    for call in (
        lambda: mine(X, C, P, corpus_texts=broken),
        lambda: mine(X, C, P, corpus_texts=dict(enumerate(broken))),
        lambda: negmine.hardness_report(X, C, P, corpus_texts=broken),
        lambda: mine(X, C, [7] * 40, query_ids=range(40)).to_jsonl(tmp_path / "x", Q, broken),
        lambda: mine(X, C, P, query_texts=[*Q[:7], entry, *Q[8:]]),
    ):
        with pytest.raises(TypeError, match=rf"_texts must be .*{kind.removesuffix('Type')}.* (in row|for id) 7"):
            call()
    if kind != "int":
        with pytest.raises(TypeError, match=rf"corpus_ids must be (ints or )?strings.*{kind}\) in row 7"):
            mine(X, C, D[:40], corpus_ids=broken)


def test_1k_float64():
    got, want = mine(X.astype("f8"), torch.from_numpy(C).double(), P), mine(X, C, P)
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_array_equal(got.scores, want.scores)
    assert got.config["rounded_to_float32"] == ["query_embeddings", "corpus_embeddings"]
    assert want.config["rounded_to_float32"] == []
    np.testing.assert_array_equal(mine(X, [C[:9].astype("f8"), C[9:]], P, index="exact").indices, want.indices)
    assert negmine.NegativeIndex.build(C.astype("f8")).search(X, 3).indices[:, 0].tolist() == list(range(40))


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "value",
    [
        *([{1}] * 40, [Unspeakable()] * 40, [f"id {i}" for i in range(100_000)], {"a": 1}, "x" * 10**6),
        *([10**6000] * 40, [(Unspeakable(),)] * 40, [("x" * 500, i) for i in range(1000)], [X[0]] * 40),
    ],
    ids=lambda value: type(value).__name__,
)
def test_1l_refused_values(value):
    assert len(describe(value)) <= 200 and "\n" not in describe(value)
    for call in (
        lambda: mine(X, C, value),
        lambda: mine(X, C, P, exclude=value),
        lambda: mine(X, C, value, corpus_ids=D),
        lambda: mine(X, C, P, corpus_ids=value),
        lambda: mine(X, C, P, corpus_texts=value),
        lambda: mine(X, C, P, num_negatives=value),
        lambda: mine(X, value, P),
        lambda: negmine.hardness_report(X, C, value),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^(mine_hard_negatives|hardness_report): ") as raised:
            call()
        assert len(str(raised.value)) < 520 and "\n" not in str(raised.value)


def test_masked_arrays_are_refused():
    """The values under a mask are not meant as data."""
    masked = np.ma.masked_array(C, mask=C > 1.9)
    with pytest.raises(ValueError, match="corpus_embeddings must be without masked entries"):
        mine(X, np.ma.masked_array(C, mask=C > 0.5), P)
    rows = np.ma.masked_array(np.arange(40), mask=np.arange(40) == 7)
    with pytest.raises(ValueError, match="positives must be without masked entries: fill or remove them, got 1 masked"):
        mine(X, C, rows)
    assert not masked.mask.any() and len(mine(X, masked, P).indices) == 40


def test_1n_corpus_containers():
    got = mine(X, C, D[:40], corpus_texts={text: text.upper() for text in D})
    assert got.corpus_ids == D and got.to_triplets()[0].tolist() == [0, "doc 0", f"doc {got.indices[0, 0]}"]
    for refused, words in (
        ("".join(D), "got a str"),
        ({"train": D}, "must be a mapping from ids to strings, got a list for id 'train'"),
        (iter(D), "got a list_iterator"),
        ({1, 2}, "got a set"),
        (np.array(D).reshape(250, 2), "got a NumPy array of shape (250, 2)"),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            mine(X, C, P, corpus_texts=refused)
    with pytest.raises(TypeError, match="corpus_texts must be a sequence, not a mapping, if corpus_ids is given"):
        mine(X, C, P, corpus_ids=D, corpus_texts=dict(zip(D, D, strict=True)))
    with pytest.raises(ValueError, match="corpus_texts must be 500 texts, one per row, got 499"):
        mine(X, C, P, corpus_texts=D[1:])


def test_1o_positives_named_twice():
    twice, once = mine(X[:1], C, [[5, 5]]), mine(X[:1], C, [[5]])
    assert twice.to_labeled_pairs().tolist() == once.to_labeled_pairs().tolist()
    assert twice.skipped == once.skipped and twice.positives.rows.tolist() == [5]
    assert mine(X[:2], C, [[9, 5, 9], [5]]).positives.rows.tolist() == [9, 5, 5]


def test_1q_flat_options():
    with pytest.raises(TypeError, match=r"select=Select\(range_min=10, relative_margin=0.05\), got range_min=10"):
        mine(X, C, P, range_min=10, relative_margin=0.05)


def test_results_use_ids(tmp_path):
    ids, names = [f"d{i}" for i in range(500)], [f"q{i}" for i in range(40)]
    plain = mine(X, C, P)
    got = mine(X, C, ids[:40], query_ids=names, corpus_ids=ids, exclude=[[] for _ in P])
    np.testing.assert_array_equal(got.indices, plain.indices)
    assert got.query_ids is names and got.corpus_ids is ids
    for form in ("to_triplets", "to_n_tuples"):
        rows = getattr(plain, form)().tolist()
        assert getattr(got, form)().tolist() == [[f"q{a}", *(f"d{b}" for b in rest)] for a, *rest in rows]
    assert got.to_labeled_pairs()[0].tolist() == ["q0", "d0", 1]
    number = mine(X, C, P + 1000, query_ids=P + 50, corpus_ids=np.arange(500) + 1000)
    assert number.to_triplets().dtype == np.int64
    np.testing.assert_array_equal(number.to_triplets() - [50, 1000, 1000], plain.to_triplets())
    short = mine(X[:1], C[:3], ["d0"], corpus_ids=ids[:3])
    assert short.to_labeled_lists()[1].tolist() == [["d0", *short.to_triplets()[:, 2], None]]
    for result in (got, number):
        result.save(tmp_path / "r.npz")
        again = MiningResult.load(tmp_path / "r.npz")
        np.testing.assert_array_equal(again.to_triplets(), result.to_triplets())
    with pytest.raises(ValueError, match="positives must be ids of corpus_ids, got 'd999' for query 1"):
        mine(X[:2], C, [["d0"], ["d1", "d999"]], corpus_ids=ids)
    with pytest.raises(TypeError, match="positives must be strings, like the other ids, got 0 "):
        mine(X, C, P.tolist(), corpus_ids=ids)


def test_filters_count_each_pair_once():
    got = mine(X, C, P, select=Select(max_score=0.2, absolute_margin=0.9), num_negatives=500)
    scores = X @ C.T
    above, near = scores > 0.2, scores > got.positive_scores[:, None] - np.float32(0.9)
    others = np.arange(500) != P[:, None]
    assert (
        got.skipped["max_score"] == (above & others).sum()
        and got.skipped["absolute_margin"] == (near & ~above & others).sum()
    )
    assert sum(got.skipped.values()) + got.num_valid.sum() == 40 * 500


def broken_inputs():
    """X and C, in which queries 4 and 30 and rows 2, 100 and 499 contain NaN or infinity. Row 2 is the positive of query 2."""
    queries, corpus = X.copy(), C.copy()
    queries[4], queries[30, 7] = np.nan, np.inf
    corpus[[2, 100], 5], corpus[499] = (np.nan, -np.inf), np.nan
    return queries, corpus


BROKEN_QUERIES = "query_embeddings contain NaN or infinity in 2 of 40 rows, which get no negatives: 4, 30"
BROKEN_ROWS = "corpus_embeddings contain NaN or infinity in 3 of 500 rows, which are never negatives: 2, 100, 499"


def mine_warned(*arguments, **options):
    """The result, and the messages of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = mine(*arguments, **options)
    assert all(each.filename == __file__ and each.category is UserWarning for each in caught)
    return result, [str(each.message).removeprefix("mine_hard_negatives: ") for each in caught]


@pytest.mark.parametrize("form", ["arrays", "float16", "npy shards", "safetensors", "Flat", "a saved index", "resumed"])
def test_rows_that_are_not_finite_are_left_out_named_and_counted(form, tmp_path):
    queries, corpus = broken_inputs()
    given, options = (queries, corpus), {}
    if form == "float16":
        given = (queries.astype("f2"), corpus.astype("f2"))
    elif form == "npy shards":
        np.save(tmp_path / "q.npy", queries), np.save(tmp_path / "a.npy", corpus[:90])
        np.save(tmp_path / "b.npy", corpus[90:])
        given = (tmp_path / "q.npy", [tmp_path / "a.npy", tmp_path / "b.npy"])
    elif form == "safetensors":
        save_file = pytest.importorskip("safetensors.numpy").save_file
        save_file({"rows": corpus}, tmp_path / "c.safetensors")
        given = (queries, tmp_path / "c.safetensors")
    elif form in ("Flat", "a saved index"):
        pytest.importorskip("faiss")
        options["index"] = "Flat"
        if form == "a saved index":
            negmine.NegativeIndex.build(corpus).save(tmp_path / "index")
            options["index"] = negmine.NegativeIndex.load(tmp_path / "index")
    elif form == "resumed":
        options |= {"resume_dir": tmp_path / "run", "batch_size": 7}
        mine_warned(*given, P, num_negatives=500, **options)
        sorted((tmp_path / "run").glob("queries-*"))[1].unlink()
    got, said = mine_warned(*given, P, num_negatives=500, **options)
    assert said == [BROKEN_QUERIES, BROKEN_ROWS]
    assert not np.isin(got.indices, [2, 100, 499]).any() and np.isfinite(got.scores[got.indices >= 0]).all()
    valid = np.full(40, 500 - 1 - 3)
    valid[2], valid[[4, 30]] = 500 - 3, 0
    assert got.num_valid.tolist() == valid.tolist()
    assert np.flatnonzero(np.isnan(got.positive_scores)).tolist() == [2, 4, 30]
    assert got.skipped["not_finite"] == 38 * 3 - 1 + 2 * 499
    assert sum(got.skipped.values()) + got.num_valid.sum() == 40 * 500
    assert got.config["not_finite"] == {"query_embeddings": 2, "corpus_embeddings": 3}
    assert "rows that contain NaN or infinity: 2 of query_embeddings, 3 of corpus_embeddings\n" in got.summary()


def test_filters_and_fractions_see_finite_rows_only():
    queries, corpus = broken_inputs()
    finite = np.setdiff1d(np.arange(500), [2, 100, 499])
    for select in (Select(absolute_margin=0.5, min_score=-0.2), Select(0.1, 0.5), Select(0.1, 0.5, max_score=0.3)):
        got, _ = mine_warned(queries, corpus, P, select=select, num_negatives=300)
        rows, valid = got.indices[8:12], got.num_valid[8:12]
        want = mine(X[8:12], C[finite], np.arange(8, 12) - 1, select=select, num_negatives=300)
        np.testing.assert_array_equal(rows, np.where(want.indices < 0, -1, finite[want.indices]))
        assert (valid == want.num_valid).all() and (valid > 0).all()
    _, said = mine_warned(X, C, P)
    assert not said


def test_queries_that_are_not_finite_are_not_one_query():
    queries, corpus = broken_inputs()
    queries[[8, 9]] = np.nan
    _, said = mine_warned(queries, corpus, P)
    assert said == [BROKEN_QUERIES.replace("2 of 40", "4 of 40").replace("4, 30", "4, 8, 9, 30"), BROKEN_ROWS]


def test_old_negatives_that_are_no_longer_finite_are_dropped():
    seen = []
    broken = C.copy()
    broken[np.unique(mine(X, C, P, num_negatives=2).indices), 0] = np.inf
    with pytest.warns(UserWarning, match="corpus_embeddings contain NaN or infinity"):
        negmine.mining.mining_rounds(
            lambda r: (X, broken if r else C),
            lambda r, result: seen.append(result),
            P,
            rounds=2,
            num_negatives=2,
            keep_old=2,
        )
    assert (seen[1].num_valid == 2).all() and np.isfinite(seen[1].scores[:, :2]).all()
    assert not np.isin(seen[1].indices[:, :2], seen[0].indices).any()
