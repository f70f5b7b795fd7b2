"""Draw every benchmarks/results/<machine>.csv into <machine>.png beside it, and write the README's table from the rows.

Reads rows only, times nothing.

One row of bars an op, one group a case: the time over the floor (the matrix products that no method avoids), and the
memory held beyond the inputs. Of equal (case, op, variant) the newest row counts; whiskers are the 20 % and 80 %
quantiles.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.run import RESULTS

COLOURS = ["#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f"]
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- made by `make plots` from benchmarks/results -->", "<!-- end -->"
Row = dict[str, str]


def newest(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list({(row["case"], row["op"], row["variant"]): row for row in csv.DictReader(file)}.values())


def bars(axes: Axes, rows: list[Row], cases: list[str], variants: list[str], value: str) -> None:
    width = 0.8 / len(variants)
    for turn, variant in enumerate(variants):
        for row in (row for row in rows if row["variant"] == variant):
            place = cases.index(row["case"]) + (turn - (len(variants) - 1) / 2) * width
            colour = COLOURS[turn % len(COLOURS)]
            if value == "memory":
                axes.bar(place, max(float(row["peak_extra_mib"]), 0.1), width, color=colour)
                continue
            floor = float(row["floor_ms"])
            low, middle, high = (float(row[name]) / floor for name in ("q20_ms", "median_ms", "q80_ms"))
            axes.bar(place, middle, width, color=colour, yerr=[[middle - low], [high - middle]], capsize=2)
            axes.annotate(f"{float(row['median_ms']):.3g}", (place, high), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> Path:
    rows = newest(path)
    cases, ops, variants = (list(dict.fromkeys(row[name] for row in rows)) for name in ("case", "op", "variant"))
    figure, grid = plt.subplots(len(ops), 2, figsize=(11, 2.6 * len(ops)), squeeze=False, layout="constrained")
    for (left, right), op in zip(grid, ops, strict=True):
        of_op = [row for row in rows if row["op"] == op]
        bars(left, of_op, cases, variants, "time")
        left.axhline(1, color="black", linewidth=0.8, linestyle=":")
        left.set_title(f"{op}: time / floor (labels: ms)", loc="left", fontsize=10)
        bars(right, of_op, cases, variants, "memory")
        right.set_title(f"{op}: peak extra memory, MiB", loc="left", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[turn % len(COLOURS)]) for turn in range(len(variants))]
    figure.legend(handles, variants, loc="outside upper right", ncols=len(variants), frameon=False)
    newest_row = max(rows, key=lambda row: row["date"])
    figure.suptitle(
        f"{path.stem}   torch {newest_row['torch']}   {newest_row['date'][:10]}", x=0.01, ha="left", fontsize=11
    )
    drawn = path.with_suffix(".png")
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    return drawn


def table(path: Path) -> str:
    """The newest rows as Markdown, negmine beside plain PyTorch, shapes where it loses included."""
    rows = newest(path)
    found = {(row["case"], row["op"], row["variant"]): row for row in rows}
    lines = [
        "| shape (B, K, D) | op | negmine | plain PyTorch | times faster | floor | extra memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (_, op, variant), ours in found.items():
        plain = found.get((ours["case"], op, "eager"))
        if not variant.startswith("negmine") or plain is None:
            continue
        ratio = float(plain["median_ms"]) / float(ours["median_ms"])
        shape = f"{ours['B']}, {int(ours['K']):,}, {ours['D']} {ours['dtype']}"
        lines.append(
            f"| {shape} | {op} | {ours['median_ms']} ms | {plain['median_ms']} ms | {ratio:.1f} | {ours['floor_ms']} ms "
            f"| {ours['peak_extra_mib']} against {plain['peak_extra_mib']} MiB |"
        )
    last = max(rows, key=lambda row: row["date"])
    source = (
        f"{path.stem}, {last['threads']} threads, torch {last['torch']}, commit {last['commit']}, {last['date'][:10]}"
    )
    return "\n".join([*lines, "", f"Medians of interleaved rounds on {source}; rows in `benchmarks/results/`."])


def write_readme(tables: list[str]) -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text("\n".join([before + BEGIN, "", "\n\n".join(tables), "", END + rest.split(END)[1]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    results = parser.parse_args().results
    paths = sorted(results.glob("*.csv"))
    if not paths:
        raise SystemExit(f"there are no rows in {results} to draw: run `make bench` first")
    for path in paths:
        print(draw(path))
    if results == RESULTS:
        write_readme([table(path) for path in paths])


if __name__ == "__main__":
    main()
