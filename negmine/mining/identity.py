"""Determines which rows are the same document or the same query, and which documents are not allowed as negatives of a query.

    document   corpus rows with equal ids, or with equal texts after NFC normalisation and white-space folding, transitively. The
               lowest row represents the document. Empty texts are never equal. With deduplicate="exact", rows with equal
               embeddings are the same document too.
    query      rows with equal ids or equal texts; if neither ids nor texts are given, rows with equal embeddings. The rows of a
               query share their positives.

Ids and texts are hashed to 128 bits once, before a scan. A scan uses row numbers only: the rows that represent documents, and the
documents to leave out for each query.
"""

import hashlib
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from negmine.mining.columns import Column, split_mapping
from negmine.mining.dedup import first_equal
from negmine.mining.row_lists import RowLists, SharedLists, parse
from negmine.ops.checks import Phrase, describe, refuse

IDS = "one id per row: all ints or all strings, in a list, an array, or a column of a table"
# A key is two 64-bit words. Keys of ints and of empty texts are not hashes; these values of the second word mark them.
INT_KEY, BLANK_KEY = 1 << 62, 1 << 61
QUERIES = 8192  # how many queries are counted at a time
SHARED = (
    "{}: {} rows of query_embeddings are equal to rows with other positives, so they share these positives; pass query_ids or "
    "query_texts if they are different queries"
)

EMPTY = (
    "{}: {} of the {:,} texts of the corpus are empty, the first in row {}, and may become negatives; remove them, or name them "
    "in exclude"
)
NOT_FINITE = "{}: {} contain NaN or infinity in {:,} of {:,} rows, which {}: {}"
EFFECTS = {"query_embeddings": "get no negatives", "corpus_embeddings": "are never negatives"}
SHOWN_ROWS = 10  # row numbers in a message


def fold(text: str) -> str:
    """The form in which texts are compared: NFC, with each run of white space replaced by one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def text_keys(column: Column, blank: int) -> np.ndarray:
    """(rows, 2) uint64 keys, equal for equal texts. Empty texts get unique keys, also across columns with different `blank`."""
    keys = np.empty((len(column), 2), np.uint64)  # (rows, 2)
    for begin, block in column.texts():
        folded = [fold(text) for text in block]
        part = keys[begin : begin + len(block)]
        part[:] = np.frombuffer(b"".join(map(_hash, folded)), np.uint64).reshape(-1, 2)
        empty = np.flatnonzero([not text for text in folded])
        part[empty, 0], part[empty, 1] = begin + empty, BLANK_KEY + blank
    return keys


def is_blank(keys: np.ndarray) -> np.ndarray:
    """bool (rows,): whether the keys (rows, 2) are those of empty texts."""
    return keys[:, 1] - np.uint64(BLANK_KEY) <= 1  # wraps around for smaller numbers


def id_keys(
    op: str, name: str, blocks: Any, rows: int, kind: type | None = None, place: str = "row"
) -> tuple[np.ndarray, type | None]:
    """Keys (rows, 2) uint64, equal for equal ids, of blocks of (begin, ids), and the type of the ids.

    Raises TypeError unless all ids have the same type, which must be `kind` if that is given.
    """
    keys = np.empty((rows, 2), np.uint64)  # (rows, 2)
    for begin, block in blocks:
        for row, entry in enumerate(block, begin):
            found = str if isinstance(entry, str) else int if is_int(entry) else None
            if found is None or found is not (kind or found):
                wanted = (
                    "ints or strings" if kind is None else f"{'strings' if kind is str else 'ints'}, like the other ids"
                )
                raise refuse(
                    op,
                    name,
                    wanted,
                    Phrase(f"{describe(entry, 60)} ({type(entry).__name__}) in {place} {row}"),
                    TypeError,
                )
            kind = found
        part = keys[begin : begin + len(block)]
        if kind is int:
            try:
                part[:, 0] = np.array([int(entry) for entry in block], np.int64).view(np.uint64)
            except OverflowError:
                came = Phrase(f"a larger int in rows {begin} to {begin + len(block)}")
                raise refuse(op, name, "ints of at most 64 bits", came) from None
            part[:, 1] = INT_KEY
        else:
            part[:] = np.frombuffer(b"".join(map(_hash, block)), np.uint64).reshape(-1, 2)
    return keys, kind


def is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def joined_groups(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Merge the groups of two partitions of the rows wherever they overlap.

    A partition is an array (rows,): for each row, the lowest row of its group. Both arguments and the result have this form.
    """
    lowest = first.copy()
    while True:
        a, b = lowest, lowest[other]  # (rows,) each: the groups that each row joins
        apart = np.flatnonzero(a != b)
        if not len(apart):
            return lowest
        low, high = np.minimum(a[apart], b[apart]), np.maximum(a[apart], b[apart])
        lowest = lowest.copy()
        np.minimum.at(lowest, high, low)
        while not np.array_equal(pointed := lowest[lowest], lowest):
            lowest = pointed


@dataclass(frozen=True)
class Side:
    """The ids and texts of the queries or of the corpus, checked and hashed."""

    ids: Column | None
    texts: Column | None
    id_keys: np.ndarray | None  # (rows, 2) uint64
    text_keys: np.ndarray | None
    id_type: type | None

    @classmethod
    def open(cls, op: str, names: tuple[str, str], ids: Any, texts: Any, rows: int, blank: int) -> "Side":
        """names: the names of the two arguments. rows: the number of embeddings."""
        ids, texts = split_mapping(op, names, ids, texts)
        id_column = None if ids is None else Column(op, names[0], ids, IDS)
        text_column = None if texts is None else Column(op, names[1], texts)
        for column, what in ((id_column, "ids"), (text_column, "texts")):
            if column is not None:
                column.require_length(rows, f"{rows} {what}, one per row")
        keys, kind = (None, None) if id_column is None else id_keys(op, names[0], id_column.blocks(), rows)
        hashed = None if text_column is None else text_keys(text_column, blank)
        return cls(id_column, text_column, keys, hashed, kind)

    @classmethod
    def of_texts(cls, op: str, names: tuple[str, str], ids: Any, texts: Any, blank: int) -> "Side":
        """A side with one row for each text."""
        ids, texts = split_mapping(op, names, ids, texts)
        return cls.open(op, names, ids, texts, len(Column(op, names[1], texts)), blank)

    def __len__(self) -> int:
        return len(self.ids or self.texts or ())

    def groups(self) -> np.ndarray | None:
        """(rows,) int64: for each row, the lowest row of the same query or document; None if there are neither ids nor texts."""
        parts = [first_equal(keys) for keys in (self.id_keys, self.text_keys) if keys is not None]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else joined_groups(*parts)

    def content(self, ids: str, texts: str) -> dict[str, str]:
        """Hashes of the ids and the texts that were given, by name of the argument."""
        given = {ids: self.id_keys, texts: self.text_keys}
        return {
            name: hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()
            for name, keys in given.items()
            if keys is not None
        }


def _matches(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of others (P, 2), the lowest row of keys (rows, 2) with an equal key: (P,) int64, -1 if there is none."""
    lowest = first_equal(np.concatenate([keys, others]))[len(keys) :]
    return np.where(lowest < len(keys), lowest, -1)


@dataclass(frozen=True)
class Hidden:
    """The documents that are not allowed as negatives of each query."""

    given: RowLists  # the positives as given, without repetitions
    positives: SharedLists  # the positives of all rows of the same query
    exclude: RowLists
    own: np.ndarray  # (Q,) int64: the document whose text equals that of the query; -1 = none
    id_groups: np.ndarray | None  # (K,) int64: the lowest row with the same id; None if positives are row numbers
    first: np.ndarray | None  # (K,) int64: the lowest row of the same document; None = every row is its own document
    rows: int  # K
    # The rows that contain NaN or infinity, of the queries and of the corpus. They have no negatives, and are none.
    not_finite_queries: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    not_finite: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """The rows that represent the documents of `rows`."""
        return rows if self.first is None else self.first[rows]

    def with_equal_rows(self, lowest: np.ndarray) -> "Hidden":
        """A copy in which rows with equal embeddings are one document. lowest (K,) int64: the lowest row equal to each row."""
        return replace(self, first=lowest if self.first is None else joined_groups(self.first, lowest))

    @property
    def distinct(self) -> np.ndarray | None:
        """(K,) bool: the rows that represent their document and are finite; None if all do."""
        if self.first is None and not len(self.not_finite):
            return None
        every = np.arange(self.rows)
        distinct = self.documents(every) == every
        distinct[self.not_finite] = False
        return distinct

    @property
    def sizes(self) -> np.ndarray:
        """(Q,) int64: an upper bound on the number of documents hidden from each query."""
        return self.positives.sizes + self.exclude.sizes + (self.own >= 0)

    def take(self, queries: np.ndarray) -> RowLists:
        """The documents hidden from some queries, ascending, without those that are not finite."""
        documents = RowLists.union(*self._parts(queries))
        return documents.without(self.not_finite) if len(self.not_finite) else documents

    def _parts(self, queries: np.ndarray) -> tuple[RowLists, RowLists, RowLists]:
        """The excluded documents, those with the text of the query, and the positives."""
        positives, exclude, own = self.positives.take(queries), self.exclude.take(queries), self.own[queries]
        some = np.flatnonzero(own >= 0)
        count = len(queries)
        return (
            RowLists.of_pairs(exclude.queries, self.documents(exclude.rows), count),
            RowLists.of_pairs(some, self.documents(own[some]), count),
            RowLists.of_pairs(positives.queries, self.documents(positives.rows), count),
        )

    def count(self, first: int, last: int) -> dict[str, int]:
        """The number of pairs of a query in [first, last) and a row that are hidden, by reason; only the first reason counts."""
        sizes = np.ones(1, np.int64) if self.first is None else np.bincount(self.first, minlength=self.rows)
        id_sizes = None if self.id_groups is None else np.bincount(self.id_groups, minlength=self.rows)
        spare = 0 if self.first is None else self.rows - int((sizes > 0).sum())  # rows that do not represent a document
        broken = self.not_finite[self.documents(self.not_finite) == self.not_finite]  # those that represent a document
        counts = dict.fromkeys(("positive", "exclude", "own_text", "equal_to_positive", "duplicate", "not_finite"), 0)
        for begin in range(first, last, QUERIES):
            queries = np.arange(begin, min(begin + QUERIES, last))
            positives = self.positives.take(queries)
            named = np.ones(len(positives.rows), np.int64) if id_sizes is None else id_sizes[positives.rows]  # (P,)
            pairs = positives.queries * self.rows + self.documents(positives.rows)  # (P,)
            positive_documents, inverse = np.unique(pairs, return_inverse=True)
            named_in = np.bincount(inverse.reshape(-1), named, len(positive_documents)).astype(np.int64)
            counts["positive"] += int(named.sum())
            seen = np.empty(0, np.int64)
            reasons = zip(("exclude", "own_text", "equal_to_positive"), self._parts(queries), strict=True)
            for reason, part in reasons:
                documents = np.setdiff1d(part.queries * self.rows + part.rows, seen)
                held = sizes[documents % self.rows if self.first is not None else np.zeros_like(documents)]
                if len(positive_documents):
                    at = np.searchsorted(positive_documents, documents).clip(max=len(positive_documents) - 1)
                    known = np.where(positive_documents[at] == documents, named_in[at], 0)
                else:
                    known = np.zeros_like(documents)
                counts[reason] += int((held - known).sum())
                counts["duplicate"] -= int((held - 1).sum())
                seen = np.r_[seen, documents]
            counts["duplicate"] += spare * len(queries)
            is_broken = np.isin(queries, self.not_finite_queries)
            counts["not_finite"] += count_not_finite(*divmod(seen, self.rows), is_broken, self.rows - spare, broken)
        return counts


def count_not_finite(
    queries: np.ndarray, documents: np.ndarray, is_broken: np.ndarray, num_documents: int, broken: np.ndarray
) -> int:
    """The number of pairs of one of B queries and a document that are not hidden, and of which one is not finite.

    queries, documents (P,): the hidden pairs, without repetitions. is_broken (B,) bool: the queries that are not finite.
    num_documents: the number of all documents. broken (M,): those that are not finite.
    """
    if not is_broken.any() and not len(broken):
        return 0
    B = len(is_broken)
    hidden = np.bincount(queries, minlength=B)
    broken_hidden = np.bincount(queries[np.isin(documents, broken)], minlength=B)
    return int(np.where(is_broken, num_documents - hidden, len(broken) - broken_hidden).sum())


def warn_not_finite(op: str, name: str, found: np.ndarray, rows: int, stacklevel: int) -> None:
    """Warn if some of the rows of the argument `name` contain NaN or infinity. found (M,): their numbers, ascending."""
    if len(found):
        message = NOT_FINITE.format(op, name, len(found), rows, EFFECTS[name], shown_rows(found))
        warnings.warn(message, UserWarning, stacklevel)


def shown_rows(numbers: np.ndarray) -> str:
    """The first of some row numbers, for a message."""
    return ", ".join(map(str, numbers[:SHOWN_ROWS].tolist())) + (", ..." if len(numbers) > SHOWN_ROWS else "")


def resolve(
    op: str,
    queries: Side,
    corpus: Side,
    positives: Any,
    exclude: Any,
    Q: int,
    K: int,
    query_digests: Callable[[], np.ndarray],
    *,
    warn: bool = True,
) -> Hidden:
    """Convert positives and exclusions, in any of their forms, to the documents hidden from each query.

    query_digests: a function that returns (Q, 2) uint64 hashes of the rows of query_embeddings. It is called if neither ids nor
    texts are given. Rows with equal hashes are then one query, and a warning is given if this adds positives to some rows.
    """
    known = corpus.id_keys

    def row_of(name: str, ids: list) -> np.ndarray:
        assert known is not None
        return _matches(known, id_keys(op, name, [(0, ids)], len(ids), corpus.id_type, "entry")[0])

    lookup = None if known is None else row_of
    given = parse(op, "positives", positives, Q, K, lookup)
    excluded = RowLists.empty(Q) if exclude is None else parse(op, "exclude", exclude, Q, K, lookup)
    if warn and corpus.text_keys is not None:
        empty = np.flatnonzero(is_blank(corpus.text_keys))
        if len(empty):
            warnings.warn(EMPTY.format(op, len(empty), K, empty[0]), UserWarning, stacklevel=7)
    own = np.full(Q, -1)
    if queries.text_keys is not None and corpus.text_keys is not None:
        own = _matches(corpus.text_keys, queries.text_keys)
    list_of = queries.groups()
    by_value = list_of is None
    if list_of is None:
        list_of = first_equal(query_digests())
    united = given
    if (list_of != np.arange(Q)).any():
        united = RowLists.of_pairs(list_of[given.queries], given.rows, Q)
        if by_value and warn:
            grown = int((united.sizes[list_of] != given.sizes).sum())
            if grown:
                warnings.warn(SHARED.format(op, grown), UserWarning, stacklevel=7)
    return Hidden(
        given,
        SharedLists(united, list_of),
        excluded,
        own,
        None if known is None else first_equal(known),
        corpus.groups(),
        K,
    )
