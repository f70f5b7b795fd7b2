"""Open files for reading: regular files only, with a limit on how many bytes are read.

A pipe would block and a device may never end, so both raise a ValueError. The size of a JSON file is limited, because the
parsed objects take many times its memory.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from negmine.mining.remote import is_url, open_url
from negmine.ops.checks import describe

MAX_JSON_BYTES = 1 << 26  # limit for files that a user names; negmine's own files have smaller limits


def cause(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters; its type if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Open an existing regular file for reading, or a temporary copy of one in object storage.

    Raises ValueError for anything else; the message names the path.
    """
    if is_url(path):
        return open_url(str(path))
    if not os.path.exists(path):
        raise ValueError(f"{describe(str(path))} does not exist")
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not block
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        said = error.strerror if isinstance(error, OSError) else cause(error)
        raise ValueError(f"{describe(str(path))} cannot be opened ({said})") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{describe(str(path))} is not a regular file")
    return open(number, "rb")


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The content of a file. Raises ValueError if it has more than `max_bytes` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
        if size > max_bytes or len(content) > max_bytes:
            raise ValueError(f"{describe(str(path))} has {size:,} bytes, more than the limit of {max_bytes:,}")
    return content


def parse_json(text: bytes | str, where: str, object_hook: Callable | None = None) -> Any:
    """Parse JSON. NaN and Infinity, which are not JSON, raise a ValueError. Error messages start with `where`."""

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not valid JSON")

    try:
        return json.loads(text, parse_constant=constant, object_hook=object_hook)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({cause(error)})") from error


def read_json(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The values of a JSON file in UTF-8, with or without a byte order mark."""
    content = read_bytes(path, max_bytes)
    return parse_json(content.removeprefix(b"\xef\xbb\xbf"), describe(str(Path(path))))
