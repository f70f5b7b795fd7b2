"""A progress bar on stderr: one line with the time left.

with progress(total, show, "mining", "chunk") as advance:
    advance(1)
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 0.2  # seconds between two updates
CELLS = 24


def clock(seconds: float) -> str:
    """A duration as text, such as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def line(what: str, done: float, total: float, unit: str, elapsed: float) -> str:
    """The text of the line: what, a bar, how many are done, the elapsed time and the time left."""
    share = min(1.0, done / total) if total else 1.0
    bar = "=" * round(CELLS * share)
    left = f", {clock(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
    return f"{what} [{bar:<{CELLS}}] {100 * share:3.0f} %  {done:,} of {total:,} {unit}, {clock(elapsed)}{left}"


@contextlib.contextmanager
def progress(total: int, show: bool, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of pieces just done. Nothing is written unless `show` is True."""
    done, started, written = 0, time.monotonic(), 0.0

    def advance(pieces: int) -> None:
        nonlocal done, written
        done += pieces
        now = time.monotonic()
        if show and now - written >= EVERY:
            written = now
            print(f"\r{line(what, done, total, unit, now - started)}\033[K", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if show and total:
            print(f"\r{line(what, done, total, unit, time.monotonic() - started)}\033[K", file=sys.stderr, flush=True)
