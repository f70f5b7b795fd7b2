"""merge_retrievers compared with loops, and the documented properties of build_batches."""

import copy
import pickle
import re

import numpy as np
import pytest

import negmine
from negmine.adapters.sentence_transformers import hard_batches
from negmine.mining import MiningResult, NegativeIndex, build_batches, merge_retrievers
from tests.cases import unit

Q, K = 30, 120
P = [[b, 60 + b // 2] for b in range(Q)]  # two queries share each second positive
TEXTS = [f"doc {i % 110}" for i in range(K)]  # ten copies
mine = negmine.mine_hard_negatives


def retrievers(n=8):
    results = [mine(unit(Q, 8, seed=s), unit(K, 8, seed=9 + s), P, num_negatives=n, corpus_texts=TEXTS) for s in (1, 2)]
    found = NegativeIndex.build(unit(K, 8, seed=20)).search(unit(Q, 8, seed=3), n)
    return [*results, found]


def loop(lists, hidden, method, n, weights, constant):
    """lists: for each retriever, the (document, score) pairs of one query, hardest first."""
    clean = []
    for pairs in lists:
        seen = {}
        for row, score in pairs:
            document = TEXTS.index(TEXTS[row])
            if document not in hidden:
                seen.setdefault(document, score)
        clean.append(list(seen.items()))
    if method == "round_robin":
        merged = []
        for turn in range(max(map(len, clean), default=0)):
            for pairs in clean:
                if turn < len(pairs) and pairs[turn][0] not in merged:
                    merged.append(pairs[turn][0])
        return merged[:n], clean
    total = {}
    for pairs, weight in zip(clean, weights, strict=True):
        low, high = min(s for _, s in pairs), max(s for _, s in pairs)
        for place, (document, score) in enumerate(pairs, 1):
            if method == "scores":
                part = weight * ((score - low) / (high - low) if high > low else 1)
            else:
                part = weight / (constant + place)
            total[document] = total.get(document, 0) + part
    return sorted(total, key=lambda document: (-total[document], document))[:n], clean


@pytest.mark.parametrize("method", ["rrf", "scores", "round_robin"])
def test_merged_as_the_loop_does(method, tmp_path):
    parts = retrievers()
    for weights, n in ((None, 5), ([1.0, 0.5, 2.0], None)):
        got = merge_retrievers(parts, method=method, num_negatives=n, weights=weights)
        for b in range(Q):
            lists = []
            for part in parts:
                lists.append(
                    [(int(k), float(s)) for k, s in zip(part.indices[b], part.scores[b], strict=True) if k >= 0]
                )
            hidden = {TEXTS.index(TEXTS[row]) for row in P[b]}
            want, clean = loop(lists, hidden, method, n or 8, weights or [1, 1, 1], 60)
            kept = got.indices[b][got.indices[b] >= 0].tolist()
            assert kept == want and got.num_valid[b] == len(want)
            for slot, document in enumerate(want):
                places = [[d for d, _ in pairs].index(document) if document in dict(pairs) else -1 for pairs in clean]
                assert got.sources[b, slot].tolist() == places
        assert (np.diff(np.where(np.isinf(got.scores), -1, got.scores)) <= 0).all()
    got.save(tmp_path / "merged.npz")
    np.testing.assert_array_equal(MiningResult.load(tmp_path / "merged.npz").sources, got.sources)
    assert got.to_triplets().shape[1] == 3 and "queries" in got.summary()


def test_refused_retrievers():
    parts = retrievers()
    other = mine(unit(Q, 8, seed=1), unit(K, 8, seed=2), [[0]] * Q)
    for given, words in (
        ([], "retrievers must be a list that begins with a MiningResult"),
        ([parts[2]], "retrievers must be a list that begins with a MiningResult"),
        ([parts[0], other], "retrievers[1] must be of the queries, corpus rows and positives of the first"),
        (
            [parts[0], (parts[2].scores[1:], parts[2].indices[1:])],
            "retrievers[1] must be scores and int indices of one shape",
        ),
        (
            [parts[0], (parts[2].scores, parts[2].indices + K)],
            "retrievers[1] must be of corpus rows in [0, 120), or -1",
        ),
        ([parts[0], "bm25"], "retrievers[1] must be a MiningResult, or a pair"),
    ):
        with pytest.raises((ValueError, TypeError), match="^merge_retrievers: " + re.escape(words)):
            merge_retrievers(given)
    with pytest.raises(ValueError, match="weights must be 3 numbers of 0 or more"):
        merge_retrievers(parts, weights=[1.0])
    with pytest.raises(ValueError, match="method must be 'rrf' or 'scores' or 'round_robin'"):
        merge_retrievers(parts, method="borda")


def shared(batch):
    rows = [TEXTS.index(TEXTS[row]) for b in batch for row in set(P[b])]
    return len(rows) - len(set(rows))


def test_batches_hold_no_positive_of_another_query(tmp_path):
    result = mine(unit(Q, 8, seed=1), unit(K, 8, seed=2), P, num_negatives=20, corpus_texts=TEXTS)
    names = ["a" if b % 3 else "b" for b in range(Q)]
    for options in ({}, {"datasets": names}, {"drop_last": True}, {"seed": 5}):
        batches = build_batches(result, 4, **options)
        made = list(batches)
        assert len(made) == len(batches) and made == list(batches)
        flat = [b for batch in made for b in batch]
        assert len(flat) == len(set(flat)) and (options.get("drop_last") or sorted(flat) == list(range(Q)))
        assert not any(shared(batch) for batch in made) and max(map(len, made)) == 4
        if "datasets" in options:
            assert all(len({names[b] for b in batch}) == 1 for batch in made)
        if "drop_last" in options:
            assert {len(batch) for batch in made} == {4}
        batches.set_epoch(1)
        assert list(batches) != made
    twins = mine(unit(4, 8, seed=1), unit(K, 8, seed=2), [0, 1, 2, 3], query_ids=["x", "x", "y", "z"])
    assert all(not {0, 1} <= set(batch) for batch in build_batches(twins, 4))
    with pytest.warns(UserWarning, match="are equal to rows"):
        equal = mine(unit(1, 8, seed=1).repeat(4, 1), unit(K, 8, seed=2), [0, 1, 2, 3])
    equal.save(tmp_path / "equal.npz")
    assert [len(batch) for batch in build_batches(MiningResult.load(tmp_path / "equal.npz"), 4)] == [1] * 4
    none = mine(unit(3, 8, seed=1), unit(K, 8, seed=2), [[0], [], [2]])
    assert sorted(b for batch in build_batches(none, 2) for b in batch) == [0, 2]


def test_batches_are_hard():
    """Queries are close to few centres. A batch has queries of one centre, which are hard negatives for each other."""
    centres = unit(10, 16, seed=3).repeat_interleave(8, 0)
    corpus = centres + 0.1 * unit(80, 16, seed=4)
    queries = corpus + 0.05 * unit(80, 16, seed=5)
    result = mine(queries, corpus, list(range(80)), num_negatives=7)
    made = list(build_batches(result, 8))
    assert sum(len({b // 8 for b in batch}) == 1 for batch in made) >= 8


class Table:
    """The interface of datasets.Dataset that hard_batches uses."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, name):
        return self.columns[name]

    def __len__(self):
        return len(self.columns[self.column_names[0]])


def test_batches_of_the_rows_of_a_dataset():
    """A row for each positive, in any order: each row once, no two rows of a query in a batch, near rows in one batch."""
    centres = unit(10, 16, seed=3).repeat_interleave(8, 0)
    corpus = centres + 0.1 * unit(80, 16, seed=4)
    texts = [f"query {i}" for i in range(40)]
    result = mine(
        corpus[::2], corpus, [[2 * i, 2 * i + 1] for i in range(40)], num_negatives=7, query_texts=texts, seed=1
    )
    rows = np.random.default_rng(0).permutation(np.arange(40).repeat(2))
    batches = build_batches(result, 4, rows=rows)
    made = list(batches)
    assert sorted(row for batch in made for row in batch) == list(range(80))
    assert all(len({rows[row] for row in batch}) == len(batch) for batch in made)
    assert sum(len({rows[row] // 4 for row in batch}) == 1 for batch in made) >= 12
    sampler = hard_batches(result)
    table = Table(anchor=[texts[q] for q in rows], positive=[""] * 80)
    found = sampler(table, batch_size=4, drop_last=False, valid_label_columns=["label"], generator=None, seed=0)
    assert list(found) == made and found.batch_size == 4 and found.drop_last is False
    assert copy.deepcopy(sampler) is copy.copy(sampler) is sampler
    saved = pickle.dumps(sampler)  # the trainer does so for each checkpoint
    assert len(saved) < 200
    with pytest.raises(ValueError, match="hard_batches: the result is not part of a checkpoint"):
        pickle.loads(saved)(table, 4)
    with pytest.raises(ValueError, match="hard_batches: dataset must be the text of a query of the result in row 1 of"):
        sampler(Table(anchor=["query 0", "nobody's"]), 4)
    with pytest.raises(TypeError, match=r"hard_batches: dataset must be a datasets\.Dataset, which has a length"):
        sampler(iter([]), 4)
    with pytest.raises(ValueError, match="hard_batches: result must be mined with query_texts"):
        hard_batches(mine(corpus[:3], corpus, [0, 1, 2]))
    for bad, words in (
        ([0, 40], "rows must be numbers of queries, in .0, 40., got 40"),
        ([0.5], "rows must be a flat"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"build_batches: {words}"):
            build_batches(result, 4, rows=bad)
