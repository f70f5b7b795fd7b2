"""Write a file atomically: at any time, and after a crash, the path has either the old content or all of the new content.

The content is written to a new file in the same folder, which is flushed to disk and then renamed. The new file has a random name
and is created exclusively, so links and files of other processes are never written to. It gets the permissions of the file that
it replaces.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from negmine.mining.remote import is_url
from negmine.ops.checks import describe, refuse

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")  # an unfinished file; the group is the start of its final name
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

PIPE_SECONDS = 10.0  # how long to wait for another process to open a pipe for reading


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk. Only then does a renamed file survive a power failure."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device, or in /dev or /proc. /dev/stdout, for example, may be a link to a file."""
    is_device = path.absolute().parts[1:2] in (("dev",), ("proc",)) and "shm" not in path.parts
    return path.exists() and (is_device or not (path.is_file() or path.is_dir()))


def _mode_of(path: Path) -> int | None:
    """The permissions of an existing regular file; None for anything else."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return stat.S_IMODE(status.st_mode) & 0o777 if stat.S_ISREG(status.st_mode) else None


def _failure(op: str, path: Path, error: OSError) -> OSError:
    why = f" ({error.strerror})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not path.parent.is_dir():
        what = "not a folder" if path.parent.exists() else "a folder that does not exist"
        why = f", because {describe(str(path.parent))} is {what}"
    elif error.errno == errno.EISDIR:
        why = ", because it is a folder"
    return OSError(error.errno, f"{op}: {describe(str(path))} could not be written{why}; existing files are unchanged")


def require_output(op: str, name: str, path: Any) -> Path:
    """The path of a file that can be written. Raises for a folder, a file in a missing folder, and a read-only file."""
    if not isinstance(path, (str, os.PathLike)):
        raise refuse(op, name, "the path of a file", path, TypeError)
    given, path = os.fspath(path), Path(path)
    if not isinstance(given, str) or not path.name or "\0" in given:
        raise refuse(op, name, "the path of a file", given)
    if is_url(given):
        raise refuse(op, name, "the path of a file on this machine", given)
    try:
        if is_stream(path):
            return path
        problem = 0
        if not path.parent.is_dir():
            problem = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
        elif path.is_dir() or given.endswith("/"):
            problem = errno.EISDIR
        elif not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
            problem = errno.EACCES
        elif len(os.fsencode(path.name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
            problem = errno.ENAMETOOLONG
    except OSError as error:
        raise _failure(op, path, error) from error
    if problem:
        raise _failure(op, path, OSError(problem, os.strerror(problem)))
    return path


def _open_stream(path: Path) -> int:
    """Open a stream and return its descriptor. Raises OSError if nothing reads a pipe within PIPE_SECONDS."""
    end = time.monotonic() + PIPE_SECONDS
    while True:
        try:
            number = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() >= end:
                raise
            time.sleep(0.01)
    os.set_blocking(number, True)
    return number


def _open_new(path: Path, mode: int) -> tuple[Path, int]:
    """Create a new file in the folder of `path`; returns its path and its descriptor."""
    while True:
        partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.partial")
        try:
            return partial, os.open(partial, NEW_FILE, mode)
        except FileExistsError:
            continue


@contextlib.contextmanager
def atomic_write(op: str, path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A context manager that yields a file to write; the file becomes `path` when the block ends without an error.

    A link is replaced by the file; the target of the link does not change. A stream (`is_stream`) must not be replaced, so it is
    written to directly. A pipe that nothing reads raises OSError.
    """
    path = require_output(op, "path", path)
    partial = None
    try:
        if is_stream(path):
            with open(_open_stream(path), "wb") as file:
                yield file
            return
        mode = _mode_of(path)
        partial, number = _open_new(path, 0o666 if mode is None else mode)
        with open(number, "wb") as file:
            if mode is not None:
                os.fchmod(number, mode)
            yield file
            file.flush()
            os.fsync(number)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BrokenPipeError:
        raise  # the reader closed the pipe: the command has an exit code for that
    except OSError as error:
        raise _failure(op, path, error) from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
