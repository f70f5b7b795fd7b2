"""Plot every benchmarks/results/<machine>.csv, and write the tables of README.md and benchmarks/README.md, without timing.

    <machine>-speed-up.png   the speed-up over PyTorch, one dot for each op, case and peer
    <machine>-cases.png      a row of bars for each op: the time relative to the floor, and the memory in addition to the inputs
    <machine>-scaling.png    time and memory against K, B and D

Of rows with the same (case, op, variant, threads), the newest is used. Error bars show the 20 % and 80 % quantiles.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks import rows as files
from benchmarks.cases import SWEEPS
from benchmarks.measure import EAGER, EAGER_FP32, OURS
from benchmarks.palette import COLOURS
from benchmarks.rows import RESULTS, Row, write_between
from benchmarks.run import COLUMNS

README = RESULTS.parents[1] / "README.md"
ALL_ROWS = RESULTS.parent / "README.md"
SHOWN = (  # in README.md: usual shapes, a large D, and a shape at which negmine gains little
    ("moco", "info_nce", "loss and gradient"),
    ("moco-bf16", "info_nce", "loss and gradient"),
    ("moco-bf16", "mine_hardest", "the hardest 1,024"),
    ("moco", "mochi", "MoCHi, loss and gradient"),
    ("retrieval-768", "info_nce", "loss and gradient"),
    ("batch-1", "info_nce", "loss and gradient"),
)
IN_README = ("amd-epyc", "intel-xeon-emerald-rapids", "intel-xeon-ice-lake")  # benchmarks/README.md has all machines
BEGIN = "<!-- made by `make plots` from benchmarks/results -->"


def newest(path: Path) -> list[Row]:
    rows = files.newest(path, "case", "op", "variant", "threads")
    if any(set(row) != set(COLUMNS) for row in rows[:1]):
        raise SystemExit(f"{path}: the columns are not those of benchmarks.run; move the file away and measure again")
    return rows


def is_swept(row: Row) -> bool:
    return "=" in row["case"]


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


def caption(path: Path, rows: list[Row]) -> str:
    last = max(rows, key=lambda row: row["date"])
    return f"{path.stem}   torch {last['torch']}   {last['date'][:10]}"


def save(figure: plt.Figure, path: Path, rows: list[Row], name: str) -> Path:
    figure.suptitle(caption(path, rows), x=0.01, ha="left", fontsize=10)
    drawn = path.with_name(f"{path.stem}-{name}.png")
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    return drawn


def draw_cases(path: Path, rows: list[Row]) -> Path:
    cases, ops, variants = (list(dict.fromkeys(row[name] for row in rows)) for name in ("case", "op", "variant"))
    figure, grid = plt.subplots(len(ops), 2, figsize=(15, 2.6 * len(ops)), squeeze=False, layout="constrained")
    for (left, right), op in zip(grid, ops, strict=True):
        of_op = [row for row in rows if row["op"] == op]
        there = [case for case in cases if any(row["case"] == case for row in of_op)]
        bars(left, of_op, there, variants, "time")
        left.axhline(1, color="black", linewidth=0.8, linestyle=":")
        left.set_title(f"{op}: time / matrix products alone (labels: ms)", loc="left", fontsize=10)
        bars(right, of_op, there, variants, "memory")
        right.set_title(f"{op}: peak extra memory, MiB", loc="left", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[turn % len(COLOURS)]) for turn in range(len(variants))]
    figure.legend(handles, variants, loc="outside upper right", ncols=len(variants), frameon=False, fontsize=8)
    return save(figure, path, rows, "cases")


def draw_speed_up(path: Path, rows: list[Row]) -> Path:
    """Draw one line per op and shape, with a dot for each peer at its time divided by that of negmine.

    Negmine is the vertical line at 1, so dots to the right of it are peers that are slower.
    """
    ours = {line_key(row): float(row["median_ms"]) for row in rows if row["variant"] == OURS}
    peers = list(dict.fromkeys(row["variant"] for row in rows if not row["variant"].startswith(OURS)))
    threads = {row["threads"] for row in rows}
    labels: list[str] = []  # from top to bottom: an op, its shapes, the next op, ...
    places: dict[tuple[str, ...], int] = {}  # line_key(row) -> index in labels
    for op in dict.fromkeys(row["op"] for row in rows):
        labels.append(op)
        for row in sorted((row for row in rows if row["op"] == op), key=work):
            if line_key(row) not in places:
                places[line_key(row)] = len(labels)
                shape = f"{int(row['B']):,} × {int(row['K']):,} × {row['D']}  {row['dtype']}"
                labels.append(shape if len(threads) == 1 else f"{shape}, {row['threads']} threads")
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(labels) + 1.4), layout="constrained")
    for line, place in places.items():
        there = [row for row in rows if line_key(row) == line and row["variant"] in peers and line in ours]
        before, above = 0.0, False
        for row in sorted(there, key=lambda row: float(row["median_ms"])):
            ratio = float(row["median_ms"]) / ours[line]
            colour = COLOURS[1 + peers.index(row["variant"]) % (len(COLOURS) - 1)]
            axes.plot([1, ratio], [place, place], color=colour, linewidth=1, alpha=0.35)
            axes.plot(ratio, place, "o", color=colour, markersize=5)
            above = not above or ratio > 1.25 * before  # labels of close dots alternate between above and below
            offset = (3, 3) if above else (3, -9)
            axes.annotate(short(ratio), (ratio, place), offset, textcoords="offset points", fontsize=7)
            before = ratio
    axes.axvline(1, color=COLOURS[0], linewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for place, tick in enumerate(axes.yaxis.get_major_ticks()):
        if place not in places.values():
            tick.label1.set_fontweight("bold")
            tick.tick1line.set_visible(False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    threads_text = f", {threads.pop()} threads" if len(threads) == 1 else ""
    axes.set_title(
        f"time of the others / time of negmine, queries × keys × width{threads_text}", loc="left", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[1 + turn % (len(COLOURS) - 1)])
        for turn in range(len(peers))
    ]
    axes.legend(handles, peers, frameon=False, fontsize=8, loc="upper right")
    return save(figure, path, rows, "speed-up")


def short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def line_key(row: Row) -> tuple[str, ...]:
    return row["op"], row["case"], row["threads"]


def work(row: Row) -> tuple[int, str]:
    return int(row["B"]) * int(row["K"]) * int(row["D"]), row["dtype"]


def draw_scaling(path: Path, rows: list[Row]) -> Path:
    ops = list(dict.fromkeys(row["op"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    threads = max((row["threads"] for row in rows), key=int)
    figure, grid = plt.subplots(len(ops), 4, figsize=(15, 3.1 * len(ops)), squeeze=False, layout="constrained")
    panels = [("K", "median_ms"), ("K", "peak_extra_mib"), ("B", "median_ms"), ("D", "median_ms")]
    for line, op in zip(grid, ops, strict=True):
        for axes, (letter, value) in zip(line, panels, strict=True):
            for turn, variant in enumerate(variants):
                swept = [
                    row
                    for row in rows
                    if row["op"] == op and row["variant"] == variant and row["case"].startswith(f"{letter}=")
                ]
                for count, style in ((threads, "-"), *((("1", ":"),) if threads != "1" and variant == OURS else ())):
                    points = sorted((int(row[letter]), float(row[value])) for row in swept if row["threads"] == count)
                    label = f"{variant}, {count} thread{'s' if count != '1' else ''}"
                    colour = COLOURS[turn % len(COLOURS)]
                    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colour, label=label)
            axes.set_xscale("log", base=2)
            if value == "median_ms":
                axes.set_yscale("log")
            else:  # memory may be 0
                axes.set_yscale("symlog", linthresh=1)
                axes.set_ylim(bottom=0)
            axes.set_xticks(SWEEPS[letter], [f"{size:,}" for size in SWEEPS[letter]], fontsize=7)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            what = "ms" if value == "median_ms" else "peak extra MiB"
            axes.set_title(f"{op}: {what} against {letter}", loc="left", fontsize=10)
    grid[0, 0].legend(frameon=False, fontsize=8)
    return save(figure, path, rows, "scaling")


def draw(path: Path) -> list[Path]:
    rows = newest(path)
    named, swept = [row for row in rows if not is_swept(row)], [row for row in rows if is_swept(row)]
    drawn = [draw_speed_up(path, named), draw_cases(path, named)] if named else []
    letters = {row["case"].partition("=")[0] for row in swept}
    return drawn + ([draw_scaling(path, swept)] if letters == SWEEPS.keys() else [])


def most_threads(path: Path) -> list[Row]:
    """Newest rows of the named cases (not of the sweeps), measured with the largest number of threads in the file."""
    rows = [row for row in newest(path) if not is_swept(row)]
    threads = max((row["threads"] for row in rows), key=int)
    return [row for row in rows if row["threads"] == threads]


def source(path: Path, rows: list[Row]) -> str:
    """Text that says where and when the rows were measured."""
    last = max(rows, key=lambda row: row["date"])
    return (
        f"{path.stem}, {last['threads']} threads, torch {last['torch']}, commit {last['commit']}, {last['date'][:10]}"
    )


def summary(paths: list[Path]) -> str:
    """Markdown table of SHOWN: one line per shape, and per machine one column that compares negmine with plain PyTorch."""
    found = {path: {(row["case"], row["op"], row["variant"]): row for row in most_threads(path)} for path in paths}
    lines = [
        f"| B, K, D | computed | {' | '.join(f'{path.stem}, ms' for path in paths)} | extra memory |",
        "| --- " * (3 + len(paths)) + "|",
    ]
    shown: dict[Path, list[Row]] = {path: [] for path in paths}
    for case, op, words in SHOWN:
        cells, shape, memory = [], "", ""
        for path in paths:
            ours = found[path].get((case, op, OURS))
            plain = [row for name in (EAGER, EAGER_FP32) if (row := found[path].get((case, op, name)))]
            if ours is None or not plain:
                cells.append("not measured")
                continue
            plain = min(plain, key=lambda row: float(row["median_ms"]))
            shown[path] += [ours, plain]
            times = float(plain["median_ms"]) / float(ours["median_ms"])
            cells.append(f"{ours['median_ms']} against {plain['median_ms']} ({times:.1f}x)")
            shape = f"{ours['B']}, {int(ours['K']):,}, {ours['D']} {ours['dtype']}"
            memory = f"{ours['peak_extra_mib']} against {plain['peak_extra_mib']} MiB"
        if shape:
            lines.append(f"| {shape} | {words} | {' | '.join(cells)} | {memory} |")
    sources = "; ".join(source(path, rows) for path, rows in shown.items() if rows)
    says = (
        "Median times of negmine against plain PyTorch, and how many times faster negmine is (less than 1x: slower). "
        "For bfloat16 inputs, plain PyTorch computes in bfloat16 or in float32, whichever is faster on the machine."
    )
    return "\n".join([*lines, "", f"{says} Measured on {sources}."])


def table(path: Path) -> str:
    """Markdown table of all rows, also of those where negmine is slower than others."""
    rows = most_threads(path)
    found = {(row["case"], row["op"], row["variant"]): row for row in rows}
    lines = [
        "| shape (B, K, D) | op | negmine | plain PyTorch | times faster | others, their time over ours | floor | extra memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for (case, op, variant), ours in sorted(found.items(), key=lambda item: cases.index(item[0][0])):
        plain = found.get((case, op, EAGER))
        if variant != OURS or plain is None:
            continue
        took = float(ours["median_ms"])
        others = [
            f"{row['variant']} {short(float(row['median_ms']) / took)}"
            for row in rows
            if (row["case"], row["op"]) == (case, op) and row["variant"] not in (OURS, EAGER)
        ]
        shape = f"{ours['B']}, {int(ours['K']):,}, {ours['D']} {ours['dtype']}"
        lines.append(
            f"| {shape} | {op} | {ours['median_ms']} ms | {plain['median_ms']} ms | {float(plain['median_ms']) / took:.1f} "
            f"| {'; '.join(others)} | {ours['floor_ms']} ms | {ours['peak_extra_mib']} against {plain['peak_extra_mib']} MiB |"
        )
    return "\n".join(
        [*lines, "", f"Medians of interleaved rounds on {source(path, rows)}; rows in `benchmarks/results/`."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    results = parser.parse_args().results
    paths = sorted(results.glob("*.csv"), key=lambda path: path.stem)
    if not paths:
        raise SystemExit(f"there are no CSV files in {results}: run `make bench` first")
    for path in paths:
        print(*draw(path), sep="\n")
    if results == RESULTS:
        write_between(README, BEGIN, summary([path for path in paths if path.stem in IN_README]))
        write_between(ALL_ROWS, BEGIN, "\n\n".join(table(path) for path in paths))


if __name__ == "__main__":
    main()
