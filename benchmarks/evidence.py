"""Make the tables and pictures of docs/evidence.md from committed rows. Trains nothing.

    python -m benchmarks.evidence

Reads benchmarks/results/evidence/fashion_mnist.csv, which `examples/difficulty.py --csv` appends to, and the rows of
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
    """The mean and half of its 95 % interval; NaN where the seeds are too few (or more than T_95 knows)."""
    t = T_95.get(len(values))
    half = t * statistics.stdev(values) / len(values) ** 0.5 if t else float("nan")
    return statistics.fmean(values), half


def cell(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half == half else "")


def differences(found: dict[str, float], plain: dict[str, float]) -> list[float]:
    """Of the seeds that both have."""
    return [value - plain[seed] for seed, value in found.items() if seed in plain]


def of_images(rows: list[Row], measure: str) -> dict[str, dict[str, float]]:
    """treatment -> seed -> value."""
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
    """A line a treatment: the mean of each measure, and its difference from `all` of the same seeds."""
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
    """mean_and_half over seeds; no interval of overlaps, since pairs of seeds are not independent."""
    values = list(of_images(rows, measure)["all"].values())
    return (statistics.fmean(values), float("nan")) if measure.startswith("overlap") else mean_and_half(values)


def shares_table(rows: list[Row], prefix: str) -> str:
    """A line a measure whose name begins so."""
    lines = ["| measure | seeds or pairs | mean |", "| --- | --- | --- |"]
    for measure in dict.fromkeys(row["measure"] for row in rows if row["measure"].startswith(prefix)):
        count = len(of_images(rows, measure)["all"])
        lines.append(f"| {measure} | {count} | {cell(*spread(rows, measure))} |")
    return "\n".join(lines)


def tables(images: list[Row], texts: list[Row]) -> str:
    both = [of_images(images, measure) for measure in ("knn", "probe")]
    return "\n\n".join(
        [
            f"Images, {images[0]['classes']} classes, {images[0]['steps']} steps:",
            treatments_table(["k-NN", "linear probe"], both),
            f"Text, {TEXT_STEPS} steps:",
            treatments_table(["MRR"], [of_texts(texts)]),
            "Images, the share of a bin of difficulty that is of the query's own class (hardest first):",
            shares_table(images, "same class"),
            "Images, the overlap of the hardest 5 % of two seeds:",
            shares_table(images, "overlap"),
        ]
    )


def draw(images: list[Row], texts: list[Row]) -> None:
    from benchmarks.figures import AFTER, BEFORE, plt, save

    figure, panels = plt.subplots(1, 2, figsize=(12, 3), layout="constrained")
    sources = [("Images: k-NN accuracy", of_images(images, "knn")), ("Text: MRR", of_texts(texts))]
    for axes, (title, found) in zip(panels, sources, strict=True):
        names = [name for name in found if name != "all"]
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
        axes.set_xlabel("difference from all negatives, same seed; 95 % intervals")
    save(figure, IMAGES.parent / "treatments.png")

    figure, panels = plt.subplots(1, 2, figsize=(12, 3), layout="constrained", width_ratios=[2, 1])
    for axes, prefix, title in (
        (panels[0], "same class", "Share of the query's own class, by bin of difficulty"),
        (panels[1], "overlap", "Hardest 5 %: overlap of two seeds"),
    ):
        measures = list(dict.fromkeys(row["measure"] for row in images if row["measure"].startswith(prefix)))
        names = [measure.removeprefix("same class, ").replace(" to ", " to\n") for measure in measures]
        for place, measure in enumerate(measures):
            mean, half = spread(images, measure)
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
