"""The three figures of the demo: learning curves, properties of hard negatives, and the time and memory of a step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.hardness import BINS, RANKS, Hardness
from benchmarks.measure import Measured
from benchmarks.palette import BLUE, GREEN, GREY, PURPLE, RED, YELLOW
from benchmarks.peers import OPS
from benchmarks.train import IN_DEMO, RECIPES, K, Run

COLOURS = dict(zip(IN_DEMO, [BLUE, GREEN, RED, YELLOW, GREY, PURPLE], strict=True))
FLOOR = "torch's matrix products alone"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1}
BEFORE, AFTER, ACCENT = "#a9b4c2", BLUE, RED
plt.rcParams.update(
    {
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "svg.fonttype": "none",
    }
)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], gap: float) -> None:
    """Write (x, y, text, colour) at the ends of lines, moved up just enough that no two overlap."""
    lowest = float("-inf")
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + gap)
        axes.annotate(text, (x, y), (x * 1.03, lowest), color=colour, va="center", fontsize=8.5, annotation_clip=False)


def learning_curves(runs: list[Run], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, (field, title) in zip(
        panels, [("recall_1", "recall@1"), ("recall_10", "recall@10"), ("mrr", "MRR")], strict=True
    ):
        ends = []
        for run in runs:
            steps = [step for step, _ in run.curve]
            values = [getattr(metrics, field) for _, metrics in run.curve]
            axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.8, color=COLOURS.get(run.name))
            ends.append((steps[-1], values[-1], run.name, COLOURS.get(run.name, "black")))
        low, high = axes.get_ylim()
        label_ends(axes, ends, (high - low) * 0.055)
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.set_xticks(steps)
        axes.set_xlim(0, steps[-1] * 1.28)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle("Held-out example sentences: is their dictionary entry found among 117,659?", x=0.01, ha="left")
    save(figure, path)


def recipe_windows(axes: Axes, names: list[str], measured: Hardness) -> None:
    """One bar for each recipe: the ranks that its loss uses, and the share of the gradient of all negatives that they have."""
    held = [0.0, *measured.attention.tolist()]
    for place, name in enumerate(reversed(names)):
        recipe = RECIPES[name]
        first, end = (int(bound * K) for bound in recipe.window)
        axes.barh(place, end - max(first, 1), left=max(first, 1), height=0.3, color=COLOURS.get(name, AFTER), alpha=0.8)
        share = np.interp(end, [0, *RANKS.tolist()], held) - np.interp(first, [0, *RANKS.tolist()], held)
        text = f"{recipe.title}: {end - first:,} keys, {100 * share:.0f} % of the gradient"
        if recipe.parents:
            axes.barh(place, recipe.parents - 1, left=1, height=0.3, facecolor="none", edgecolor="white", hatch="///")
            text += f" + mixtures of ranks 1 to {recipe.parents:,}"
        axes.text(1.1, place + 0.32, text, va="center", fontsize=9, bbox=LABEL)
    axes.set_yticks([])
    axes.set_ylim(-0.4, len(names) - 0.4)
    axes.set_title("Ranks of each recipe; share of the gradient before training")


def hardness(before: Hardness, after: Hardness, names: list[str], trained_with: str, path: Path) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(13, 8.6), layout="constrained")
    (scores, attention), (related, windows) = grid
    middle = (BINS[1:] + BINS[:-1]) / 2
    for measured, colour, label in [(before, BEFORE, "before training"), (after, AFTER, "after")]:
        scores.fill_between(middle, measured.density, color=colour, alpha=0.35, linewidth=0)
        scores.plot(middle, measured.density, color=colour, label=f"queue, {label}")
        attention.plot(RANKS, measured.attention, color=colour, marker="o", markersize=3, label=label)
    scores.plot(
        middle, after.synthetic_density, color=COLOURS["mochi"], linestyle="--", label="MoCHi's synthetic, after"
    )
    scores.set_yscale("log")
    scores.set_ylim(1e-4, 5e2)
    scores.vlines(0, 1e-4, 12, color="black", linewidth=1)
    scores.text(0.02, 8, "harder than the positive", fontsize=8.5)
    for fraction, place in after.thresholds.items():
        scores.vlines(place, 1e-4, 12, color=ACCENT, linewidth=1, linestyle=":")
        scores.text(place - 0.015, 8, f"{100 * fraction:g} %", color=ACCENT, ha="right", fontsize=8.5)
    scores.set_title("Scores of the negatives, relative to the positive's")
    scores.set_xlabel("score minus score of the positive   (dotted: mean thresholds after training)")
    scores.set_ylabel("density, log scale")
    scores.legend(loc="upper left", fontsize=8.5)

    attention.set_title("Share of the gradient that comes from the hardest r negatives")
    attention.set_ylabel("share of the negatives' gradient")
    attention.set_ylim(0, 1.02)
    attention.legend(loc="lower right")

    for colour, (name, values) in zip([AFTER, ACCENT, "#66a182"], after.related.items(), strict=True):
        known = values > 0
        related.plot(RANKS[known], values[known], color=colour, marker="o", markersize=3, label=name)
        early = before.related[name] > 0
        related.plot(RANKS[early], before.related[name][early], color=colour, alpha=0.35, linewidth=1)
    related.set_yscale("log")
    related.set_ylim(1e-5, 1)
    related.set_title("Relation to the correct answer")
    related.set_ylabel("share of the negatives at that rank   (faint: before)")
    related.legend(loc="lower left", fontsize=8.5)

    recipe_windows(windows, names, before)
    for axes in (attention, related, windows):
        axes.set_xscale("log")
        axes.set_xlim(1, K)
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
        axes.set_xlabel(f"rank among the {K:,} keys of the queue, 1 = hardest")
        for fraction in after.thresholds:
            axes.axvline(fraction * K, color=ACCENT, linewidth=1, linestyle=":")
    figure.suptitle(
        f'256 held-out queries against the queue, before and after training with "{trained_with}"', x=0.01, ha="left"
    )
    save(figure, path)


def step_time(measured: dict[str, list[Measured]], path: Path) -> None:
    figure, (times, memory) = plt.subplots(1, 2, figsize=(13, 0.9 + 0.85 * len(measured)), layout="constrained")
    height = 0.36
    for place, of_op in enumerate(reversed(measured.values())):
        for turn, (m, colour) in enumerate(zip(of_op, [AFTER, BEFORE], strict=True)):
            y = place + (0.5 - turn) * height
            times.barh(
                y,
                m.timing.median,
                height,
                color=colour,
                label=m.variant if place == 0 else None,
                xerr=[[m.timing.median - m.timing.q20], [m.timing.q80 - m.timing.median]],
                ecolor="#555",
            )
            times.text(max(m.timing.q80, m.floor_ms), y, f"  {m.timing.median:.0f} ms", va="center", fontsize=8.5)
            memory.barh(y, m.peak_extra_mib, height, color=colour)
            memory.text(m.peak_extra_mib, y, f"  {m.peak_extra_mib:.0f} MiB", va="center", fontsize=8.5)
        times.plot(
            [of_op[0].floor_ms] * 2,
            [place - height, place + height],
            color="black",
            linewidth=1.5,
            label=FLOOR if place == 0 else None,
        )
    for axes, title in [
        (times, "time, ms (median; whiskers 20 % and 80 %)"),
        (memory, "peak memory beyond the inputs, MiB"),
    ]:
        axes.set_title(title)
        axes.margins(x=0.18)
        axes.set_yticks(range(len(measured)), [OPS[name].title for name in reversed(measured)] if axes is times else [])
    handles, labels = times.get_legend_handles_labels()
    order = [labels.index(name) for name in ("negmine", "eager", FLOOR)]
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower left", ncols=3)
    save(figure, path)
