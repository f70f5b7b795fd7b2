"""Run the tests in several processes. On a GPU most of the time is spent in compilers, each of which uses one thread.

    python -m build_tools.run_shards [--logs FOLDER] [--] [pytest arguments]

Each process writes to FOLDER/<shard>.txt while it runs, so that no output is lost if a test hangs. pytest-xdist does the same,
but a machine with a GPU and no network may have only pytest.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

PASSED = (0, 5)  # 5: pytest found no test for this shard


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("build/shards"), help="folder for the output of each shard")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest")
    args = parser.parse_args(arguments)
    shards = max(1, min(12, (os.cpu_count() or 1) - 2))
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # there is a shard for every core
    args.logs.mkdir(parents=True, exist_ok=True)
    logs = [args.logs / f"{shard}.txt" for shard in range(shards)]
    runs = []
    for shard, log in enumerate(logs):
        command = [sys.executable, "-m", "pytest", "tests", "-v", f"--shard={shard}/{shards}", *args.pytest]
        with log.open("w") as out:
            runs.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    codes = [run.wait() for run in runs]
    for log, code in zip(logs, codes, strict=True):
        lines = log.read_text().splitlines()
        print("\n".join(lines[-150:] if code not in PASSED else lines[-1:]), flush=True)
    if failed := sum(code not in PASSED for code in codes):
        raise SystemExit(f"{failed} of {shards} shards failed")


if __name__ == "__main__":
    main(sys.argv[1:])
