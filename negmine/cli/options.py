"""Options made from a function: one for each argument, spelled as it is, typed by its annotation, explained by the docstring.

    num_negatives: int = 3     ->  --num-negatives N        (--num_negatives is understood too)
    count_skipped: bool        ->  --count-skipped, --no-count-skipped

Only what is given on the command line reaches the function: defaults stay Python's own.
"""

import argparse
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

OPTION = re.compile(r"^--[\w-]+")


@dataclass(frozen=True)
class Reader:
    """How the words after an option become an argument that no plain type describes."""

    read: Callable[[Any], Any]
    shown: str
    nargs: int | str | None = None


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one sentence, without the usage, and names the help."""

    instead = ""  # what takes the place of required options

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message += self.instead
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def spelled(words: list[str]) -> list[str]:
    """Options with dashes, whichever way they came."""
    return [OPTION.sub(lambda found: found[0].replace("_", "-"), word) for word in words]


def explained(docstring: str | None) -> dict[str, str]:
    """What the section Parameters of a NumPy docstring says, by name."""
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(docstring or "").partition("\nParameters\n")
    for names, words in re.findall(r"^(\w+(?:, \w+)*) : .*\n((?:    .*\n?)+)", section.split("\n\n", 1)[0], re.M):
        found |= dict.fromkeys(names.split(", "), " ".join(words.replace("``", "").split()))
    return found


def number(word: str) -> int | float:
    """A rank, or a fraction: 50 is an int and 0.05 a float, as Select tells them apart."""
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


def none_or(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, with the word "none" for None."""

    def either(word: str) -> Any:
        return None if word.lower() == "none" else read(word)

    either.__name__ = f"{read.__name__}, or none"  # argparse says it in a refusal
    return either


def _type_of(annotation: Any) -> tuple[Callable[[str], Any], str | None]:
    """What reads one word of this annotation, and the letter that stands for a number in the usage."""
    kinds = get_args(annotation) or (annotation,)
    read: Callable[[str], Any] = str
    if int in kinds and float in kinds:
        read = number
    elif int in kinds or float in kinds:
        read = int if int in kinds else float
    letter = None if read is str else "X" if read is float else "N"
    return (none_or(read) if types.NoneType in kinds and read is not str else read), letter


def add_options(
    parser: Any,
    function: Callable,
    readers: Mapping[str, Reader] | None = None,
    skip: Iterable[str] = ("self",),
    only: Iterable[str] | None = None,
) -> list[str]:
    """An option for each argument of `function` but `skip`, or for those of `only`; returns their names."""
    parameters = inspect.signature(function).parameters
    explanations, added = explained(function.__doc__), []
    for name, parameter in parameters.items():
        if name in skip or (only is not None and name not in only):
            continue
        added.append(name)
        required = parameter.default is inspect.Parameter.empty
        words = explanations.get(name, "").replace("%", "%%")
        if not required and parameter.default not in (None, ""):
            words += f" (default: {parameter.default})".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "required": required, "help": words, "dest": name}
        reader = (readers or {}).get(name)
        if reader is not None:
            options |= {"nargs": reader.nargs, "metavar": reader.shown}
        elif isinstance(parameter.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            read, letter = _type_of(parameter.annotation)
            options |= {"type": read, "metavar": letter or name.rsplit("_", 1)[-1].upper()}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return added


def given(
    args: argparse.Namespace, names: Iterable[str], readers: Mapping[str, Reader] | None = None
) -> dict[str, Any]:
    """The arguments that the command line gave, read."""
    found = {}
    for name in names:
        if hasattr(args, name):
            value = getattr(args, name)
            found[name] = readers[name].read(value) if readers and name in readers else value
    return found
