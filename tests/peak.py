"""Measures the peak memory of a call, in addition to the memory in use before it, in a separate process."""

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
    """The MiB that call(large) holds at its peak; call(small) goes before it, for code pages and thread stacks."""
    call(small)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status_mib("VmRSS")
    call(large)
    print(status_mib("VmHWM") - before)


def peak_mib(program: str, *words: str) -> float:
    """What a program that ends in print_peak prints."""
    run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)
