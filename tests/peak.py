"""Measure the peak memory of a call in a separate process, minus the memory in use before the call."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_peak(call: Callable[[Any], object], small: Any, large: Any) -> None:
    """Print the MiB that call(large) needs at its peak. call(small) runs before it, to load code and start threads."""
    call(small)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    before = status_mib("VmRSS")
    call(large)
    print(status_mib("VmHWM") - before)


def peak_mib(program: str, *words: str) -> float:
    """Run a program that ends with print_peak, and return the printed number."""
    run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)
