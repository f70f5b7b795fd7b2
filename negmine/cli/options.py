"""Make command-line options from a function: one for each argument, with its name, its type and the text of its docstring.

    num_negatives: int = 3     ->  --num-negatives N        (--num_negatives works too)
    count_skipped: bool        ->  --count-skipped, --no-count-skipped

Only options that are given are passed to the function, so its defaults apply to all others.
"""

import argparse
import contextlib
import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

OPTION = re.compile(r"^--[\w-]+")


@dataclass(frozen=True)
class Reader:
    """How the words after an option are converted to an argument, if its type is not a simple one."""

    read: Callable[[Any], Any]
    shown: str
    nargs: int | str | None = None


# argparse's message about a word of the wrong type, and what each type is called instead
INVALID = re.compile(r"argument (\S+): invalid (\w+)(, or none)? value: (.*)")
WANTED = {
    "int": "an int",
    "float": "a number",
    "number": "a rank (an int such as 50) or a fraction (a float such as 0.05)",
}


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one sentence and refers to --help, without printing the usage."""

    instead = ""  # added to the message about missing options: what can be given instead

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The parsed options. A subcommand refuses unknown options itself, so that the message names it."""
        found, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.error(self._unknown(rest[0]))
        return found, rest

    def _unknown(self, word: str) -> str:
        """The message about a word that is not an option, with the names of similar options."""
        if not word.startswith("-"):
            return f"there must be an option before {word!r}"
        name, options = word.partition("=")[0], [name for name in self._option_string_actions if name.startswith("--")]
        stem = name.lstrip("-")
        similar = [option for option in options if len(stem) > 2 and stem in option]
        similar = (similar or difflib.get_close_matches(name, options, 2, cutoff=0.75))[:4]
        return f"there is no option {name}" + (f"; did you mean {' or '.join(similar)}?" if similar else "")

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message += self.instead
        if found := INVALID.fullmatch(message):
            option, kind, or_none, word = found.groups()
            message = f"{option} must be {WANTED.get(kind, kind)}{' or none' if or_none else ''}, got {word}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def spelled(words: list[str]) -> list[str]:
    """The words, with underscores in the names of options replaced by dashes."""
    return [OPTION.sub(lambda found: found[0].replace("_", "-"), word) for word in words]


def explained(docstring: str | None) -> dict[str, str]:
    """The descriptions in the section Parameters of a NumPy docstring, by name."""
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(docstring or "").partition("\nParameters\n")
    for names, words in re.findall(r"^(\w+(?:, \w+)*) : .*\n((?:    .*\n?)+)", section.split("\n\n", 1)[0], re.M):
        found |= dict.fromkeys(names.split(", "), " ".join(words.replace("``", "").split()))
    return found


def number(word: str) -> int | float:
    """Parse a rank or a fraction: 50 becomes an int and 0.05 a float, which Select treats differently."""
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


def none_or(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function like `read` that also converts the word "none" to None."""

    def either(word: str) -> Any:
        return None if word.lower() == "none" else read(word)

    either.__name__ = f"{read.__name__}, or none"  # argparse uses the name in error messages
    return either


def _type_of(annotation: Any) -> tuple[Callable[[str], Any], str | None]:
    """The function that parses one word of this type, and the placeholder for numbers in the usage."""
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
    """Add an option for each argument of `function` except `skip`, or only for those in `only`. Returns their names."""
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


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Add the name of an option to the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')}: {error}") from error


def given(
    args: argparse.Namespace, names: Iterable[str], readers: Mapping[str, Reader] | None = None
) -> dict[str, Any]:
    """The arguments that are given on the command line, parsed."""
    found = {}
    for name in names:
        if hasattr(args, name):
            value = getattr(args, name)
            with named(name):
                found[name] = readers[name].read(value) if readers and name in readers else value
    return found
