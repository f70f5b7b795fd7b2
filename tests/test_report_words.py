"""The sentences of hardness_report about its figures, at the values where a sentence changes."""

import math

import numpy as np

import negmine
from negmine.report import words
from tests.cases import unit

EDGES = (0.0, 0.05, 0.3, 0.8, 1.0)


def figures_of(mean: list[float], error: float, edges: tuple[float, ...] = EDGES) -> tuple[dict, dict]:
    """Figures and facts of a report with one curve and nothing else remarkable."""
    made = negmine.hardness_report(unit(4, 8), unit(60, 8, seed=2), edges=edges)
    figures = dict(made.figures) | {"same_class_mean": np.array(mean), "same_class_error": np.full(len(mean), error)}
    return figures | {"same_class_chance": np.array(0.1), "hard_agreement": np.array(0.0)}, made.facts


def test_findings_describe_the_easiest_bin():
    for last, error, said in (
        (0.30, 0.01, "it rises again, 0.25 above the bin 30 % to 80 %"),
        (0.06, 0.01, "does not rise again"),
        (0.04, 0.01, "does not rise again"),
    ):
        figures, facts = figures_of([0.5, 0.2, 0.05, last], error)
        (sentence,) = [s for s in words.findings(figures, facts) if s.startswith("Same class")]
        assert said in sentence and sentence.startswith(
            "Same class: 50 % among the hardest 5 %, 10 % over the whole pool"
        )
    figures, facts = figures_of([0.5, 0.2, 0.05, 0.3], math.nan)
    assert not any("again" in s for s in words.findings(figures, facts)), "one query has no standard error"


def test_advice_follows_the_figures():
    figures, facts = figures_of([0.5, 0.3, 0.05, 0.05], 0.01)
    (advice,) = words.advice(figures, facts)
    assert (
        "50 % of the hardest negatives are of the query's own class; by chance 10 % would be" in advice
        and "hardest 30 % with Select(0.3, None)" in advice
    )
    figures["same_class_mean"][:] = 0.1
    assert words.advice(figures, facts) == ["No change is needed."]
    figures["hard_agreement"] = np.array(0.5)
    assert words.advice(figures, facts)[0].startswith("Some rows are hard for many queries at once")
    for kept, said in ((0.2, "mine again"), (0.8, "the mined negatives are still good")):
        figures["overlap"] = np.full((4, 1), kept)
        assert words.advice(figures, facts)[-1].endswith(said + ".")


def test_bins_after_empty_ones_begin_at_nothing():
    made = negmine.hardness_report(unit(4, 8), unit(60, 8, seed=2), edges=(0.0, 0.001, 0.5, 0.999, 1.0))
    assert [line[:14].strip() for line in words.table(made.figures, made.facts)[1:]] == [
        "0 % to 50 %",
        "50 % to 99.9 %",
        "99.9 % to 100",
    ]
