"""MiningResult.to_html: how many negatives each query got, how far below its positive they lie, what was dropped."""

import html as escape
from typing import TYPE_CHECKING

import numpy as np

from negmine.report import charts
from negmine.report.page import FRAME, STYLE, _card, _list

if TYPE_CHECKING:
    from negmine.search.result import MiningResult

MOST_BARS = 9


def shares_found(result: "MiningResult") -> dict[str, float]:
    """How many negatives -> the share of the queries that got so many."""
    Q, n = result.indices.shape
    edges = np.unique(np.linspace(0, n + 1, min(n + 1, MOST_BARS) + 1).astype(int))  # [low, high) of each bar
    spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return {
        str(low) if high == low + 1 else f"{low} to {high - 1}": float(
            ((result.num_valid >= low) & (result.num_valid < high)).sum() / max(1, Q)
        )
        for low, high in spans
    }


def gaps(result: "MiningResult") -> np.ndarray:
    """The positive's score less the negative's, of every negative whose query has a positive."""
    scores = np.where(result.indices >= 0, result.scores, np.nan).astype(np.float64)  # (Q, n)
    gap = (result.positive_scores[:, None] - scores).ravel()
    return gap[np.isfinite(gap)]


def shares_of_gaps(gap: np.ndarray) -> dict[str, float]:
    """A span of gaps -> the share of the negatives in it; the one value where all are equal."""
    if not len(gap) or gap.min() == gap.max():
        return {charts.number(float(value)): 1.0 for value in gap[:1]}
    edges = charts.ticks(float(gap.min()), float(gap.max()), MOST_BARS - 2)
    edges = [float(gap.min()), *(edge for edge in edges if gap.min() < edge < gap.max()), float(gap.max())]
    counts, _ = np.histogram(gap, edges)
    names = [charts.number(float(f"{edge:.2g}")) for edge in edges]
    names = ["below " + names[1], *(f"from {name}" for name in names[1:-1])] if len(names) > 2 else ["all"]
    return dict(zip(names, (counts / len(gap)).tolist(), strict=True))


def _bars(title: str, said: str, shares: dict[str, float]) -> str:
    plot = charts.bars([*shares], [*shares.values()], [float("nan")] * len(shares), title) if shares else ""
    return _card(title, said, plot)


def html(result: "MiningResult") -> str:
    """The whole page."""
    config, (Q, n) = result.config, result.indices.shape
    sizes = f"{Q:,} queries, {config['corpus_rows']:,} corpus rows, {config['dimension']} dimensions"
    dropped = [f"{name}: {count:,} (query, row) pairs dropped." for name, count in result.skipped.items()]
    gap = gaps(result)
    above = [f"{np.mean(gap < 0):.1%} of the negatives score above their query's positive."] if len(gap) else []
    short = int((result.num_valid < n).sum())
    advice = [
        f"{short:,} queries have fewer than {n}: a wider select.range_max, a smaller margin, or a larger corpus gives more."
    ]
    plots = _bars("Negatives found", "Share of the queries, by how many they got.", shares_found(result))
    plots += _bars(
        "Below the positive", "The positive's score less the negative's: share of the negatives.", shares_of_gaps(gap)
    )
    return FRAME.substitute(
        title="The mined negatives",
        style=STYLE,
        conditions=f"{sizes}; seed {config['arguments']['seed']}; negmine {config['versions']['negmine']}.",
        findings=_list(above + dropped),
        advice=_list(advice if short else ["Nothing here asks for a change."]),
        body=f'<div class="two">{plots}</div>'
        + f'<section><pre style="font-size: 12.5px; white-space: pre-wrap">{escape.escape(result.summary())}</pre></section>',
    )
