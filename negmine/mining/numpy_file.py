"""Read arrays from .npy and .npz files. All sizes are checked against the size of the file before memory is allocated.

NumPy itself allocates whatever size a header states, and decompresses without a limit. Here each array must have exactly as many
bytes as its header states, and all arrays of an archive may decompress to at most MAX_RATIO times the size of the file. Nothing
in a file is executed: object arrays raise an error.
"""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from negmine.mining.regular_file import cause, open_regular
from negmine.ops.checks import describe

MAX_RATIO = 100  # limit for decompressed size / size of the archive
FREE_BYTES = 1 << 26  # MAX_RATIO applies only to archives that decompress to more bytes than this
MAX_HEADER = 10_000
MAX_MEMBERS = 10_000


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """The array of a .npy file of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is {version}, not (1, 0) or (2, 0)")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file, max_header_size=MAX_HEADER)
    if dtype.hasobject or dtype.fields is not None or dtype.kind not in "biufUSV":
        raise ValueError(f"its dtype is {describe(dtype)}, not numbers or strings")
    count = 1
    for side in shape:
        count *= side  # Python's ints: no overflow
    begin = file.tell()
    if any(side < 0 for side in shape) or not dtype.itemsize or begin + count * dtype.itemsize != size:
        raise ValueError(f"its header states shape {describe(shape)} of {dtype}, but {size - begin:,} bytes follow")
    array = np.empty(count, dtype)
    view: np.ndarray = array.view(np.uint8) if count else np.empty(0, np.uint8)
    at = 0
    while at < array.nbytes:
        piece = file.read(min(1 << 20, array.nbytes - at))
        if not piece:
            raise ValueError("it ends early")
        view[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)


def _problem(path: str | os.PathLike, what: str, error: BaseException) -> ValueError:
    return ValueError(f"{describe(str(Path(path)))} must be a {what} ({cause(error)})")


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, in memory."""
    with open_regular(path) as file:
        try:
            return _read_array(file, os.fstat(file.fileno()).st_size)
        except Exception as error:  # the parsers of NumPy, zipfile and zlib raise many types
            raise _problem(path, ".npy file of numbers or strings", error) from error


def read_npz(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name: all of them, or those in `names` that exist."""
    with open_regular(path) as file:
        try:
            return _read_members(file, names)
        except Exception as error:  # the parsers of NumPy, zipfile and zlib raise many types
            raise _problem(path, ".npz file of numbers or strings", error) from error


def names_in_npz(path: str | os.PathLike) -> list[str]:
    """The names of the arrays of a .npz file."""
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        except Exception as error:  # the parsers of NumPy, zipfile and zlib raise many types
            raise _problem(path, ".npz file", error) from error


def _read_members(file: IO[bytes], names: Iterable[str] | None) -> dict[str, np.ndarray]:
    size = os.fstat(file.fileno()).st_size
    wanted = None if names is None else set(names)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"it contains {len(members):,} arrays, more than {MAX_MEMBERS:,}")
        by_name: dict[str, Any] = {member.filename.removesuffix(".npy"): member for member in members}
        if len(by_name) != len(members):
            raise ValueError("it contains two arrays with the same name")
        chosen = {name: member for name, member in by_name.items() if wanted is None or name in wanted}
        inflated = sum(member.file_size for member in chosen.values())
        if inflated > max(FREE_BYTES, size) and inflated > MAX_RATIO * size:
            raise ValueError(f"its {size:,} bytes would decompress to {inflated:,}")
        found = {}
        for name, member in chosen.items():
            if member.compress_type == zipfile.ZIP_STORED and member.file_size > size:
                raise ValueError(
                    f"the stated size of its {name}, {member.file_size:,} bytes, is more than the file has"
                )
            with archive.open(member) as held:
                found[name] = _read_array(held, member.file_size)
        return found
