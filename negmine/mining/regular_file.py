"""Open files for reading: regular files only, and never more of one than was asked for.

A pipe would block and a device may have no end, so both are refused. JSON is parsed only up to a number of bytes, because the
objects that it describes take many times its own memory.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from negmine.mining.remote import is_url, open_url
from negmine.ops.checks import describe

MAX_JSON_BYTES = 1 << 26  # of a file that a user gives; a file of negmine's own allows fewer


def cause(error: BaseException) -> str:
    """The message of an error in at most 200 characters, on one line; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """An existing regular file, open for reading, or a copy of one in object storage.

    Raises ValueError for anything else, in a sentence that names it.
    """
    if is_url(path):
        return open_url(str(path))
    if not os.path.exists(path):
        raise ValueError(f"{describe(str(path))} is no file")
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block here
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        said = error.strerror if isinstance(error, OSError) else cause(error)
        raise ValueError(f"{describe(str(path))} is no file that can be read ({said})") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{describe(str(path))} is not a regular file")
    return open(number, "rb")


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
        if size > max_bytes or len(content) > max_bytes:
            raise ValueError(f"{describe(str(path))} holds {size:,} bytes, more than the {max_bytes:,} that are read")
    return content


def parse_json(text: bytes | str, where: str, object_hook: Callable | None = None) -> Any:
    """JSON as Python values; NaN and Infinity, which are not JSON, are refused. `where` begins the message of an error."""

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=constant, object_hook=object_hook)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({cause(error)})") from error


def read_json(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The values of a JSON file in UTF-8, with or without a byte order mark."""
    content = read_bytes(path, max_bytes)
    return parse_json(content.removeprefix(b"\xef\xbb\xbf"), describe(str(Path(path))))
