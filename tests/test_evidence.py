"""docs/evidence.md has the tables that are computed from the committed rows."""

from benchmarks import evidence
from benchmarks.rows import read


def test_the_page_has_the_tables_of_the_rows():
    text = evidence.tables(read(evidence.IMAGES), read(evidence.TEXTS))
    assert f"{evidence.BEGIN}\n\n{text}\n" in evidence.PAGE.read_text()


def test_intervals_are_of_differences_of_equal_seeds():
    measure = {"all": {"0": 0.5, "1": 0.6, "2": 0.7}, "some": {"0": 0.51, "1": 0.62, "2": 0.73, "3": 0.1}}
    assert "| some | 4 | 0.4900 | +0.0200 ± 0.0248 |" in evidence.treatments_table(["k"], [measure])
