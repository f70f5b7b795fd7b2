"""Lists of corpus rows, one list per query, in compressed sparse form: the rows of query q are rows[indptr[q] : indptr[q + 1]].

Positives and exclusions are given as one int per query, as a list of int lists, or as the tuple (indptr, indices); `parse`
converts each of these forms.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from negmine.ops.checks import refuse, require_stored

FORMS = "one row number a query, a list of lists of row numbers, or a tuple (indptr, indices)"


class RowLists(NamedTuple):
    """Q lists of row numbers."""

    indptr: np.ndarray  # (Q + 1,) int64
    rows: np.ndarray  # (P,) int64, P = entries of all lists together

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
        """The lists of some queries, in that order."""
        sizes = self.sizes[queries]
        indptr = np.r_[0, np.cumsum(sizes)]
        at = np.arange(indptr[-1]) - np.repeat(indptr[:-1], sizes) + np.repeat(self.indptr[queries], sizes)
        return RowLists(indptr, self.rows[at])

    def padded(self) -> np.ndarray:
        """(Q, longest) int64, -1 past the end of a list."""
        out = np.full((len(self.sizes), int(self.sizes.max(initial=0))), -1)
        out[self.queries, np.arange(len(self.rows)) - self.indptr[self.queries]] = self.rows
        return out

    def union(self, other: "RowLists") -> "RowLists":
        """Each query's set of rows in either, ascending."""
        pairs = np.stack([np.r_[self.queries, other.queries], np.r_[self.rows, other.rows]])  # (2, P + P')
        pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
        new = np.ones(pairs.shape[1], dtype=bool)
        new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
        sizes = np.bincount(pairs[0, new], minlength=len(self.indptr) - 1)
        return RowLists(np.r_[0, np.cumsum(sizes)], pairs[1, new])

    def reduce(self, values: np.ndarray, how: str) -> np.ndarray:
        """values (P,) fp32 -> (Q,) fp32: the "min", "max" or "mean" of each list; NaN for an empty list or one with NaN."""
        out = np.full(len(self.indptr) - 1, np.nan, np.float32)  # (Q,)
        some = self.sizes > 0
        if not some.any():
            return out
        starts = self.indptr[:-1][some]  # reduceat reads up to the next start, and empty lists lie between none
        if how == "mean":
            out[some] = np.add.reduceat(values.astype(np.float64), starts) / self.sizes[some]
        else:
            out[some] = (np.minimum if how == "min" else np.maximum).reduceat(values, starts)
        return out

    def content_hash(self) -> str:
        """One hash of all lists."""
        return hashlib.blake2b(self.indptr.tobytes() + self.rows.tobytes(), digest_size=16).hexdigest()


def _int_array(op: str, name: str, value: Any) -> np.ndarray:
    """A flat sequence of ints as an int64 array."""
    if isinstance(value, Tensor):
        require_stored(op, name, value)
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise refuse(op, name, "a flat sequence of ints", value, TypeError)
    return array.astype(np.int64)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim > 0)


def parse(op: str, name: str, value: Any, Q: int, K: int) -> RowLists:
    """The Q lists that `value` holds in any of its forms; raises for an entry outside [0, K)."""
    if not _is_sequence(value):
        raise refuse(op, name, FORMS, value, TypeError)
    if isinstance(value, tuple) and len(value) == 2 and all(_is_sequence(part) for part in value):
        lists = RowLists(_int_array(op, f"{name}'s indptr", value[0]), _int_array(op, f"{name}'s indices", value[1]))
        steps = np.diff(lists.indptr)
        if (
            len(lists.indptr) != Q + 1
            or lists.indptr[0] != 0
            or (steps < 0).any()
            or lists.indptr[-1] != len(lists.rows)
        ):
            wanted = (
                f"ascending from 0 to the length of indices ({len(lists.rows)}), one entry more than the {Q} queries"
            )
            raise refuse(op, f"{name}'s indptr", wanted, value[0])
    elif len(value) != Q:
        raise refuse(op, name, f"as long as there are queries ({Q})", f"{len(value)} entries")
    elif not any(_is_sequence(entry) for entry in value):
        lists = RowLists(np.arange(Q + 1), _int_array(op, name, value))
    else:
        entries = [_int_array(op, f"{name}[{q}]", entry) for q, entry in enumerate(value)]
        sizes = [len(entry) for entry in entries]
        lists = RowLists(np.r_[0, np.cumsum(sizes)].astype(np.int64), np.concatenate(entries))
    outside = np.flatnonzero((lists.rows < 0) | (lists.rows >= K))
    if len(outside):
        query = int(np.searchsorted(lists.indptr, outside[0], side="right") - 1)
        came = f"{lists.rows[outside[0]]} for query {query}"
        raise refuse(op, name, f"row numbers of the corpus, in [0, {K})", came)
    return lists
