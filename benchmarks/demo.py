"""The demo: train with several choices of hard negatives on real data, and write a page with the results.

    python -m benchmarks.demo                                          six recipes, a few minutes on two cores
    python -m benchmarks.demo --recipes all mochi --steps 500 --out out
    python -m benchmarks.demo --recipe ring --steps 500                any of the RECIPES of benchmarks.train

It writes to --out: index.html (everything in one file), results.csv, results.md, step_time.csv, learning_curves.png,
hardness.png, step_time.png. The answers of held-out queries are dictionary entries that were never positives in training.
"""

import argparse
import datetime
import time
from pathlib import Path

import torch
from tqdm import tqdm

import negmine
from benchmarks import figures, report, wordnet
from benchmarks.cases import QUEUE_OPS, Inputs
from benchmarks.hardness import Relations, measure_hardness
from benchmarks.measure import Measured, measure
from benchmarks.peers import OPS
from benchmarks.rows import machine_name
from benchmarks.train import IN_DEMO, RECIPES, TEMPERATURE, B, Head, K, Run, evaluate, new_heads, queue_rows, train

EVALUATIONS = 4


@torch.no_grad()
def real_inputs(query_head: Head, key_head: Head, task: wordnet.Task, rows: torch.Tensor) -> Inputs:
    """A batch of held-out queries and the keys of the queue, for timing. rows (K,): the corpus rows in the queue."""
    chosen = task.held_out[:B]  # (B,)
    answers = task.positives[chosen]  # (B,)
    return Inputs(
        query_head(task.queries[chosen]),
        key_head(task.corpus[answers]),
        key_head(task.corpus[rows]),
        answers,
        rows,
        TEMPERATURE,
    )


def time_ops(inputs: Inputs, seconds: float) -> dict[str, list[Measured]]:
    return {name: measure(name, inputs, seconds, [None]) for name in tqdm(QUEUE_OPS, desc="timing one step")}


def summary(runs: list[Run], measured: dict[str, list[Measured]]) -> str:
    lines = [f"\n{'negatives':<40}{'R@1':>7}{'R@10':>7}{'MRR':>7}{'ms/step':>9}"]
    before = runs[0].curve[0][1]
    lines.append(f"{'(before training)':<40}{before.recall_1:>7.3f}{before.recall_10:>7.3f}{before.mrr:>7.3f}")
    for run in runs:
        after = run.curve[-1][1]
        lines.append(
            f"{RECIPES[run.name].title:<40}{after.recall_1:>7.3f}{after.recall_10:>7.3f}{after.mrr:>7.3f}"
            f"{run.ms_per_step:>9.0f}"
        )
    lines.append(f"\n{'one step, ms':<52}{'negmine':>8}{'eager':>8}{'matmul':>8}")
    for name, (fused, eager) in measured.items():
        lines.append(
            f"{OPS[name].title:<52}{fused.timing.median:>8.1f}{eager.timing.median:>8.1f}{fused.floor_ms:>8.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument(
        "--recipes",
        "--recipe",
        nargs="+",
        choices=RECIPES,
        default=list(IN_DEMO),
        metavar="NAME",
        help=", ".join(RECIPES),
    )
    parser.add_argument(
        "--show", choices=RECIPES, help="the recipe whose hard negatives are shown (default: the first)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be 2 or more, got {args.steps}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    task = wordnet.load().to(args.device)
    texts = wordnet.load_texts()
    relations = Relations(task, texts)
    untrained = new_heads(task.corpus.shape[1], args.seed, task.corpus.device)
    before = evaluate(*untrained, task)
    evaluate_at = sorted({round(args.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)})
    runs = [train(name, task, args.steps, args.seed, evaluate_at, before) for name in args.recipes]
    shown = next((run for run in runs if run.name == args.show), runs[0])

    rows = queue_rows(task, torch.Generator().manual_seed(args.seed))  # (K,)
    measured = time_ops(real_inputs(shown.query_head, shown.key_head, task, rows), seconds=4.0)
    hardness = [
        measure_hardness(*heads, task, rows, relations) for heads in (untrained, (shown.query_head, shown.key_head))
    ]
    figures.learning_curves(runs, args.out / "learning_curves.png")
    figures.hardness(*hardness, args.recipes, RECIPES[shown.name].title, args.out / "hardness.png")
    figures.step_time(measured, args.out / "step_time.png")
    conditions = (
        f"One seed ({args.seed}), {args.steps} steps of batch {B}, queue {K:,}, temperature {TEMPERATURE}; "
        f"{len(task.held_out):,} held-out queries, so one standard error of R@1 is about "
        f"{(before.recall_1 * (1 - before.recall_1) / len(task.held_out)) ** 0.5:.3f}; smaller differences mean nothing. "
        f"{machine_name(args.device)}, torch {torch.__version__}, negmine {negmine.__version__}, "
        f"{datetime.date.today().isoformat()}."
    )
    page = report.write(args.out, runs, shown, untrained, measured, task, texts, relations, args.seed, conditions)
    print(summary(runs, measured))
    print(f"\n{conditions}\n\n{time.perf_counter() - started:.0f} s in all. The page: {page.resolve()}")


if __name__ == "__main__":
    main()
