"""The output files of the demo: results.csv, step_time.csv, results.md, and index.html, which includes everything.

The page has the table, the figures and, for a dozen random held-out queries, the hardest negatives of the whole corpus before and
after training. Negatives that may be false negatives are marked.
"""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

import negmine
from benchmarks.hardness import Relations
from benchmarks.measure import Measured
from benchmarks.peers import OPS
from benchmarks.rows import Row
from benchmarks.rows import write as write_rows
from benchmarks.train import RECIPES, Head, Metrics, Run
from benchmarks.wordnet import Task, Texts

FRAME = Path(__file__).resolve().parent / "page.html"
SHOWN_QUERIES = 12
SHOWN_NEGATIVES = 6
MARKS = {
    "same gloss": "the same definition: almost surely a false negative",
    "same word": "another sense of the same word",
    "broader": "the answer's hypernym",
    "narrower": "a hyponym of the answer",
}


@dataclass(frozen=True)
class Mining:
    """The rank of a query's answer in the corpus, and the query's hardest negatives."""

    positive_score: float
    rank: int  # of the answer; 1 is the best
    negatives: list[tuple[int, float]]  # (corpus row, score), hardest first


@torch.no_grad()
def mine(query_head: Head, key_head: Head, task: Task, chosen: torch.Tensor) -> list[Mining]:
    """Rank the corpus for the queries whose numbers are in chosen (B,)."""
    corpus, query = key_head(task.corpus), query_head(task.queries[chosen])  # (K, D), (B, D)
    answers = task.positives[chosen]  # (B,)
    negatives = negmine.Negatives(corpus, ids=torch.arange(len(corpus), device=corpus.device))
    positive = (query * corpus[answers]).sum(dim=1)  # (B,)
    mined = negmine.mine_hardest(query, negatives, SHOWN_NEGATIVES, query_ids=answers)  # (B, SHOWN_NEGATIVES) each
    _, stats = negmine.info_nce(query, corpus[answers], negatives, query_ids=answers, return_stats=True)
    return [
        Mining(score, above + 1, list(zip(index, scores, strict=True)))
        for score, above, index, scores in zip(
            positive.tolist(), stats.positive_rank.tolist(), mined.index.tolist(), mined.scores.tolist(), strict=True
        )
    ]


def result_rows(runs: list[Run]) -> list[Row]:
    def row(name: str, title: str, steps: int, reached: Metrics, ms_per_step: str) -> Row:
        return {
            "recipe": name,
            "negatives": title,
            "steps": str(steps),
            "R@1": f"{reached.recall_1:.3f}",
            "R@10": f"{reached.recall_10:.3f}",
            "MRR": f"{reached.mrr:.3f}",
            "ms per step": ms_per_step,
        }

    rows = [row("start", "before training", *runs[0].curve[0], "")]
    return rows + [row(run.name, RECIPES[run.name].title, *run.curve[-1], f"{run.ms_per_step:.0f}") for run in runs]


def time_rows(measured: dict[str, list[Measured]]) -> list[Row]:
    rows = []
    for name, (fused, eager) in measured.items():
        rows.append(
            {
                "op": OPS[name].title,
                "negmine ms": f"{fused.timing.median:.1f}",
                "eager ms": f"{eager.timing.median:.1f}",
                "times faster": f"{eager.timing.median / fused.timing.median:.2f}",
                "torch matmul ms": f"{fused.floor_ms:.1f}",
                "negmine MiB": f"{fused.peak_extra_mib:.0f}",
                "eager MiB": f"{eager.peak_extra_mib:.0f}",
            }
        )
    return rows


def markdown(rows: list[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_table(rows: list[Row], best: tuple[str, ...] = ()) -> str:
    """HTML table of the rows; in the columns `best`, the largest value is bold."""
    largest = {name: max(float(row[name]) for row in rows) for name in best}
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = ""
    for row in rows:
        cells = "".join(
            f'<td class="{"best" if name in best and float(value) == largest[name] else ""}">{html.escape(value)}</td>'
            for name, value in row.items()
        )
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def entry(row: int, texts: Texts) -> str:
    return f"<b>{html.escape(', '.join(texts.lemmas[row]))}</b>: {html.escape(texts.glosses[row])}"


def mining_column(title: str, mining: Mining, answer: int, texts: Texts, relations: Relations) -> str:
    items = ""
    for row, score in mining.negatives:
        badges = "".join(
            f'<span class="mark {mark.replace(" ", "-")}">{mark}</span>' for mark in relations.marks(answer, row)
        )
        above = "above" if score > mining.positive_score else ""
        items += (
            f'<li class="{above}"><span class="score">{score:.3f}</span><span>{entry(row, texts)} {badges}</span></li>'
        )
    return (
        f"<div><h4>{title}: the answer ranks <b>{mining.rank:,}</b>, "
        f"score {mining.positive_score:.3f}</h4><ol>{items}</ol></div>"
    )


def card(chosen: int, before: Mining, after: Mining, task: Task, texts: Texts, relations: Relations) -> str:
    answer = int(task.positives[chosen])
    return (
        f'<article><p class="query"><b>{html.escape(texts.lemmas[answer][0])}</b>: '
        f"“{html.escape(texts.examples[chosen])}”</p>"
        f'<p class="answer">{entry(answer, texts)}</p><div class="columns">'
        + mining_column("before", before, answer, texts, relations)
        + mining_column("after", after, answer, texts, relations)
        + "</div></article>"
    )


def write(
    out: Path,
    runs: list[Run],
    shown: Run,
    untrained: tuple[Head, Head],
    measured: dict[str, list[Measured]],
    task: Task,
    texts: Texts,
    relations: Relations,
    seed: int,
    conditions: str,
) -> Path:
    """Write every output into `out`, where the pictures already are; returns the path of the page."""
    results, times = result_rows(runs), time_rows(measured)
    write_rows(out / "results.csv", list(results[0]), results)
    write_rows(out / "step_time.csv", list(times[0]), times)
    (out / "results.md").write_text(f"{conditions}\n\n{markdown(results)}\n\n{markdown(times)}\n")

    generator = torch.Generator().manual_seed(seed)
    chosen = task.held_out[
        torch.randperm(len(task.held_out), generator=generator)[:SHOWN_QUERIES].to(task.held_out.device)
    ]
    before, after = mine(*untrained, task, chosen), mine(shown.query_head, shown.key_head, task, chosen)
    cards = "".join(
        card(number, *pair, task, texts, relations)
        for number, *pair in zip(chosen.tolist(), before, after, strict=True)
    )
    pictures = {
        name: base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        for name in ("learning_curves", "hardness", "step_time")
    }
    legend = "".join(
        f'<li><span class="mark {mark.replace(" ", "-")}">{mark}</span> {text}</li>' for mark, text in MARKS.items()
    )
    page = out / "index.html"
    page.write_text(
        Template(FRAME.read_text()).substitute(
            pictures,
            conditions=html.escape(conditions),
            legend=legend,
            cards=cards,
            shown=RECIPES[shown.name].title,
            results=html_table(results, best=("R@1", "R@10", "MRR")),
            times=html_table(times),
        )
    )
    return page
