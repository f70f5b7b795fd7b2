"""The page: findings first, then plots, the texts of suspects, and what to do. One file, no script, nothing fetched."""

import html as escape
from string import Template
from typing import Any

import numpy as np

from negmine.report import charts, words

Figures = dict[str, np.ndarray]
Facts = dict[str, Any]
RANKS = ((1, 1), (2, 5), (6, 10), (11, 100), (101, None))  # spans of the positive's rank that a bar stands for

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --line: #e3e8ee; --paper: #fff; --back: #f4f6f9;
  --main: #1b6ca8; --fill: #1b6ca830; --red: #c63d51; --warm: #fbe9cc; --warm-ink: #6b4800 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #98a5b3; --line: #2b3541; --paper: #18202a; --back: #10161d;
  --main: #63b0ea; --fill: #63b0ea30; --red: #ff7d8c; --warm: #4a3814; --warm-ink: #ffd993 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15.5px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 44px 24px 88px }
h1 { font-size: 31px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em } h2 { font-size: 20px; margin: 46px 0 6px }
h3 { font-size: 15.5px; margin: 0 0 2px } p { max-width: 78ch; margin: 6px 0 } .soft { color: var(--soft); font-size: 14px }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px; margin: 14px 0 }
.two { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 14px }
.two { align-items: start } .two section { margin: 0 }
@media (max-width: 520px) { .two { grid-template-columns: 1fr } main { padding: 28px 14px 60px } }
ul.said { margin: 0; padding-left: 20px } ul.said li { margin: 7px 0; max-width: 84ch }
section.do { border-left: 4px solid var(--main) }
.plot { width: 100%; height: auto; display: block; margin-top: 8px; font-size: 11.5px }
.plot text { fill: var(--soft) } .plot text.name { font-size: 12px } .plot text.value { fill: var(--ink); font-weight: 600 }
.plot .grid { stroke: var(--line) } .plot .axis { stroke: var(--soft) }
.plot .curve { fill: none; stroke: var(--main); stroke-width: 2.2 }
.plot .dot { fill: var(--main) } .plot .error { stroke: var(--main); stroke-width: 5; opacity: .32; stroke-linecap: round }
.plot .chance { fill: none; stroke: var(--red); stroke-width: 1.6; stroke-dasharray: 5 4 } .plot .bar { fill: var(--main) }
.plot .area { fill: var(--fill); stroke: var(--main); stroke-width: 1.4 }
.dash { color: var(--red); font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.42 } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500; font-size: 12.5px } tbody tr:last-child td { border-bottom: 0 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.text { min-width: 180px; overflow-wrap: anywhere }
.mark { font-size: 11.5px; padding: 1px 8px; border-radius: 9px; background: var(--warm); color: var(--warm-ink);
  white-space: nowrap }
details summary { cursor: pointer; color: var(--soft); font-size: 14px; margin-top: 10px }
"""

FRAME = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<h1>$title</h1><p class="soft">$conditions</p>
<section><ul class="said">$findings</ul></section>
<h2>What to do next</h2><section class="do"><ul class="said">$advice</ul></section>
$body
</main></body></html>
"""
)


def _list(sentences: list[str]) -> str:
    return "".join(f"<li>{escape.escape(sentence)}</li>" for sentence in sentences)


def _card(title: str, said: str, plot: str) -> str:
    return f'<section><h3>{escape.escape(title)}</h3><p class="soft">{said}</p>{plot}</section>' if plot else ""


def _by_difficulty(figures: Figures, facts: Facts) -> str:
    cards = ""
    said = {
        "score": "Signed: below zero is opposite, not alike.",
        "same_class": 'Share of the query\'s own class; <span class="dash">dashed</span>: its share of the pool.',
    }
    measure = 'Mean over the negatives at that difficulty; <span class="dash">dashed</span>: over the whole pool.'
    for name, title, overall in words.shown(figures, facts):
        plot = charts.curve(words.bounds(figures), figures[f"{name}_mean"], figures[f"{name}_error"], overall, title)
        cards += _card(title[0].upper() + title[1:], said.get(name, measure), plot)
    return (
        "<h2>By difficulty</h2><p>Each query ranks its own negatives, hardest first. Bins are narrow at both tails; "
        "shaded: two standard errors over queries. "
        f'{facts["arguments"]["samples_per_bin"]} ranks a bin and query were looked at.</p><div class="two">{cards}</div>'
    )


def _positives(figures: Figures, facts: Facts) -> str:
    if not facts["has_positives"]:
        return ""
    rank = figures["positive_rank"][figures["positive_rank"] > 0]
    names = [f"{low}" if low == high else f"{low} to {high}" if high else f"over {low - 1}" for low, high in RANKS]
    shares = [float(((rank >= low) & (rank <= (high or rank.max()))).mean()) for low, high in RANKS]
    plot = charts.bars(names, shares, [float("nan")] * len(RANKS), "rank of the best positive")
    return _card("Rank of the best positive", "Share of the queries; 1: it comes before every negative.", plot)


def _consistency(figures: Figures, facts: Facts) -> str:
    tail, Q = words.percent(facts["arguments"]["tail"]), len(figures["queries"])
    cards = ""
    for side, word in (("hard", "hardest"), ("easy", "easiest")):
        plot = charts.histogram(
            figures[f"{side}_histogram"], figures[f"{side}_expected"], f"rows by count, {word}", f"of {Q:,} queries"
        )
        said = (
            f"Rows of the corpus by the number of queries that have them among their {word} {tail}; "
            '<span class="dash">dashed</span>: if every query chose by itself. '
            f"Variance: {figures[f'{side}_variance_ratio']:.3g} times chance."
        )
        cards += _card(f"The same rows for everyone? The {word}", said, plot)
        rows = [
            f'<tr><td class="n">{row["queries"]:,}</td><td class="n">{row["row"]:,}</td>{_text(row, "row_text")}</tr>'
            for row in facts[f"often_{side}"]
        ]
        cards += _table(
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
    said = 'Share of the hardest negatives that both snapshots name; <span class="dash">dashed</span>: by chance.'
    return _card("Still hard since the older snapshot", said, plot)


def _pair(cards: str) -> str:
    return f'<h2>Where the positives stand</h2><div class="two">{cards}</div>' if cards else ""


def _text(record: dict[str, Any], name: str) -> str:
    """A cell: the text, or where there is none the row's number."""
    fallback = {"query_text": "query", "positive_text": "positive", "row_text": "row"}[name]
    said = record.get(name)
    return f'<td class="text">{escape.escape(said) if said is not None else f"{fallback} {record[fallback]:,}"}</td>'


def _table(title: str, head: str, rows: list[str]) -> str:
    if not rows:
        return ""
    return (
        f'<section class="wide"><h3>{escape.escape(title)}</h3><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


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
    out = _table("Negatives that outscore every positive", head, rows)
    rows = [
        f'<tr><td class="n">{record["score"]:.3f}</td>{_text(record, "query_text")}{_text(record, "positive_text")}'
        f"{_text(record, 'row_text')}<td>{_marks(record)}</td></tr>"
        for record in facts["near_duplicates"]
    ]
    out += _table("Rows that all but repeat a positive", f'<th class="n">score</th>{texts}<th></th>', rows)
    if not out:
        return ""
    return (
        "<h2>Suspects: are these negatives?</h2><p>Largest gap first, at most three a query. Some will be "
        f"right answers that nobody marked; others are what the encoder has yet to learn.</p>{out}"
    )


def _table_of_figures(figures: Figures, facts: Facts) -> str:
    curves = words.shown(figures, facts)
    head = "<th>of the negatives</th>" + "".join(f'<th class="n">{escape.escape(title)}</th>' for _, title, _ in curves)
    rows = [
        f"<tr><td>{words.bin_name(figures, i)}</td>"
        + "".join(
            f'<td class="n">{figures[f"{name}_mean"][i]:.4f} ± {2 * figures[f"{name}_error"][i]:.4f}</td>'
            for name, _, _ in curves
        )
        + "</tr>"
        for i in words.known_bins(figures, "score")
    ]
    table = _table("By difficulty", head, rows)
    return f"<details><summary>The same as numbers, ± two standard errors</summary>{table}</details>"


def html(figures: Figures, facts: Facts) -> str:
    """The whole page."""
    Q = len(figures["queries"])
    conditions = (
        f"{Q:,} of {facts['queries']:,} queries, {facts['corpus_rows']:,} corpus rows, {facts['dimension']} dimensions; "
        f"seed {facts['arguments']['seed']}; negmine {facts['version']}."
    )
    body = _by_difficulty(figures, facts) + _table_of_figures(figures, facts)
    return FRAME.substitute(
        title=escape.escape(facts["title"]),
        style=STYLE,
        conditions=conditions,
        findings=_list(words.findings(figures, facts)),
        advice=_list(words.advice(figures, facts)),
        body=body
        + _pair(_positives(figures, facts) + _drift(figures, facts))
        + _consistency(figures, facts)
        + _suspects(figures, facts),
    )
