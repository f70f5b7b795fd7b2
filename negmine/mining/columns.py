"""Columns of texts, ids and lists, read by position, whatever container holds them.

Labels of a pandas index are ignored: entry 0 is the first entry. Mappings, which have no positions, and single strings raise a
TypeError.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from negmine.mining.tables import is_stream
from negmine.ops.checks import Phrase, describe, kind_of, refuse, require_stored

TEXTS = "texts, one per row, in a list, an array, or a column of a table"
BLOCK = 4096  # entries converted to Python objects at a time


def _drained(op: str, name: str, stream: Any) -> list:
    """All entries of a column of a streamed dataset; of its only column of strings if no column is given."""
    if not hasattr(stream, "column_names"):
        return list(stream)
    rows = iter(stream)
    first: dict[str, Any] = next(rows, {})
    fitting = [key for key, entry in first.items() if isinstance(entry, str)]
    if len(fitting) != 1:
        wanted = "a streamed dataset with one column of strings, or one of its columns"
        raise refuse(op, name, wanted, Phrase(f"columns {', '.join(map(str, first)) or 'of an empty one'}"), TypeError)
    return [first[fitting[0]], *(row[fitting[0]] for row in rows)]


def is_column(value: Any) -> bool:
    """Whether a value can be read by position. Strings, mappings and scalars cannot."""
    if isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset)) or getattr(value, "ndim", 1) == 0:
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


class Column:
    """The entries of a container, by position."""

    def __init__(self, op: str, name: str, value: Any, wanted: str = TEXTS) -> None:
        self.op, self.name, self.given = op, name, value
        if is_stream(value):
            value = self.given = _drained(op, name, value)
        if not is_column(value):
            raise refuse(op, name, wanted, _kind(value), TypeError)
        if hasattr(value, "column_names") and hasattr(value, "features"):  # a datasets.Dataset
            value = value[_text_column(op, name, value)]
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape) != 1:
            raise refuse(op, name, wanted, Phrase(f"{kind_of(value)} of shape {tuple(shape)}"), TypeError)
        if isinstance(value, Tensor):
            require_stored(op, name, value)
            value = value.detach().cpu().numpy()
        if type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "array"):
            value = value.array  # of a Series or an Index: indexed by position
        self._held = value

    def __len__(self) -> int:
        return len(self._held)

    def block(self, begin: int, end: int) -> list:
        """Entries [begin, end) as Python objects."""
        part = self._held[begin:end]
        for convert in ("to_pylist", "tolist"):  # Arrow; NumPy and pandas
            if hasattr(part, convert):
                return getattr(part, convert)()
        return list(part)

    def blocks(self) -> Iterator[tuple[int, list]]:
        """(begin, entries) of all blocks."""
        for begin in range(0, len(self), BLOCK):
            yield begin, self.block(begin, min(begin + BLOCK, len(self)))

    def take(self, rows: np.ndarray) -> list:
        """The entries of these rows as Python objects."""
        if isinstance(self._held, np.ndarray):
            return self._held[rows].tolist()
        if type(self._held).__module__.partition(".")[0] == "datasets" and len(rows):
            return list(self._held[rows.tolist()])  # decoded together; one by one takes 0.1 ms a row
        found = [self._held[row] for row in rows.tolist()]
        return [entry.as_py() if hasattr(entry, "as_py") else entry for entry in found]

    def strings(self, rows: np.ndarray) -> list[str]:
        """The entries of these rows. Raises TypeError if one is not a string."""
        found = self.take(rows)
        for row, entry in zip(rows.tolist(), found, strict=True):
            if not isinstance(entry, str):
                raise refuse(self.op, self.name, "strings", Phrase(f"{_kind(entry)} in row {row}"), TypeError)
        return found

    def require_length(self, rows: int, wanted: str) -> None:
        if len(self) != rows:
            raise refuse(self.op, self.name, wanted, Phrase(len(self)))

    def texts(self) -> Iterator[tuple[int, list[str]]]:
        """(begin, texts) of all blocks. Raises TypeError for an entry that is not a string."""
        for begin, block in self.blocks():
            for row, entry in enumerate(block, begin):
                if not isinstance(entry, str):
                    came = Phrase(f"{_kind(entry)} in row {row}")
                    raise refuse(self.op, self.name, "strings", came, TypeError)
            yield begin, block


def _kind(value: Any) -> Phrase:
    """The type of a value, and the value itself if it is a number."""
    if isinstance(value, (int, float)):
        return Phrase(f"{describe(value, 40)} ({type(value).__name__})")
    return kind_of(value)


def _text_column(op: str, name: str, table: Any) -> str:
    """The only column of strings of a datasets.Dataset."""
    fitting = [
        key for key, kind in table.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if len(fitting) != 1:
        wanted = "a Dataset with one column of strings, or one of its columns"
        raise refuse(op, name, wanted, Phrase(f"a Dataset with columns {', '.join(table.column_names)}"), TypeError)
    return fitting[0]


def split_mapping(op: str, names: tuple[str, str], ids: Any, texts: Any) -> tuple[Any, Any]:
    """Ids and texts. A mapping from ids to texts is split into both. `names`: the names of the arguments."""
    if not isinstance(texts, Mapping):
        return ids, texts
    if ids is not None:
        raise refuse(op, names[1], f"a sequence, not a mapping, if {names[0]} is given", _kind(texts), TypeError)
    for key, text in texts.items():
        if not isinstance(text, str):
            raise refuse(
                op,
                names[1],
                "a mapping from ids to strings",
                Phrase(f"{_kind(text)} for id {describe(key, 60)}"),
                TypeError,
            )
    return list(texts), list(texts.values())
