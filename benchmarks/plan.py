"""What a larger job takes, from the rates measured here: writes docs/planning.md from benchmarks/results/<machine>.csv.

The rate is that of the longest queue of the K sweep; the page first shows how well the rate of a short queue foretells the
long ones, so that a reader knows what such a sum is worth.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import SWEEP
from benchmarks.measure import OURS
from benchmarks.plot import newest
from benchmarks.rows import RESULTS, Row

PAGE = RESULTS.parents[1] / "docs" / "planning.md"
FORETELLS = 65536  # the K whose rate is tried on the longer queues


@dataclass(frozen=True)
class Job:
    what: str
    op: str
    B: int
    K: int
    D: int
    bytes_each: int  # of one stored number


JOBS = [
    Job("MoCo step, queue of 65,536", "info_nce", 256, 65_536, 128, 4),
    Job("MoCo step, queue of 1 M", "info_nce", 256, 1 << 20, 128, 4),
    Job("MoCo step, queue of 16 M", "info_nce", 256, 1 << 24, 128, 4),
    Job("hardest 1,024 of 1 M texts, 1,000 queries", "mine_hardest", 1000, 1_000_000, 384, 4),
    Job("hardest 1,024 of 10 M texts, 100,000 queries", "mine_hardest", 100_000, 10_000_000, 384, 4),
    Job("hardest 1,024 of 100 M texts, 1 M queries", "mine_hardest", 1_000_000, 100_000_000, 768, 4),
]


def span(seconds: float) -> str:
    for name, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{1e3 * seconds:.3g} ms"


def size(count: float) -> str:
    for name, unit in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 2**20:.3g} MiB"


def swept_over_k(rows: list[Row], op: str) -> dict[int, Row]:
    """The rows of the K sweep by K, with the most threads."""
    threads = max((row["threads"] for row in rows), key=int)
    chosen = [row for row in rows if row["case"].startswith("K=") and row["op"] == op]
    return {int(r["K"]): r for r in chosen if r["variant"] == OURS and r["threads"] == threads}


def page(path: Path) -> str:
    rows = newest(path)
    last = max(rows, key=lambda row: row["date"])
    ops = list(dict.fromkeys(job.op for job in JOBS))
    curves = {op: swept_over_k(rows, op) for op in ops}
    lines = [
        "# Planning",
        "",
        f"What larger jobs take on `{path.stem}` ({last['threads']} threads, torch {last['torch']}, {last['date'][:10]}), "
        "by the rates of `benchmarks/results/`. Written by `python -m benchmarks.plan`; measure your own machine with "
        "`make bench` first.",
        "",
        "## How far a rate carries",
        "",
        f"The time at K = {FORETELLS:,} (B = {SWEEP.B}, D = {SWEEP.D}), multiplied up, against what was measured there:",
        "",
        "| op | K | foretold | measured | measured / foretold | extra memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, curve in curves.items():
        for K, row in sorted(curve.items()):
            if K > FORETELLS:
                foretold = float(curve[FORETELLS]["median_ms"]) * K / FORETELLS
                measured = float(row["median_ms"])
                lines.append(
                    f"| {op} | {K:,} | {foretold:.3g} ms | {measured:.3g} ms | {measured / foretold:.2f} "
                    f"| {row['peak_extra_mib']} MiB |"
                )
    lines += [
        "",
        "## What a job takes",
        "",
        "Time = B K D / rate, the rate that of the longest queue above. The matrix is what eager PyTorch would store; no "
        "negmine op stores it. Keys that do not fit in memory stream from disk (`mine_hard_negatives`), at the disk's rate "
        "if that is less.",
        "",
        "| job | op | B | K | D | time here | keys | the matrix |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in JOBS:
        K, row = max(curves[job.op].items())
        rate = SWEEP.B * K * SWEEP.D / (float(row["median_ms"]) / 1e3)  # multiply-adds a second, all else included
        lines.append(
            f"| {job.what} | {job.op} | {job.B:,} | {job.K:,} | {job.D} | {span(job.B * job.K * job.D / rate)} "
            f"| {size(job.K * job.D * job.bytes_each)} | {size(4 * job.B * job.K)} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="?", help="the CSV file's stem (default: the only one)")
    machine = parser.parse_args().machine
    found = [path for path in sorted(RESULTS.glob("*.csv")) if machine in (None, path.stem)]
    if len(found) != 1:
        raise SystemExit(f"name one of {', '.join(path.stem for path in found) or 'no results: run make bench first'}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found[0]))
    print(PAGE)


if __name__ == "__main__":
    main()
