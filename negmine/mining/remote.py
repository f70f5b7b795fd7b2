"""Files in object storage, read through fsspec where it is installed: "s3://bucket/rows.npy", "gs://bucket/corpus.jsonl".

A file is copied once into an unnamed temporary file, which disappears when it is closed or the process ends. The environment
variable TMPDIR sets the folder for temporary files. fsspec's packages (s3fs, gcsfs, adlfs, ...) find the credentials.
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


@contextmanager
def _fsspec(url: str) -> Iterator[Any]:
    """The package fsspec; errors inside the block become a ValueError or an ImportError that names the URL."""
    where = describe(url)
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{where} is a URL, and reading it needs fsspec: pip install fsspec") from error
    try:
        yield fsspec
    except ImportError as error:  # the package for this kind of storage is missing
        raise ImportError(f"{where} cannot be read without another package ({_cause(error)})") from error
    except Exception as error:  # each kind of storage raises its own types
        raise ValueError(f"{where} cannot be read ({_cause(error)})") from error


def _copy(url: str, target: IO[bytes]) -> None:
    with _fsspec(url) as fsspec, fsspec.open(url, "rb") as source:
        while piece := source.read(COPIED_BYTES):
            target.write(piece)
    target.flush()
    target.seek(0)


def _cause(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def exists(url: str) -> bool:
    """Whether a file or folder is in object storage."""
    with _fsspec(url) as fsspec:
        storage, path = fsspec.core.url_to_fs(url)
        return bool(storage.exists(path))


def names_in_folder(url: str) -> list[str]:
    """The sorted names of the files and folders in a folder of object storage; empty if there is no such folder."""
    with _fsspec(url) as fsspec:
        storage, path = fsspec.core.url_to_fs(url)
        if not storage.isdir(path):
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in storage.ls(path, detail=False))


def open_url(url: str) -> IO[bytes]:
    """A copy of a file in object storage, open for reading. Raises a ValueError or an ImportError that names the URL."""
    with ExitStack() as opened:
        copy = opened.enter_context(tempfile.TemporaryFile(prefix="negmine-"))
        _copy(url, copy)
        opened.pop_all()  # the caller closes the copy
    return copy


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The path of a temporary copy with the same extension. It is deleted when the block ends; a memory map of it stays valid.

    Errors inside the block name the URL.
    """
    number, name = tempfile.mkstemp(prefix="negmine-", suffix=Path(url).suffix)
    try:
        with open(number, "r+b") as copy:
            _copy(url, copy)
        yield Path(name)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace(name, url)) from error
    finally:
        os.unlink(name)
