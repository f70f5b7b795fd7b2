"""Predict the times of GPU ops from the work of their kernel launches.

    python -m benchmarks.gpu_trace    write results/gpu-model/launches.csv from the compiled kernels, without a GPU; takes minutes
    python -m benchmarks.gpu_model    write results/gpu-model/times.csv and the table of docs/gpu.md from launches.csv

A row of launches.csv is one launch: the number of programs (blocks), the warps of each, the iterations of the main loop, the
instructions of an iteration and outside the loops, the multiply-adds, the exponentials, and the bytes read from memory and
gathered from L2.

On a multiprocessor, a launch takes at least as long as the slowest of its units needs (`low`). If the tensor cores and the other
units do not overlap, their times are added (`high`). Programs are not divided, so a launch takes as long as the multiprocessor
with the most programs. Each launch adds LAUNCH_US. The floor is the time of the matrix products that every method needs, at the
full rate of the tensor cores: one product for scores, two for scores and gradient. A goal is a multiple of the time of the same
products at the rate that large products reach.
"""

import argparse
import math
from typing import Any, NamedTuple

from benchmarks.cases import CASES, Case
from benchmarks.peers import MIX
from benchmarks.rows import RESULTS, Row, read, write, write_between

FOLDER = RESULTS / "gpu-model"
PAGE = RESULTS.parents[1] / "docs" / "gpu.md"
BEGIN = "<!-- made by `python -m benchmarks.gpu_model` from benchmarks/results/gpu-model -->"
SHAPES = [CASES[name] for name in ("moco-bf16", "moco-bf16-1024", "moco-bf16-4096")]
OPS = ("info_nce", "window", "mine_hardest", "rank_thresholds", "mochi")
BACKENDS = ("triton", "cuda")
LAUNCH_US = 1.3  # time of a kernel launch in a CUDA graph


class Card(NamedTuple):
    """The rates of one GPU as stated by its vendor, except `reached`, `memory` and `gathered`."""

    names: tuple[str, ...]  # as they occur in torch.cuda.get_device_name()
    capability: int
    processors: int
    ghz: float
    multiply_adds: int  # in bf16, per clock and multiprocessor
    reached: float  # fraction of these that a large product of the best library reaches
    memory: float  # bytes per microsecond that a copy reaches
    gathered: float  # bytes per microsecond of rows gathered from L2; an assumption

    def us(self, count: float, per_clock: float) -> float:
        """The time of `count` operations, of which each multiprocessor does `per_clock` per clock."""
        return count / (per_clock * self.processors * 1e3 * self.ghz)


CARDS = {
    "A100": Card(("A100",), 80, 108, 1.41, 1024, 0.86, 1.7e6, 4.0e6),
    "H100, H200": Card(("H100", "H200"), 90, 132, 1.755, 2048, 0.84, 3.0e6, 5.5e6),
}
WARP_INSTRUCTIONS, EXPONENTIALS = 4, 16  # per clock and multiprocessor, for both
# The number of products in the floor, and the goal as a multiple of them, by B. Reading the rows that MoCHi mixes is added to its
# goal.
PRODUCTS = {"info_nce": 2, "window": 1, "mine_hardest": 1, "rank_thresholds": 1, "mochi": 2}
GOALS = {
    "info_nce": {256: 2.3, 1024: 1.5, 4096: 1.3},
    "window": {256: 3.5, 1024: 3.5, 4096: 3.5},
    "mine_hardest": {256: 3.7, 1024: 2.2, 4096: 1.6},
    "rank_thresholds": {256: 1.7, 1024: 1.7, 4096: 1.7},
    "mochi": {256: 2.0, 1024: 1.4, 4096: 1.4},
}


class Launch(NamedTuple):
    """One row of launches.csv."""

    card: str
    backend: str
    op: str
    ids: str  # "ids" or ""
    B: int
    kernel: str
    launches: int = 1
    programs: int = 1
    warps: int = 0
    turns: int = 0  # iterations of the main loop
    per_turn: int = 0  # instructions of a warp in one iteration of the main loop
    outside: int = 0  # instructions of a warp outside the loops
    multiply_adds: int = 0
    exponentials: int = 0
    bytes: int = 0
    gathered: int = 0

    @classmethod
    def of(cls, row: Row) -> "Launch":
        return cls(*(kind(row[name]) for name, kind in cls.__annotations__.items()))


class Time(NamedTuple):
    low: float
    high: float


def time_of(launch: Launch, card: Card) -> Time:
    """The time of one row of launches, in microseconds."""
    uneven = math.ceil(launch.programs / card.processors) * card.processors / launch.programs
    per_warp = launch.turns * launch.per_turn + launch.outside
    issue = card.us(launch.programs * launch.warps * per_warp, WARP_INSTRUCTIONS)
    tensor = card.us(launch.multiply_adds, card.multiply_adds)
    exponentials = card.us(launch.exponentials, EXPONENTIALS)
    memory = launch.bytes / card.memory + launch.gathered / card.gathered
    low = max(uneven * max(issue, tensor, exponentials), memory)
    high = max(uneven * (tensor + max(issue, exponentials)), memory)
    return Time(low + launch.launches * LAUNCH_US, high + launch.launches * LAUNCH_US)


def mixed_bytes(B: int, D: int) -> int:
    """Bytes of the bf16 rows that are read to mix the synthetic negatives of B queries in MoCHi."""
    return 2 * B * D * (2 * MIX.pairs + MIX.with_query)


def floor_us(op: str, case: Case, card: Card) -> float:
    return card.us(PRODUCTS[op] * case.B * case.K * case.D, card.multiply_adds)


def goal_us(op: str, case: Case, card: Card) -> float:
    reached = floor_us(op, case, card) / card.reached
    if op == "mochi":
        reached += 2 * case.B * case.D * 2 * MIX.pairs / card.gathered
    return GOALS[op][case.B] * reached


COLUMNS = (
    "card",
    "backend",
    "op",
    "ids",
    "B",
    "K",
    "D",
    "dtype",
    "launches",
    "floor_us",
    "goal_us",
    "low_us",
    "high_us",
)


def times(launches: list[Launch]) -> list[dict[str, object]]:
    """The rows of times.csv."""
    calls: dict[tuple, list[Launch]] = {}
    for launch in launches:
        calls.setdefault(launch[:5], []).append(launch)
    found = []
    for (name, backend, op, ids, B), of_call in calls.items():
        card, case = CARDS[name], next(case for case in SHAPES if case.B == B)
        each = [time_of(launch, card) for launch in of_call]
        found.append(
            {
                "card": name, "backend": backend, "op": op, "ids": ids,
                "B": B, "K": case.K, "D": case.D, "dtype": case.dtype,
                "launches": sum(launch.launches for launch in of_call),
                "floor_us": f"{floor_us(op, case, card):.1f}", "goal_us": f"{goal_us(op, case, card):.0f}",
                "low_us": f"{sum(time.low for time in each):.0f}", "high_us": f"{sum(time.high for time in each):.0f}",
            }
        )  # fmt: skip
    return found


def predicted(machine: str, row: dict[str, Any], rows: list[Row] | None = None) -> str:
    """ "low to high" in ms for a measured row of negmine on a GPU with this name; empty if there is no prediction."""
    card = next((name for name, card in CARDS.items() if any(each.lower() in machine for each in card.names)), None)
    backend = {"negmine": "triton", "negmine[triton]": "triton", "negmine[cuda]": "cuda"}.get(str(row["variant"]))
    op, ids = ("info_nce", "") if row["op"] == "whole_queue" else (row["op"], "ids")
    wanted = {"card": card, "backend": backend, "op": op, "ids": ids} | {
        x: str(row[x]) for x in ("B", "K", "D", "dtype")
    }
    for known in read(FOLDER / "times.csv") if rows is None else rows:
        if all(known[name] == value for name, value in wanted.items()):
            low, high = (float(known[name]) / 1e3 for name in ("low_us", "high_us"))
            return f"{low:.3g} to {high:.3g}"
    return ""


def table(rows: list[Row]) -> str:
    """One line for each op and B, and one column for each GPU, backend and kind of pool."""
    kinds = [(card, backend, ids) for card in CARDS for backend in BACKENDS for ids in ("", "ids")]
    by_kind = {(row["card"], row["backend"], row["ids"], row["op"], row["B"]): row for row in rows}
    titles = [f"{card}, {backend}{', ids' if ids else ''}" for card, backend, ids in kinds]
    lines = [["op", "B", *(f"goal {card}" for card in CARDS), *titles]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for op in OPS:
        for case in SHAPES:
            goals = [by_kind[card, "triton", "", op, str(case.B)]["goal_us"] for card in CARDS]
            of_kinds = [by_kind[(*kind, op, str(case.B))] for kind in kinds]
            lines.append([op, str(case.B), *goals, *(f"{row['low_us']} to {row['high_us']}" for row in of_kinds)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = times([Launch.of(row) for row in read(FOLDER / "launches.csv")])
    write(FOLDER / "times.csv", list(COLUMNS), rows)
    write_between(PAGE, BEGIN, table(read(FOLDER / "times.csv")))


if __name__ == "__main__":
    main()
