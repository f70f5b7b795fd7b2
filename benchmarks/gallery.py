"""Draw the pictures of docs/examples.md, which show the results of complete runs of the examples.

    python -m benchmarks.gallery                             draw the pictures from the committed rows
    python -m benchmarks.gallery --run simclr image_moco     run these examples again first; all of them take 20 minutes

The rows are in benchmarks/results/gallery/examples.csv, one for each point of a picture. A run replaces the rows of its example.
sentence_transformers_training and ray_mining need the packages of the same names.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.figures import plt, save
from benchmarks.palette import BLUE, COLOURS, GREY
from benchmarks.rows import RESULTS, Row, commit, read, write
from benchmarks.stand_ins import stand_ins

ROOT = RESULTS.parents[1]
FOLDER = RESULTS / "gallery"
ROWS = FOLDER / "examples.csv"
COLUMNS = ["date", "commit", "example", "series", "x", "value"]
Point = tuple[str, float, float]  # series, x, value
Lines = dict[str, tuple[list[float], list[float]]]  # series -> x, values

sys.path.insert(0, str(ROOT / "examples"))


def printed(script: str, pattern: str) -> list[float]:
    """Run an example, and return the numbers that the pattern finds in its output."""
    done = subprocess.run(
        [sys.executable, f"examples/{script}"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    return [float(number) for number in found.groups()]


def histogram(series: str, scores: np.ndarray) -> Iterator[Point]:
    """The density of scores in bins of 0.02."""
    density, edges = np.histogram(scores, bins=np.arange(-0.5, 1.01, 0.02), density=True)
    for low, value in zip(edges, density, strict=False):
        yield series, round(float(low) + 0.01, 2), float(value)


def cumulative(series: str, items: Tensor, num_items: int) -> Iterator[Point]:
    """Which share of the items are among the x most popular ones. Item 0 is the most popular."""
    counts = torch.bincount(items.flatten(), minlength=num_items).double()
    shares = counts.cumsum(0) / counts.sum()
    for x in np.unique(np.geomspace(1, num_items, 60).astype(int)):
        yield series, int(x), float(shares[x - 1])


def run_image_moco() -> Iterator[Point]:
    import image_moco

    args = image_moco.parse(["--evaluate-every", "250"])
    images = image_moco.load(args.data, args.size, args.root)
    _, results = image_moco.train(args, images, image_moco.Ranks("cpu"))
    for found in results:
        yield "20 nearest neighbours", found["step"], found["knn"]
        yield "linear probe", found["step"], found["probe"]


def run_simclr() -> Iterator[Point]:
    before, after = printed("simclr.py", r"k-NN accuracy: (\S+) before training, (\S+) after")
    yield "before training", 0, before
    yield "after 20 epochs", 0, after


def run_clip_two_ranks() -> Iterator[Point]:
    import clip_two_ranks as clip

    for series, steps in (("before training", 0), ("after 600 steps", 600)):
        model = clip.train(0, 1, steps, 256, torch.device("cpu"))
        with torch.no_grad():
            images, texts, _ = model(*clip.make_pairs(16, seed=10**6))
        for place, score in enumerate((images @ texts.T).flatten().tolist()):
            yield series, place, score


def run_sentence_transformers_training() -> Iterator[Point]:
    before, after = printed("sentence_transformers_training.py", r"entries: (\S+) before training, (\S+) after")
    yield "before training", 0, before
    yield "after one epoch", 0, after


def run_ray_mining() -> Iterator[Point]:
    import ray_mining

    import negmine

    with TemporaryDirectory() as folder:
        paths, query, positives = ray_mining.write_data(Path(folder), 500_000, 20_000, 8)
        mined = negmine.mine_hard_negatives(
            query, paths, positives, num_negatives=5, select=negmine.Select(relative_margin=0.05)
        )
        corpus = np.concatenate([np.load(path) for path in paths])
    others = np.random.default_rng(1).integers(0, len(corpus), len(query))
    yield from histogram("random rows", (query * corpus[others]).sum(1))
    yield from histogram("mined negatives", np.asarray(mined.scores)[np.asarray(mined.indices) >= 0])
    yield from histogram("positives", (query * corpus[positives]).sum(1))


def run_metric_learning_pml() -> Iterator[Point]:
    with stand_ins():
        import metric_learning_pml as pml

        images = pml.Images(*pml.load_idx())
        series = {"peer": "their miner", "miner": "NegmineMiner", "memory": "a memory of 4,096 embeddings"}
        for name, loss_of in pml.losses_of(list(series), 4096).items():
            yield series[name], 0, pml.train(name, loss_of, images, 8 * (len(images.train) // 128), 128, seed=0)


def run_recommender_logq() -> Iterator[Point]:
    import recommender_logq as logq

    tastes, users, items = logq.make_data(120_000)
    tested = slice(100_000, None)
    yield from cumulative("taken by users", items[tested], logq.ITEMS)
    for name, series in (("plain", "recommended, in-batch negatives as they are"), ("logQ", "recommended, with logQ")):
        towers = logq.train(name == "logQ", tastes, users[:100_000], items[:100_000], 2000, 256, 0)
        yield from cumulative(series, logq.recommend(towers, tastes[users[tested]]), logq.ITEMS)


def draw_lines(axes: Axes, lines: Lines, x: str, y: str) -> None:
    for colour, (series, (places, values)) in zip(COLOURS, lines.items(), strict=False):
        axes.plot(places, values, marker="o", markersize=3, color=colour, label=series)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")


def draw_bars(axes: Axes, lines: Lines, y: str) -> None:
    for place, (_, values) in enumerate(lines.values()):
        axes.barh(place, values[0], 0.6, color=BLUE if place else GREY)
        axes.text(values[0], place, f" {values[0]:.3f}", va="center")
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(y)


def draw_histograms(axes: Axes, lines: Lines) -> None:
    for colour, (series, (places, values)) in zip((GREY, *COLOURS), lines.items(), strict=False):
        axes.fill_between(places, values, step="mid", alpha=0.5, color=colour, label=series)
    axes.set_xlabel("inner product with the query")
    axes.set_ylabel("density")
    axes.legend()


def draw_popularity(axes: Axes, lines: Lines) -> None:
    for colour, (series, (places, values)) in zip((GREY, COLOURS[1], BLUE), lines.items(), strict=False):
        axes.plot(places, values, color=colour, label=series)
    axes.set_xscale("log")
    axes.set_xlabel("number of items, the most popular first")
    axes.set_ylabel("share that they make up")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")


def draw_matrices(figure: plt.Figure, lines: Lines) -> None:
    panels = figure.subplots(1, len(lines))
    for axes, (series, (_, values)) in zip(panels, lines.items(), strict=True):
        side = int(len(values) ** 0.5)
        shown = axes.imshow(np.reshape(values, (side, side)), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(series)
        axes.set_xlabel("caption")
        axes.set_ylabel("picture")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(shown, ax=panels, label="cosine similarity", shrink=0.8)


def draw(example: str, lines: Lines) -> None:
    sizes = {"clip_two_ranks": (8, 3.6), "simclr": (7, 1.6), "sentence_transformers_training": (7, 1.6)}
    figure = plt.figure(figsize=sizes.get(example, (7, 3.2)), layout="constrained")
    if example == "clip_two_ranks":
        draw_matrices(figure, lines)
    else:
        axes = figure.subplots()
        if example == "image_moco":
            draw_lines(axes, lines, "step", "accuracy on test images")
        elif example == "ray_mining":
            draw_histograms(axes, lines)
        elif example == "recommender_logq":
            draw_popularity(axes, lines)
        else:
            measures = {
                "simclr": "accuracy of 20 nearest neighbours",
                "metric_learning_pml": "recall@1 of test images among training images",
                "sentence_transformers_training": "MRR@10 of held-out sentences",
            }
            draw_bars(axes, lines, measures[example])
    save(figure, FOLDER / f"{example}.png")


RUNS: dict[str, Callable[[], Iterator[Point]]] = {
    "image_moco": run_image_moco,
    "simclr": run_simclr,
    "clip_two_ranks": run_clip_two_ranks,
    "sentence_transformers_training": run_sentence_transformers_training,
    "ray_mining": run_ray_mining,
    "metric_learning_pml": run_metric_learning_pml,
    "recommender_logq": run_recommender_logq,
}


def lines_of(rows: list[Row]) -> Lines:
    lines: Lines = {}
    for row in rows:
        places, values = lines.setdefault(row["series"], ([], []))
        places.append(float(row["x"]))
        values.append(float(row["value"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", default=[], choices=list(RUNS), metavar="EXAMPLE", help=", ".join(RUNS))
    FOLDER.mkdir(exist_ok=True)
    for example in parser.parse_args().run:
        stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "example": example}
        points = list(RUNS[example]())
        new = [stamp | {"series": series, "x": f"{x:g}", "value": f"{value:.4g}"} for series, x, value in points]
        write(ROWS, COLUMNS, [row for row in read(ROWS) if row["example"] != example] + new)
    for example, rows in groupby(read(ROWS), lambda row: row["example"]):
        draw(example, lines_of(list(rows)))


if __name__ == "__main__":
    main()
