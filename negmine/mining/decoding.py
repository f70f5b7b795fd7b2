"""Decode Arrow vectors into a memory-mapped temporary file, which disappears when the process ends.

A stream is decoded from start to end. Of a file with parts, such as the row groups of Parquet, only the parts with requested rows
are decoded, each once. A process that needs some rows of a large file reads only those parts.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from negmine.mining.tables import matrix
from negmine.ops.checks import Phrase, refuse

DECODED_ROWS = 4096  # decoded at a time


def _no_room(op: str, name: str, source: str, error: OSError) -> OSError:
    where = f"{op}: {name}: no space left in {tempfile.gettempdir()!r} for the rows of {source!r}"
    return OSError(error.errno, f"{where} ({error.strerror}); set TMPDIR to another folder")


def _uneven(op: str, name: str, source: str, column: str, row: int) -> Exception:
    wanted = f"lists of equal length without nulls in column {column!r}"
    return refuse(op, name, wanted, Phrase(f"{source} near row {row}"))


def decoded(op: str, name: str, source: str, column: str, pieces: Iterator[Any]) -> np.ndarray:
    """Arrow arrays of lists of floats as a private memory map (rows, D). source: the file or table that errors name."""
    rows, dim, dtype = 0, 0, np.dtype(np.float32)
    with tempfile.TemporaryFile(prefix="negmine-") as file:
        for lists in pieces:
            part = matrix(lists)
            if part is not None and len(part):
                dim, dtype = dim or part.shape[1], part.dtype
            if part is None or (len(part) and part.shape[1] != dim):
                raise _uneven(op, name, source, column, rows)
            try:
                file.write(part.reshape(-1).data)
            except OSError as error:
                raise _no_room(op, name, source, error) from error
            rows += len(lists)
        file.flush()
        return np.memmap(file, dtype, "c", 0, (rows, dim)) if rows and dim else np.empty((rows, dim), dtype)


class DecodedRows:
    """(rows, D) of a file that is decoded piece by piece, when rows of a piece are first asked for."""

    ndim = 2

    def __init__(
        self, op: str, name: str, source: str, column: str, sizes: Sequence[int], read: Callable[[int], Iterator[Any]]
    ) -> None:
        """sizes: the number of rows of each piece. read(i): the Arrow arrays of piece i."""
        self._about, self._read = (op, name, source, column), read
        self._starts = np.r_[0, np.cumsum(np.array(sizes, np.int64))]
        self.is_decoded = np.array(sizes, np.int64) == 0  # (pieces,)
        rows, dim, self.dtype = int(self._starts[-1]), 0, np.dtype(np.float32)
        if rows:
            first = int(np.flatnonzero(~self.is_decoded)[0])
            lists = next((lists for lists in read(first) if len(lists)), None)
            if lists is None:
                raise ValueError(
                    f"{op}: {name} must be a complete file, got {source!r}, which has fewer rows than it says"
                )
            part = matrix(lists)
            if part is None:
                raise _uneven(*self._about, 0)
            dim, self.dtype = part.shape[1], part.dtype
        self.shape = (rows, dim)
        self._array = np.empty(self.shape, self.dtype)
        if rows and dim:
            self._file = tempfile.TemporaryFile(prefix="negmine-")  # noqa: SIM115
            os.ftruncate(self._file.fileno(), rows * dim * self.dtype.itemsize)
            self._array = np.memmap(self._file, self.dtype, "r+", 0, self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The rows of a slice, or of an array of numbers."""
        if isinstance(rows, slice):
            begin, end, _ = rows.indices(len(self))
            low, high = np.searchsorted(self._starts, (begin, end), side="right") - 1
            pieces = np.arange(low, high + (end > self._starts[high])) if end > begin else np.arange(0)
        else:
            pieces = np.unique(np.searchsorted(self._starts, rows, side="right") - 1)
        for piece in pieces[~self.is_decoded[pieces]].tolist():
            self._decode(piece)
        return self._array[rows]

    def _decode(self, piece: int) -> None:
        op, name, source, _ = self._about
        at, row_bytes = int(self._starts[piece]), self.shape[1] * self.dtype.itemsize
        for lists in self._read(piece):
            part = matrix(lists)
            if part is None or (len(part) and part.shape[1] != self.shape[1]):
                raise _uneven(*self._about, at)
            try:
                content, begin = part.reshape(-1).view(np.uint8).data, at * row_bytes
                while len(content):
                    written = os.pwrite(self._file.fileno(), content, begin)
                    content, begin = content[written:], begin + written
            except OSError as error:
                raise _no_room(op, name, source, error) from error
            at += len(lists)
        if at != self._starts[piece + 1]:
            raise ValueError(f"{op}: {name}: {source!r} changed while it was read")
        self.is_decoded[piece] = True
