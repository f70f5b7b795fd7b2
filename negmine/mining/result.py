"""MiningResult: the mined negatives with their scores, the positives and all settings.

    indices (Q, n) int64, rows of the corpus, hardest first, padded with -1
    scores  (Q, n) fp32, padded with -inf

A result is saved as one .npz file that contains a description in JSON. Nothing in it is ever executed.
"""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from negmine.mining import result_page
from negmine.mining.atomic_file import atomic_write, require_output
from negmine.mining.columns import Column
from negmine.mining.identity import Hidden, Side, resolve
from negmine.mining.numpy_file import read_npz
from negmine.mining.regular_file import cause, parse_json
from negmine.mining.row_lists import RowLists
from negmine.mining.training_rows import TrainingRows
from negmine.ops.checks import describe, refuse
from negmine.options import is_real

FORMAT = 2
MAX_DESCRIPTION_BYTES = 1 << 20  # limit on the size of the JSON, which takes a few thousand bytes
DTYPES = {
    "indices": np.int64,
    "scores": np.float32,
    "positive_scores": np.float32,
    "num_valid": np.int64,
    "positives_indptr": np.int64,
    "positives_rows": np.int64,
}
OPTIONAL = {"positive_pair_scores": np.float32, "query_rows": np.int64, "sources": np.int32}
IDS = ("query_ids", "corpus_ids")
QUARTILES = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}


@dataclass(frozen=True, eq=False)  # arrays cannot be compared by ==
class MiningResult:
    """The result of `mine_hard_negatives` or `load`, for Q queries and n = num_negatives.

    Attributes
    ----------
    indices : array (Q, n) int64
        The negatives of each query as row numbers of the corpus, hardest first; -1 at the end if it has fewer than n.
    scores : array (Q, n) float32
        The scores of the negatives; -inf where indices is -1.
    positive_scores : array (Q,) float32
        The score of each query's positives, on which margins are based; NaN if it has no positive.
    num_valid : array (Q,) int64
        The number of negatives of each query.
    positives : RowLists
        The corpus rows of each query's positives, without repetitions.
    skipped : dict
        The number of pairs of query and row that each mask and filter removed. A pair is counted once, for the first of them.
    config : dict
        Arguments, versions, sizes and content hashes.
    positive_pair_scores : array (P,) float32, optional
        The score of each of the P pairs in positives.
    query_ids, corpus_ids, query_texts, corpus_texts : optional
        The ids and texts that were passed to mining.
    query_rows : array (Q,) int64, optional
        For each row of queries, the first row of the same query; None if no two rows are the same query.
    sources : array (Q, n, retrievers) int32, optional
        The rank of each negative in each retriever's list, if the result was made by `merge_retrievers`.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(50, 16), dim=1)
    >>> result = negmine.mine_hard_negatives(rows[:5], rows, list(range(5)), num_negatives=2)
    >>> result.to_triplets().shape, result.num_valid.tolist()
    ((10, 3), [2, 2, 2, 2, 2])
    """

    indices: np.ndarray  # (Q, n) int64
    scores: np.ndarray  # (Q, n) fp32
    positive_scores: np.ndarray  # (Q,) fp32
    num_valid: np.ndarray  # (Q,) int64
    positives: RowLists  # a positive that was given by id is the lowest row with that id
    skipped: dict[str, int]
    config: dict[str, Any]
    positive_pair_scores: np.ndarray | None = None  # (P,) fp32
    query_ids: Any = None  # (Q,)
    corpus_ids: Any = None  # (K,)
    query_texts: Any = None  # (Q,)
    corpus_texts: Any = None  # (K,)
    query_rows: np.ndarray | None = None  # (Q,) int64
    sources: np.ndarray | None = None  # (Q, n, retrievers) int32

    @property
    def recall(self) -> float | None:
        """The measured share of the hardest rows that the approximate index found in this run; None if the index was exact."""
        return (self.config.get("index") or {}).get("recall")

    def hidden(self, exclude: Any = None) -> Hidden:
        """The documents that may not be a query's negatives: its positives, documents equal to it, and `exclude`.

        Parameters
        ----------
        exclude : optional
            Further documents that are excluded, in any form that `mine_hard_negatives` takes.

        Returns
        -------
        Hidden
            The excluded documents of each query.
        """
        op, (Q, K) = "MiningResult.hidden", (len(self.indices), self.config["corpus_rows"])
        sides = (
            Side.open(op, ("query_ids", "query_texts"), self.query_ids, self.query_texts, Q, 0),
            Side.open(op, ("corpus_ids", "corpus_texts"), self.corpus_ids, self.corpus_texts, K, 1),
        )
        rows = self.positives.rows
        names = rows if sides[1].ids is None else sides[1].ids.take(rows)
        of_query = np.arange(Q) if self.query_rows is None else self.query_rows
        every = np.stack([of_query.astype(np.uint64)] * 2, 1)
        return resolve(op, *sides, (self.positives.indptr, names), exclude, Q, K, lambda: every, warn=False)

    def to_triplets(self) -> np.ndarray:
        """Triplets of query, positive and negative, for each combination of a query's positives and negatives.

        Returns
        -------
        array (T, 3) int64, or object if ids are strings
            Queries and documents as query_ids and corpus_ids if the result has them, else as row numbers.

        Examples
        --------
        >>> rows = F.normalize(torch.randn(50, 16), dim=1)
        >>> result = negmine.mine_hard_negatives(rows[:5], rows, list(range(5)), num_negatives=2)
        >>> result.to_triplets().shape
        (10, 3)
        """
        queries, rows = self._pairs()  # (P,), (P, 1 + n)
        at, slot = np.nonzero(rows[:, 1:] >= 0)  # (T,) each
        documents = self.document_names(np.stack([rows[at, 0], rows[at, slot + 1]], 1))
        return _joined(self.query_names(queries[at])[:, None], documents)

    def to_n_tuples(self) -> np.ndarray:
        """Rows of a query, one of its positives and its n negatives. Queries with fewer than n negatives are left out.

        Returns
        -------
        array (M, 2 + n) int64, or object if ids are strings
            Queries and documents as query_ids and corpus_ids if the result has them, else as row numbers.
        """
        queries, rows = self._pairs()
        full = (rows >= 0).all(1)  # (P,)
        return _joined(self.query_names(queries[full])[:, None], self.document_names(rows[full]))

    def to_labeled_pairs(self) -> np.ndarray:
        """Pairs of query and document with a label: 1 for a positive, 0 for a negative.

        Returns
        -------
        array (L, 3) int64, or object if ids are strings
            Query, document and label. Queries and documents are ids if the result has them, else row numbers.
        """
        some = self.indices >= 0  # (Q, n)
        at, _ = np.nonzero(some)
        pairs = [
            np.stack([self.positives.queries, self.positives.rows, np.ones_like(self.positives.rows)], 1),
            np.stack([at, self.indices[some], np.zeros_like(at)], 1),
        ]
        joined = np.concatenate(pairs)
        joined = joined[np.argsort(joined[:, 0], kind="stable")]
        return _joined(
            self.query_names(joined[:, 0])[:, None], self.document_names(joined[:, 1])[:, None], joined[:, 2:]
        )

    def to_labeled_lists(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lists of a query's documents with labels, one list for each positive. Queries without negatives are left out.

        Returns
        -------
        queries : array (M,) int64, or object if ids are strings
            The query of each list.
        documents : array (M, 1 + n) int64, or object if ids are strings
            The positive, then the negatives. Lists of fewer than n negatives are padded with -1, or None if ids are strings.
        labels : array (M, 1 + n) int64
            1 for the positive, 0 for negatives and -1 for padding.
        """
        queries, rows = self._pairs()
        some = (rows[:, 1:] >= 0).any(1)  # (P,)
        labels = np.where(rows >= 0, 0, -1)
        labels[:, 0] = 1
        return self.query_names(queries[some]), self.document_names(rows[some]), labels[some]

    def to_jsonl(
        self,
        path: str | os.PathLike,
        query_texts: Any = None,
        corpus_texts: Any = None,
        *,
        corpus_titles: Any = None,
        form: str = "flagembedding",
    ) -> int:
        """Write training data to a file of JSON lines, atomically.

        Parameters
        ----------
        path : path
            The file.
        query_texts : sequence of str, optional
            The texts of the queries, by row. The default is the texts that were mined with.
        corpus_texts : sequence of str, optional
            The texts of the corpus, by row. The default is the texts that were mined with.
        corpus_titles : sequence of str, optional
            The titles of the corpus, by row. Tevatron's form has a field for them; in other forms they precede the text.
        form : str
            The fields of a line, which are those of the program that reads it:

            - "flagembedding": {"query", "pos", "neg", "pos_scores", "neg_scores"}
            - "tevatron": {"query_id", "query", "positive_passages": [{"docid", "title", "text"}], "negative_passages": [...]}
            - "ms-swift": {"messages", "positive_messages", "negative_messages"}
            - "sentence-transformers": {"anchor", "positive", "negative_1", ..., "negative_n"}, one line for each positive
            - "distillation": the same with "label", the scores of the positive and of the negatives
            - "pylate": {"query_id", "document_ids", "scores"}, without texts

        Returns
        -------
        int
            How many lines were written.

        Notes
        -----
        Queries and documents are named by query_ids and corpus_ids if the result has them, else by row numbers. Queries without
        a positive or without a negative are left out. "sentence-transformers" and "distillation" also leave out queries with
        fewer than n negatives. A warning says how many were left out.
        """
        op = "to_jsonl"
        rows = TrainingRows(op, self, form, query_texts, corpus_texts, corpus_titles)
        require_output(op, "path", path)
        lines = 0
        with atomic_write(op, path) as file:
            for line in rows.lines():
                file.write(line)
                lines += 1
        rows.warn()
        return lines

    def to_dataset(
        self,
        query_texts: Any = None,
        corpus_texts: Any = None,
        *,
        corpus_titles: Any = None,
        form: str = "sentence-transformers",
    ) -> Any:
        """The rows that `to_jsonl` writes, as a datasets.Dataset.

        Parameters
        ----------
        query_texts : sequence of str, optional
            The texts of the queries, by row. The default is the texts that were mined with.
        corpus_texts : sequence of str, optional
            The texts of the corpus, by row. The default is the texts that were mined with.
        corpus_titles : sequence of str, optional
            The titles of the corpus, by row. Tevatron's form has a field for them; in other forms they precede the text.
        form : str
            As in `to_jsonl`.

        Returns
        -------
        datasets.Dataset
            One row for each line that `to_jsonl` writes.

        Raises
        ------
        ImportError
            If the package datasets is not installed.
        """
        op = "to_dataset"
        rows = TrainingRows(op, self, form, query_texts, corpus_texts, corpus_titles)
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ImportError(f"{op}: needs the package datasets: pip install datasets") from error
        dataset = Dataset.from_list(list(rows))
        rows.warn()
        return dataset

    def to_parquet(
        self,
        path: str | os.PathLike,
        query_texts: Any = None,
        corpus_texts: Any = None,
        *,
        corpus_titles: Any = None,
        form: str = "sentence-transformers",
    ) -> int:
        """Write the rows that `to_jsonl` writes to a Parquet file, atomically.

        Parameters
        ----------
        path : path
            The file.
        query_texts : sequence of str, optional
            The texts of the queries, by row. The default is the texts that were mined with.
        corpus_texts : sequence of str, optional
            The texts of the corpus, by row. The default is the texts that were mined with.
        corpus_titles : sequence of str, optional
            The titles of the corpus, by row. Tevatron's form has a field for them; in other forms they precede the text.
        form : str
            As in `to_jsonl`.

        Returns
        -------
        int
            How many rows were written.

        Raises
        ------
        ImportError
            If the package pyarrow is not installed.
        """
        op = "to_parquet"
        rows = TrainingRows(op, self, form, query_texts, corpus_texts, corpus_titles)
        require_output(op, "path", path)
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{op}: needs the package pyarrow: pip install pyarrow") from error
        count, writer, held = 0, None, iter(rows)
        with atomic_write(op, path) as file:
            while block := list(itertools.islice(held, 1 << 14)):
                table = pyarrow.Table.from_pylist(block, schema=None if writer is None else writer.schema)
                writer = writer or parquet.ParquetWriter(file, table.schema)
                writer.write_table(table)
                count += len(block)
            if writer is None:
                parquet.write_table(pyarrow.table({}), file)
            else:
                writer.close()
        rows.warn()
        return count

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with one row for each positive and each negative of each query.

        Returns
        -------
        pandas.DataFrame
            Columns: query_id and document_id (row numbers if the result has no ids), label (1 for a positive, 0 for a negative),
            rank (0 for a positive, 1 for the hardest negative, and so on), score, and, if the texts are known, query and
            document.

        Raises
        ------
        ImportError
            If the package pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas: needs the package pandas: pip install pandas") from error
        some = self.indices >= 0  # (Q, n)
        at, slot = np.nonzero(some)
        each = np.r_[self.positives.queries, at]
        scores = self.positive_pair_scores
        scores = np.full(len(self.positives.rows), np.nan, np.float32) if scores is None else scores
        order = np.argsort(each, kind="stable")
        each, rows = each[order], np.r_[self.positives.rows, self.indices[some]][order]
        ranks = np.r_[np.zeros_like(self.positives.rows), slot + 1][order]
        columns: dict[str, Any] = {
            "query_id": self.query_names(each),
            "document_id": self.document_names(rows),
            "label": (ranks == 0).astype(np.int64),
            "rank": ranks,
            "score": np.r_[scores, self.scores[some]][order],
        }
        for name, texts, at_rows in (("query", self.query_texts, each), ("document", self.corpus_texts, rows)):
            if texts is not None:
                columns[name] = Column("to_pandas", f"{name} texts", texts).strings(at_rows)
        return pandas.DataFrame(columns)

    def summary(self) -> str:
        """A table, as text, of the scores of positives and negatives, the removed pairs, and queries with few negatives.

        Returns
        -------
        str
            Several lines.
        """
        Q, n = self.indices.shape
        some = self.indices >= 0  # (Q, n)
        gap = (self.positive_scores[:, None].astype(np.float64) - np.where(some, self.scores, np.nan))[some]
        columns = {"positive": self.positive_scores, "negative": self.scores[some], "difference": gap}
        lines = [f"{'':<12}" + "".join(f"{name:>12}" for name in ("count", "mean", "std", *QUARTILES))]
        for name, values in columns.items():
            finite = values[np.isfinite(values)].astype(np.float64)
            cells = f"{name:<12}{len(finite):>12,}"
            if len(finite):
                numbers = [finite.mean(), finite.std(), *np.quantile(finite, list(QUARTILES.values()))]
                cells += "".join(f"{number:>12.4f}" for number in numbers)
            lines.append(cells)
        short, none = int((self.num_valid < n).sum()), int((self.num_valid == 0).sum())
        lines.append(f"{Q:,} queries, {n} negatives requested for each: {short:,} have fewer, {none:,} have none")
        dropped = [f"{name} {count:,}" for name, count in self.skipped.items()]
        where = "the rank window" if self.config["arguments"]["range_mode"] == "raw" else "all pairs"
        lines.append(f"(query, corpus row) pairs removed from {where}: " + ", ".join(dropped))
        not_finite = {name: count for name, count in self.config.get("not_finite", {}).items() if count}
        if not_finite:
            found = (f"{count:,} of {name}" for name, count in not_finite.items())
            lines.append(f"rows that contain NaN or infinity: {', '.join(found)}")
        if self.recall is not None:
            lines.append(f"recall of the index, measured on a sample of the queries: {self.recall:.1%}")
        if short:
            lines.append("to get more negatives: a larger select.range_max, a smaller margin, or a larger corpus")
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike) -> None:
        """Write an HTML page with plots of the scores and counts of what the filters removed, atomically.

        The page is one file. It contains no scripts and makes no network requests.

        Parameters
        ----------
        path : path
            The file.
        """
        page = result_page.render(
            self.scores, self.positive_scores, self.num_valid, self.skipped, self.config, self.summary()
        )
        with atomic_write("MiningResult.to_html", path) as file:
            file.write(page.encode())

    def save(self, path: str | os.PathLike) -> None:
        """Write the result to one .npz file, atomically. Ids are stored, texts are not.

        Parameters
        ----------
        path : path
            The file. No suffix is added.
        """
        description = json.dumps({"format": FORMAT, "skipped": self.skipped, "config": self.config})
        arrays = {name: getattr(self, name) for name in ("indices", "scores", "positive_scores", "num_valid")}
        arrays |= {"positives_indptr": self.positives.indptr, "positives_rows": self.positives.rows}
        for name in IDS:
            if getattr(self, name) is not None:
                arrays |= _stored_ids(name, getattr(self, name))
        arrays |= {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}
        with atomic_write("MiningResult.save", path) as file:
            np.savez(file, description=np.frombuffer(description.encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MiningResult":
        """Read a file that `save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : path
            The file.

        Returns
        -------
        MiningResult
            The result that was saved, without texts.

        Raises
        ------
        ValueError
            If the file does not exist, is damaged, or was not written by `save`.
        """
        op = "MiningResult.load"
        if not Path(path).is_file():
            raise refuse(op, "path", "an existing file", str(path))
        try:
            arrays = read_npz(path, {*DTYPES, *OPTIONAL, "description", *IDS, *(f"{name}_ends" for name in IDS)})
            text = arrays.pop("description").tobytes()
            if len(text) > MAX_DESCRIPTION_BYTES:
                raise ValueError(f"its description holds {len(text):,} bytes")
            description = parse_json(text, "its description")
            ids: dict[str, Any] = {name: _loaded_ids(name, arrays) for name in IDS}
            optional = {name: arrays[name] for name in OPTIONAL if name in arrays}
            arrays = {name: arrays[name] for name in DTYPES}
            skipped, config = description["skipped"], description["config"]
            problem = _problem(arrays, description, ids) or _problem_of_optional(arrays, optional)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            what = f"{op}: {describe(str(path))} is damaged or was not written by save"
            raise ValueError(f"{what} ({cause(error)})") from error
        if problem:
            raise ValueError(f"{op}: {describe(str(path))} cannot be read: {problem}")
        positives = RowLists(arrays.pop("positives_indptr"), arrays.pop("positives_rows"))
        fields: dict[str, Any] = {**arrays, **optional, **ids}
        return cls(**fields, positives=positives, skipped=skipped, config=config)

    def query_names(self, rows: np.ndarray) -> np.ndarray:
        """The ids of queries, or the row numbers themselves if there are no ids.

        Parameters
        ----------
        rows : array of any shape, int64
            Row numbers of queries.

        Returns
        -------
        array
            Of the same shape.
        """
        return _named(self.query_ids, rows)

    def document_names(self, rows: np.ndarray) -> np.ndarray:
        """The ids of documents, or the row numbers themselves if there are no ids.

        Parameters
        ----------
        rows : array of any shape, int64
            Row numbers of the corpus; -1 for none, which gives -1, or None if ids are strings.

        Returns
        -------
        array
            Of the same shape.
        """
        return _named(self.corpus_ids, rows)

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """For each pair of query and positive: the query (P,), and the positive followed by the query's negatives (P, 1 + n)."""
        queries = self.positives.queries  # (P,)
        return queries, np.concatenate([self.positives.rows[:, None], self.indices[queries]], 1)


def _stored_ids(name: str, ids: Any) -> dict[str, np.ndarray]:
    """The arrays that store ids: one of ints, or one of the UTF-8 bytes of strings and one of where each string ends."""
    column = Column("MiningResult.save", name, ids)
    entries = [entry for _, block in column.blocks() for entry in block]
    if all(isinstance(entry, int) for entry in entries):
        return {name: np.array(entries, np.int64)}
    parts = [entry.encode("utf-8", "surrogatepass") for entry in entries]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {name: np.frombuffer(b"".join(parts), np.uint8), f"{name}_ends": ends}


def _loaded_ids(name: str, arrays: dict[str, np.ndarray]) -> list | None:
    """The ids that _stored_ids stored. Raises ValueError if the arrays are damaged."""
    if name not in arrays:
        return None
    held = arrays[name]
    if f"{name}_ends" not in arrays:
        if held.dtype != np.int64 or held.ndim != 1:
            raise ValueError(f"its {name} are {held.dtype} of shape {held.shape}")
        return held.tolist()
    ends = arrays[f"{name}_ends"]
    starts = np.r_[0, ends[:-1]] if ends.dtype == np.int64 and ends.ndim == 1 else ends
    if held.dtype != np.uint8 or starts is ends or (starts > ends).any() or sum(ends[-1:]) != len(held):
        raise ValueError(f"its {name}_ends do not fit its {name}")
    text = held.tobytes()
    return [text[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def _named(ids: Any, rows: np.ndarray) -> np.ndarray:
    """The ids of rows of any shape. A row of -1 becomes -1 among ints and None among strings."""
    if ids is None:
        return rows
    some = rows >= 0
    found = Column("MiningResult", "ids", ids).take(rows[some])
    out = np.full(rows.shape, None, object)
    if all(isinstance(entry, (int, np.integer)) for entry in found):
        out = np.full(rows.shape, -1)
    out[some] = found
    return out


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Concatenate columns of ints or of objects."""
    if any(part.dtype == object for part in parts):
        parts = tuple(part.astype(object) for part in parts)
    return np.concatenate(parts, 1)


def _problem(arrays: dict[str, np.ndarray], description: dict[str, Any], ids: dict[str, list | None]) -> str:
    """The first inconsistency in a file that could be read; empty if there is none."""
    if description["format"] != FORMAT:
        return f"its format is {describe(description['format'])}, and this version of negmine reads format {FORMAT}"
    for name, dtype in DTYPES.items():
        if arrays[name].dtype != dtype:
            return f"its {name} are {arrays[name].dtype}, not {np.dtype(dtype)}"
    indices, indptr, rows = arrays["indices"], arrays["positives_indptr"], arrays["positives_rows"]
    if indices.ndim != 2 or indptr.ndim != 1 or rows.ndim != 1:
        return f"its indices have {indices.ndim} dimensions, not 2"
    skipped, config = description["skipped"], description["config"]
    if not isinstance(skipped, dict) or not all(type(count) is int and count >= 0 for count in skipped.values()):
        return f"its skipped is {describe(skipped)}, not a count for each filter"
    wrong = _problem_of_config(config)
    if wrong:
        return wrong
    Q, K = len(indices), config["corpus_rows"]
    shapes = {"scores": indices.shape, "positive_scores": (Q,), "num_valid": (Q,), "positives_indptr": (Q + 1,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            return f"its {name} have shape {arrays[name].shape}, not {shape}"
    for name, rows_named in (("query_ids", Q), ("corpus_ids", K)):
        given = ids[name]
        if given is not None and len(given) != rows_named:
            return f"its {name} name {len(given)} rows of {rows_named}"
    if indptr[0] != 0 or (np.diff(indptr) < 0).any() or rows.shape != (indptr[-1],):
        return "its positives_indptr does not fit its positives_rows"
    if ((indices < -1) | (indices >= K)).any() or ((rows < 0) | (rows >= K)).any():
        return f"it names rows outside its corpus of {K}"
    if not np.array_equal((indices >= 0).sum(1), arrays["num_valid"]):
        return "its num_valid does not count its indices"
    return ""


def _problem_of_optional(arrays: dict[str, np.ndarray], optional: dict[str, np.ndarray]) -> str:
    Q, n = arrays["indices"].shape
    shapes = {"positive_pair_scores": arrays["positives_rows"].shape, "query_rows": (Q,)}
    for name, held in optional.items():
        if held.dtype != OPTIONAL[name] or held.shape != shapes.get(name, (Q, n, held.shape[-1])):
            return f"its {name} are {held.dtype} of shape {held.shape}"
    rows = optional.get("query_rows", np.empty(0, np.int64))
    if ((rows < 0) | (rows > np.arange(len(rows)))).any():
        return "its query_rows name later rows"
    return ""


def _problem_of_config(config: Any) -> str:
    """The first field of a config that summary, to_html or the writers cannot use; empty if there is none."""
    wanted: dict[str, Any] = dict.fromkeys(("arguments", "versions"), dict)
    wanted |= dict.fromkeys(("corpus_rows", "queries", "dimension"), int) | {"index": (dict, NoneType)}
    for name, kind in wanted.items():
        if name not in config or not isinstance(config[name], kind) or isinstance(config[name], bool):
            return f"its config has no {name} of the right type"
    if not isinstance(config["versions"].get("negmine"), str) or "seed" not in config["arguments"]:
        return "its config lacks versions or arguments"
    not_finite = config.get("not_finite", {})
    if not isinstance(not_finite, dict) or not all(type(count) is int for count in not_finite.values()):
        return f"its config has the counts {describe(not_finite)} of rows that contain NaN or infinity"
    recall = (config["index"] or {}).get("recall")
    if recall is not None and not is_real(recall):
        return f"its config has the recall {describe(recall)}"
    if config["arguments"].get("range_mode") not in ("filtered", "raw"):
        return f"its config has the range_mode {describe(config['arguments'].get('range_mode'))}"
    return ""
