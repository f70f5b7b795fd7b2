"""Measure the peak memory of a call in a separate process, minus the memory in use before the call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import processes


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _peak(prepare: Callable[..., tuple[Callable[[Any], object], Any, Any]], arguments: tuple) -> float:
    call, small, large = prepare(*arguments)
    call(small)  # to load code and start threads
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    before = status_mib("VmRSS")
    call(large)
    return status_mib("VmHWM") - before


def peak_mib(prepare: Callable[..., tuple[Callable[[Any], object], Any, Any]], *arguments: Any) -> float:
    """The MiB that call(large) needs at its peak, after call(small). prepare(*arguments) returns call, small and large."""
    return processes.result_of(_peak, prepare, arguments)
