"""benchmarks.mining: every difference between miners is explained, and the tables are computed from the rows."""

import numpy as np
import pytest

from benchmarks import mining
from benchmarks.differences import REASONS, explain
from benchmarks.rows import END, append

WINDOW = 6
MARGIN = 0.1
# Scores of rows 0, 1, 2, ... for the query (1, 0). The positive is row 0, so that the margin keeps rows with 0.81 or less.
SCORES = [0.9, 0.89, 0.88, 0.87, 0.86, 0.85, 0.81 + 1e-8, 0.7, 0.7 + 1e-8, 0.5, 0.4]


def explained(ours, theirs):
    corpus = np.array([[s, (1 - s * s) ** 0.5] for s in SCORES], np.float32)
    query = np.array([[1.0, 0.0]], np.float32)
    found = explain(np.array([ours]), np.array([theirs]), query, corpus, np.array([0]), MARGIN, WINDOW)
    assert sum(found.values()) == 1 and tuple(found) == REASONS
    return next(name for name, queries in found.items() if queries)


@pytest.mark.parametrize(
    "ours, theirs, reason",
    [
        ([7, 9], [7, 9], "same"),
        ([8, 7], [7, 8], "ties"),
        ([6, 7], [7, 9], "threshold"),
        ([7, 9], [6, 7], "threshold"),
        ([7, 9], [-1, -1], "window"),
        ([10, -1], [-1, -1], "fewer"),
        ([1, 2], [-1, -1], "unexplained"),  # six rows are searched, and row 2 is the third
        ([9, 10], [7, 9], "unexplained"),
        ([-1, -1], [7, 9], "unexplained"),
        ([7, 9], [9, -1], "unexplained"),
    ],
)
def test_each_difference_has_its_reason(ours, theirs, reason):
    assert explained(ours, theirs) == reason


def test_the_tables_are_the_newest_rows(monkeypatch, tmp_path):
    folder, page = tmp_path / "mining", tmp_path / "page.md"
    monkeypatch.setattr(mining, "RESULTS", tmp_path)
    monkeypatch.setattr(mining, "DOCS", page)
    page.write_text(f"before\n\n{mining.BEGIN}\nstale\n{END}\n\nafter\n")
    stamp = {"commit": "abc", "threads": 2, "torch": "2", "K": 20_000, "D": 16, "given_up": 1_234, "load": 0.4}

    def row(date, variant, Q, cpu):
        return stamp | {"date": date, "variant": variant, "Q": Q, "cpu_s": cpu, "wall_s": cpu, "peak_extra_mib": 2_000}

    rows = [
        row("2026-01-01", "negmine", 900, 9),
        row("2026-01-03", "negmine", 9_000, 1),
        row("2026-01-03", "negmine", 9_000, 4),
    ]
    rows += [row("2026-01-02", "negmine", 9_000, 50), row("2026-01-03", "st_torch", 9_000, 8)]
    append(folder / "box.csv", list(rows[0]), rows)
    told = stamp | {"date": "2026-01-03", "variant": "st_torch", "Q": 9_000} | dict(zip(REASONS, range(6), strict=True))
    append(folder / "box-differences.csv", list(told), [told])
    mining.write_tables()
    text = page.read_text()
    assert text.startswith("before\n\n" + mining.BEGIN) and text.endswith(END + "\n\nafter\n") and "stale" not in text
    assert "9,000 queries, 20,000 entries, D = 16:" in text and "900 queries" not in text.replace("9,000", "")
    assert "| `mine_hard_negatives` | 2.5 | 2.5 | 2,000 MiB | 1,234 |" in text
    assert "| sentence-transformers, use_faiss=False | 8.0 | 8.0 | 2,000 MiB | 1,234 |" in text
    assert "| sentence-transformers, use_faiss=False | 0 | 1 | 2 | 3 | 4 | 5 |" in text
    assert "box, 2 threads, torch 2, commit abc, 2026-01-03, load 0 to 0." in text
    once = text
    mining.write_tables()
    assert page.read_text() == once
