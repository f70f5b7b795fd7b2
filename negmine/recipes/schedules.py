"""Schedules: values that depend on the step, as objects that can be compared, printed and pickled.

Any number of a recipe may be a schedule, or another callable of the step. After its last step a schedule stays at `end`. Counts
of negatives determine shapes, so they cannot be schedules. For ranks, use `whole` of a schedule.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negmine.losses.schedules import at_start, at_step
from negmine.ops import checks

# What to do if the value of a schedule is not what an option needs.
ADVICE = {
    "must be a rank (int": "use whole for a schedule of ranks",
    "must be an int of": "numbers of negatives determine shapes and cannot be schedules",
}
Number = float | Tensor | Callable[[Tensor], Tensor]
Temperature = Number


def _check(name: str, numbers: dict[str, Any], counts: dict[str, Any]) -> None:
    for argument, value in numbers.items():
        checks.require_number(name, argument, value)
    for argument, value in counts.items():
        checks.require_count(name, argument, value)


class Schedule(ABC):
    """A function of the step. A 0-d tensor gives a 0-d float64 tensor on its device, without synchronisation; an int a float."""

    def __call__(self, step: Any) -> Any:
        value = self.value(torch.as_tensor(step))
        return value if isinstance(step, Tensor) else value.item()

    @abstractmethod
    def value(self, step: Tensor) -> Tensor:
        """The value at a step () int64."""


@dataclass(frozen=True)
class linear(Schedule):
    """A schedule that goes linearly from `start` to `end` and stays there.

        start + (end - start) min(step / steps, 1)

    Parameters
    ----------
    start : float
        The value at step 0.
    end : float
        The last value.
    steps : int
        The step at which the end is reached.

    Examples
    --------
    >>> negmine.recipes.linear(1.0, 0.0, 100)(25)
    0.75
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check("linear", {"start": self.start, "end": self.end}, {"steps": self.steps})

    def value(self, step: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * (step.double() / self.steps).clamp_max(1.0)


@dataclass(frozen=True)
class cosine(Schedule):
    """A schedule that goes from `start` to `end` along half a cosine and stays there.

        end + (start - end) (1 + cos(pi min(step / steps, 1))) / 2

    Parameters
    ----------
    start : float
        The value at step 0.
    end : float
        The last value.
    steps : int
        The step at which the end is reached.

    Examples
    --------
    >>> round(negmine.recipes.cosine(1.0, 0.0, 100)(50), 6)
    0.5
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check("cosine", {"start": self.start, "end": self.end}, {"steps": self.steps})

    def value(self, step: Tensor) -> Tensor:
        share = (step.double() / self.steps).clamp_max(1.0)
        return self.end + (self.start - self.end) * (1 + (math.pi * share).cos()) / 2


@dataclass(frozen=True)
class exponential(Schedule):
    """A schedule that approaches `end` exponentially.

        end + (start - end) exp(-decay step / every)

    Parameters
    ----------
    start : float
        The value at step 0.
    end : float
        The last value.
    decay : float
        The decay of the exponent in one unit of time.
    every : int
        The number of steps in one unit of time. The public code of Ring decays by 0.1 at each step, so it practically reaches
        its end after 45 steps. For a schedule that lasts for the whole training, pass the number of steps of an epoch.

    Examples
    --------
    >>> round(negmine.recipes.exponential(1.0, 0.0, 1.0, every=10)(10), 3)
    0.368
    """

    start: float
    end: float
    decay: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        _check("exponential", {"start": self.start, "end": self.end}, {"every": self.every})
        checks.require_number("exponential", "decay", self.decay, least=0)

    def value(self, step: Tensor) -> Tensor:
        return self.end + (self.start - self.end) * (-self.decay * step.double() / self.every).exp()


@dataclass(frozen=True)
class step(Schedule):
    """A schedule of equally spaced values from `start` to `end`, each for the same number of steps.

    Parameters
    ----------
    start : float
        The value at step 0.
    end : float
        The last value.
    steps : int
        The total number of steps of all values. After them the value stays at `end`.
    levels : int
        The number of values.

    Notes
    -----
    The schedule of Ring is ``step(1.0, 0.1, steps, 10)``, and ``--anneal down`` of HCL is ``step(beta, 0.0, steps, 9)``.

    Examples
    --------
    >>> schedule = negmine.recipes.step(1.0, 0.0, 100, levels=5)
    >>> [schedule(at) for at in (0, 20, 99, 500)]
    [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int
    levels: int = 10

    def __post_init__(self) -> None:
        _check("step", {"start": self.start, "end": self.end}, {"steps": self.steps})
        checks.require_count("step", "levels", self.levels, 2)

    def value(self, step: Tensor) -> Tensor:
        level = (step * self.levels // self.steps).clamp_max(self.levels - 1)
        return self.start + (self.end - self.start) * (level.double() / (self.levels - 1))


@dataclass(frozen=True)
class whole(Schedule):
    """A schedule that is rounded to whole numbers, for ranks.

    Parameters
    ----------
    schedule : callable
        The schedule to round.

    Examples
    --------
    >>> negmine.recipes.whole(negmine.recipes.linear(100, 10, 1000))(500)
    55
    """

    schedule: Callable[[Any], Any]

    def value(self, step: Tensor) -> Tensor:
        return torch.as_tensor(self.schedule(step)).double().round().long()


@dataclass(frozen=True)
class after:
    """`value` with `enabled` False before the step `first`, decided on the device: a warm-up without synthetic negatives.

    value: a Mix or Kinds, or a schedule of one.
    """

    value: Any
    first: int

    def __call__(self, step: Tensor) -> Any:
        value = self.value(step) if callable(self.value) else self.value
        return value.enabled_where(torch.as_tensor(step) >= self.first)


@dataclass(frozen=True)
class Scheduled:
    """A schedule whose value is make(**keywords), with keywords that are schedules evaluated at the step."""

    make: Callable[..., Any]
    keywords: dict[str, Any]

    def __call__(self, step: Tensor) -> Any:
        return self.make(**at_step(self.keywords, step))


def scheduled(make: Callable[..., Any], **keywords: Any) -> Any:
    """make(**keywords), or a schedule of it if a keyword is a schedule. Invalid values at step 0 raise an error at once."""
    schedules = {name for name, value in keywords.items() if callable(value)}
    if not schedules:
        return make(**keywords)
    start = at_start(keywords)
    numbers = {name: value.item() if name in schedules and is_number(value) else value for name, value in start.items()}
    try:
        make(**numbers)  # checks the values of schedules
        make(**start)  # checks their types: in training they are tensors, whose values are not read
    except ValueError as error:
        for wanted, advice in ADVICE.items():
            if wanted in str(error) and any(f": {name} must be" in str(error) for name in schedules):
                raise ValueError(f"{error} ({advice})") from None
        raise
    return Scheduled(make, keywords)


def is_number(value: Any) -> bool:
    """True for a 0-d tensor that has data."""
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta
