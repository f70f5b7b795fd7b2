"""Train every recipe with several seeds on the demo's task, write one CSV row for each run, and plot the results.

    python -m benchmarks.recipes --seeds 0 1 2 --steps 500        all of benchmarks.train's RECIPES
    python -m benchmarks.recipes --recipe ring synco --seeds 0    some of them
    python -m benchmarks.recipes --draw                           only writes the picture and the table again

A row is appended to benchmarks/results/recipes/wordnet.csv at the end of each run. Runs whose (recipe, seed, steps) has a row
are skipped, so an interrupted command can be started again. The picture is wordnet.png beside the rows, and the table is in
docs/comparison.md.
"""

import argparse
import datetime
import statistics
from pathlib import Path

import torch

import negmine
from benchmarks import wordnet
from benchmarks.figures import AFTER, BEFORE, plt, save
from benchmarks.rows import RESULTS, Row, append, commit, machine_name, newest, write_between
from benchmarks.train import RECIPES, Metrics, evaluate, new_heads, train

METRICS = {"recall_1": "recall@1", "recall_10": "recall@10", "mrr": "MRR"}
KEY = ("recipe", "seed", "steps")
COLUMNS = [*KEY, *METRICS, "ms_per_step", "negmine", "commit", "torch", "machine", "date"]
START = "before training"
ROWS = RESULTS / "recipes" / "wordnet.csv"
PAGE = RESULTS.parent.parent / "docs" / "comparison.md"
BEGIN = "<!-- made by `python -m benchmarks.recipes` from benchmarks/results/recipes -->"


def key_of(row: Row) -> tuple[str, int, int]:
    return row["recipe"], int(row["seed"]), int(row["steps"])


def row_of(name: str, seed: int, steps: int, metrics: Metrics, ms_per_step: float, device: str) -> Row:
    return {
        "recipe": name,
        "seed": str(seed),
        "steps": str(steps),
        **{metric: f"{getattr(metrics, metric):.5f}" for metric in METRICS},
        "ms_per_step": f"{ms_per_step:.1f}",
        "negmine": negmine.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "machine": machine_name(device),
        "date": datetime.date.today().isoformat(),
    }


def run_missing(task: wordnet.Task, names: list[str], seeds: list[int], steps: int, path: Path) -> None:
    """Train every (recipe, seed) that has no row with this number of steps."""
    device = task.corpus.device.type
    done = {key_of(row) for row in newest(path, *KEY)}
    for seed in seeds:
        missing = [name for name in names if (name, seed, steps) not in done]
        if not missing:
            continue
        before = evaluate(*new_heads(task.corpus.shape[1], seed, task.corpus.device), task)
        if (START, seed, 0) not in done:
            append(path, COLUMNS, [row_of(START, seed, 0, before, 0.0, device)])
        for name in missing:
            run = train(name, task, steps, seed, [steps], before)
            append(path, COLUMNS, [row_of(name, seed, steps, run.curve[-1][1], run.ms_per_step, device)])


def summary(rows: list[Row], steps: int) -> list[tuple[str, dict[str, list[float]]]]:
    """(recipe, {metric: one value per seed}) of the runs with `steps` steps, sorted by mean MRR, best first."""
    names = dict.fromkeys(row["recipe"] for row in rows if int(row["steps"]) == steps and row["recipe"] in RECIPES)
    runs = {name: [row for row in rows if row["recipe"] == name and int(row["steps"]) == steps] for name in names}
    values = {name: {m: [float(row[m]) for row in runs[name]] for m in METRICS} for name in names}
    return sorted(values.items(), key=lambda item: -statistics.mean(item[1]["mrr"]))


def draw(rows: list[Row], steps: int, path: Path) -> None:
    """Plot one line per recipe, best on top: a small dot for each seed, a bar from lowest to highest, a large dot at the mean."""
    ranking = summary(rows, steps)
    start = [float(row["mrr"]) for row in rows if row["recipe"] == START]
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.27 * len(ranking)), layout="constrained")
    for place, (_, values) in enumerate(reversed(ranking)):
        seeds = values["mrr"]
        axes.plot([min(seeds), max(seeds)], [place, place], color=BEFORE, linewidth=5, solid_capstyle="round")
        axes.plot(seeds, [place] * len(seeds), "o", markersize=3, color=AFTER, alpha=0.6)
        axes.plot(statistics.mean(seeds), place, "o", markersize=7, color=AFTER)
    if start:
        axes.axvline(statistics.mean(start), color="black", linewidth=0.8, linestyle=":", label=START)
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(ranking)), [RECIPES[name].title for name, _ in reversed(ranking)])
    count = max((len(values["mrr"]) for _, values in ranking), default=0)
    axes.set_xlabel(
        f"held-out MRR after {steps} steps; small dots are seeds (at most {count}), bars their range", loc="right"
    )
    axes.grid(axis="x", alpha=0.25)
    save(figure, path)


def table(rows: list[Row], steps: int) -> str:
    """Markdown table of means and, with two or more seeds, standard deviations."""

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    lines = [f"| recipe | what | seeds | {' | '.join(METRICS.values())} |", "| --- " * (3 + len(METRICS)) + "|"]
    for name, values in summary(rows, steps):
        cells = " | ".join(cell(values[metric]) for metric in METRICS)
        lines.append(f"| `{name}` | {RECIPES[name].title} | {len(values['mrr'])} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", "--recipe", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--draw", action="store_true", help="do not train; only write the picture and the table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be 2 or more, got {args.steps}")
    if not args.draw:
        run_missing(wordnet.load().to(args.device), args.recipes, args.seeds, args.steps, args.out)
    rows = newest(args.out, *KEY)
    text = table(rows, args.steps)
    draw(rows, args.steps, args.out.with_suffix(".png"))
    if args.out == ROWS:
        write_between(PAGE, BEGIN, text)
    print(text)


if __name__ == "__main__":
    main()
