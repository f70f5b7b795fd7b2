"""Lists of corpus rows, one per query, in compressed sparse form: the rows of query q are rows[indptr[q] : indptr[q + 1]].

Users give positives and exclusions as one entry per query, as a list of lists, or as the tuple (indptr, indices). `parse`
converts each of these forms. An entry is a row number, or an id if the corpus has ids.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from negmine.mining.columns import Column, is_column
from negmine.ops.checks import Phrase, describe, refuse, require_stored, require_unmasked

FORMS = "one {entry} per query, a list of lists of {entry}s{more}, or a tuple (indptr, indices)"


class RowLists(NamedTuple):
    """Q lists of row numbers."""

    indptr: np.ndarray  # (Q + 1,) int64
    rows: np.ndarray  # (P,) int64; P is the number of entries in all lists

    @classmethod
    def empty(cls, queries: int) -> "RowLists":
        """An empty list for each query."""
        return cls(np.zeros(queries + 1, np.int64), np.empty(0, np.int64))

    @property
    def sizes(self) -> np.ndarray:
        """(Q,) int64."""
        return np.diff(self.indptr)

    @property
    def queries(self) -> np.ndarray:
        """(P,) int64: the query of each entry."""
        return np.repeat(np.arange(len(self.indptr) - 1), self.sizes)

    def take(self, queries: np.ndarray) -> "RowLists":
        """The lists of the given queries, in the given order."""
        sizes = self.sizes[queries]
        indptr = np.r_[0, np.cumsum(sizes)]
        at = np.arange(indptr[-1]) - np.repeat(indptr[:-1], sizes) + np.repeat(self.indptr[queries], sizes)
        return RowLists(indptr, self.rows[at])

    def padded(self) -> np.ndarray:
        """(Q, longest) int64, padded with -1."""
        out = np.full((len(self.sizes), int(self.sizes.max(initial=0))), -1)
        out[self.queries, np.arange(len(self.rows)) - self.indptr[self.queries]] = self.rows
        return out

    def union(self, *others: "RowLists") -> "RowLists":
        """For each query, the rows that are in any of its lists, ascending."""
        lists = (self, *others)
        pairs = np.stack([np.concatenate([part.queries for part in lists]), np.concatenate([p.rows for p in lists])])
        return self.of_pairs(pairs[0], pairs[1], len(self.indptr) - 1)

    @staticmethod
    def of_pairs(queries: np.ndarray, rows: np.ndarray, Q: int) -> "RowLists":
        """queries, rows (P,) -> for each query its rows, ascending and without repetitions."""
        pairs = np.stack([queries, rows])  # (2, P)
        pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
        new = np.ones(pairs.shape[1], dtype=bool)
        new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
        return RowLists(np.r_[0, np.cumsum(np.bincount(pairs[0, new], minlength=Q))], pairs[1, new])

    def without(self, rows: np.ndarray) -> "RowLists":
        """Each list without the given rows (M,)."""
        kept = ~np.isin(self.rows, rows)
        sizes = np.bincount(self.queries[kept], minlength=len(self.sizes))
        return RowLists(np.r_[0, np.cumsum(sizes)], self.rows[kept])

    def distinct(self) -> "RowLists":
        """Each list without repetitions, in the order given."""
        queries = self.queries
        by_row = np.lexsort((self.rows, queries))  # stable: equal entries keep their order
        pairs = np.stack([queries, self.rows])[:, by_row]
        new = np.ones(len(self.rows), dtype=bool)
        new[by_row[1:]] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
        return RowLists(np.r_[0, np.cumsum(np.bincount(queries[new], minlength=len(self.sizes)))], self.rows[new])

    def reduce(self, values: np.ndarray, how: str) -> np.ndarray:
        """values (P,) fp32 -> (Q,) fp32: the "min", "max" or "mean" of each list; NaN if the list is empty or contains NaN."""
        out = np.full(len(self.indptr) - 1, np.nan, np.float32)  # (Q,)
        some = self.sizes > 0
        if not some.any():
            return out
        starts = self.indptr[:-1][some]  # reduceat reads up to the next start; empty lists have no entries in between
        if how == "mean":
            out[some] = np.add.reduceat(values.astype(np.float64), starts) / self.sizes[some]
        else:
            out[some] = (np.minimum if how == "min" else np.maximum).reduceat(values, starts)
        return out

    def content_hash(self) -> str:
        """One hash of all lists."""
        return hashlib.blake2b(self.indptr.tobytes() + self.rows.tobytes(), digest_size=16).hexdigest()


class SharedLists(NamedTuple):
    """Lists of rows, where several queries may have the same list."""

    lists: RowLists
    list_of: np.ndarray  # (Q,) int64: the number of the list of each query

    @property
    def sizes(self) -> np.ndarray:
        """(Q,) int64."""
        return self.lists.sizes[self.list_of]

    def take(self, queries: np.ndarray) -> RowLists:
        """The lists of the given queries, in the given order."""
        return self.lists.take(self.list_of[queries])


Lookup = Callable[[str, list], np.ndarray]  # the argument's name and ids (P,) -> their rows (P,) int64, -1 = no such id


def whole_numbers(op: str, name: str, value: Any) -> np.ndarray:
    """Convert a flat sequence of ints to an int64 array. Raises an error for anything else."""
    if isinstance(value, Tensor):
        require_stored(op, name, value)
    require_unmasked(op, name, value)
    if isinstance(value, (list, tuple, Tensor, np.ndarray)):
        held = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    else:
        column = Column(op, name, value, "a flat sequence of ints")
        held = column.block(0, len(column))
    try:
        array = np.asarray(held)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.dtype.kind == "O" and array.ndim == 1 and all(type(entry) is int for entry in array):
        array = np.array(
            [min(max(entry, -1), 2**62) for entry in array], np.int64
        )  # too large for int64, so not a row number
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        strings = array.dtype.kind in "US" or (array.size and isinstance(array.flat[0], str))
        wanted = "row numbers; to give ids of documents, pass corpus_ids" if strings else "a flat sequence of ints"
        raise refuse(op, name, wanted, value, TypeError)
    return array.astype(np.int64)


def _entries(op: str, name: str, value: Any, lookup: Lookup | None) -> np.ndarray:
    """Convert a flat sequence of row numbers or ids to row numbers."""
    if lookup is None:
        return whole_numbers(op, name, value)
    column = Column(op, name, value, "a flat sequence of ids")
    return lookup(name, column.block(0, len(column)))


def parse(op: str, name: str, value: Any, Q: int, K: int, lookup: Lookup | None = None) -> RowLists:
    """Convert `value`, in any of its forms, to Q lists of rows without repetitions.

    Entries are ids if `lookup` is given, else row numbers. Raises an error for an entry that is not one of the K rows.
    """
    forms = (
        FORMS.format(entry="row number", more="") if lookup is None else FORMS.format(entry="id", more=" of corpus_ids")
    )
    if not is_column(value):
        raise refuse(op, name, forms, value, TypeError)
    if isinstance(value, tuple) and len(value) == 2 and all(is_column(part) for part in value):
        indptr = whole_numbers(op, f"{name}'s indptr", value[0])
        lists = RowLists(indptr, _entries(op, f"{name}'s indices", value[1], lookup))
        steps = np.diff(indptr)
        if len(indptr) != Q + 1 or indptr[0] != 0 or (steps < 0).any() or indptr[-1] != len(lists.rows):
            wanted = (
                f"ascending from 0 to the length of indices ({len(lists.rows)}), one entry more than the {Q} queries"
            )
            raise refuse(op, f"{name}'s indptr", wanted, value[0])
    elif len(value) != Q:
        raise refuse(op, name, f"of {Q} entries, one for each query", Phrase(f"{len(value)} entries"))
    elif getattr(value, "ndim", 1) == 1 and getattr(getattr(value, "dtype", None), "kind", "O") in "iu":
        lists = RowLists(np.arange(Q + 1), _entries(op, name, value, lookup))
    else:
        column = Column(op, name, value, forms) if getattr(value, "ndim", 1) == 1 else value
        parts = column.block(0, Q) if isinstance(column, Column) else list(column)
        if not any(is_column(part) for part in parts):
            lists = RowLists(np.arange(Q + 1), _entries(op, name, parts, lookup))
        else:
            for q, part in enumerate(parts):
                if not is_column(part):
                    raise refuse(
                        op, f"{name}[{q}]", f"a flat sequence of {'ints' if lookup is None else 'ids'}", part, TypeError
                    )
            sizes = [len(part) for part in parts]
            indptr = np.r_[0, np.cumsum(sizes)].astype(np.int64)
            if lookup is None:
                entries = [whole_numbers(op, f"{name}[{q}]", part) for q, part in enumerate(parts)]
                lists = RowLists(indptr, np.concatenate(entries))
            else:
                flat = [each for part in parts for each in (part.tolist() if hasattr(part, "tolist") else part)]
                lists = RowLists(indptr, lookup(name, flat))
    outside = np.flatnonzero((lists.rows < 0) | (lists.rows >= K))
    if len(outside):
        query = int(np.searchsorted(lists.indptr, outside[0], side="right") - 1)
        if lookup is not None:
            given = _entry(value, query, int(outside[0] - lists.indptr[query]), int(outside[0]))
            raise refuse(op, name, "ids of corpus_ids", Phrase(f"{describe(given, 80)} for query {query}"))
        came = Phrase(f"{lists.rows[outside[0]]} for query {query}")
        raise refuse(op, name, f"row numbers of the corpus, in [0, {K})", came)
    return lists.distinct() if (lists.sizes > 1).any() else lists


def _entry(value: Any, query: int, at: int, flat: int) -> Any:
    """The entry at a position of the list given for a query."""
    if isinstance(value, tuple) and len(value) == 2 and all(is_column(part) for part in value):
        return Column("", "", value[1]).block(flat, flat + 1)[0]
    entry = Column("", "", value).block(query, query + 1)[0] if getattr(value, "ndim", 1) == 1 else value[query]
    return entry if not is_column(entry) else list(entry)[at]
