"""Write the tables and figures of docs/evidence.md from committed result rows, without training.

    python -m benchmarks.evidence

It reads benchmarks/results/evidence/fashion_mnist.csv, which `examples/difficulty.py --csv` appends to, and the rows of
benchmarks.recipes that answer the same questions on text. Intervals are 95 % by Student's t over seeds.
"""

import statistics

from benchmarks.recipes import ROWS as TEXTS
from benchmarks.rows import RESULTS, Row, read, write_between

IMAGES = RESULTS / "evidence" / "fashion_mnist.csv"
PAGE = RESULTS.parents[1] / "docs" / "evidence.md"
BEGIN = "<!-- made by `python -m benchmarks.evidence` from benchmarks/results -->"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, by the number of seeds
ON_TEXTS = {  # recipe of benchmarks.train -> the treatment's name in examples/difficulty.py
    "all": "all",
    "hard5": "hardest 5 %",
    "easy95": "easiest 95 %",
    "drop01": "without the hardest 0.1 %",
    "hard5_drop01": "hardest 5 % without the hardest 0.1 %",
}
TEXT_STEPS = "150"


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval: NaN if T_95 does not have the number of seeds."""
    t = T_95.get(len(values))
    half = t * statistics.stdev(values) / len(values) ** 0.5 if t else float("nan")
    return statistics.fmean(values), half


def cell(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half == half else "")


def differences(found: dict[str, float], plain: dict[str, float]) -> list[float]:
    """The differences for the seeds that both have."""
    return [value - plain[seed] for seed, value in found.items() if seed in plain]


def by_classes(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by number of classes, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["classes"], []).append(row)
    return found


def of_images(rows: list[Row], measure: str) -> dict[str, dict[str, float]]:
    """treatment -> seed -> value of a measure. All rows have the same number of classes."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["measure"] == measure:
            found.setdefault(row["treatment"], {})[row["seed"]] = float(row["value"])
    return found


def of_texts(rows: list[Row]) -> dict[str, dict[str, float]]:
    """treatment -> seed -> MRR."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["recipe"] in ON_TEXTS and row["steps"] == TEXT_STEPS:
            found.setdefault(ON_TEXTS[row["recipe"]], {})[row["seed"]] = float(row["mrr"])
    return found


def treatments_table(heads: list[str], measures: list[dict[str, dict[str, float]]]) -> str:
    """One line for each treatment: the mean of each measure, and its difference from `all` with the same seeds."""
    names = [column for head in heads for column in (head, f"{head}, difference from all")]
    lines = [f"| negatives | seeds | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for treatment, seeds in measures[0].items():
        cells = []
        for measure in measures:
            found = measure[treatment]
            gap = differences(found, measure["all"])
            cells += [
                f"{statistics.fmean(found.values()):.4f}",
                cell(*mean_and_half(gap), "+") if treatment != "all" and gap else "",
            ]
        lines.append(f"| {treatment} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(rows: list[Row], measure: str) -> tuple[float, float]:
    """mean_and_half over seeds. Overlaps have no interval, because pairs of seeds are not independent."""
    values = list(of_images(rows, measure)["all"].values())
    return (statistics.fmean(values), float("nan")) if measure.startswith("overlap") else mean_and_half(values)


def shares_table(settings: dict[str, list[Row]], prefix: str) -> str:
    """One line for each measure whose name starts with `prefix`, and one column for each number of classes."""
    heads = [f"{classes} classes" for classes in settings]
    lines = [f"| measure | seeds or pairs | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    first = next(iter(settings.values()))
    for measure in dict.fromkeys(row["measure"] for row in first if row["measure"].startswith(prefix)):
        count = len(of_images(first, measure)["all"])
        cells = [cell(*spread(rows, measure)) for rows in settings.values()]
        lines.append(f"| {measure} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(images: list[Row], texts: list[Row]) -> str:
    settings, parts = by_classes(images), []
    for classes, rows in settings.items():
        both = [of_images(rows, measure) for measure in ("knn", "probe")]
        parts += [f"Images, {classes} classes, {rows[0]['steps']} steps:"]
        parts += [treatments_table(["k-NN", "linear probe"], both)]
    parts += [f"Text, {TEXT_STEPS} steps:", treatments_table(["MRR"], [of_texts(texts)])]
    parts += ["Images, the share of each bin of difficulty (hardest first) that is of the query's own class:"]
    parts += [shares_table(settings, "same class")]
    parts += ["Images, the overlap between the hardest 5 % of two seeds:", shares_table(settings, "overlap")]
    return "\n\n".join(parts)


def draw(images: list[Row], texts: list[Row]) -> None:
    from benchmarks.figures import AFTER, BEFORE, plt, save

    settings = by_classes(images)
    sources = [
        (f"Images, {classes} classes: k-NN accuracy", of_images(rows, "knn")) for classes, rows in settings.items()
    ]
    sources.append(("Text: MRR", of_texts(texts)))
    heights = [len(found.keys() - {"all", "untrained"}) + 1 for _, found in sources]
    figure, panels = plt.subplots(
        len(sources), 1, figsize=(9, 1.6 + 0.38 * sum(heights)), layout="constrained", height_ratios=heights
    )
    for axes, (title, found) in zip(panels, sources, strict=True):
        names = [name for name in found if name not in ("all", "untrained")]
        for place, name in enumerate(reversed(names)):
            gaps = differences(found[name], found["all"])
            mean, half = mean_and_half(gaps)
            axes.plot(gaps, [place] * len(gaps), "o", markersize=3, color=BEFORE)
            axes.errorbar(mean, place, xerr=half, fmt="o", color=AFTER, capsize=3)
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), reversed(names))
        axes.set_ylim(-0.5, len(names) - 0.5)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.25)
        axes.set_title(title)
    panels[-1].set_xlabel("difference from all negatives with the same seed; 95 % intervals")
    save(figure, IMAGES.parent / "treatments.png")

    rows, classes = next(iter(settings.values())), next(iter(settings))
    figure, panels = plt.subplots(1, 2, figsize=(12, 3), layout="constrained", width_ratios=[2, 1])
    for axes, prefix, title in (
        (panels[0], "same class", f"Share of the query's own class by difficulty, {classes} classes"),
        (panels[1], "overlap", "Overlap of two seeds' hardest 5 %"),
    ):
        measures = list(dict.fromkeys(row["measure"] for row in rows if row["measure"].startswith(prefix)))
        names = [measure.removeprefix("same class, ").replace(" to ", " to\n") for measure in measures]
        for place, measure in enumerate(measures):
            mean, half = spread(rows, measure)
            axes.bar(place, mean, 0.6, color=BEFORE if " by " in measure else AFTER)
            if half == half:
                axes.errorbar(place, mean, yerr=half, color="black", capsize=3)
        axes.set_xticks(range(len(measures)), names, fontsize=8.5)
        axes.set_xlabel("part of the ranking, hardest first" if prefix == "same class" else "")
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.25)
        axes.set_title(title)
    save(figure, IMAGES.parent / "hardness.png")


def main() -> None:
    images, texts = read(IMAGES), read(TEXTS)
    draw(images, texts)
    write_between(PAGE, BEGIN, tables(images, texts))


if __name__ == "__main__":
    main()
