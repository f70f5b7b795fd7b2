"""Files in object storage, read through fsspec where it is installed: "s3://bucket/rows.npy", "gs://bucket/corpus.jsonl".

A file is copied once, into a temporary file without a name, which disappears when it is closed or the process ends. TMPDIR names
the folder. Credentials are those that fsspec's own packages (s3fs, gcsfs, adlfs, ...) find.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from negmine.ops.checks import describe

COPIED_BYTES = 1 << 22  # at a time
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(name: Any) -> bool:
    """True for a string such as "s3://bucket/file"."""
    return isinstance(name, str) and URL.match(name) is not None


def _copy(url: str, target: IO[bytes]) -> None:
    where = describe(url)
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{where} is a URL, and reading it needs fsspec: pip install fsspec") from error
    try:
        with fsspec.open(url, "rb") as source:
            while piece := source.read(COPIED_BYTES):
                target.write(piece)
    except ImportError as error:  # the package of one kind of storage
        raise ImportError(f"{where} cannot be read without another package ({_cause(error)})") from error
    except Exception as error:  # each kind of storage raises its own
        raise ValueError(f"{where} cannot be read ({_cause(error)})") from error
    target.flush()
    target.seek(0)


def _cause(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def open_url(url: str) -> IO[bytes]:
    """A copy of a file in object storage, open for reading. Raises ValueError or ImportError in a sentence that names it."""
    with ExitStack() as opened:
        copy = opened.enter_context(tempfile.TemporaryFile(prefix="negmine-"))
        _copy(url, copy)
        opened.pop_all()  # it stays open
    return copy


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The path of a copy, with the ending of its name. A file that was mapped meanwhile stays mapped; errors name the URL."""
    number, name = tempfile.mkstemp(prefix="negmine-", suffix=Path(url).suffix)
    try:
        with open(number, "r+b") as copy:
            _copy(url, copy)
        yield Path(name)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace(name, url)) from error
    finally:
        os.unlink(name)
