"""Vectors of Arrow, decoded piece by piece into a temporary file that is memory-mapped and disappears when the process ends."""

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from negmine.mining.tables import matrix
from negmine.ops.checks import refuse

DECODED_ROWS = 4096  # decoded at a time


def decoded(op: str, name: str, source: str, column: str, pieces: Iterator[Any]) -> np.ndarray:
    """(rows, D) of Arrow arrays of lists of floats, as a private memory map. source: what they are of, for errors."""
    rows, dim, dtype = 0, 0, np.dtype(np.float32)
    with tempfile.TemporaryFile(prefix="negmine-") as file:
        for lists in pieces:
            part = matrix(lists)
            if part is not None and len(part):
                dim, dtype = dim or part.shape[1], part.dtype
            if part is None or (len(part) and part.shape[1] != dim):
                wanted = f"lists of one length without gaps in column {column!r}"
                raise refuse(op, name, wanted, f"{source} near row {rows}")
            try:
                file.write(part.reshape(-1).data)
            except OSError as error:
                where = f"{op}: {name}: no room in {tempfile.gettempdir()!r} for the rows of {source!r}"
                raise OSError(error.errno, f"{where} ({error.strerror}); TMPDIR names another folder") from error
            rows += len(lists)
        file.flush()
        return np.memmap(file, dtype, "c", 0, (rows, dim)) if rows and dim else np.empty((rows, dim), dtype)
