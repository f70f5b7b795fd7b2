"""Time negmine, PyTorch and other packages, and append rows to benchmarks/results/<machine>.csv.

    python -m benchmarks.run --quick                                    two shapes, under three minutes on two cores
    python -m benchmarks.run --sweep K B D --threads 1 2                vary K, then B, then D; the others are fixed
    python -m benchmarks.run --quick --base v0.1                        compare the working tree with another commit
    python -m benchmarks.run --device cuda                              every case and peer on a GPU
    python -m benchmarks.run --device cuda --op mine_hardest --case moco-bf16 --compile

The tests of the kernels run first, and nothing is timed if one fails. Then the results of every variant are compared with PyTorch
in float64. If a result of negmine differs, that op and case is not timed and the exit code is 1. The exit code is also 1 if an op
fails in another way; the other ops are still measured. benchmarks/README.md explains the columns. A short table is printed last.
"""

import argparse
import datetime
import itertools
import os
import subprocess
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import gpu_model, libraries
from benchmarks.cases import CASES, ON_CPU, ON_GPU, QUICK, SWEEPS, Case, Inputs, make_inputs, sweep
from benchmarks.measure import OURS, Disagreement, measure
from benchmarks.peers import OPS
from benchmarks.rows import RESULTS, append, commit, machine_name

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
    "driver",
    "triton",
    "timed",
    "call_ms",
    "rate_floor_ms",
    "peak_share",
]


def tests_pass(device: str) -> bool:
    """Run the tests of the kernels on this device."""
    chosen = "cpu and not triton" if device == "cpu" else "triton or cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *TESTS]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=RESULTS.parents[1], env=environment).returncode == 0


def driver() -> str:
    """The version of the GPU driver; empty if there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[0]
    except OSError:
        return ""


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def rows_of(name: str, case: Case, inputs: Inputs, args: argparse.Namespace) -> list[dict[str, object]]:
    if args.compile is None:
        compiled = args.device == "cuda" and not args.no_peers
    else:
        compiled = not args.compile or case.name in args.compile
    measured = measure(
        name,
        inputs,
        args.seconds,
        args.backend or [None],
        isas=tuple(args.isa),
        with_compile=compiled,
        with_peers=not args.no_peers,
    )
    shortest_scores_mib = 2 * case.B * case.K / 2**20  # a (B, K) matrix of scores with two bytes each
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
            "timed": m.timing.timed,
            "call_ms": f"{m.timing.call:.4g}",
            "rate_floor_ms": "" if m.rate_floor_ms is None else f"{m.rate_floor_ms:.4g}",
            "peak_share": f"{m.peak_extra_mib / shortest_scores_mib:.4f}",
        }
        for m in measured
    ]


def summary(rows: list[dict[str, object]]) -> list[str]:
    """One line per case and op: negmine's time relative to its floor, and relative to the fastest other variant."""
    lines = [f"{'case':<16}{'op':<16}{'negmine ms':>11}{'/ floor':>9}{'next best':>26}{'faster':>8}{'memory':>9}"]
    for case, name in dict.fromkeys((row["case"], row["op"]) for row in rows):
        own = [row for row in rows if (row["case"], row["op"]) == (case, name)]
        ours = [row for row in own if str(row["variant"]).startswith(OURS)]
        others = [row for row in own if row not in ours]
        if not ours:
            continue
        best, rival = (min(part, key=lambda row: float(row["median_ms"]), default=None) for part in (ours, others))
        floor = float(best["rate_floor_ms"] or best["floor_ms"])
        line = f"{case:<16}{name:<16}{best['median_ms']:>11}{float(best['median_ms']) / floor:>9.2f}"
        if rival:
            faster = float(rival["median_ms"]) / float(best["median_ms"])
            line += f"{rival['variant'] + ' ' + rival['median_ms']:>26}{faster:>8.1f}"
        else:
            line += f"{'none ran':>26}{'':>8}"
        lines.append(line + f"{100 * float(best['peak_share']):>8.1f}%")
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only the cases {', '.join(QUICK)}, about 2 s per op")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: the cases that are made for the device")
    parser.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=[], help="vary one size (K, B or D) instead of the cases"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", nargs="+", help="time negmine with each of these backends")
    parser.add_argument(
        "--isa",
        nargs="+",
        default=[],
        help="also time the CPU kernels limited to these instruction sets, for example portable avx2",
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=CASES,
        metavar="CASE",
        help="also time torch.compile of plain PyTorch, in these cases or, without names, in all; default: in all on a GPU",
    )
    parser.add_argument("--no-peers", action="store_true", help="time only negmine and plain PyTorch")
    parser.add_argument("--no-tests", action="store_true", help="do not run the kernels' tests first")
    parser.add_argument("--seconds", type=float, help="time spent on each op and case (default 10, quick 2)")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="repeat everything with each of these numbers of CPU threads"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument(
        "--base", metavar="REF", help="also time this commit, in turn with the working tree, and print only the ratios"
    )
    args = parser.parse_args()
    args.seconds = args.seconds or (2.0 if args.quick else 10.0)
    return args


def main() -> int:
    args = arguments()
    if not args.no_tests and not tests_pass(args.device):
        print("Nothing was timed because a test of the kernels failed.")
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
        "driver": driver() if args.device == "cuda" else "",
        "triton": triton_version(),
    }
    failed = 0
    measured: list[dict[str, object]] = []
    for case, threads in itertools.product(cases, args.threads or [torch.get_num_threads()]):
        torch.set_num_threads(threads)
        inputs = make_inputs(case, args.device)
        for name in (name for name in args.op if name in case.ops):
            try:
                rows = rows_of(name, case, inputs, args)
            except Disagreement as complaint:
                failed += 1
                print(f"NOT TIMED  {case.name}: {complaint}")
                rows = []
            except Exception:  # the other ops must still be measured
                failed += 1
                print(f"FAILED     {case.name}: {name}")
                traceback.print_exc()
                rows = []
            append(args.results / f"{machine}.csv", COLUMNS, [stamp | row for row in rows])
            measured += rows
            for row in rows:
                beside = f"{threads} threads"
                if args.device == "cuda":
                    expected = gpu_model.predicted(machine, row)
                    beside = f"predicted {expected} ms" if expected else ""
                print(
                    f"{case.name:<16}{name:<16}{row['variant']:<24}{row['median_ms']:>8} ms   floor "
                    f"{row['floor_ms']:>7} ms   +{row['peak_extra_mib']:>7} MiB   {beside}",
                    flush=True,
                )
    print("\n".join(summary(measured)))
    for package, reason in libraries.ABSENT.items():
        print(f"not timed: {package} ({reason})")
    print(f"rows appended to {args.results / machine}.csv" + (f"; {failed} not measured" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
