"""The HTML page of a MiningResult: how many negatives each query has, how far below the positive they are, what was removed."""

import html
import math

import numpy as np

from negmine.pages import charts, frame

MAX_BARS = 9


def shares_found(num_valid: np.ndarray, n: int) -> dict[str, float]:
    """num_valid (Q,), each at most n -> the share of the queries with each number, or range of numbers, of negatives."""
    edges = np.unique(np.linspace(0, n + 1, min(n + 1, MAX_BARS) + 1).astype(int))  # [low, high) of each bar
    spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return {
        str(low) if high == low + 1 else f"{low} to {high - 1}": float(
            ((num_valid >= low) & (num_valid < high)).sum() / max(1, len(num_valid))
        )
        for low, high in spans
    }


def score_gaps(scores: np.ndarray, positive_scores: np.ndarray) -> np.ndarray:
    """scores (Q, n), padded with -inf, positive_scores (Q,) -> for each negative, the positive score minus its score."""
    gaps = (positive_scores[:, None] - np.where(np.isneginf(scores), np.nan, scores).astype(np.float64)).ravel()
    return gaps[np.isfinite(gaps)]


def shares_of_gaps(gaps: np.ndarray) -> dict[str, float]:
    """The share of the negatives in each interval of score gaps; one value if all gaps are equal."""
    if not len(gaps) or gaps.min() == gaps.max():
        return {charts.number(float(value)): 1.0 for value in gaps[:1]}
    edges = charts.ticks(float(gaps.min()), float(gaps.max()), MAX_BARS - 2)
    edges = [float(gaps.min()), *(edge for edge in edges if gaps.min() < edge < gaps.max()), float(gaps.max())]
    counts, _ = np.histogram(gaps, edges)
    names = [charts.number(float(f"{edge:.2g}")) for edge in edges]
    names = ["below " + names[1], *(f"from {name}" for name in names[1:-1])] if len(names) > 2 else ["all"]
    return dict(zip(names, (counts / len(gaps)).tolist(), strict=True))


def _bars(title: str, caption: str, shares: dict[str, float]) -> str:
    plot = charts.bars([*shares], [*shares.values()], [math.nan] * len(shares), title) if shares else ""
    return frame.card(title, caption, plot)


def render(
    scores: np.ndarray,
    positive_scores: np.ndarray,
    num_valid: np.ndarray,
    skipped: dict[str, int],
    config: dict,
    summary: str,
) -> str:
    """The whole page, from the fields of a MiningResult and its summary."""
    Q, n = scores.shape
    sizes = f"{Q:,} queries, {config['corpus_rows']:,} corpus rows, {config['dimension']} dimensions"
    dropped = [f"{name}: {count:,} (query, row) pairs removed." for name, count in skipped.items()]
    gaps = score_gaps(scores, positive_scores)
    above = [f"{np.mean(gaps < 0):.1%} of the negatives score above their query's positive."] if len(gaps) else []
    short = int((num_valid < n).sum())
    advice = "No change is needed."
    if short:
        remedies = "a larger select.range_max, a smaller margin, or a larger corpus gives more"
        advice = f"{short:,} queries have fewer than {n} negatives: {remedies}."
    plots = _bars("Negatives found", "Share of the queries, by their number of negatives.", shares_found(num_valid, n))
    plots += _bars(
        "Distance below the positive",
        "Share of the negatives, by the positive's score minus the negative's score.",
        shares_of_gaps(gaps),
    )
    return frame.document(
        "The mined negatives",
        f"{sizes}; seed {config['arguments']['seed']}; negmine {config['versions']['negmine']}.",
        above + dropped,
        [advice],
        f'<div class="two">{plots}</div>'
        f'<section><pre style="font-size: 12.5px; white-space: pre-wrap">{html.escape(summary)}</pre></section>',
    )
