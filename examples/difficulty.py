"""Are all negative examples equal? The experiment of Cai et al. 2020 (arXiv 2010.06682) on your images, with seeds and intervals.

    python examples/difficulty.py --csv runs.csv                     3 seeds of every treatment: hours on two CPU cores
    python examples/difficulty.py --csv runs.csv --classes 2 5       the same on the images of the first 2 and 5 classes
    python examples/difficulty.py --csv runs.csv --table             the tables again, without training
    python examples/difficulty.py --quick --csv runs.csv             two treatments, two seeds, 10 steps

Trains MoCo v2 (examples/image_moco.py) on some of each query's negatives only: the hardest 5 %, the easiest 95 %, bins of
difficulty, all without the hardest 0.1 %, and all without those of the query's own class (an oracle). A run that is in the CSV
file is not trained again. For comparison the untrained network is evaluated too. Of the models trained on all negatives it
measures:

    same class    the share of the negatives in each bin of difficulty that are of the query's own class
    overlap       the share of a query's hardest 5 % that are also its hardest 5 % for a model of another seed; the overlap by
                  chance; and the overlap by chance of models that know the class and nothing else
"""

import argparse
import csv
import itertools
import statistics
from pathlib import Path

import torch
from image_moco import MoCo, Ranks, parse, train
from torch import Tensor

import negmine
from image_tools import Images, features, load

BINS = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 1.0)  # of each query's ranking, hardest first
# Treatment -> the recipe of examples/image_moco.py with its options.
TREATMENTS = {
    "all": ["--recipe", "moco_v2"],
    "hardest 5 %": ["--recipe", "hardest", "--option", "fraction=0.05"],
    "easiest 95 %": ["--recipe", "easiest", "--option", "fraction=0.95"],
    "without the hardest 0.1 %": ["--recipe", "hardest", "--option", "fraction=1.0", "skip=0.001"],
    "hardest 5 % without the hardest 0.1 %": ["--recipe", "hardest", "--option", "fraction=0.05", "skip=0.001"],
    "without the query's class": ["--recipe", "moco_v2", "--oracle"],
    "hardest 5 % without the query's class": ["--recipe", "hardest", "--option", "fraction=0.05", "--oracle"],
} | {
    f"{low:.1%} to {high:.0%}": ["--recipe", "hardest", "--option", f"fraction={high}", f"skip={low}"]
    for low, high in itertools.pairwise(BINS[1:])
}
MEASURES = ("knn", "probe", "alignment", "uniformity")
COLUMNS = ("data", "classes", "steps", "seed", "treatment", "measure", "value")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t of a 95 % interval, by the number of seeds
HARD = 0.05


def first_classes(images: Images, classes: int) -> Images:
    """The images of the first classes alone."""
    known, asked = images.train_labels < classes, images.test_labels < classes
    return Images(images.train[known], images.train_labels[known], images.test[asked], images.test_labels[asked])


def ranking(model: MoCo, images: Images, count: int = 1000) -> tuple[Tensor, Tensor]:
    """For `count` test images: all training images, hardest first (count, N), and whether each is of the same class."""
    keys, query = (features(model.query, part) for part in (images.train, images.test[:count]))
    index = negmine.mine_hardest(query, keys, len(keys)).index
    return index, images.train_labels[index] == images.test_labels[:count, None]


def same_class(same: Tensor) -> dict[str, float]:
    """The share of the query's class in each bin of a ranking (Q, N)."""
    N = same.shape[1]
    bounds = [(low, high, int(low * N), max(int(high * N), int(low * N) + 1)) for low, high in itertools.pairwise(BINS)]
    return {f"same class, {low:.1%} to {high:.1%}": same[:, a:b].float().mean().item() for low, high, a, b in bounds}


def consistency(first: Tensor, second: Tensor, images: Images) -> dict[str, float]:
    """Of two models' rankings (Q, N): the overlap of the hardest, and what two independent choices would overlap."""
    Q, N = first.shape
    hard = int(HARD * N)
    chosen = [torch.zeros(Q, N, dtype=torch.bool).scatter_(1, index[:, :hard], True) for index in (first, second)]
    overlap = (chosen[0] & chosen[1]).sum(1) / hard  # (Q,)
    own = images.train_labels == images.test_labels[:Q, None]  # (Q, N)
    by_class = torch.zeros(Q)  # expected overlap if each model chose as many of the class and of the rest at random
    for group in (own, ~own):
        counts = [(part & group).sum(1).double() for part in chosen]
        by_class += (counts[0] * counts[1] / group.sum(1).clamp_min(1) / hard).float()
    return {"overlap": overlap.mean().item(), "overlap by chance": HARD, "overlap by class": by_class.mean().item()}


class Runs:
    """The CSV file: one line a measure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    def add(self, key: tuple, values: dict[str, float]) -> None:
        new = [
            dict(zip(COLUMNS, (*map(str, key), name, f"{value:.5f}"), strict=True)) for name, value in values.items()
        ]
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerows(new)
        self.rows += new

    def has(self, key: tuple) -> bool:
        return any(tuple(row[name] for name in COLUMNS[:5]) == tuple(map(str, key)) for row in self.rows)

    def values(self, setting: tuple, treatment: str, measure: str) -> dict[str, float]:
        """seed -> value."""
        wanted = (*map(str, setting), treatment, measure)
        names = (*COLUMNS[:3], "treatment", "measure")
        return {row["seed"]: float(row["value"]) for row in self.rows if tuple(row[name] for name in names) == wanted}


def interval(values: list[float]) -> str:
    """Mean and half of its 95 % interval by Student's t."""
    if len(values) not in T_95:
        return f"{statistics.fmean(values):+.4f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+.4f} ± {half:.4f}"


def tables(runs: Runs) -> None:
    for setting in dict.fromkeys(tuple(row[name] for name in COLUMNS[:3]) for row in runs.rows):
        data, classes, steps = setting
        print(
            f"\n{data}, {classes} classes, {steps} steps; differences from `all` of the same seed, with 95 % intervals\n"
        )
        print(
            "| negatives | seeds | k-NN | linear probe | k-NN, difference | probe, difference | alignment | uniformity |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        plain = {measure: runs.values(setting, "all", measure) for measure in MEASURES}
        for treatment in ("untrained", *TREATMENTS):
            found = {measure: runs.values(setting, treatment, measure) for measure in MEASURES}
            if not found["knn"]:
                continue
            mean = {measure: statistics.fmean(values.values()) for measure, values in found.items()}
            gaps = {}
            for measure in ("knn", "probe"):
                both = [
                    value - plain[measure][seed] for seed, value in found[measure].items() if seed in plain[measure]
                ]
                gaps[measure] = "" if treatment == "all" or not both else interval(both)
            print(
                f"| {treatment} | {len(found['knn'])} | {mean['knn']:.4f} | {mean['probe']:.4f} | {gaps['knn']} | "
                f"{gaps['probe']} | {mean['alignment']:.3f} | {mean['uniformity']:.3f} |"
            )
        print()
        rows = [row for row in runs.rows if tuple(row[name] for name in COLUMNS[:3]) == setting]
        for measure in dict.fromkeys(row["measure"] for row in rows):
            if measure.startswith(("same class", "overlap")):
                values = [float(row["value"]) for row in rows if row["measure"] == measure]
                print(f"{measure}: {statistics.fmean(values):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="appended to; runs that it holds are not repeated")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--classes", type=int, nargs="+", default=[10], help="train on the images of the first so many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--treatments", nargs="+", default=list(TREATMENTS), choices=list(TREATMENTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="two treatments, two seeds, 10 steps")
    args = parser.parse_args()
    runs = Runs(args.csv)
    if args.quick:
        args.treatments, args.seeds, args.steps = ["all", "hardest 5 %"], [0, 1], 10
    for classes in args.classes if not args.table else []:
        ranks = Ranks(None)
        images = first_classes(Images(*(part.to(ranks.device) for part in load(args.data, 32, "data"))), classes)
        images = Images(*(part[: 800 if args.quick else None] for part in images))
        rankings: dict[int, Tensor] = {}
        for treatment, seed in itertools.product(args.treatments, args.seeds):
            key = (args.data, classes, args.steps, seed, treatment)
            if runs.has(key):
                continue
            asked = parse([*TREATMENTS[treatment], "--seed", str(seed)] + ["--quick"] * args.quick)
            asked.steps = asked.evaluate_every = args.steps
            asked.plain_steps = min(asked.plain_steps, args.steps // 4)  # a short run has the treatment too
            model, results = train(asked, images, ranks)
            runs.add(key, {measure: results[-1][measure] for measure in MEASURES})
            if treatment == "all":
                runs.add((*key[:4], "untrained"), {measure: results[0][measure] for measure in MEASURES})
                index, same = (part.cpu() for part in ranking(model, images, 200 if args.quick else 1000))
                runs.add(key, same_class(same))
                for other, earlier in rankings.items():  # those trained by this process
                    pair = (*key[:3], f"{other} and {seed}", treatment)
                    runs.add(pair, consistency(earlier, index, Images(*(part.cpu() for part in images))))
                rankings[seed] = index
    tables(runs)


if __name__ == "__main__":
    main()
