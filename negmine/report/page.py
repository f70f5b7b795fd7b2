"""The HTML page of a HardnessReport: findings, recommendations, plots, and the texts of suspects."""

import html
from typing import Any

import numpy as np

from negmine.pages import charts, frame
from negmine.report import words

Figures = dict[str, np.ndarray]
Facts = dict[str, Any]
RANKS = ((1, 1), (2, 5), (6, 10), (11, 100), (101, None))  # ranges of the positive's rank, one per bar


def _by_difficulty(figures: Figures, facts: Facts) -> str:
    cards = ""
    captions = {
        "score": "Scores have a sign: below zero, vectors point in opposite directions.",
        "same_class": 'Share of the query\'s own class; <span class="dash">dashed</span>: its share of the pool.',
    }
    measure = 'Mean over the negatives at that difficulty; <span class="dash">dashed</span>: over the whole pool.'
    for name, title, overall in words.shown(figures, facts):
        plot = charts.curve(words.bounds(figures), figures[f"{name}_mean"], figures[f"{name}_error"], overall, title)
        cards += frame.card(title[0].upper() + title[1:], captions.get(name, measure), plot)
    return (
        "<h2>By difficulty</h2><p>Each query ranks its own negatives, hardest first. Bins are narrow at both tails. "
        "The shaded band is two standard errors over queries. "
        f'{facts["arguments"]["samples_per_bin"]} ranks per bin and query were sampled.</p><div class="two">{cards}</div>'
    )


def _positives(figures: Figures, facts: Facts) -> str:
    if not facts["has_positives"]:
        return ""
    rank = figures["positive_rank"][figures["positive_rank"] > 0]
    names = [f"{low}" if low == high else f"{low} to {high}" if high else f"over {low - 1}" for low, high in RANKS]
    shares = [float(((rank >= low) & (rank <= (high or rank.max()))).mean()) for low, high in RANKS]
    plot = charts.bars(names, shares, [float("nan")] * len(RANKS), "rank of the best positive")
    return frame.card("Rank of the best positive", "Share of the queries. Rank 1: it is above every negative.", plot)


def _consistency(figures: Figures, facts: Facts) -> str:
    tail, Q = words.percent(facts["arguments"]["tail"]), len(figures["queries"])
    cards = ""
    for side, word in (("hard", "hardest"), ("easy", "easiest")):
        plot = charts.histogram(
            figures[f"{side}_histogram"], figures[f"{side}_expected"], f"rows by count, {word}", f"of {Q:,} queries"
        )
        caption = (
            f"Rows of the corpus by the number of queries that have them among their {word} {tail}; "
            '<span class="dash">dashed</span>: if queries chose independently. '
            f"Variance: {figures[f'{side}_variance_ratio']:.3g} times chance."
        )
        cards += frame.card(f"The {word}: the same rows for all queries?", caption, plot)
        rows = [
            f'<tr><td class="n">{row["queries"]:,}</td>{_name(row)}{_text(row, "row_text")}</tr>'
            for row in facts[f"often_{side}"]
        ]
        cards += frame.table(
            f"Most often among the {word}", '<th class="n">queries</th><th class="n">row</th><th>text</th>', rows
        )
    return f'<h2>Consistency across queries</h2><div class="two">{cards}</div>'


def _drift(figures: Figures, facts: Facts) -> str:
    if "overlap" not in figures:
        return ""
    sizes, kept = figures["overlap_sizes"], np.nanmean(figures["overlap"], axis=0)
    names = [f"hardest {n:,}" for n in sizes]
    chance = [float(n / facts["corpus_rows"]) for n in sizes]
    plot = charts.bars(names, [float(share) for share in kept], chance, "overlap with the older snapshot")
    caption = 'Share of the hardest negatives that both snapshots have; <span class="dash">dashed</span>: by chance.'
    return frame.card("Still hard since the older snapshot", caption, plot)


def _pair(cards: str) -> str:
    return f'<h2>Ranks of the positives</h2><div class="two">{cards}</div>' if cards else ""


def _text(record: dict[str, Any], name: str) -> str:
    """A table cell with the text and the id, if they are known, else the row number."""
    kind = name.removesuffix("_text")
    text, key = record.get(name), record.get(f"{kind}_id")
    parts = [] if key is None else [f"<b>{html.escape(str(key))}</b>"]
    parts += [html.escape(text)] if text is not None else [] if parts else [f"{kind} {record[kind]:,}"]
    return f'<td class="text">{" ".join(parts)}</td>'


def _name(record: dict[str, Any]) -> str:
    """A table cell with the id of the row, else its number."""
    key = record.get("row_id")
    return f'<td class="n">{record["row"]:,}</td>' if key is None else f'<td class="text">{html.escape(str(key))}</td>'


def _marks(record: dict[str, Any]) -> str:
    marks = [("same text", record.get("same_text")), ("same class", record.get("same_class"))]
    return " ".join(f'<span class="mark">{mark}</span>' for mark, holds in marks if holds)


def _suspects(figures: Figures, facts: Facts) -> str:
    texts = "<th>query</th><th>its positive</th><th>the negative</th>"
    rows = [
        f'<tr><td class="n">{record["score"]:.3f}</td><td class="n">{record["positive_score"]:.3f}</td>'
        f"{_text(record, 'query_text')}{_text(record, 'positive_text')}"
        f"{_text(record, 'row_text')}<td>{_marks(record)}</td></tr>"
        for record in facts["suspects"]
    ]
    head = f'<th class="n">negative</th><th class="n">positive</th>{texts}<th></th>'
    out = frame.table("Negatives that outscore every positive", head, rows)
    rows = [
        f'<tr><td class="n">{record["score"]:.3f}</td>{_text(record, "query_text")}{_text(record, "positive_text")}'
        f"{_text(record, 'row_text')}<td>{_marks(record)}</td></tr>"
        for record in facts["near_duplicates"]
    ]
    out += frame.table("Near duplicates of positives", f'<th class="n">score</th>{texts}<th></th>', rows)
    if not out:
        return ""
    return (
        "<h2>Suspects: are these negatives?</h2><p>Largest gap first, at most three per query. Some are "
        f"right answers that are not marked as positives; others the encoder has not learned yet.</p>{out}"
    )


def _table_of_figures(figures: Figures, facts: Facts) -> str:
    curves = words.shown(figures, facts)
    head = "<th>of the negatives</th>" + "".join(f'<th class="n">{html.escape(title)}</th>' for _, title, _ in curves)
    rows = [
        f"<tr><td>{words.bin_name(figures, i)}</td>"
        + "".join(
            f'<td class="n">{figures[f"{name}_mean"][i]:.4f} ± {2 * figures[f"{name}_error"][i]:.4f}</td>'
            for name, _, _ in curves
        )
        + "</tr>"
        for i in words.known_bins(figures, "score")
    ]
    table = frame.table("By difficulty", head, rows)
    return f"<details><summary>The same as numbers, ± two standard errors</summary>{table}</details>"


def render(figures: Figures, facts: Facts) -> str:
    """The whole page."""
    Q = len(figures["queries"])
    conditions = (
        f"{Q:,} of {facts['queries']:,} queries, {facts['corpus_rows']:,} corpus rows, {facts['dimension']} dimensions; "
        f"seed {facts['arguments']['seed']}; negmine {facts['version']}."
    )
    body = _by_difficulty(figures, facts) + _table_of_figures(figures, facts)
    return frame.document(
        facts["title"],
        conditions,
        words.findings(figures, facts),
        words.advice(figures, facts),
        body
        + _pair(_positives(figures, facts) + _drift(figures, facts))
        + _consistency(figures, facts)
        + _suspects(figures, facts),
    )
