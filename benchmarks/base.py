"""Compare the speed of this tree with that of another commit.

Both are timed in separate processes, in alternating turns, so that other load on the machine affects both. The reported ratio is
that of the medians over the turns, together with the smallest and the largest ratio of a turn.
"""

import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.measure import OURS
from benchmarks.rows import read

ROOT = Path(__file__).resolve().parents[1]
TURNS = 3
Key = tuple[str, str, str, str]


def command_of(arguments: list[str], results: Path) -> list[str]:
    """The command of the same run without --base, which writes its rows to `results`."""
    at = next(place for place, word in enumerate(arguments) if word.startswith("--base"))
    kept = arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    return [sys.executable, "-m", "benchmarks.run", *kept, "--no-tests", "--no-peers", "--results", str(results)]


def medians(results: Path) -> dict[Key, float]:
    rows: dict[Key, float] = {}
    for path in results.glob("*.csv"):
        for row in read(path):
            if row["variant"].startswith(OURS):
                rows[row["case"], row["op"], row["variant"], row["threads"]] = float(row["median_ms"])
    return rows


def compare(reference: str, arguments: list[str]) -> int:
    """Print one line for each row. Returns 1 if one of the trees could not be timed."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", str(other), reference], cwd=ROOT, check=True)
        try:
            print(f"building {reference}", flush=True)
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=other, check=True, stdout=subprocess.DEVNULL)
            # The benchmarks of this tree measure both trees, because the other commit may have other cases, or none.
            subprocess.run(["rm", "-rf", "benchmarks"], cwd=other, check=True)
            subprocess.run(["cp", "-r", str(ROOT / "benchmarks"), "benchmarks"], cwd=other, check=True)
            taken: dict[str, dict[Key, list[float]]] = {"here": defaultdict(list), "base": defaultdict(list)}
            for turn in range(TURNS):
                for name, tree in (("base", other), ("here", ROOT)):
                    results = Path(folder) / f"{name}-{turn}"
                    print(f"turn {turn + 1} of {TURNS}: {name}", flush=True)
                    done = subprocess.run(command_of(arguments, results), cwd=tree, stdout=subprocess.DEVNULL)
                    if done.returncode:
                        print(f"{name} could not be timed: run it alone to see why")
                        return 1
                    for key, median in medians(results).items():
                        taken[name][key].append(median)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    print(f"\n{'case':<15}{'op':<14}{'variant':<20}{reference:>12}{'here':>12}{'faster':>9}   between turns")
    for key in taken["here"].keys() & taken["base"].keys():
        then, now = taken["base"][key], taken["here"][key]
        ratios = [a / b for a, b in zip(then, now, strict=True)]
        print(
            f"{key[0]:<15}{key[1]:<14}{key[2]:<20}{statistics.median(then):>9.3g} ms{statistics.median(now):>9.3g} ms"
            f"{statistics.median(then) / statistics.median(now):>8.2f}x   {min(ratios):.2f} to {max(ratios):.2f}"
        )
    return 0
