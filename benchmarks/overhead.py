"""Measure the overhead of small calls on one thread: dispatch, Python and autograd.

    python -m benchmarks.overhead      B = 2, K = 64, D = 16; appends rows to benchmarks/results/overhead/<machine>.csv

Each row has the median CPU time in microseconds, which does not include other processes, and its ratio to PyTorch in the same
run. The PyTorch code is the matrix form of MoCo's loss: cross_entropy(cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / T,
zeros).
"""

import argparse
import datetime
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import negmine
from benchmarks.rows import RESULTS, append, commit, machine_name

B, K, D, TEMPERATURE = 2, 64, 16, 0.07
CALLS = 50  # calls in one timed round
COLUMNS = ["date", "commit", "machine", "torch", "op", "variant", "median_us", "ratio_to_plain", "goal"]
GOALS = {
    ("info_nce", "forward"): 2.5,
    ("info_nce", "backward"): 1.6,
    ("window", "forward"): 4.0,
    ("window", "backward"): 2.2,
}


def variants() -> dict[tuple[str, str], Callable[[], object]]:
    """The calls by (op, "forward" or "backward"); "backward" includes forward."""
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, D, generator=generator), dim=1) for n in (B, B, K))
    q.requires_grad_()
    zeros = torch.zeros(B, dtype=torch.long)
    window = negmine.Select(0.0, 0.25)

    def plain() -> torch.Tensor:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE
        return F.cross_entropy(logits, zeros)

    def trained(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            q.grad = None
            loss().backward()

        return step

    losses = {
        "plain": plain,
        "info_nce": lambda: negmine.info_nce(q, k, queue, temperature=TEMPERATURE),
        "window": lambda: negmine.info_nce(q, k, queue, temperature=TEMPERATURE, select=window),
    }
    forward = {(op, "forward"): loss for op, loss in losses.items()}
    return forward | {(op, "backward"): trained(loss) for op, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds of each call")
    parser.add_argument("--results", type=Path, default=RESULTS / "overhead", help="folder of the CSV files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    calls = variants()
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(CALLS):
            call()
    for turn in range(args.rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            for _ in range(CALLS):
                calls[name]()
            taken[name].append(1e6 * (time.process_time() - start) / CALLS)
    medians = {name: sorted(times)[len(times) // 2] for name, times in taken.items()}
    stamp = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine_name("cpu"),
        "torch": torch.__version__,
    }
    rows: list[dict[str, object]] = []
    for (op, variant), median in medians.items():
        ratio, goal = median / medians["plain", variant], GOALS.get((op, variant), "")
        numbers = {"median_us": f"{median:.1f}", "ratio_to_plain": f"{ratio:.2f}", "goal": goal}
        rows.append(stamp | {"op": op, "variant": variant} | numbers)
        print(f"{op:<10}{variant:<10}{median:>8.1f} us   {ratio:>5.2f}x plain" + (f"   goal {goal}x" if goal else ""))
    append(args.results / f"{machine_name('cpu')}.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
