"""Write a file atomically: a reader, or a crash, sees either the old file or the complete new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk: a renamed file survives a power cut only after that."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def atomic_write(op: str, path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A context manager that yields a file to write; the file becomes `path` when the block ends without an error.

    A pipe, a device, or a name in /dev or /proc, such as /dev/stdout, is written to directly, because it must not be replaced.
    """
    path = Path(path)
    is_device = (
        path.absolute().parts[1:2] in (("dev",), ("proc",)) and "shm" not in path.parts
    )  # a link, at times to a file
    if path.exists() and (is_device or not (path.is_file() or path.is_dir())):
        with open(path, "wb") as file:
            yield file
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{op}: {str(path)!r} could not be written ({error.strerror}); what was there before is untouched",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
