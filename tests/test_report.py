"""hardness_report compared with loops in float64; its page, its files and its errors.

With integer embeddings, scores are exact, so ranks equal those of the loop, also for equal scores.
"""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import negmine
from negmine.report import HardnessReport, words
from negmine.report import figures as fig
from tests.cases import unit, whole
from tests.peak import peak_mib

ROOT = Path(__file__).resolve().parents[1]
Q, K, D = 7, 43, 5
EDGES = (0.0, 0.05, 0.3, 0.8, 1.0)


@pytest.fixture(scope="module")
def case():
    generator = np.random.default_rng(3)
    return {
        "query_embeddings": whole(Q, D, seed=1),
        "corpus_embeddings": whole(K, D, seed=2),
        "positives": [[int(k) for k in generator.choice(K, 1 + q % 3, replace=False)] for q in range(Q)],
        "exclude": [[q, q + 1] for q in range(Q)],
        "query_labels": generator.integers(0, 4, Q),
        "corpus_labels": generator.integers(0, 4, K),
        "class_similarity": {"matrix": generator.random((4, 4)), "sum": lambda q, k: q + k},
    }


def rankings(case) -> list[list[tuple[float, int]]]:
    """Return the pool of each query as (score, row), hardest first; among equal scores, the lower row comes first."""
    out = []
    for q, query in enumerate(case["query_embeddings"].double().tolist()):
        hidden = {*case["positives"][q], *case["exclude"][q]}
        scores = [sum(x * y for x, y in zip(query, row, strict=True)) for row in case["corpus_embeddings"].tolist()]
        out.append(
            sorted(((s, k) for k, s in enumerate(scores) if k not in hidden), key=lambda pair: (-pair[0], pair[1]))
        )
    return out


def mean_and_error(per_query: list[float]) -> tuple[float, float]:
    n, mean = len(per_query), sum(per_query) / len(per_query)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in per_query) / (n - 1) / n)


def report(case, **options):
    return negmine.hardness_report(**{"edges": EDGES, "samples_per_bin": K, "tail": 0.2, **case, **options})


@pytest.mark.parametrize("backend", [None, "reference"])
def test_every_curve_is_the_loops(case, backend):
    made = report(case, backend=backend).figures
    ranked = rankings(case)
    labels, matrix = (case["query_labels"], case["corpus_labels"]), case["class_similarity"]["matrix"]
    curves = {
        "score": lambda q, s, k: s,
        "same_class": lambda q, s, k: float(labels[0][q] == labels[1][k]),
        "similarity/matrix": lambda q, s, k: matrix[labels[0][q], labels[1][k]],
        "similarity/sum": lambda q, s, k: float(q + k),
    }
    for name, value in curves.items():
        for i, (low, high) in enumerate(itertools.pairwise(EDGES)):
            means = []
            for q, pool in enumerate(ranked):
                span = pool[math.floor(low * len(pool)) : math.floor(high * len(pool))]
                if span:
                    means.append(sum(value(q, s, k) for s, k in span) / len(span))
            mean, error = mean_and_error(means)
            assert made[f"{name}_mean"][i] == pytest.approx(mean, abs=1e-12), (name, i)
            assert made[f"{name}_error"][i] == pytest.approx(error, abs=1e-12), (name, i)
    chance = [sum(labels[0][q] == labels[1][k] for _, k in pool) / len(pool) for q, pool in enumerate(ranked)]
    assert made["same_class_chance"] == pytest.approx(sum(chance) / Q)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_consistency_and_positives_are_the_loops(case, backend):
    made = report(case, backend=backend).figures
    ranked = rankings(case)
    counts, shares = {"hard": [0] * K, "easy": [0] * K}, []
    for q, pool in enumerate(ranked):
        n = max(1, math.floor(0.2 * len(pool)))
        shares.append(n / len(pool))
        for _, k in pool[:n]:
            counts["hard"][k] += 1
        for _, k in sorted(pool, key=lambda pair: (pair[0], pair[1]))[:n]:
            counts["easy"][k] += 1
        query = case["query_embeddings"][q].double()
        best = max(float(query @ case["corpus_embeddings"][p].double()) for p in case["positives"][q])
        assert made["positive_score"][q] == best
        assert made["positive_rank"][q] == 1 + sum(s > best for s, _ in pool)
        assert (made["top_margins"][q] == [s - best for s, _ in pool[:10]]).all()
    a = sum(shares) / Q
    for side, expected in counts.items():
        assert made[f"{side}_count"].tolist() == expected
        mean = sum(expected) / K
        ratio = sum((c - mean) ** 2 for c in expected) / K / (Q * a * (1 - a))
        assert made[f"{side}_variance_ratio"] == pytest.approx(ratio)
        assert made[f"{side}_histogram"].tolist() == [expected.count(c) for c in range(max(expected) + 1)]
        binomial = [K * math.comb(Q, c) * a**c * (1 - a) ** (Q - c) for c in range(max(expected) + 1)]
        assert made[f"{side}_expected"] == pytest.approx(binomial)


def test_suspects_and_near_duplicates_are_the_loops(case):
    corpus = case["corpus_embeddings"].double()
    made = report(case, near_duplicate_score=20.0, num_suspects=1000).facts
    ranked, pairs, near = rankings(case), [], []
    for q, pool in enumerate(ranked):
        query = case["query_embeddings"][q].double()
        best = max(float(query @ corpus[p]) for p in case["positives"][q])
        pairs += [(best - s, q, k) for s, k in pool[:3] if s > best]
        for p in case["positives"][q]:
            close = sorted(((-float(corpus[p] @ corpus[k]), k) for _, k in pool))[:10]
            near += [(score, q, p, k) for score, k in close if -score >= 20]
    assert near and pairs
    assert [(s["positive_score"] - s["score"], s["query"], s["row"]) for s in made["suspects"]] == sorted(pairs)
    found = [(-s["score"], s["query"], s["positive"], s["row"]) for s in made["near_duplicates"]]
    assert found == sorted(near)


def test_drift_is_the_loops(case):
    bare = {name: case[name] for name in ("query_embeddings", "corpus_embeddings", "positives", "exclude")}
    older = (whole(Q, 3, seed=8), whole(K, 3, seed=9))
    made = report(bare, previous=older).figures
    ranked, before = rankings(case), rankings({**case, "query_embeddings": older[0], "corpus_embeddings": older[1]})
    assert made["overlap_sizes"].tolist() == [1, math.floor(0.2 * K)]

    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]

    for q in range(Q):
        for column, size in enumerate(made["overlap_sizes"]):
            n = min(int(size), math.floor(0.2 * len(ranked[q])))
            both = {k for _, k in ranked[q][:n]} & {k for _, k in before[q][:n]}
            assert made["overlap"][q, column] == pytest.approx(len(both) / n)
        sides = [
            ranks((e[q].double() @ c.double().T).tolist())
            for e, c in ((case["query_embeddings"], case["corpus_embeddings"]), older)
        ]
        assert made["rank_correlation"][q] == pytest.approx(np.corrcoef(*sides)[0, 1])
    same = report(bare, previous=(bare["query_embeddings"], bare["corpus_embeddings"])).figures
    assert (same["overlap"] == 1).all() and same["rank_correlation"] == pytest.approx(1.0)


def test_batches_change_nothing(case, monkeypatch):
    whole_run = report(case, samples_per_bin=2).figures
    monkeypatch.setattr("negmine.report.measure.MOST_QUERIES", 3)
    in_parts = report(case, samples_per_bin=2).figures
    assert whole_run.keys() == in_parts.keys()
    for name, values in whole_run.items():
        np.testing.assert_array_equal(values, in_parts[name], name)


def test_sampled_ranks_are_distinct_and_cover_their_bin():
    size = torch.tensor([1000, 37, 3])
    bounds = fig.rank_bounds(EDGES, size)
    drawn = torch.stack(
        [fig.sampled_ranks(bounds, 4, torch.arange(3), seed) for seed in range(400)]
    )  # (400, 3, bins * 4)
    for b, i in itertools.product(range(3), range(len(EDGES) - 1)):
        low, high = bounds[b, i].item(), bounds[b, i + 1].item()
        ranks = drawn[:, b, 4 * i : 4 * i + 4]
        if high - low <= 4:
            assert (ranks == torch.tensor([*range(low, high), *[-1] * (4 - high + low)])).all()
            continue
        assert (ranks.diff(dim=1) > 0).all() and ranks.min() >= low and ranks.max() < high
        if high - low < 60:
            assert set(ranks.flatten().tolist()) == set(range(low, high)), "some rank is never drawn"


def test_a_subset_of_queries_keeps_its_own_rows(case):
    made = report(case, num_queries=3)
    assert len(made.figures["queries"]) == 3 and made.facts["queries"] == Q
    every = report(case)
    assert (made.figures["positive_rank"] == every.figures["positive_rank"][made.figures["queries"]]).all()


def test_normalize_gives_cosines():
    q, c = torch.randn(4, 6), torch.randn(20, 6) * 3
    raw = negmine.hardness_report(q, c, [0, 1, 2, 3])
    assert "norms from" in raw.advice()[0] and "normalize=True" in raw.advice()[0]
    made = negmine.hardness_report(q, c, [0, 1, 2, 3], normalize=True)
    given = negmine.hardness_report(*(torch.nn.functional.normalize(v, dim=1) for v in (q, c)), [0, 1, 2, 3])
    np.testing.assert_array_equal(made.figures["score_mean"], given.figures["score_mean"])
    assert words.is_unit(made.facts) and not words.is_unit(raw.facts)


def small_and_large_report():
    q, c = unit(1024, 16), unit(65536, 16, seed=1)
    options = {"num_queries": None, "max_memory_bytes": 16 << 20, "samples_per_bin": 2}
    return lambda queries: negmine.hardness_report(queries, c, **options), q[:2], q


def test_no_matrix_of_all_pairs():
    """1,024 queries and 65,536 rows, whose scores need 256 MiB. The limit includes buffers of each thread and the figures."""
    assert peak_mib(small_and_large_report) < 128


class Reader(HTMLParser):
    """Collects tags, attributes and text of a page, and checks that tags are closed in the right order."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>'


def test_the_page_is_whole_and_escapes_texts(case, tmp_path):
    page = tmp_path / "page.html"
    named = {f"{EVIL}{name}": measure for name, measure in case["class_similarity"].items()}
    options = {
        "query_texts": [f"{EVIL} {q}" for q in range(Q)],
        "corpus_texts": [f"{EVIL} {k}" for k in range(K)],
        "class_similarity": named,
        "title": EVIL,
        "near_duplicate_score": 20.0,
        "previous": (case["query_embeddings"], case["corpus_embeddings"]),
    }
    made = report(case, page=page, **options)
    read = Reader(page.read_text())
    assert not {"script", "img", "link", "iframe", "object"} & set(read.tags)
    assert not [a for a in read.attributes if a[0] in ("src", "href", "xlink:href") or a[0].startswith("on")]
    style = re.search("<style>(.*?)</style>", page.read_text(), re.S).group(1)
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert read.tags.count("svg") == 4 + 1 + 2 + 1  # curves, positives, consistency, drift
    for sentence in [*made.findings(), *made.advice(), EVIL]:
        assert sentence in read.said
    assert (
        "nan"
        not in re.sub("<style>.*?</style>", "", page.read_text(), flags=re.S).replace("dominant", "").split(EVIL)[0]
    )


def test_the_smallest_report_has_a_page(tmp_path):
    made = negmine.hardness_report(torch.eye(3)[:1], torch.eye(3), page=tmp_path / "p.html")
    assert Reader((tmp_path / "p.html").read_text()).said.count("How hard are these negatives?") == 2
    assert not made.facts["has_positives"] and made.advice() == ["No change is needed."]
    assert made.figures["hard_count"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("kind", ["json", "npz"])
def test_files_load_what_was_saved(case, tmp_path, kind):
    made = report(case, corpus_texts=["ünï"] * K)
    path = tmp_path / f"report.{kind}"
    made.save(path)
    back = HardnessReport.load(path)
    assert back.facts == made.facts and back.summary() == made.summary()
    for name, values in made.figures.items():
        finite = np.where(np.isfinite(values), values, np.nan)  # JSON has only null for values that are not finite
        np.testing.assert_array_equal(
            back.figures[name]
            if kind == "json"
            else np.where(np.isfinite(back.figures[name]), back.figures[name], np.nan),
            finite,
        )
        assert back.figures[name].dtype == values.dtype and back.figures[name].shape == values.shape
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged or was not written by save"):
        HardnessReport.load(path)


def test_invalid_files_raise_errors(tmp_path):
    for path, said in ((tmp_path / "a.txt", "a .json or .npz file"), (tmp_path / "a.json", "an existing file")):
        with pytest.raises(ValueError, match=said):
            HardnessReport.load(path)
    (tmp_path / "a.json").write_text(json.dumps({"format": 99, "facts": {}, "figures": {}}))
    with pytest.raises(ValueError, match="format 99"):
        HardnessReport.load(tmp_path / "a.json")


def test_files_are_written_whole_or_not_at_all(case, tmp_path):
    made = report(case)
    for write, name in ((made.to_html, "a.html"), (made.save, "a.json"), (made.save, "a.npz")):
        write(tmp_path / name)
        with pytest.raises(OSError, match=rf"HardnessReport\.\w+: .*{name}' could not be written"):
            write(tmp_path / "none" / name)
    good = (tmp_path / "a.json").read_bytes()
    broken = HardnessReport({"score_mean": np.array([object()])}, made.facts)
    with pytest.raises(TypeError):
        broken.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json", "a.npz"]


def test_shared_and_spearman_at_their_edges():
    assert fig.shared(torch.tensor([[1, 2, -1]]), torch.tensor([[2, -1, -1]])).tolist() == [1]
    assert fig.spearman(torch.ones(1, 4), torch.rand(1, 4)).isnan().all()
    assert math.isnan(fig.variance_ratio(np.zeros(3), 0, 0.5))
    assert fig.binomial(3, 0.0, 2).tolist() == [1, 0, 0] and fig.binomial(2, 1.0, 2).tolist() == [0, 0, 1]


q, c = unit(3, 4, seed=0), unit(9, 4, seed=1)
labels = {"query_labels": [0, 1, 2], "corpus_labels": [0] * 9}
REFUSALS = [
    ({"query_embeddings": [1]}, TypeError, "query_embeddings[0] must be an array, a tensor"),
    ({"query_embeddings": q[:0]}, ValueError, "query_embeddings must be of at least one row, got 0"),
    ({"corpus_embeddings": c[:, :2]}, ValueError, "corpus_embeddings must be of query_embeddings' D = 4"),
    ({"corpus_embeddings": c * torch.inf}, ValueError, "corpus_embeddings must be finite, got NaN or infinity in row 0"),
    ({"positives": [0, 9, 0]}, ValueError, "positives must be row numbers of the corpus, in [0, 9)"),
    ({"query_labels": [0] * 3}, ValueError, "corpus_labels must be given together"),
    ({**labels, "corpus_labels": [0] * 8}, ValueError, "corpus_labels must be 9 ints or strings"),
    ({**labels, "corpus_labels": ["a"] * 9}, ValueError, "corpus_labels must be of the same type as query_labels"),
    ({"class_similarity": np.eye(2)}, ValueError, "class_similarity must be a callable unless"),
    ({**labels, "class_similarity": np.eye(2)}, ValueError, "a (C, C) matrix with one row per label"),
    ({**labels, "class_similarity": [["a"]]}, TypeError, "class_similarity must be a matrix of numbers"),
    ({"class_similarity": {"x": 3}}, TypeError, "class_similarity['x'] must be a (C, C) matrix or a callable"),
    ({"class_similarity": lambda q, k: q[:1]}, ValueError, "one number for each of"),
    ({"query_texts": ["a"]}, ValueError, "query_texts must be 3 texts, one per row"),
    ({"corpus_texts": "a" * 9}, TypeError, "corpus_texts must be texts, one per row"),
    ({"previous": q}, TypeError, "previous must be a pair"),
    ({"previous": (q, c[:4])}, ValueError, "previous must be of 3 queries and 9 corpus rows"),
    ({"normalize": 1}, TypeError, "normalize must be True or False"),
    ({"edges": (0.0, 0.5)}, ValueError, "edges must be fractions ascending from 0 to 1"),
    ({"edges": (0.0, 0.5, 0.5, 1.0)}, ValueError, "edges must be fractions"),
    ({"tail": 1.0}, ValueError, "tail must be a fraction above 0 and below 1"),
    ({"num_queries": 0}, ValueError, "num_queries must be an int of 1 or more"),
    ({"samples_per_bin": None}, ValueError, "samples_per_bin must be an int of 1 or more"),
    ({"near_duplicate_score": None}, ValueError, "near_duplicate_score must be a number"),
    ({"seed": -1}, ValueError, "seed must be an int"),
    ({"max_memory_bytes": 10}, ValueError, "max_memory_bytes must be at least"),
    ({"device": "cuda:99"}, ValueError, "device must be a device that torch can use here"),
    ({"page": "/no/such/folder/p.html"}, ValueError, "page must be a path in an existing folder"),
    ({"title": 3}, TypeError, "title must be a string"),
]  # fmt: skip


@pytest.mark.parametrize("change, kind, said", REFUSALS, ids=[said[:40] for *_, said in REFUSALS])
def test_refusals(change, kind, said):
    with pytest.raises(kind, match=re.escape(said)) as caught:
        negmine.hardness_report(**{"query_embeddings": q, "corpus_embeddings": c, **change})
    assert str(caught.value).startswith("hardness_report: ")
