"""Profile one call on a GPU with Nsight Compute: python -m benchmarks.profile [--case CASE --op OP] [--out FOLDER]

By default, the call is that of the negmine row of this machine in benchmarks/results whose time is most times its floor.
profile.txt lists every kernel launch of one warm call with its time, and for the longest launch its throughputs, occupancy,
stalls, instructions and memory traffic.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import CASES, make_inputs
from benchmarks.measure import OURS
from benchmarks.peers import OPS
from benchmarks.rows import RESULTS, Row, machine_name, read

SECTIONS = [
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats",
    "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
]  # fmt: skip
DURATION = "gpu__time_duration.sum"


def worst(rows: list[Row]) -> tuple[str, str]:
    """Return the (case, op) whose newest row of negmine has the largest time relative to its floor."""
    newest = {(row["case"], row["op"]): row for row in rows if row["variant"].startswith(OURS) and row["rate_floor_ms"]}
    if not newest:
        raise SystemExit("there are no rows of this GPU to choose from: run the benchmarks, or name --case and --op")
    return max(newest, key=lambda key: float(newest[key]["median_ms"]) / float(newest[key]["rate_floor_ms"]))


def launches(printed: str) -> list[tuple[str, float]]:
    """Parse the CSV of `ncu --page raw --print-units base` into (kernel, microseconds) for each launch."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["ID"]]  # the row without an ID has the units
    return [(row["Kernel Name"], float(row[DURATION].replace(",", "")) / 1e3) for row in rows]


def table(found: list[tuple[str, float]]) -> list[str]:
    """Lines of text: for each kernel its time, its share of the total time, and its number of launches; longest first."""
    total = sum(time for _, time in found)
    kernels = {name: [time for other, time in found if other == name] for name, _ in found}
    lines = [f"{total:9.1f} us in {len(found)} launches"]
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(times):9.1f} us {100 * sum(times) / total:5.1f} %  {len(times):4} x  {name[:90]}")
    return lines


def call_once(case: str, op: str) -> None:
    """Profile only one call, after three calls of warm-up."""
    inputs = make_inputs(CASES[case], "cuda")
    for _ in range(3):
        OPS[op].fused(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    OPS[op].fused(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def ncu(case: str, op: str, *options: str) -> str:
    call = [sys.executable, "-m", "benchmarks.profile", "--once", "--case", case, "--op", op]
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", *options, *call]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of profile.txt")
    parser.add_argument(
        "--once", action="store_true", help="make the call to be profiled (this is what runs under ncu)"
    )
    args = parser.parse_args()
    if (args.case is None) != (args.op is None):
        parser.error("--case and --op go together")
    if args.case is None:
        args.case, args.op = worst(read(RESULTS / f"{machine_name('cuda')}.csv"))
    if args.once:
        call_once(args.case, args.op)
        return
    found = launches(ncu(args.case, args.op, "--metrics", DURATION, "--csv", "--page", "raw", "--print-units", "base"))
    lines = [f"{args.op} on {args.case}, one warm call", *table(found)]
    print("\n".join(lines), flush=True)
    longest = max(found, key=lambda launch: launch[1])[0]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    base = longest.split("(")[0].split("<")[0].split("::")[-1].split()[-1]  # ncu matches the bare name
    detail = ncu(args.case, args.op, "--kernel-name", base, "--launch-count", "1", *sections)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.txt").write_text("\n".join([*lines, "", f"the longest: {longest}", detail]))
    print(f"details of {base}: {args.out / 'profile.txt'}")


if __name__ == "__main__":
    main()
