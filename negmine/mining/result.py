"""MiningResult: the mined negatives with their scores, the positives and all settings.

    indices (Q, n) int64 rows of the corpus, hardest first, -1 past the end;   scores (Q, n) fp32, -inf there

A result is saved as one .npz file with a description in JSON; nothing in it is ever executed. Training data is returned as index
arrays, because the texts, images or tokens of the rows belong to the caller.
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
MAX_DESCRIPTION_BYTES = 1 << 20  # of the JSON beside the arrays, which takes a few thousand
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


@dataclass(frozen=True, eq=False)  # == of arrays has no one answer
class MiningResult:
    """The result of `mine_hard_negatives`, for Q queries and n = num_negatives. It is made by mining or by `load`.

    Attributes
    ----------
    indices : array (Q, n) int64
        Rows of the corpus, hardest first; -1 past the end.
    scores : array (Q, n) float32
        -inf past the end.
    positive_scores : array (Q,) float32
        Aggregated over each query's positives; NaN where it has none.
    num_valid : array (Q,) int64
        How many negatives a query has.
    positives : RowLists
        The positives' rows as given, each once.
    skipped : dict
        How many pairs of query and row each mask and filter removed, each pair once.
    config : dict
        Arguments, versions, sizes and content hashes.
    positive_pair_scores : array (P,) float32, optional
        The score of each entry of positives.
    query_ids, corpus_ids, query_texts, corpus_texts : optional
        As given.
    query_rows : array (Q,) int64, optional
        The lowest row of each row's query; None = each row is a query of its own.
    sources : array (Q, n, retrievers) int32, optional
        Of merge_retrievers.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(50, 16), dim=1)
    >>> result = negmine.mine_hard_negatives(rows[:5], rows, list(range(5)), num_negatives=2)
    >>> result.to_triplets().shape, result.num_valid.tolist()
    ((10, 3), [2, 2, 2, 2, 2])
    """

    indices: np.ndarray  # (Q, n) int64
    scores: np.ndarray  # (Q, n) fp32
    positive_scores: np.ndarray  # (Q,) fp32, aggregated over each query's positives; NaN where it has none
    num_valid: np.ndarray  # (Q,) int64, entries of indices that are not -1
    positives: RowLists  # rows, as given, each once; of an id its lowest row
    skipped: dict[str, int]  # (query, row) pairs that each mask and filter dropped, each pair once
    config: dict[str, Any]  # arguments, versions, sizes and content hashes
    positive_pair_scores: np.ndarray | None = None  # (P,) fp32, of each entry of positives
    query_ids: Any = None  # as given, (Q,) or None
    corpus_ids: Any = None  # (K,)
    query_texts: Any = None  # (Q,)
    corpus_texts: Any = None  # (K,)
    query_rows: np.ndarray | None = (
        None  # (Q,) int64 lowest row of each row's query; None = each row is a query of its own
    )
    sources: np.ndarray | None = None  # (Q, n, retrievers) int32, of merge_retrievers

    @property
    def recall(self) -> float | None:
        """The share of the hardest rows that the approximate index found, as measured for this run; None for an exact one."""
        return (self.config.get("index") or {}).get("recall")

    def hidden(self, exclude: Any = None) -> Hidden:
        """The documents that each query must not get, by the positives, ids and texts of this result, and `exclude`."""
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
        """(T, 3): query, positive, negative, for every positive and every negative of a query.

        Queries and documents are named by query_ids and corpus_ids where the result has them, else by their row numbers. The
        array is int64, or object where ids are strings. So are the arrays of to_n_tuples, to_labeled_pairs and to_labeled_lists.
        """
        queries, rows = self._pairs()  # (P,), (P, 1 + n)
        at, slot = np.nonzero(rows[:, 1:] >= 0)  # (T,) each
        documents = self.document_names(np.stack([rows[at, 0], rows[at, slot + 1]], 1))
        return _joined(self.query_names(queries[at])[:, None], documents)

    def to_n_tuples(self) -> np.ndarray:
        """(M, 2 + n): query, positive, n negatives; a query with fewer than n is left out."""
        queries, rows = self._pairs()
        full = (rows >= 0).all(1)  # (P,)
        return _joined(self.query_names(queries[full])[:, None], self.document_names(rows[full]))

    def to_labeled_pairs(self) -> np.ndarray:
        """(L, 3): query, document, label; label 1 for its positives, 0 for its negatives, each once."""
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
        """queries (M,), documents (M, 1 + n) and labels (M, 1 + n) int64, one list for each positive: it first, labelled 1, then
        negatives, labelled 0. Past the end of the negatives the label is -1 and the document -1, or None where ids are strings.
        A query without negatives has no list."""
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
        """Write training data, atomically, as lines of JSON; returns how many lines.

        query_texts, corpus_texts: strings, one a row, read by position; default: those that were mined with.
        corpus_titles: strings, one a row: a field of its own in Tevatron's form, put before the text in others.
        form: "flagembedding": {"query", "pos", "neg", "pos_scores", "neg_scores"}
            "tevatron": {"query_id", "query", "positive_passages": [{"docid", "title", "text"}], "negative_passages": [...]}
            "ms-swift": {"messages", "positive_messages", "negative_messages"}
            "sentence-transformers": {"anchor", "positive", "negative_1", ..., "negative_n"}, a line for each positive
            "distillation": the same, and "label", the scores of the positive and of the negatives
            "pylate": {"query_id", "document_ids", "scores"}, without texts

        Queries and documents are named by query_ids and corpus_ids where the result has them, else by their row numbers. A query
        without a positive or a negative has no line; in "sentence-transformers" and "distillation" neither has a query with fewer
        than n. A warning counts them.
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
        """The rows that `to_jsonl` writes, as a datasets.Dataset."""
        op = "to_dataset"
        rows = TrainingRows(op, self, form, query_texts, corpus_texts, corpus_titles)
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ImportError(f"{op}: needs the package datasets: pip install datasets") from error
        made = Dataset.from_list(list(rows))
        rows.warn()
        return made

    def to_parquet(
        self,
        path: str | os.PathLike,
        query_texts: Any = None,
        corpus_texts: Any = None,
        *,
        corpus_titles: Any = None,
        form: str = "sentence-transformers",
    ) -> int:
        """Write the rows that `to_jsonl` writes, atomically, to a Parquet file; returns how many rows."""
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
        """A pandas.DataFrame with a row for each positive and each negative of each query.

        Columns: query_id, document_id (row numbers where there are no ids), label (1 or 0), rank (0 of a positive; of negatives
        from 1, the hardest), score, and query and document where their texts are known.
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
        """A text table: scores of positives and negatives, their difference, dropped pairs, queries with too few negatives."""
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
        lines.append(f"{Q:,} queries, {n} negatives asked for each: {short:,} have fewer, {none:,} of them none")
        dropped = [f"{name} {count:,}" for name, count in self.skipped.items()]
        where = "in the window" if self.config["arguments"]["range_mode"] == "raw" else "of all"
        lines.append(f"(query, row) pairs dropped, {where}: " + ", ".join(dropped))
        if self.recall is not None:
            lines.append(f"recall of the index, measured on this run's queries: {self.recall:.1%}")
        if short:
            lines.append("more negatives: a wider select.range_max, a smaller margin, or a larger corpus")
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike) -> None:
        """Write one HTML page without scripts or network requests: negatives found and dropped, with inline plots."""
        page = result_page.render(
            self.scores, self.positive_scores, self.num_valid, self.skipped, self.config, self.summary()
        )
        with atomic_write("MiningResult.to_html", path) as file:
            file.write(page.encode())

    def save(self, path: str | os.PathLike) -> None:
        """Write one .npz file at exactly this path, atomically; ids are stored in it, texts are not."""
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
        """Read a file that `save` wrote. Raises ValueError for another kind of file and for a damaged one."""
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
        """The names of query rows, of any shape: ids where there are some, else the rows themselves."""
        return _named(self.query_ids, rows)

    def document_names(self, rows: np.ndarray) -> np.ndarray:
        """The names of corpus rows, of any shape."""
        return _named(self.corpus_ids, rows)

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every (query, positive): queries (P,), and (P, 1 + n) the positive followed by the query's negatives."""
        queries = self.positives.queries  # (P,)
        return queries, np.concatenate([self.positives.rows[:, None], self.indices[queries]], 1)


def _stored_ids(name: str, ids: Any) -> dict[str, np.ndarray]:
    """The arrays that hold ids: ints, or the UTF-8 bytes of strings and where each ends."""
    column = Column("MiningResult.save", name, ids)
    entries = [entry for _, block in column.blocks() for entry in block]
    if all(isinstance(entry, int) for entry in entries):
        return {name: np.array(entries, np.int64)}
    parts = [entry.encode("utf-8", "surrogatepass") for entry in entries]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {name: np.frombuffer(b"".join(parts), np.uint8), f"{name}_ends": ends}


def _loaded_ids(name: str, arrays: dict[str, np.ndarray]) -> list | None:
    """The ids that _stored_ids stored; raises ValueError where they are damaged."""
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
    """rows of any shape, -1 = none -> their ids: int64 with -1, or objects with None."""
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
    """Columns of ints or of objects side by side."""
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
    recall = (config["index"] or {}).get("recall")
    if recall is not None and not is_real(recall):
        return f"its config has the recall {describe(recall)}"
    if config["arguments"].get("range_mode") not in ("filtered", "raw"):
        return f"its config has the range_mode {describe(config['arguments'].get('range_mode'))}"
    return ""
