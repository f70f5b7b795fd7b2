"""A file format for arrays with metadata. A file is verified before any of its content is used.

    magic | part | part | ... | facts (metadata) and the table of parts as JSON | length and hash of that JSON | magic

A part is an array or a sequence of bytes. The table has the dtype, shape, offset and hash of each part. Reading checks all sizes
against the size of the file before memory is allocated, and then the hashes. Arrays are returned as private memory maps. Nothing
in a file is executed.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from negmine.mining.atomic_file import atomic_write
from negmine.mining.regular_file import cause, open_regular, parse_json
from negmine.ops.checks import describe, refuse

MAGIC = b"negmine\x01"
TAIL = struct.Struct("<Q16s8s")  # length and hash of the JSON, magic
MAX_TABLE_BYTES = 1 << 20  # facts and table take a few hundred bytes
DTYPES = ("uint8", "uint16", "int64", "float16", "float32")
CHUNK_BYTES = 1 << 20  # bytes in memory at a time while hashing

Write = Callable[[Any], Any]  # takes bytes


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


def array_part(array: np.ndarray) -> tuple[str, tuple[int, ...], Callable[[Write], Any]]:
    """An array in the form in which `write` takes a part."""
    dense = np.ascontiguousarray(array)
    return str(dense.dtype), dense.shape, lambda emit: emit(dense.reshape(-1).view(np.uint8).data)


def write(op: str, path: str | os.PathLike, kind: str, facts: dict, parts: dict[str, tuple]) -> None:
    """Write facts and parts.

    parts: name -> (dtype, shape, produce). produce(emit) calls emit with the bytes, piece by piece. A shape of None is set to the
    number of bytes.
    """
    table = {}
    with atomic_write(op, path) as file:
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
    """The facts and parts of a file that `write` wrote. Raises ValueError if the file is damaged or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise refuse(op, "path", "an existing file", str(path))
    try:
        with open_regular(path) as file:
            facts, parts = _table(file, os.fstat(file.fileno()).st_size, kind)
            for name, part in parts.items():
                if digest_of(_pieces(file, part.offset, part.size)) != part.blake2b:
                    raise ValueError(f"{describe(name)} does not match its hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"{op}: {describe(str(path))} is damaged or is not a {kind} file ({cause(error)})") from error
    return facts, parts


def _pieces(file: IO[bytes], offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    for begin in range(0, size, CHUNK_BYTES):
        yield file.read(min(CHUNK_BYTES, size - begin))


def _table(file: IO[bytes], total: int, kind: str) -> tuple[dict, dict[str, Part]]:
    if total < len(MAGIC) + TAIL.size or file.read(len(MAGIC)) != MAGIC:
        raise ValueError("its first bytes are wrong")
    file.seek(total - TAIL.size)
    length, digest, magic = TAIL.unpack(file.read(TAIL.size))
    end = total - TAIL.size - length  # where the parts end
    if magic != MAGIC or length > MAX_TABLE_BYTES or end < len(MAGIC):
        raise ValueError("its last bytes are wrong")
    file.seek(end)
    text = file.read(length)
    if hashlib.blake2b(text, digest_size=16).digest() != digest:
        raise ValueError("its table does not match its hash")
    content = parse_json(text, "its table")
    if content["kind"] != kind:
        raise ValueError(f"it is a file of kind {describe(content['kind'])}")
    if not isinstance(content["facts"], dict):
        raise ValueError("its facts are not a JSON object")
    parts = {}
    for name, entry in content["parts"].items():
        part = Part(entry["dtype"], tuple(entry["shape"]), entry["offset"], entry["size"], entry["blake2b"])
        sizes = (*part.shape, part.offset, part.size)
        if (
            part.dtype not in DTYPES
            or len(part.shape) > 8
            or not all(type(size) is int and 0 <= size < 2**63 for size in sizes)
        ):
            raise ValueError(
                f"in its table, {describe(name)} has dtype {describe(part.dtype)} and shape {describe(part.shape)}"
            )
        needed = np.dtype(part.dtype).itemsize
        for side in part.shape:
            needed *= side  # Python's ints: no overflow
        if part.size != needed or part.offset < len(MAGIC) or part.offset + part.size > end:
            raise ValueError(
                f"in its table, {describe(name)} needs {needed} bytes at offset {part.offset}, but the parts end at {end}"
            )
        parts[name] = part
    return content["facts"], parts


def map_array(path: str | os.PathLike, part: Part) -> np.ndarray:
    """A private memory map of a part: writing to it changes memory only, never the file."""
    if not part.size:
        return np.empty(part.shape, part.dtype)
    return np.memmap(path, part.dtype, "c", part.offset, part.shape)
