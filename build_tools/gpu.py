"""make gpu: run everything that needs a GPU, unattended, on a machine with a GPU, its own Python and no network.

    python -m build_tools.gpu [PHASE ...] [--out FOLDER] [--minutes 9]

    build      build the extensions in place
    smoke      run each kernel of each backend once, each in a separate process (build_tools/gpu_smoke.py)
    pairs      time the ops that both Triton and CUDA have; negmine/ops/backends.py chooses between them by these rows
    test       run the tests that need a GPU, for every backend, in several processes
    bench      run benchmarks/run.py, one process for each case; rows go to benchmarks/results, with a copy in FOLDER
    profile    run Nsight Compute on the call that is slowest compared with its lower bound
    sanitize   run compute-sanitizer's memcheck and racecheck on small tests that together launch every kernel

If a phase fails or exceeds its share of the time, the others still run, and the exit code is 1. FOLDER/<phase>.txt has the
output of each phase, and the last lines show how each ended. build runs before any other phase; if everything is built
already, it takes seconds.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .cuda_toolkit import find_nvcc

# Fractions of the time. On a new GPU, the first phases give the most important results, before anything goes wrong.
SHARES = {"build": 0.12, "smoke": 0.12, "pairs": 0.14, "test": 0.28, "bench": 0.14, "profile": 0.06, "sanitize": 0.14}
RESULTS = Path("benchmarks/results")
TAIL = 25  # lines of a phase's output that are shown if it fails
Command = list[str]


def python(*arguments: str) -> Command:
    return [sys.executable, *arguments]


def commands(phase: str, out: Path) -> list[Command]:
    """The commands of a phase. If one fails, the next still runs."""
    if phase == "build":
        return [python("setup.py", "--quiet", "build_ext", "--inplace")]
    if phase == "smoke":
        return [python("-m", "build_tools.gpu_smoke", "--out", str(out))]
    if phase == "test":
        limit = ["--timeout=120"] if importlib.util.find_spec("pytest_timeout") else []
        logs = ["--logs", str(out / "shards"), "--"]
        return [python("-m", "build_tools.run_shards", *logs, "-m", "gpu", "--durations=15", *limit)]
    if phase in ("pairs", "bench"):
        from benchmarks.cases import CASES, ON_GPU, QUEUE_OPS

        time_it = python("-m", "benchmarks.run", "--no-tests", "--device", "cuda")
        if phase == "bench":
            compiled = ("--seconds", "2", "--compile", "moco-bf16-1024")
            return [[*time_it, "--case", case, *compiled] for case in ON_GPU]
        both = ("--op", *QUEUE_OPS, "--backend", "triton", "cuda", "--no-peers", "--seconds", "1")
        return [[*time_it, "--case", case, *both] for case in ON_GPU if "mine_hardest" in CASES[case].ops]
    if phase == "profile":
        return [python("-m", "benchmarks.profile", "--out", str(out))]
    tests = python("-m", "pytest", "-m", "sanitized", "--continue-on-collection-errors", "tests")
    return [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests] for tool in ("memcheck", "racecheck")
    ]


def settings(phase: str, out: Path) -> dict[str, str]:
    """The environment of a phase. All processes share one cache of compiled Triton kernels."""
    cache = {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(Path("build/triton").absolute())}
    return os.environ | cache | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if phase == "sanitize" else {})


def run(command: Command, log: Path, environment: dict[str, str], seconds: float) -> str:
    """Run a command and kill it after its time. Returns what went wrong; empty if it succeeded."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "" if code == 0 else "ran out of time" if code is None else f"exit code {code}"


def run_phase(phase: str, out: Path, seconds: float) -> tuple[str, float]:
    """Run a phase. Returns what went wrong (empty if nothing did), and how many seconds it took."""
    log = out / f"{phase}.txt"
    log.write_text("")
    start = time.monotonic()
    faults = []
    for command in commands(phase, out):
        fault = run(command, log, settings(phase, out), start + seconds - time.monotonic())
        if fault and fault not in faults:
            faults.append(fault)
    return "; ".join(faults), time.monotonic() - start


def describe_gpu() -> str:
    """The GPU, torch and Python. If NEGMINE_ARCHES is not set, kernels are then built only for this GPU."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu needs a GPU that torch of {sys.executable} can use, and there is none.")
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if find_nvcc() and "NEGMINE_ARCHES" not in os.environ:  # other targets would only take time
        os.environ["NEGMINE_ARCHES"] = f"{major}{minor}" + ("a" if major == 9 else "")
    return f"{name}, sm_{major}{minor}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", nargs="*", help=f"of {', '.join(SHARES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of logs and copies of the rows")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all phases together")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.phase) - set(SHARES)):
        parser.error(f"there is no phase {', '.join(unknown)}; there are {', '.join(SHARES)}")
    print(describe_gpu(), flush=True)
    wanted = [phase for phase in SHARES if phase == "build" or not args.phase or phase in args.phase]
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    lines = []
    for place, phase in enumerate(wanted):
        # Time that a phase does not use goes to the following ones.
        share = SHARES[phase] / sum(SHARES[later] for later in wanted[place:])
        print(f"{phase} ...", flush=True)
        fault, seconds = run_phase(phase, args.out, share * (deadline - time.monotonic()))
        lines.append(f"{phase:<10}{seconds:>6.0f} s   {'FAILED: ' + fault if fault else 'done'}")
        printed = (args.out / f"{phase}.txt").read_text().splitlines()
        tail = len(printed) if phase == "smoke" else TAIL if fault or phase in ("pairs", "bench", "profile") else 2
        print("\n".join(printed[-tail:]))
        print(lines[-1], flush=True)
    for path in RESULTS.glob("nvidia-*.csv"):
        shutil.copy(path, args.out)
        print(f"rows: {args.out / path.name}")
    print("\n".join(["", *lines]))
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
