"""Time negmine against plain PyTorch and other packages, and append rows to benchmarks/results/<machine>.csv.

    python -m benchmarks.run --quick                                    two shapes, under three minutes on two cores
    python -m benchmarks.run --sweep K B D --threads 1 2                one letter varied, the rest held
    python -m benchmarks.run --device cuda --op mine_hardest --case moco --compile
    python -m benchmarks.run --quick --base v0.1                        this tree against another commit, side by side

The tests of the kernels run first, and a red one stops everything. Then every variant answers the same inputs as plain
PyTorch in fp32; where one answer differs, nothing of that op and case is timed, and the exit code is 1. `floor_ms` is the
matrix products that no method avoids, `copy_ms` one copy of the keys, both timed in the same rounds.
"""

import argparse
import csv
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import libraries
from benchmarks.cases import CASES, ON_CPU, ON_GPU, QUICK, SWEEPS, Case, Inputs, make_inputs, sweep
from benchmarks.measure import Disagreement, measure
from benchmarks.peers import OPS

RESULTS = Path(__file__).resolve().parent / "results"
TESTS = ["tests/test_kernels.py", "tests/test_rules.py"]
COLUMNS = [
    "date",
    "commit",
    "machine",
    "device",
    "threads",
    "torch",
    "case",
    "B",
    "K",
    "D",
    "dtype",
    "op",
    "variant",
    "median_ms",
    "q20_ms",
    "q80_ms",
    "rounds",
    "floor_ms",
    "copy_ms",
    "peak_extra_mib",
]


def machine_name(device: str) -> str:
    """The GPU's name, or the CPU's model, as a file name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the working tree, with "-dirty" where it has changes."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return shown.stdout.strip() or "none"


def tests_pass(device: str) -> bool:
    """The kernels' own tests on this device; what they print is shown."""
    chosen = "cpu and not triton" if device == "cpu" else "triton or cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *TESTS]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=RESULTS.parents[1], env=environment).returncode == 0


def rows_of(name: str, case: Case, inputs: Inputs, args: argparse.Namespace) -> list[dict[str, object]]:
    measured = measure(
        name,
        inputs,
        args.seconds,
        args.backend or [None],
        isas=args.isa,
        with_compile=args.compile,
        with_libraries=not args.no_libraries,
    )
    return [
        {
            "threads": torch.get_num_threads(),
            "case": case.name,
            "B": case.B,
            "K": case.K,
            "D": case.D,
            "dtype": case.dtype,
            "op": name,
            "variant": m.variant,
            "median_ms": f"{m.timing.median:.4g}",
            "q20_ms": f"{m.timing.q20:.4g}",
            "q80_ms": f"{m.timing.q80:.4g}",
            "rounds": m.timing.rounds,
            "floor_ms": f"{m.floor_ms:.4g}",
            "copy_ms": f"{m.copy_ms:.4g}",
            "peak_extra_mib": f"{m.peak_extra_mib:.1f}",
        }
        for m in measured
    ]


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"the cases {', '.join(QUICK)}, about 2 s each op")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: those meant for the device")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[], help="vary one letter instead of the cases")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", nargs="+", help="negmine backends to insist on, one variant each")
    parser.add_argument("--isa", nargs="+", default=[], help="also time the CPU kernels held to these: portable avx2")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain version")
    parser.add_argument("--no-libraries", action="store_true", help="time no other packages")
    parser.add_argument("--no-tests", action="store_true", help="do not run the kernels' tests first")
    parser.add_argument("--seconds", type=float, help="time spent on each op and case (default 10, quick 2)")
    parser.add_argument("--threads", type=int, nargs="+", help="repeat all with these numbers of CPU threads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--base", metavar="REF", help="time this commit too, in turns, and print the ratios only")
    args = parser.parse_args()
    args.seconds = args.seconds or (2.0 if args.quick else 10.0)
    return args


def main() -> int:
    args = arguments()
    if not args.no_tests and not tests_pass(args.device):
        print("Nothing was timed: a test of the kernels is red.")
        return 1
    if args.base:
        from benchmarks import base

        return base.compare(args.base, sys.argv[1:])
    default = QUICK if args.quick else ON_GPU if args.device == "cuda" else ON_CPU
    cases = [CASES[name] for name in args.case or ([] if args.sweep else default)]
    cases += [case for letter in args.sweep for case in sweep(letter)]
    machine = machine_name(args.device)
    stamp = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine,
        "device": args.device,
        "torch": torch.__version__,
    }
    refused = 0
    for case in cases:
        inputs = make_inputs(case, args.device)
        for threads in args.threads or [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            for name in (name for name in args.op if name in case.ops):
                try:
                    rows = rows_of(name, case, inputs, args)
                except Disagreement as complaint:
                    refused += 1
                    print(f"REFUSED  {case.name}: {complaint}")
                    rows = []
                append_rows(args.results / f"{machine}.csv", [stamp | row for row in rows])
                for row in rows:
                    print(
                        f"{case.name:<15}{name:<14}{row['variant']:<24}{row['median_ms']:>8} ms   floor "
                        f"{row['floor_ms']:>7} ms   +{row['peak_extra_mib']:>7} MiB   {threads} threads",
                        flush=True,
                    )
    for package, reason in libraries.ABSENT.items():
        print(f"not timed: {package} ({reason})")
    print(f"rows appended to {args.results / machine}.csv" + (f"; {refused} refused" if refused else ""))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
