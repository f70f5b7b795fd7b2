"""The parts of HTML pages: document, style, lists, cards and tables. A page is one file without scripts or network requests."""

import html
from string import Template

_STYLE = """
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
ul.sentences { margin: 0; padding-left: 20px } ul.sentences li { margin: 7px 0; max-width: 84ch }
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

_DOCUMENT = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<h1>$title</h1><p class="soft">$conditions</p>
<section><ul class="sentences">$findings</ul></section>
<h2>What to do next</h2><section class="do"><ul class="sentences">$advice</ul></section>
$body
</main></body></html>
"""
)


def document(title: str, conditions: str, findings: list[str], advice: list[str], body: str) -> str:
    """The whole page: title, conditions, findings, advice, and then `body`, which is HTML; the rest is text."""
    return _DOCUMENT.substitute(
        title=html.escape(title),
        style=_STYLE,
        conditions=html.escape(conditions, quote=False),
        findings=_items(findings),
        advice=_items(advice),
        body=body,
    )


def _items(sentences: list[str]) -> str:
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)


def card(title: str, caption: str, plot: str) -> str:
    """A section with a plot; empty if there is no plot. `caption` is HTML."""
    return f'<section><h3>{html.escape(title)}</h3><p class="soft">{caption}</p>{plot}</section>' if plot else ""


def table(title: str, head: str, rows: list[str]) -> str:
    """A section with a table; empty if there are no rows. `head` and `rows` are HTML."""
    if not rows:
        return ""
    return (
        f'<section class="wide"><h3>{html.escape(title)}</h3><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )
