"""Schedules: values that move with the step, as objects that can be compared, printed and pickled.

Any number of a recipe may be one, or any other callable of the step. After its last step a schedule stays at `end`. A count of
negatives, or a rank, takes `whole` of one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from negmine.losses.schedules import at_step
from negmine.ops import checks

Number = float | Callable[[int], float]
Count = int | Callable[[int], int]
Temperature = float | Tensor | Callable[[int], float]


def _check(name: str, numbers: dict[str, Any], counts: dict[str, Any]) -> None:
    for argument, value in numbers.items():
        checks.require_number(name, argument, value)
    for argument, value in counts.items():
        checks.require_count(name, argument, value)


@dataclass(frozen=True)
class linear:
    """start + (end - start) min(step / steps, 1)."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check("linear", {"start": self.start, "end": self.end}, {"steps": self.steps})

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class cosine:
    """end + (start - end) (1 + cos(pi min(step / steps, 1))) / 2."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check("cosine", {"start": self.start, "end": self.end}, {"steps": self.steps})

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2


@dataclass(frozen=True)
class exponential:
    """end + (start - end) exp(-decay step / every).

    every: the steps in which the distance shrinks by exp(-decay). Ring's public code decays by 0.1 at each iteration (every=1)
    and is within 1 % of its floor after 45 steps; pass every=steps of an epoch for a schedule that lasts a training run.
    """

    start: float
    end: float
    decay: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        _check("exponential", {"start": self.start, "end": self.end}, {"every": self.every})
        checks.require_number("exponential", "decay", self.decay, least=0)

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * math.exp(-self.decay * step / self.every)


@dataclass(frozen=True)
class step:
    """`levels` equally spaced values from start to end, each held for steps / levels.

    Ring's is step(1.0, 0.1, steps, 10); HCL's `--anneal down` is step(beta, 0.0, steps, 9).
    """

    start: float
    end: float
    steps: int
    levels: int = 10

    def __post_init__(self) -> None:
        _check("step", {"start": self.start, "end": self.end}, {"steps": self.steps})
        checks.require_count("step", "levels", self.levels, 2)

    def __call__(self, step: int) -> float:
        level = min(step * self.levels // self.steps, self.levels - 1)
        return self.start + (self.end - self.start) * (level / (self.levels - 1))


@dataclass(frozen=True)
class whole:
    """The value of another schedule, rounded to the nearest whole number: for counts and ranks, such as mochi's N and S."""

    schedule: Callable[[int], float]

    def __call__(self, step: int) -> int:
        return round(self.schedule(step))


@dataclass(frozen=True)
class after:
    """None before the step `first`, then `value`, which may be a schedule itself: a warm-up without an option."""

    value: Any
    first: int

    def __call__(self, step: int) -> Any:
        if step < self.first:
            return None
        return self.value(step) if callable(self.value) else self.value


@dataclass(frozen=True)
class Scheduled:
    """make(**keywords) of the step: the keywords that are schedules evaluated, the others as they are."""

    make: Callable[..., Any]
    keywords: dict[str, Any]

    def __call__(self, step: int) -> Any:
        return self.make(**at_step(self.keywords, step))


def scheduled(make: Callable[..., Any], **keywords: Any) -> Any:
    """make(**keywords) at once where no keyword is a schedule, so that bad values are refused early; else their schedule."""
    made = Scheduled(make, keywords)
    return made if any(map(callable, keywords.values())) else made(0)
