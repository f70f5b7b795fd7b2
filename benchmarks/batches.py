"""Compare random batches with batches of mutually hard queries, on the task of the demo, with in-batch negatives only.

    python -m benchmarks.batches --seeds 0 1 2 --steps 150        run the trainings that have no row yet, and write the table
    python -m benchmarks.batches --table                          write the table again, without training

Heads, optimiser and evaluation are those of benchmarks/train.py, without its queue: the negatives of a query are the other
positives of its batch. Both kinds of batches contain every training query once in each epoch. For `hard`, NEGATIVES negatives of
each query are mined once before training, by the frozen sentence vectors, and build_batches groups the queries by them. Rows go
to results/batches/wordnet.csv.
"""

import argparse
import datetime
import itertools
import statistics
from collections.abc import Iterator

import torch

import negmine
from benchmarks import wordnet
from benchmarks.recipes import METRICS, PAGE
from benchmarks.rows import RESULTS, append, commit, machine_name, newest, write_between
from benchmarks.train import TEMPERATURE, evaluate, follow, new_heads, optimizer_of

ROWS = RESULTS / "batches" / "wordnet.csv"
KEY = ("batches", "batch_size", "seed", "steps")
COLUMNS = [*KEY, *METRICS, "loss", "seconds_to_mine", "negmine", "commit", "torch", "machine", "date"]
KINDS = {
    "random": "random",
    "hard": "mutually hard (`build_batches`)",
    "random, hardness added": "random, hardness added to the loss (LLaVE)",
    "hard, hardness added": "mutually hard, hardness added to the loss",
}
NEGATIVES = 20
BEGIN = "<!-- made by `python -m benchmarks.batches` from benchmarks/results/batches -->"


def mined(task: wordnet.Task) -> negmine.mining.MiningResult:
    """Mine negatives of the training queries among all entries."""
    train = task.train.numpy()
    queries, answers = task.queries.numpy()[train], task.positives.numpy()[train]
    return negmine.mine_hard_negatives(
        queries, task.corpus.numpy(), answers, num_negatives=NEGATIVES, query_ids=train, count_skipped=False
    )


def batches_of(kind: str, task: wordnet.Task, result: negmine.mining.MiningResult, size: int, seed: int) -> Iterator:
    """Batches of positions in task.train, without end. The last batch of an epoch is left out if it is smaller."""
    if kind.startswith("hard"):
        hard = negmine.mining.build_batches(result, size, drop_last=True, seed=seed)
        for epoch in itertools.count():
            hard.set_epoch(epoch)
            yield from hard
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(task.train), generator=generator)
        yield from (order[begin : begin + size].tolist() for begin in range(0, len(order) - size + 1, size))


def train(
    kind: str, task: wordnet.Task, result: negmine.mining.MiningResult, size: int, steps: int, seed: int
) -> tuple:
    """Train. Returns the metrics, and the mean loss of the last tenth of the steps."""
    loss_of = negmine.InfoNCELoss(TEMPERATURE)
    if kind.endswith("hardness added"):
        loss_of = negmine.recipes.hardness_added(temperature=TEMPERATURE)
    query_head, key_head = new_heads(task.corpus.shape[1], seed, task.corpus.device)
    optimizer, schedule = optimizer_of(list(query_head.parameters()), steps)
    losses = []
    for rows in itertools.islice(batches_of(kind, task, result, size, seed), steps):
        batch = task.train[torch.tensor(rows)]  # (B,)
        answers = task.positives[batch]  # (B,)
        with torch.no_grad():
            follow(key_head, query_head)
            positive_key = key_head(task.corpus[answers])  # (B, D)
        query = query_head(task.queries[batch])  # (B, D)
        loss = loss_of(query, positive_key, query_ids=answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return evaluate(query_head, key_head, task), statistics.mean(losses[-max(1, steps // 10) :])


def run_missing(sizes: list[int], seeds: list[int], steps: int) -> None:
    task = wordnet.load()
    start = datetime.datetime.now()
    result = mined(task)
    seconds = (datetime.datetime.now() - start).total_seconds()
    done = {tuple(row[name] for name in KEY) for row in newest(ROWS, *KEY)}
    for seed, size, kind in itertools.product(seeds, sizes, KINDS):
        key = (kind, str(size), str(seed), str(steps))
        if key in done:
            continue
        metrics, loss = train(kind, task, result, size, steps, seed)
        values = {name: f"{getattr(metrics, name):.5f}" for name in METRICS}
        stamp = {"negmine": negmine.__version__, "commit": commit(), "torch": torch.__version__}
        stamp |= {"machine": machine_name("cpu"), "date": datetime.date.today().isoformat()}
        mining = f"{seconds:.1f}" if kind.startswith("hard") else ""
        row = dict(zip(KEY, key, strict=True)) | values | {"loss": f"{loss:.3f}", "seconds_to_mine": mining} | stamp
        append(ROWS, COLUMNS, [row])
        print({name: row[name] for name in (*KEY, *METRICS, "loss")}, flush=True)


def table(steps: int) -> str:
    rows = [row for row in newest(ROWS, *KEY) if int(row["steps"]) == steps]
    lines = [f"| batches | batch size | seeds | {' | '.join(METRICS.values())} | loss in a batch |", "| --- " * 7 + "|"]
    for size, kind in itertools.product(sorted({int(row["batch_size"]) for row in rows}), KINDS):
        own = [row for row in rows if row["batches"] == kind and int(row["batch_size"]) == size]
        if not own:
            continue
        cells = []
        for name in (*METRICS, "loss"):
            values = [float(row[name]) for row in own]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {KINDS[kind]} | {size} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 256])
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.table:
        run_missing(args.batch_sizes, args.seeds, args.steps)
    text = table(args.steps)
    write_between(PAGE, BEGIN, text)
    print(text)


if __name__ == "__main__":
    main()
