"""Argument checks. Each error is one sentence that names the function, the argument, what was wanted and what came."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from negmine.options import (
    MAX_DESCRIPTION,
    FalseNegatives,
    Mix,
    Phrase,
    Select,
    Weight,
    describe,
    is_int,
    is_real,
    is_scalar,
    kind_of,
    not_a_tensor,
    plain,
)

__all__ = ["MAX_DESCRIPTION", "Phrase", "describe", "kind_of", "not_a_tensor"]  # of negmine.options, for other modules

OPTION_TYPES = {"select": Select, "mix": Mix, "weight": Weight, "false_negatives": FalseNegatives}
SELECT_FIELDS = tuple(field.name for field in fields(Select))
Function = TypeVar("Function", bound=Callable[..., Any])
MOST_LISTED = 12  # arguments that a message lists
REDUCTIONS = ("mean", "sum", "none")
COMMON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(op: str, name: str, wanted: str, came: Any, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise, with the message `op: name must be wanted, got came`."""
    return error(f"{op}: {name} must be {wanted}, got {describe(came)}")


def refuses_unknown_names(op: str) -> Callable[[Function], Function]:
    """A decorator that raises a TypeError with advice if a keyword is not an argument of the function, or a field of Select."""

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        has_others = any(each.kind is each.VAR_KEYWORD for each in parameters.values())

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            flat = ", ".join(f"{name}={describe(options[name])}" for name in SELECT_FIELDS if name in options)
            if flat:
                raise TypeError(f"{op}: filters and ranks must be given as select=Select({flat}), got {flat}")
            if not has_others:
                require_known(op, options, tuple(parameters))
            return function(*args, **options)

        return cast(Function, checked)

    return decorate


def require_known(op: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a TypeError that suggests another name for the first name that is not one of the known arguments."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            listed = f"its arguments are {', '.join(known)}" if len(known) <= MOST_LISTED else f"see help({op})"
            advice = f"did you mean {close[0]}?" if close else listed
            raise TypeError(f"{op}: there is no argument {name}; {advice}")


def require_stored(op: str, name: str, value: Tensor) -> None:
    """Require a dense tensor that has storage (not on the meta device)."""
    require_tensor(op, name, value)
    if value.is_meta:
        raise refuse(op, name, "a tensor with data", Phrase("one on the meta device"), TypeError)


def require_unmasked(op: str, name: str, value: Any) -> None:
    """Reject masked arrays of NumPy with masked entries, since the masked values would be read."""
    masked = getattr(value, "mask", None)
    if type(value).__name__ == "MaskedArray" and masked is not None and masked.any():
        raise refuse(
            op, name, "without masked entries: fill or remove them", Phrase(f"{int(masked.sum())} masked entries")
        )


def require_tensor(op: str, name: str, value: Any, like: Tensor | None = None, like_name: str = "query") -> None:
    """Require a dense tensor on the device of `like`, which messages call `like_name`."""
    if not isinstance(value, Tensor):
        raise refuse(op, name, "a tensor", not_a_tensor(value), TypeError)
    if value.layout != torch.strided or value.is_nested:
        came = Phrase("a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}")
        raise refuse(op, name, "a dense tensor", came, TypeError)
    if like is not None and value.device != like.device:
        raise refuse(op, name, f"on the device of {like_name} ({like.device})", value)


def require_vectors(
    op: str,
    name: str,
    value: Any,
    shapes: str,
    dims: tuple[int, ...],
    like: Tensor | None = None,
    like_name: str = "query",
) -> None:
    """Require a floating tensor with the D and device of `like`. `dims` are the allowed numbers of dimensions."""
    # Valid input takes few steps, because host time dominates small calls. A nested tensor has no shape.
    dense = type(value) is Tensor and value.layout == torch.strided and not value.is_nested
    if dense and value.dim() in dims and value.dtype in COMMON_DTYPES:
        D = value.shape[-1]
        if D and (like is None or (like.shape[-1] == D and value.device == like.device)):
            return
    require_tensor(op, name, value, like, like_name)
    if not value.is_floating_point():
        raise refuse(op, name, "a floating tensor (float64, float32, bfloat16 or float16)", value, TypeError)
    if value.dim() not in dims or value.shape[-1] == 0:
        raise refuse(op, name, f"of shape {shapes} with D of 1 or more", value)
    if like is not None and value.shape[-1] != like.shape[-1]:
        possessive = f"{like_name}'" if like_name.endswith("s") else f"{like_name}'s"
        raise refuse(op, name, f"of shape {shapes} with {possessive} D = {like.shape[-1]}", value)


def require_positive(op: str, positive_key: Any, query: Tensor) -> None:
    require_vectors(op, "positive_key", positive_key, "(B, D)", (2,), query)
    if positive_key.shape != query.shape:
        raise refuse(op, "positive_key", f"of query's shape {tuple(query.shape)}", positive_key)


def require_per_row(op: str, name: str, value: Any, query: Tensor) -> None:
    """Require a floating tensor (B,) with one number for each query."""
    require_tensor(op, name, value, query)
    if not value.is_floating_point() or tuple(value.shape) != (len(query),):
        raise refuse(op, name, f"a floating tensor of shape ({len(query)},)", value)


def require_scalar(
    op: str, name: str, value: Any, *, above: float | None = None, least: float | None = None, wanted: str = ""
) -> Any:
    """Require a finite number within bounds, or a floating tensor of one element.

    Returns a Python number or a 0-d tensor. The value of a tensor is not checked, because reading it would synchronise.
    """
    given, value = value, plain(value)
    if is_scalar(value):
        return value
    good = is_real(value) and (above is None or value > above) and (least is None or value >= least)
    if not good:
        bounds = "a finite number or a 0-d floating tensor" if above is None else f"a number above {above}"
        raise refuse(op, name, wanted or (bounds if least is None else f"a number of {least} or more"), given)
    return value


def require_temperature(op: str, temperature: Any, name: str = "temperature") -> Any:
    """Require a finite number above 0, or a floating tensor of one element. Returns it like require_scalar."""
    wanted = "a number above 0 or a 0-d floating tensor"
    if callable(temperature):
        wanted += " (schedules and LogScale are for modules such as InfoNCELoss)"
    return require_scalar(op, name, temperature, above=0, wanted=wanted)


def require_options(op: str, **options: Any) -> None:
    """Require that each option is None or an object of its type."""
    for name, value in options.items():
        wanted = OPTION_TYPES[name]
        if value is not None and not isinstance(value, wanted):
            raise refuse(op, name, f"a negmine.{wanted.__name__} or None", value, TypeError)


def require_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise refuse(op, name, " or ".join(map(repr, choices)), value)


def require_count(op: str, name: str, value: Any, least: int = 1) -> int:
    value = plain(value)
    if not is_int(value) or value < least:
        raise refuse(op, name, f"an int of {least} or more", value)
    return value


def require_number(op: str, name: str, value: Any, *, above: float | None = None, least: float | None = None) -> float:
    """Require a finite number that is greater than `above`, or at least `least`."""
    value = plain(value)
    good = is_real(value) and (above is None or value > above) and (least is None or value >= least)
    if not good:
        wanted = "a finite number" if above is None else f"a number above {above}"
        raise refuse(op, name, wanted if least is None else f"a number of {least} or more", value)
    return value


def require_draw(op: str, seed: Any, step: Any, row_offset: Any) -> tuple[int, Any, Any]:
    """Check the key of random draws: seed and step are 32-bit numbers, row_offset is the global index of the first query.

    step and row_offset may be int64 tensors of one element. Their values are not checked, because reading them would synchronise.
    Returns Python ints and 0-d tensors.
    """
    numbers = type(seed) is type(step) is type(row_offset) is int
    if numbers and 0 <= seed < 2**32 and 0 <= step < 2**32 and 0 <= row_offset < 2**63:
        return seed, step, row_offset  # valid input takes few steps, as in require_vectors
    seed, step, row_offset = plain(seed), plain(step), plain(row_offset)
    if not is_int(seed) or not 0 <= seed < 2**32:
        raise refuse(op, "seed", "an int in [0, 2**32)", seed)
    for name, value, most in (("step", step, 2**32), ("row_offset", row_offset, 2**63)):
        if isinstance(value, Tensor):
            if value.dim() != 0 or value.dtype != torch.int64:
                raise refuse(op, name, f"an int in [0, 2**{most.bit_length() - 1}) or a 0-d int64 tensor", value)
        elif not is_int(value) or not 0 <= value < most:
            raise refuse(op, name, f"an int in [0, 2**{most.bit_length() - 1}) or a 0-d int64 tensor", value)
    return seed, step, row_offset


def require_bool(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise refuse(op, name, "True or False", value, TypeError)


def whole_numbers(op: str, name: str, value: Any, device: torch.device) -> Tensor:
    """Ranks as (R,) or (B, R) int64 from an int, a sequence of ints or an integer tensor."""
    value = plain(value) if not isinstance(value, Tensor) else value
    if is_int(value):
        value = [value]
    if isinstance(value, (list, tuple)):
        value = [plain(v) for v in value]
    if isinstance(value, list) and value and all(is_int(v) and v >= 0 for v in value):
        # torch.full needs no copy from the host, and so does not synchronise.
        return torch.stack([torch.full((), v, dtype=torch.int64, device=device) for v in value])
    if (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and value.dtype != torch.bool
        and value.dim() in (1, 2)
    ):
        return value.long()
    wanted = "0-based ranks: an int, a sequence of ints, or an int tensor of shape (R,) or (B, R)"
    raise refuse(op, name, wanted + " (for fractions, use quantile)", value)
