"""from_texts and rescore=, with toy models whose results are known."""

import hashlib
import os
import re
import signal

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import atomic_file, from_texts, rescoring, text_mining

D = [f"doc {i}" for i in range(60)]
Q = [f"question {i}" for i in range(12)]
P = list(range(12))


def vector(text, dim=16):
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32) * 8


def embed(texts):
    return np.stack([vector(text) for text in texts])


class Model:
    """Different methods for queries and documents, without keywords. Counts the embedded texts."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return embed(texts)

    def encode_queries(self, texts):
        return torch.from_numpy(self.encode(texts)).requires_grad_()


class Embeds:
    def embed(self, texts):
        return (row for row in embed(texts).astype(np.float64))


def unit(rows):
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


def test_1m_any_callable_normalised():
    want = negmine.mine_hard_negatives(unit(embed(Q)), unit(embed(D)), P)
    for model in (embed, Model(), Embeds(), lambda texts: [torch.from_numpy(vector(text)) for text in texts]):
        got = from_texts(model, Q, D, P, encode_batch_size=5)
        np.testing.assert_array_equal(got.indices, want.indices)
        assert np.abs(got.scores).max() <= 1 + 1e-6 and got.corpus_texts == D and got.config["rounded_to_float32"] == []
    plain = from_texts(embed, Q, D, P, normalize=False)
    assert plain.scores.max() > 8
    prompted = from_texts(
        embed, Q, {f"d{i}": text for i, text in enumerate(D)}, [f"d{i}" for i in P], query_prompt="query: "
    )
    want = negmine.mine_hard_negatives(unit(embed([f"query: {text}" for text in Q])), unit(embed(D)), P)
    np.testing.assert_array_equal(prompted.indices, want.indices)
    own = from_texts(embed, [*Q, D[5]], D, [*P, 7], num_negatives=59)
    assert own.skipped["own_text"] == 1 and 5 not in own.indices[12]


class Prompted:
    """Like a SentenceTransformer with a prompt for queries, which is used if no other prompt is given."""

    def __init__(self):
        self.prompts = {"query": "own: ", "document": ""}

    def encode_query(self, texts, prompt="own: "):
        return embed([prompt + text for text in texts])

    def encode_document(self, texts, prompt=""):
        return embed([prompt + text for text in texts])


def test_a_prompt_replaces_that_of_the_model():
    for given, own in (({}, "own: "), ({"query_prompt": "find: "}, "find: ")):
        want = negmine.mine_hard_negatives(unit(embed([own + text for text in Q])), unit(embed(D)), P)
        np.testing.assert_array_equal(from_texts(Prompted(), Q, D, P, **given).indices, want.indices)


def broken(row, value):
    def model(texts):
        rows = embed(texts)
        rows[[text.endswith(f" {row}") for text in texts]] = value
        return rows

    return model


def test_1m_what_a_model_returns():
    for model, words in (
        (
            broken(37, np.nan),
            "model must be one that returns finite rows for all texts of corpus, got NaN or infinity in rows 37",
        ),
        (
            broken(11, np.inf),
            "model must be one that returns finite rows for all texts of queries, got NaN or infinity in rows 11",
        ),
        (
            lambda texts: embed(texts)[1:],
            "model must be one that returns 12 rows (n, D) of numbers for 12 texts, got shape (11, 16)",
        ),
        (
            lambda texts: {"dense_vecs": embed(texts)},
            "wrap it in a function that selects one entry, got a dict of dense_vecs",
        ),
        (lambda texts: [[0.5] * len(text) for text in texts], "got a list that is not numeric"),
        (lambda texts: (embed(texts).astype("f8") * 1e39).tolist(), "got NaN or infinity in rows 0, 1, "),
        (lambda texts: embed(texts) * 1j, "got complex numbers"),
        (lambda texts: np.ma.masked_array(embed(texts), mask=embed(texts) > 2), "without masked entries"),
        (lambda texts: embed(texts)[0], "got shape (16,)"),
        (lambda texts: None, "got None"),
        (lambda texts: texts, "got a list that is not numeric"),
        ("minilm", "model must be a callable, or an object with encode or embed, got a str"),
    ):
        with pytest.raises((ValueError, TypeError), match="^from_texts: .*" + re.escape(words)):
            from_texts(model, Q, D, P)


def test_checks_come_before_the_model():
    def model(texts):
        raise AssertionError("the model was called")

    for change, words in (
        ({"num_negatives": 0}, "num_negatives must be an int of 1 or more"),
        ({"num_negs": 3}, "from_texts: there is no argument num_negs; did you mean num_negatives?"),
        ({"range_min": 3}, r"select=Select(range_min=3)"),
        ({"positives": [99] * 12}, "positives must be row numbers of the corpus, in [0, 60), got 99 for query 0"),
        ({"corpus": [*D, None]}, "corpus must be strings, got None in row 60"),
        ({"queries": "who"}, "queries must be texts, one per row"),
        ({"exclude": [3]}, "exclude must be of 12 entries, one for each query"),
        ({"encode_batch_size": 0}, "encode_batch_size must be"),
        ({"query_prompt": None}, "query_prompt must be a string"),
        ({"cache_dir": ""}, "cache_dir must be the path of a folder"),
        (
            {"cache_dir": __file__},
            f"cache_dir must be the path of a folder, got '{__file__}', because '{__file__}' is not a folder",
        ),
        ({"cache_dir": "s3://b/c"}, "cache_dir must be the path of a folder on this machine, got 's3://b/c'"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(words)):
            from_texts(**{"model": model, "queries": Q, "corpus": D, "positives": P, **change})


def test_the_cache_resumes_after_a_process_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(text_mining, "BLOCK_ROWS", 16)
    want, model = from_texts(embed, Q, D, P), Model()

    def killed(texts):
        if "doc 40" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed(texts)

    def killed_while_writing(op, path):
        if len(list(path.parent.glob("*.npy"))) == 3:
            monkeypatch.setattr(os, "replace", lambda *names: os.kill(os.getpid(), signal.SIGKILL))
        return atomic_file.atomic_write(op, path)

    options = {"cache_dir": tmp_path / "cache", "encode_batch_size": 4}
    for embedder, writer in ((killed, atomic_file.atomic_write), (embed, killed_while_writing)):
        child = os.fork()
        if not child:
            text_mining.atomic_write = writer
            from_texts(embedder, Q, D, P, **options)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3, "of the queries, and two of four of the corpus"
    got = from_texts(model, Q, D, P, **options)
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_array_equal(got.scores, want.scores)
    assert sorted(set(model.seen) - set(Q[:8]) - set(D[:8])) == sorted(D[32:])
    model.seen.clear()
    from_texts(model, Q, [*D, "one more"], P, **options)
    assert set(model.seen) == {*Q[:8], *D[:8], *D[48:], "one more"}
    victim = sorted((tmp_path / "cache").glob("*.npy"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="is damaged, so its texts are embedded again"):
        again = from_texts(model, Q, D, P, **options)
    np.testing.assert_array_equal(again.scores, want.scores)
    # Another model finds nothing in the cache.
    other = from_texts(lambda texts: -embed(texts)[:, :9], Q, D, P, **options)
    assert not np.array_equal(other.scores, want.scores)


# A judge looks up the score of a document in a table. The texts of queries and documents are their numbers.


def number(text):
    return int(text.split()[-1])


TABLE = np.random.default_rng(5).integers(0, 100, (12, 60)).astype(np.float32)


class Judge:
    def __init__(self):
        self.pairs = []

    def predict(self, pairs):
        self.pairs += pairs
        return TABLE[[number(q) for q, _ in pairs], [number(d) for _, d in pairs]][:, None]


def judged(**options):
    given = {"query_texts": Q, "corpus_texts": D, "num_negatives": 4, "rescore": Judge()} | options
    return negmine.mine_hard_negatives(unit(embed(Q)), unit(embed(D)), given.pop("positives", P), **given)


def loop(positives, candidates, select, n, promote=None):
    indices, promoted = [], []
    for q in range(12):
        anchor = min(TABLE[q, p] for p in positives[q])
        rest = candidates[q]
        up = [k for k in rest if promote is not None and TABLE[q, k] >= anchor - promote]
        promoted.append(up)
        kept = [k for k in rest if k not in up and TABLE[q, k] <= float(select.highest_score(torch.tensor([anchor])))]
        kept = sorted(kept, key=lambda k: (-TABLE[q, k], k))[:n]
        indices.append(kept + [-1] * (n - len(kept)))
    return np.array(indices), promoted


@pytest.mark.parametrize(
    "select", [Select(), Select(3, 30), Select(absolute_margin=5.0), Select(2, relative_margin=0.2)], ids=str
)
def test_rescored_margins_and_ranks(select, tmp_path):
    window = Select(select.range_min, select.range_max)
    wide = negmine.mine_hard_negatives(unit(embed(Q)), unit(embed(D)), P, select=window, num_negatives=20)
    for promote in (None, 10.0):
        got = judged(select=select, rescore_candidates=20, promote=promote, rescore_batch_size=7)
        want, promoted = loop([[p] for p in P], wide.indices.tolist(), select, 4, promote)
        np.testing.assert_array_equal(got.indices, want)
        np.testing.assert_array_equal(
            got.scores, np.where(want < 0, -np.inf, np.take_along_axis(TABLE, want.clip(0), 1))
        )
        np.testing.assert_array_equal(got.positive_scores, TABLE[P, P])
        if promote is not None:
            assert got.skipped["promoted"] == sum(map(len, promoted)) > 0
            lists = [got.positives.take(np.array([q])).rows.tolist() for q in range(12)]
            assert lists == [sorted([p, *up]) for p, up in zip(P, promoted, strict=True)]


def test_rows_of_one_query_share_what_is_promoted():
    got = judged(
        positives=[0, 1, *P[2:]], query_ids=[0, 0, *range(2, 12)], promote=30.0, rescore_candidates=59, num_negatives=59
    )
    known = set(got.positives.take(np.array([0, 1])).rows.tolist())
    assert len(known) > 2 and not known & set(got.indices[:2].ravel().tolist())


def test_scores_are_kept_in_resume_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(rescoring, "BLOCK_PAIRS", 32)
    want, judge = judged(), Judge()

    def killed(pairs):
        if len(judge.pairs) > 100:
            raise KeyboardInterrupt
        return judge.predict(pairs)

    with pytest.raises(KeyboardInterrupt):
        judged(rescore=killed, resume_dir=tmp_path / "run", rescore_batch_size=8)
    before = len(judge.pairs)
    got = judged(rescore=judge, resume_dir=tmp_path / "run", rescore_batch_size=8)
    np.testing.assert_array_equal(got.indices, want.indices)
    assert len(judge.pairs) - before < 12 + 12 * 40 - 80
    assert got.config["arguments"]["rescore"] == "Judge"


def test_refused_judges():
    for change, words in (
        ({"rescore": 5}, "rescore must be a callable that scores (query, document) pairs"),
        (
            {"rescore": lambda pairs: TABLE},
            "rescore must be one that returns a number for each of 64 pairs",
        ),
        ({"rescore": lambda pairs: [float("nan")] * len(pairs)}, "finite numbers, got nan for query 0 and row 0"),
        ({"rescore": lambda pairs: [1.0] * (len(pairs) - 1) + [1e39]}, "finite numbers, got inf for query "),
        ({"rescore": lambda pairs: None}, "rescore must be one that returns a number for each"),
        ({"corpus_texts": None}, "corpus_texts must be given if rescore is, got None"),
        ({"rescore": None, "promote": 1.0}, "promote must be None if rescore is None"),
        ({"promote": 1.0, "positives": [[], *([p] for p in P[1:])]}, "at least one per query if promote is given"),
    ):
        with pytest.raises((ValueError, TypeError), match="^mine_hard_negatives: .*" + re.escape(words)):
            judged(**change)
