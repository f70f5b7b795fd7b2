"""Files that are whole or absent, and a container of arrays that is checked before a byte of it is believed.

    magic | part | part | ... | facts and the table of parts as JSON | length, hash of that JSON | magic

A part is an array or a run of bytes; the table says its dtype, shape, place and hash. Reading checks every size against the
file's before anything is allocated, then the hashes; arrays come back as private maps. Nothing in a file is executed.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

MAGIC = b"negmine\x01"
TAIL = struct.Struct("<Q16s8s")  # length and hash of the JSON, magic
MOST_JSON = 1 << 26
DTYPES = ("uint8", "uint16", "int64", "float16", "float32")
PIECE = 1 << 20  # bytes in memory at a time while hashing

Emit = Callable[[Any], Any]  # takes bytes


def sync_folder(folder: Path) -> None:
    """A renamed file survives a power cut only once its folder is on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def atomic(op: str, path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends: readers, and a crash, see the old file or the whole new one.

    A pipe, a device, or a name in /dev or /proc, such as /dev/stdout, is written to as it is: it must not be replaced.
    """
    path = Path(path)
    lent = path.absolute().parts[1:2] in (("dev",), ("proc",)) and "shm" not in path.parts  # a link, at times to a file
    if path.exists() and (lent or not (path.is_file() or path.is_dir())):
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


@dataclass(frozen=True)
class Part:
    """One entry of the table."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes
    blake2b: str


def digest_of(pieces: Iterator[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def array_part(array: np.ndarray) -> tuple[str, tuple[int, ...], Callable[[Emit], Any]]:
    """What `write` takes, of an array."""
    dense = np.ascontiguousarray(array)
    return str(dense.dtype), dense.shape, lambda emit: emit(dense.reshape(-1).view(np.uint8).data)


def write(op: str, path: str | os.PathLike, kind: str, facts: dict, parts: dict[str, tuple]) -> None:
    """parts: name -> (dtype, shape or None for as many as come, a callable that is given `emit` and emits the bytes)."""
    table = {}
    with atomic(op, path) as file:
        file.write(MAGIC)
        for name, (dtype, shape, produce) in parts.items():
            file.write(bytes(-file.tell() % 64))
            offset, digest = file.tell(), hashlib.blake2b(digest_size=16)

            def emit(piece: Any, digest: Any = digest) -> None:
                digest.update(piece)
                file.write(piece)

            produce(emit)
            size = file.tell() - offset
            entry = {"dtype": dtype, "shape": (size,) if shape is None else shape, "offset": offset, "size": size}
            table[name] = entry | {"blake2b": digest.hexdigest()}
        text = json.dumps({"kind": kind, "facts": facts, "parts": table}).encode()
        file.write(text)
        file.write(TAIL.pack(len(text), hashlib.blake2b(text, digest_size=16).digest(), MAGIC))


def read(op: str, path: str | os.PathLike, kind: str) -> tuple[dict, dict[str, Part]]:
    """Facts and parts of a file that `write` made; raises ValueError, in words, for any other and for a damaged one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{op}: path must be an existing file, got {str(path)!r}")
    try:
        with open(path, "rb") as file:
            facts, parts = _table(file, path.stat().st_size, kind)
            for name, part in parts.items():
                if digest_of(_pieces(file, part.offset, part.size)) != part.blake2b:
                    raise ValueError(f"the bytes of {name} are not those that were written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ValueError(f"{op}: {str(path)!r} is damaged or is no {kind} file ({error})") from error
    return facts, parts


def _pieces(file: IO[bytes], offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    for begin in range(0, size, PIECE):
        yield file.read(min(PIECE, size - begin))


def _table(file: IO[bytes], total: int, kind: str) -> tuple[dict, dict[str, Part]]:
    if total < len(MAGIC) + TAIL.size or file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin as one")
    file.seek(total - TAIL.size)
    length, digest, magic = TAIL.unpack(file.read(TAIL.size))
    end = total - TAIL.size - length  # where the parts end
    if magic != MAGIC or length > MOST_JSON or end < len(MAGIC):
        raise ValueError("it does not end as one")
    file.seek(end)
    text = file.read(length)
    if hashlib.blake2b(text, digest_size=16).digest() != digest:
        raise ValueError("its table is not the one that was written")
    content = json.loads(text)
    if content["kind"] != kind:
        raise ValueError(f"it is a {content['kind']} file")
    parts = {}
    for name, entry in content["parts"].items():
        part = Part(entry["dtype"], tuple(entry["shape"]), entry["offset"], entry["size"], entry["blake2b"])
        if part.dtype not in DTYPES or not all(type(side) is int and side >= 0 for side in part.shape):
            raise ValueError(f"the table's {name} has dtype {part.dtype!r} and shape {part.shape}")
        needed = np.dtype(part.dtype).itemsize
        for side in part.shape:
            needed *= side  # Python's ints: no overflow
        if part.size != needed or part.offset < len(MAGIC) or part.offset + part.size > end:
            raise ValueError(f"the table's {name} needs {needed} bytes at {part.offset}, and the parts end at {end}")
        parts[name] = part
    return content["facts"], parts


def array_of(path: str | os.PathLike, part: Part) -> np.ndarray:
    """A private map of a part: what is written to it stays in memory."""
    if not part.size:
        return np.empty(part.shape, part.dtype)
    return np.memmap(path, part.dtype, "c", part.offset, part.shape)
