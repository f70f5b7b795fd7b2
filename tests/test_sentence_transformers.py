"""The mining adapter compared with sentence-transformers: the same dataset and model, both miners, every column."""

import random
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
peer = pytest.importorskip("sentence_transformers.util.hard_negatives").mine_hard_negatives

from datasets import Dataset  # noqa: E402

from negmine.adapters.sentence_transformers import mine_hard_negatives as ours  # noqa: E402

D = 24


class Model:
    """A model with an embedding for each text and both ways of calling encode; nothing is downloaded."""

    device = torch.device("cpu")

    def __init__(self, weights=0):
        self.weights, self.texts = weights, 0

    def encode(self, texts, normalize_embeddings=False, prompt=None, prompt_name=None, pool=None, **options):
        self.texts += len(texts)
        rows = []
        for text in texts:
            topic, _, number = text.partition(" ")
            rng = np.random.default_rng([self.weights, int(topic), len(prompt or "")])
            row = rng.standard_normal(D) + 0.7 * np.random.default_rng(zlib.crc32(number.encode())).standard_normal(D)
            rows.append(row / np.linalg.norm(row))
        return np.array(rows, np.float32).reshape(-1, D)

    encode_query = encode_document = encode

    def get_embedding_dimension(self):
        return D

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


class CrossEncoder:
    def __init__(self):
        self.pairs = 0

    def predict(self, pairs, batch_size=32, convert_to_tensor=False, pool=None):
        self.pairs += len(pairs)
        rows = [np.random.default_rng(int(q.split()[1]) * 1000 + int(d.split()[1])).random() for q, d in pairs]
        same_topic = [q.split()[0] == d.split()[0] for q, d in pairs]
        return torch.tensor(np.array(rows) * 0.5 + np.array(same_topic) * 0.3, dtype=torch.float32)


def pairs(rows=60):
    """Anchors 'topic number'. Every fifth anchor occurs twice, and every seventh positive belongs to two anchors."""
    rng = random.Random(0)
    anchors = [f"{rng.randrange(9)} {i if i % 5 else i - i % 10}" for i in range(rows)]
    answers = [f"{anchor.split()[0]} {1000 + (i if i % 7 else 0)}" for i, anchor in enumerate(anchors)]
    return Dataset.from_dict({"query": anchors, "answer": answers})


def corpus(rows=300):
    rng = random.Random(1)
    return [f"{rng.randrange(9)} {5000 + i}" for i in range(rows)] + ["3 5000", "3 5000"]


def tables(options, cross=False, **only_ours):
    extra = {"cross_encoder": CrossEncoder()} if cross else {}
    got = [
        miner(pairs(), Model(), corpus=corpus(), verbose=False, **extra, **options, **more)
        for miner, more in ((peer, {}), (ours, only_ours))
    ]
    return got


def equal(want, got):
    assert want.column_names == got.column_names and len(want) == len(got) > 0
    for name in want.column_names:
        if name in ("scores", "score"):
            flat = [np.concatenate([np.ravel(row) for row in table[name]]) for table in (want, got)]
            np.testing.assert_allclose(flat[0], flat[1], atol=2e-6)
        else:
            assert list(want[name]) == list(got[name]), name


@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
@pytest.mark.parametrize("output_scores", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"range_min": 4, "num_negatives": 5},
        {"range_min": 2, "range_max": 12},
        {"max_score": 0.5, "num_negatives": 2, "range_max": 300},
        {"absolute_margin": 0.1, "range_max": 300},
        {"relative_margin": 0.05, "min_score": 0.1, "range_max": 300, "use_faiss": True},
    ],
    ids=str,
)
def test_the_same_table(options, output_format, output_scores):
    """Results are equal without filters, or if enough candidates remain after the filters."""
    if "use_faiss" in options:
        pytest.importorskip("faiss")
    equal(*tables({**options, "output_format": output_format, "output_scores": output_scores}))


def negatives_of(table):
    """Return {(anchor, positive): negatives in order} of a table of triplets."""
    out = {}
    for anchor, positive, negative in zip(table["query"], table["answer"], table["negative"], strict=True):
        out.setdefault((anchor, positive), []).append(negative)
    return out


@pytest.mark.parametrize("use_faiss", [False, True])
def test_their_window_is_cut_before_the_filters_and_ours_after(use_faiss):
    """With their default depth, their negatives of a pair are the first of ours, and we also find negatives if they find none."""
    if use_faiss:
        pytest.importorskip("faiss")
    theirs, own = map(negatives_of, tables({"relative_margin": 0.05, "num_negatives": 6, "use_faiss": use_faiss}))
    assert all(own[pair][: len(found)] == found for pair, found in theirs.items())
    short = [pair for pair in own if len(theirs.get(pair, [])) < len(own[pair])]
    assert short and any(pair not in theirs for pair in short), "some pairs get nothing from them"
    want, got = tables({"relative_margin": 0.05, "num_negatives": 6, "range_max": 360})
    assert negatives_of(want) == negatives_of(got) == own, "a depth of everything makes them equal"


def test_one_query_with_several_positives_and_all_of_them_hidden():
    for table in tables({"num_negatives": 20}):
        by_query = {}
        for query, answer in zip(pairs()["query"], pairs()["answer"], strict=True):
            by_query.setdefault(query, set()).add(answer)
        assert not any(
            negative in by_query[query] for query, negative in zip(table["query"], table["negative"], strict=True)
        )


def test_no_corpus_and_named_columns():
    named = (
        pairs()
        .rename_columns({"query": "a", "answer": "b"})
        .add_column("c", ["x"] * 60)
        .select_columns(["c", "b", "a"])
    )
    options = {"anchor_column_name": "a", "positive_column_name": "b", "verbose": False}
    equal(peer(named, Model(), **options), ours(named, Model(), **options))


def test_include_positives():
    options = {"include_positives": True, "num_negatives": 8, "output_scores": True, "verbose": False}
    equal(peer(pairs(), Model(), corpus=corpus(), **options), ours(pairs(), Model(), corpus=corpus(), **options))


def test_cross_encoder():
    equal(*tables({"max_score": 0.7, "output_scores": True, "output_format": "labeled-list"}, cross=True))
    equal(*tables({"relative_margin": 0.1, "range_min": 1, "range_max": 30}, cross=True))
    judge = CrossEncoder()
    peer(pairs(), Model(), cross_encoder=judge, verbose=False)
    assert judge.pairs == 0, "theirs ignores it where nothing is filtered"
    ours(pairs(), Model(), cross_encoder=judge, verbose=False)
    assert judge.pairs > 0


def test_random_draws_by_seed():
    options = {"sampling_strategy": "random", "range_max": 40, "output_format": "n-tuple", "verbose": False}
    draws = [ours(pairs(), Model(), corpus=corpus(), seed=seed, **options) for seed in (1, 1, 2)]
    equal(draws[0], draws[1])
    assert draws[0]["negative_1"] != draws[2]["negative_1"]
    window = ours(pairs(), Model(), corpus=corpus(), range_max=40, num_negatives=40, verbose=False)
    allowed = negatives_of(window)
    for row in draws[0]:
        assert {row[f"negative_{i}"] for i in (1, 2, 3)} <= set(allowed[row["query"], row["answer"]])
    drawn = ours(pairs(), Model(), corpus=corpus(), cross_encoder=CrossEncoder(), max_score=0.6, seed=3, **options)
    assert len(drawn) == len(
        peer(pairs(), Model(), corpus=corpus(), cross_encoder=CrossEncoder(), max_score=0.6, **options)
    )


def test_the_cache_depends_on_the_weights(tmp_path):
    options = {"corpus": corpus(), "cache_folder": str(tmp_path), "verbose": False}
    first, again, trained = Model(), Model(), Model(weights=1)
    want = ours(pairs(), first, **options)
    equal(want, ours(pairs(), again, **options))
    assert again.texts == 16, "only the probes"
    other = ours(pairs(), trained, **options)
    assert trained.texts == first.texts and other["negative"] != want["negative"]
    assert ours(pairs(), Model(), query_prompt="q: ", **options)["negative"] != want["negative"]


def test_old_argument_names_warn(capsys):
    with pytest.warns(DeprecationWarning, match="as_triplets is now output_format"):
        equal(peer(pairs(), Model(), as_triplets=False, verbose=False), ours(pairs(), Model(), as_triplets=False))
    assert "negatives requested for each" in capsys.readouterr().out
    with pytest.warns(DeprecationWarning, match="margin is now absolute_margin"):
        ours(pairs(), Model(), margin=0.1, verbose=False)
    with pytest.warns(DeprecationWarning, match="is now output_scores"):
        assert "scores" in ours(pairs(), Model(), output_format="n-tuple-scores", verbose=False).column_names


@pytest.mark.parametrize(
    "options,words",
    [
        ({"sampling_strategy": "tpo"}, "sampling_strategy must be 'top' or 'random', got 'tpo'"),
        ({"output_format": "pairs"}, "output_format must be 'triplet' or 'n-tuple'"),
        ({"num_negatives": 0}, "num_negatives must be an int of 1 or more"),
        ({"faiss_batch_size": 0}, "faiss_batch_size must be an int of 1 or more"),
        ({"range_min": 3, "range_max": 5}, "range_max must be at least range_min"),
        ({"range_min": -1}, "range_min must be a rank"),
        ({"anchor_column_name": "nope"}, "anchor_column_name must be a column of dataset: query, answer, got 'nope'"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        ours(pairs(), Model(), verbose=False, **options)


def test_an_embedding_that_is_not_finite_is_refused():
    class Broken(Model):
        def encode(self, texts, **options):
            rows = super().encode(texts, **options)
            rows[[text == texts[-1] for text in texts], 3] = np.nan
            return rows

        encode_query = encode_document = encode

    last = pairs()["answer"][-1]
    with pytest.raises(
        ValueError, match=f"model must be one that returns finite embeddings, got NaN or infinity for '{last}'"
    ):
        ours(pairs(), Broken(), verbose=False)


def test_invalid_datasets_raise_errors(monkeypatch):
    for dataset in (Dataset.from_dict({"a": [], "b": []}), Dataset.from_dict({"a": ["x"]}), [("q", "p")]):
        with pytest.raises(
            ValueError, match=r"dataset must be a datasets.Dataset of 1 row or more and two columns or more"
        ):
            ours(dataset, Model())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        ours([], Model())
