"""Check the output files of a command before any work, so that no file is replaced by mistake."""

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from negmine.mining.atomic_file import is_stream, require_output


def add_overwrite(parser: Any) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing output files; inputs are never replaced"
    )


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # one does not exist
        return a.absolute() == b.absolute()


def _paths(value: Any) -> Iterable[Path]:
    """The paths that the value of an option may contain: "path", "path::name", "title=path"."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _paths(part)
    elif isinstance(value, str):
        for text in {value, value.partition("::")[0], value.rpartition("=")[2]}:
            if text and "\0" not in text:
                yield Path(text)


def check_outputs(
    command: str,
    args: argparse.Namespace,
    outputs: Mapping[str, str | None],
    *,
    overwrite: bool,
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """Raise an error if an output cannot be written, is an input or another output, or exists and `overwrite` is False.

    outputs: option -> path, or None. Inputs are `inputs` and all other values of `args` that name an existing file.
    """
    paths = {option: require_output(command, option, path) for option, path in outputs.items() if path is not None}
    own = {option.removeprefix("--").replace("-", "_") for option in outputs}
    read = [("an input", Path(path)) for path in inputs] + [
        (f"the input --{name.replace('_', '-')}", path)
        for name, value in vars(args).items()
        if name not in own
        for path in _paths(value)
        if path.is_file()
    ]
    seen: dict[str, Path] = {}
    for option, path in paths.items():
        if is_stream(path):
            continue
        for other, known in read:
            if _same(path, known):
                raise ValueError(f"{command}: {option} must not replace {other}, got {str(path)!r}")
        for other, known in seen.items():
            if _same(path, known):
                raise ValueError(f"{command}: {option} and {other} must be different files, got {str(path)!r} for both")
        if os.path.lexists(path) and not overwrite:
            wanted = "a new file, unless --overwrite is given"
            raise ValueError(f"{command}: {option} must be {wanted}: {str(path)!r} exists")
        seen[option] = path
