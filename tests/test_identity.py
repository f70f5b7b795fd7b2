"""Documents and queries identified by id, text and row, compared with a slow definition, for every engine that runs here.

Embeddings are small integers, so that scores are exact and the answers must be equal. Some rows contain NaN or infinity.
"""

import unicodedata
import warnings
from collections import Counter

import numpy as np
import pytest

import negmine
from negmine import Select
from negmine.mining.identity import joined_groups

mine = negmine.mine_hard_negatives
FILTERS = ("min_score", "max_score", "absolute_margin", "relative_margin")
WORDS = [
    "caf\u00e9 noir",
    "cafe\u0301  noir",
    " caf\u00e9\tnoir ",
    "tea",
    "tea\u00a0",
    "milk",
    "Tea",
    "",
    " \n",
    "water",
    "juice",
    "x",
]


def fold(text):
    return " ".join(unicodedata.normalize("NFC", text).split())


def groups(count, *names):
    """Group rows that have an id, text or row in common, transitively. None equals nothing."""
    found = [{row} for row in range(count)]
    for each in names:
        for a in range(count):
            for b in range(a):
                if each is not None and each[a] is not None and each[a] == each[b] and found[a] is not found[b]:
                    found[b] |= found[a]
                    for row in found[a]:
                        found[row] = found[b]
    return found


def slow(q, c, positives, exclude, ids, texts, select, dedup, n):
    """Return (indices, skipped), computed for one (query, row) pair at a time."""
    Q, K = len(q), len(c)
    blank = [[None if t is None else [fold(text) or None for text in t]][0] for t in texts]
    finite = [np.isfinite(rows).all(1).tolist() for rows in (q, c)]
    document = groups(K, ids[1], blank[1], [(row + 0).tobytes() for row in c] if dedup else None)
    query = groups(Q, ids[0], blank[0])
    if ids[0] is None and texts[0] is None:
        query = groups(Q, [(row + 0).tobytes() if good else None for row, good in zip(q, finite[0], strict=True)])
    rows = [
        [{k for k in range(K) if (k if ids[1] is None else ids[1][k]) in named[b]} for b in range(Q)]
        for named in (positives, exclude)
    ]
    first_of = {} if ids[1] is None else {each: ids[1].index(each) for each in ids[1]}
    masks = ("positive", "exclude", "own_text", "equal_to_positive", "duplicate", "not_finite")
    skipped = Counter({name: 0 for name in masks})
    skipped.update({name: 0 for name in FILTERS if getattr(select, name) is not None})
    indices = []
    for b in range(Q):
        known = set().union(*(rows[0][other] for other in query[b]))
        anchors = {first_of.get(each, each) for other in query[b] for each in positives[other]}
        scores = [float(np.dot(q[b], c[k])) if finite[0][b] and finite[1][k] else np.nan for k in range(K)]
        anchor = np.min([scores[p] for p in anchors]) if anchors else None
        pool = []
        for k in range(K):
            mates = document[k]
            if k in known:
                reason = "positive"
            elif mates & rows[1][b]:
                reason = "exclude"
            elif None not in (blank[0], blank[1]) and blank[0][b] and any(blank[1][m] == blank[0][b] for m in mates):
                reason = "own_text"
            elif mates & known:
                reason = "equal_to_positive"
            elif k != min(mates):
                reason = "duplicate"
            elif not (finite[0][b] and finite[1][k]):
                reason = "not_finite"
            elif select.min_score is not None and scores[k] < select.min_score:
                reason = "min_score"
            elif select.absolute_margin is not None and not scores[k] <= anchor - select.absolute_margin:
                reason = "absolute_margin"
            else:
                pool.append(k)
                continue
            skipped[reason] += 1
        ranked = sorted(pool, key=lambda k: (-scores[k], k))[select.range_min :][:n]
        indices.append(ranked + [-1] * (n - len(ranked)))
    return np.array(indices), dict(skipped)


def random_case(seed):
    rng = np.random.default_rng(seed)
    Q, K = int(rng.integers(1, 7)), int(rng.integers(1, 30))
    q, c = (rng.integers(-2, 3, (count, 4)).astype(np.float32) for count in (Q, K))
    if rng.random() < 0.5:
        c[K // 2 :] = c[: K - K // 2]
    for rows in (q, c):
        if rng.random() < 0.3:
            rows[rng.integers(0, len(rows), 1 + len(rows) // 5), rng.integers(4)] = rng.choice(
                [np.nan, np.inf, -np.inf]
            )
    kind = rng.integers(3)
    ids = [None, None]
    if rng.random() < 0.6:
        names = rng.integers(0, K, K)
        ids[1] = [f"d{name}" for name in names] if kind else names.tolist()
    if rng.random() < 0.5:
        ids[0] = [f"q{name}" for name in rng.integers(0, Q, Q)]
    texts = [
        rng.choice(WORDS + [f"w{i}" for i in range(20)], count).tolist() if rng.random() < 0.6 else None
        for count in (Q, K)
    ]

    def lists(most):
        named = [rng.integers(0, K, rng.integers(1, most + 1)).tolist() for _ in range(Q)]
        return named if ids[1] is None else [[ids[1][row] for row in part] for part in named]

    select = [Select(), Select(2), Select(min_score=-1.0, absolute_margin=1.0)][rng.integers(3)]
    return q, c, lists(3), lists(2), ids, texts, select, bool(rng.integers(2))


@pytest.mark.parametrize("engine", ["cpu", "reference", "Flat", "resumed"])
def test_any_ids_and_texts(engine, tmp_path):
    if engine == "Flat":
        pytest.importorskip("faiss")
    for seed in range(60):
        q, c, positives, exclude, ids, texts, select, dedup = random_case(seed)
        want, skipped = slow(q, c, positives, exclude, ids, texts, select, dedup, 5)
        options = {
            "select": select,
            "num_negatives": 5,
            "exclude": exclude,
            "deduplicate": "exact" if dedup else "none",
        }
        options |= {"query_ids": ids[0], "corpus_ids": ids[1], "query_texts": texts[0], "corpus_texts": texts[1]}
        if engine in ("cpu", "reference"):
            options |= {"backend": engine, "batch_size": 2, "corpus_chunk_size": 7}
        elif engine == "Flat":
            options |= {"index": "Flat", "count_skipped": False}
        else:
            options |= {"resume_dir": tmp_path / str(seed), "batch_size": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            got = mine(q, c, positives, **options)
            if engine == "resumed":
                for part in sorted((tmp_path / str(seed)).glob("queries-*"))[:1]:
                    part.unlink()
                got = mine(q, c, positives, **(options | {"batch_size": 3}))
        if engine == "Flat":  # among equal scores, FAISS may return others
            want_scores = np.where(want < 0, -np.inf, np.einsum("qd,qnd->qn", q, c[want]))
            np.testing.assert_array_equal(got.scores, want_scores, err_msg=f"seed {seed}")
        else:
            np.testing.assert_array_equal(got.indices, want, err_msg=f"seed {seed}")
        wanted = {name: count for name, count in skipped.items() if engine != "Flat" or name not in FILTERS}
        assert {name: got.skipped[name] for name in wanted} == wanted, seed
        assert (got.num_valid == (want >= 0).sum(1)).all()


def test_groups_are_joined_along_chains():
    rng = np.random.default_rng(0)
    for count in (1, 2, 50, 400):
        names = [rng.integers(0, max(1, count // 2), count).tolist() for _ in range(2)]
        lowest = [np.array([each.index(name) for name in each]) for each in names]
        want = [min(group) for group in groups(count, *names)]
        assert joined_groups(*lowest).tolist() == want
    chain = np.arange(1000)  # 0-1, 1-2, 2-3, ...
    assert not joined_groups(chain - chain % 2, np.maximum(0, chain - (chain + 1) % 2)).any()


def test_empty_texts_of_the_corpus_are_reported():
    """Models give the empty text a vector near many queries. Sixteen hashes are there to be mistaken for it."""
    c = np.eye(18, dtype=np.float32)
    texts = [f"document {row}" for row in range(18)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(c[:2], c, [0, 1], corpus_texts=texts, query_texts=["", " "])
    texts[5] = texts[7] = " \n"
    with pytest.warns(UserWarning, match="2 of the 18 texts of the corpus are empty, the first in row 5") as found:
        mine(c[:2], c, [0, 1], corpus_texts=texts)
    assert found[0].filename == __file__
