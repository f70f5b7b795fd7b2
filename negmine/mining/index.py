"""NegativeIndex: an exact or approximate index of rows for search by inner product.

    "exact"             an exact scan by negmine's kernels; equal scores are ordered by row number, and k is not limited
    "IVF64,PQ16", ...   a FAISS index, by its factory string
    "cagra"             the graph index of cuVS, on a GPU

The recall of an approximate index depends on the data. `recall` measures it, and mine_hard_negatives measures it in every run.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from negmine.mining import array_file
from negmine.mining.engines import CagraEngine, ExactEngine, FaissEngine, UnreadableIndex
from negmine.mining.index_shards import IndexShard, ShardedEngine
from negmine.mining.memory_budget import DENSE_BYTES, plan_batches
from negmine.mining.regular_file import cause
from negmine.mining.row_lists import RowLists
from negmine.mining.scan import OPS, Corpus, Scan, pair_scores
from negmine.mining.sources import Rows, resolve_device
from negmine.ops import backends, checks, sort_key
from negmine.options import Select, is_real

FILE_KIND = "NegativeIndex"


class Found(NamedTuple):
    """The result of `NegativeIndex.search`.

    Attributes
    ----------
    scores : array (Q, k) float32
        Scores in descending order; -inf at the end if fewer than k rows were found.
    indices : array (Q, k) int64
        The numbers of the rows; -1 at the end if fewer than k rows were found.

    Examples
    --------
    >>> index = negmine.NegativeIndex.build(torch.randn(100, 16))
    >>> scores, indices = index.search(torch.randn(8, 16), 5)
    >>> indices.shape
    (8, 5)
    """

    scores: np.ndarray  # (Q, k) fp32
    indices: np.ndarray  # (Q, k) int64


class NegativeIndex:
    """An index of rows for exact or approximate search by inner product. Use `build` or `load` to create one.

    Examples
    --------
    >>> index = negmine.NegativeIndex.build(torch.randn(100, 16))  # "exact"
    >>> index.search(torch.randn(8, 16), 5).indices.shape
    (8, 5)
    >>> index.add(torch.randn(10, 16))  # rows 100 to 109
    >>> len(index)
    110
    """

    def __init__(self, engine: Any, dtype: str, options: dict, max_memory_bytes: int | None) -> None:
        self._engine, self._dtype, self._options, self._memory = engine, dtype, options, max_memory_bytes

    @classmethod
    def build(
        cls,
        embeddings: Any,
        kind: str = "exact",
        *,
        train_rows: int | None = None,
        seed: int = 0,
        search_options: dict | None = None,
        device: str | torch.device | None = None,
        backend: str | None = None,
        max_memory_bytes: int | None = None,
    ) -> "NegativeIndex":
        """Build an index of all rows of `embeddings`.

        Parameters
        ----------
        embeddings : array, Tensor, path, or a list of these
            (rows, D), in any form that `mine_hard_negatives` accepts.
        kind : str
            "exact", a FAISS factory string ("Flat", "IVF4096,Flat", "IVF64,PQ16", "HNSW32"), or "cagra" of cuVS.
        train_rows : int, optional
            How many randomly chosen rows train an index that needs training. The default is all, but at most 262,144.
        seed : int
            Seed of that random choice.
        search_options : dict, optional
            Search options of the index: {"nprobe": 32}, {"efSearch": 128}, or {"itopk_size": 256} for "cagra".
        device : device, optional
            The device that searches. A FAISS index on "cuda" needs faiss-gpu.
        backend : str, optional
            The backend of an exact index. The default chooses one automatically.
        max_memory_bytes : int, optional
            How much memory one search of an exact index may use in addition to the rows, queries and result. The default is
            1 GiB.

        Returns
        -------
        NegativeIndex
            An exact index reads the rows from the given arrays or files whenever it searches. An approximate index has its own
            copy of the rows in memory.

        Raises
        ------
        ValueError, TypeError
            If an argument is not valid.
        ImportError
            If the package of this kind of index is not installed.

        Examples
        --------
        >>> negmine.NegativeIndex.build(torch.randn(100, 16))
        NegativeIndex('exact', 100 rows, D = 16)
        """
        op = "NegativeIndex.build"
        rows = Rows.open(op, "embeddings", embeddings)
        _check_arguments(op, kind, train_rows, seed, search_options, max_memory_bytes)
        options = dict(search_options or {})
        where = resolve_device(op, device, rows)
        if not len(rows):
            raise checks.refuse(op, "embeddings", "of at least 1 row", (0, rows.dim))
        engine: Any
        if kind == "exact":
            engine = ExactEngine(op, rows, where, backend)
        elif kind == "cagra":
            engine = CagraEngine.build(op, rows, options, where)
        else:
            engine = FaissEngine.build(op, kind, rows, train_rows, seed, options, where)
        return cls(engine, rows.dtype, options, max_memory_bytes)

    @property
    def kind(self) -> str:
        """The kind of the index, as passed to `build`."""
        return self._engine.kind

    @property
    def dim(self) -> int:
        """D, the length of a row."""
        return self._engine.dim

    @property
    def search_options(self) -> dict:
        """A copy of the search options."""
        return dict(self._options)

    def __len__(self) -> int:
        return len(self._engine)

    def __repr__(self) -> str:
        return f"NegativeIndex({self.kind!r}, {len(self)} rows, D = {self.dim})"

    def add(self, embeddings: Any) -> None:
        """Append rows. The first of them gets the number len(index).

        Parameters
        ----------
        embeddings : array, Tensor, path, or a list of these
            (rows, D), in any form that `mine_hard_negatives` accepts.

        Raises
        ------
        ValueError, TypeError
            If the rows do not fit the index.
        """
        rows = Rows.open("NegativeIndex.add", "embeddings", embeddings)
        if rows.dim != self.dim:
            raise checks.refuse("NegativeIndex.add", "embeddings", f"of the index's D = {self.dim}", rows.dim)
        self._engine.add(rows)

    def search(self, query_embeddings: Any, k: int) -> Found:
        """Find the k rows with the largest inner products with each query.

        Parameters
        ----------
        query_embeddings : array, Tensor, path, or a list of these
            (Q, D), in any form that `mine_hard_negatives` accepts.
        k : int
            How many rows to find for each query.

        Returns
        -------
        Found
            scores and indices (Q, k), in descending order of the scores; -inf and -1 if fewer than k rows were found. An
            "exact" index orders equal scores by row number. Other kinds return the rows and scores that the index computes.
            Rows that contain infinity may be returned; `mine_hard_negatives` leaves them out.

        Raises
        ------
        ValueError, TypeError
            If an argument is not valid.

        Examples
        --------
        >>> rows = torch.eye(4)
        >>> scores, indices = negmine.NegativeIndex.build(rows).search(rows[2:3], 2)
        >>> scores.tolist(), indices.tolist()
        ([[1.0, 0.0]], [[2, 0]])
        """
        op = "NegativeIndex.search"
        queries = Rows.open(op, "query_embeddings", query_embeddings)
        checks.require_count(op, "k", k)
        if queries.dim != self.dim:
            raise checks.refuse(op, "query_embeddings", f"of the index's D = {self.dim}", queries.dim)
        max_k = self._engine.max_k
        if max_k is not None and k > max_k:
            raise checks.refuse(op, "k", f"at most {max_k}, FAISS's limit on a GPU, or the index 'exact'", k)
        corpus = self._engine.rows if self.kind == "exact" else queries
        pair_bytes = 0 if self.kind == "exact" and self._engine.ops else DENSE_BYTES
        memory = self._memory if self.kind == "exact" else None
        sizes = plan_batches(op, queries, corpus, min(k, len(self)), pair_bytes, None, None, memory)
        if self.kind == "exact":
            self._engine.chunk = sizes.chunk
        scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        device = queries.device or torch.device("cpu")
        with torch.no_grad():
            if isinstance(self._engine, ShardedEngine):
                blocks = [queries.block(begin, end, device) for begin, end in queries.spans(sizes.batch)]
                return Found(*self._engine.search_batches(blocks, k))
            for begin, end in queries.spans(sizes.batch):
                scores[begin:end], indices[begin:end] = self._engine.search(queries.block(begin, end, device), k)
        return Found(scores, indices)

    def candidates(self, query: Tensor, k: int) -> np.ndarray:
        """Find candidate rows without repetitions.

        Parameters
        ----------
        query : Tensor (B, D)
            Queries.
        k : int
            How many rows to find for each query.

        Returns
        -------
        array (B, k) int64
            Row numbers; -1 if the index finds fewer than k rows.
        """
        _, ids = self._engine.search(query, min(k, self._engine.max_k or k))
        by_id = np.argsort(ids, axis=1, kind="stable")
        ranked = np.take_along_axis(ids, by_id, 1)
        repeated = np.zeros(ids.shape, bool)
        np.put_along_axis(repeated, by_id[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
        ids = np.where(repeated, -1, ids)
        return np.pad(ids, ((0, 0), (0, k - ids.shape[1])), constant_values=-1)

    def recall(
        self, query_embeddings: Any, corpus_embeddings: Any, *, k: int = 10, queries: int = 256, seed: int = 0
    ) -> float:
        """Measure the fraction of each query's k hardest rows that `search` finds.

        An exact scan finds the hardest rows. A returned row counts as found if its score, computed from the rows, is at least
        the k-th largest.

        Parameters
        ----------
        query_embeddings : array, Tensor, path, or a list of these
            (Q, D), in any form that `mine_hard_negatives` accepts.
        corpus_embeddings : array, Tensor, path, or a list of these
            The rows that the index was built from.
        k : int
            The number of hardest rows of each query.
        queries : int
            The number of queries to use, chosen at random.
        seed : int
            Seed of that random choice.

        Returns
        -------
        float
            The recall, between 0 and 1.

        Raises
        ------
        ValueError, TypeError
            If an argument is not valid.

        Examples
        --------
        >>> rows = torch.randn(100, 16)
        >>> negmine.NegativeIndex.build(rows).recall(rows[:8], rows, k=5)
        1.0
        """
        op = "NegativeIndex.recall"
        query_rows = Rows.open(op, "query_embeddings", query_embeddings)
        rows = Rows.open(op, "corpus_embeddings", corpus_embeddings)
        for name, count in {"k": k, "queries": queries}.items():
            checks.require_count(op, name, count)
        checks.require_draw(op, seed, 0, 0)
        require_same_rows(op, "corpus_embeddings", self, rows)
        if query_rows.dim != self.dim:
            raise checks.refuse(op, "query_embeddings", f"of the index's D = {self.dim}", query_rows.dim)
        where = query_rows.device or rows.device or torch.device("cpu")
        query = query_rows.gather(sample_queries(len(query_rows), queries, seed), where)  # (A, D)
        launchers = backends.choose(op, OPS, None, (query, rows.gather(np.empty(0, np.int64), where)))
        chunk = plan_batches(op, query_rows, rows, k, 0 if launchers else DENSE_BYTES, len(query), None, None).chunk
        corpus = Corpus(rows, where)
        with torch.no_grad():
            return measure_recall(self, Scan(launchers, corpus, chunk, None), query, k)

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to one file, atomically.

        The file holds the bytes of the index and their hash, but no code. A full disk raises OSError and leaves an existing file
        intact.

        Parameters
        ----------
        path : path
            The file. No suffix is added.
        """
        facts = {"kind": self.kind, "dim": self.dim, "rows": len(self), "dtype": self._dtype, "options": self._options}
        if self.kind == "exact":
            stored = "uint16" if self._dtype == "bfloat16" else self._dtype
            part: tuple = (stored, (len(self), self.dim), self._engine.serialize)
        else:
            part = ("uint8", None, self._engine.serialize)
        array_file.write("NegativeIndex.save", path, FILE_KIND, facts, {"index": part})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        search_options: dict | None = None,
        device: str | torch.device | None = None,
        backend: str | None = None,
        max_memory_bytes: int | None = None,
    ) -> "NegativeIndex":
        """Read a file that `save` wrote, or several files as the shards of one index.

        Parameters
        ----------
        path : path, or a list of paths
            The file. With several files, rows are numbered in the order of the files, and a search returns the best rows of
            all. The files may have different kinds, but either all or none of them must be "exact".
        search_options : dict, optional
            Search options that replace the saved ones.
        device, backend : optional
            As in `build`.
        max_memory_bytes : int, optional
            As in `build`. For several approximate indexes, the total size of the indexes that are kept in memory; the others
            are loaded for each search and then released. The default is 1 GiB, or the size of the largest index if that is
            larger.

        Returns
        -------
        NegativeIndex
            The index that was saved. The rows of an exact index are memory-mapped.

        Raises
        ------
        ValueError
            If the file is damaged or was not written by `save`.

        Notes
        -----
        Before anything is allocated, the sizes in the file are checked against the size of the file; then the hashes are
        checked. Hashes detect damage but not manipulation, and the bytes of a FAISS index are read by FAISS itself, so load
        approximate indexes only from sources that you trust.

        Examples
        --------
        >>> import tempfile
        >>> folder, rows = tempfile.mkdtemp(), torch.eye(4)
        >>> for i in range(2):
        ...     negmine.NegativeIndex.build(rows[2 * i : 2 * i + 2]).save(f"{folder}/{i}.index")
        >>> index = negmine.NegativeIndex.load([f"{folder}/0.index", f"{folder}/1.index"])
        >>> index.search(rows[3:], 1).indices.tolist()
        [[3]]
        """
        op = "NegativeIndex.load"
        given = list(path) if isinstance(path, (list, tuple)) else [path]
        if not given:
            raise checks.refuse(op, "path", "an existing file, or a list of files", path)
        files = [_IndexFile(op, each, search_options, max_memory_bytes) for each in given]
        first = files[0]
        for file in files[1:]:
            if (file.dim, file.dtype) != (first.dim, first.dtype) or (file.kind == "exact") != (first.kind == "exact"):
                wanted = f"files with the same D and dtype, all or none of them 'exact' (the first is {first})"
                raise checks.refuse(op, "path", wanted, checks.Phrase(f"{file} in {str(file.path)!r}"))
        if first.kind == "exact":
            rows = Rows([shard for file in files for shard in file.open_rows().shards], first.dim, first.dtype)
            engine: Any = ExactEngine(op, rows, resolve_device(op, device, rows), backend)
        else:
            default = "cuda" if "cagra" in {file.kind for file in files} else "cpu"
            where = torch.device(device or default)
            if len(files) == 1:
                engine = first.open(where)
            else:
                shards = [file.shard(where) for file in files]
                engine = ShardedEngine(op, shards, where, max_memory_bytes)
        return cls(engine, first.dtype, dict(first.options), max_memory_bytes)

    def content_hash(self) -> str:
        """A hash of the bytes that `save` would write or, for several files, of the bytes in the files.

        Returns
        -------
        str
            32 hexadecimal digits.
        """
        if isinstance(self._engine, ShardedEngine):
            return self._engine.content_hash()
        digest = hashlib.blake2b(digest_size=16)
        self._engine.serialize(digest.update)
        return digest.hexdigest()


class _IndexFile:
    """A file that `save` wrote. Its header and hashes are checked; its index is not loaded yet."""

    def __init__(self, op: str, path: Any, search_options: dict | None, max_memory_bytes: int | None) -> None:
        self.op, self.path = op, path
        facts, parts = array_file.read(op, path, FILE_KIND)
        try:
            self.kind, self.dim, self.rows, self.dtype = (facts[name] for name in ("kind", "dim", "rows", "dtype"))
            self.options = dict(facts["options"]) if search_options is None else search_options
            self._part = parts["index"]
            _check_arguments(op, self.kind, None, 0, self.options, max_memory_bytes)
            shape, dtype = self._part.shape, self._part.dtype
            if self.kind == "exact" and (shape != (self.rows, self.dim) or dtype not in (self.dtype, "uint16")):
                raise ValueError(f"its rows are {dtype} {shape}, not {self.dtype} {(self.rows, self.dim)}")
        except (KeyError, TypeError, ValueError) as error:
            what = f"{op}: {str(path)!r} is not a NegativeIndex that this version can read"
            raise ValueError(f"{what} ({cause(error)})") from error

    def __str__(self) -> str:
        return f"{self.kind} of D = {self.dim}, {self.dtype}"

    def open_rows(self) -> Rows:
        """The rows of an exact index, memory-mapped."""
        tensor = torch.from_numpy(array_file.map_array(self.path, self._part))
        return Rows.open(self.op, "path", tensor.view(torch.bfloat16) if self._part.dtype == "uint16" else tensor)

    def open(self, where: torch.device) -> Any:
        """The engine of an approximate index."""
        read = sequential_reader(array_file.map_array(self.path, self._part))
        engine: Any
        try:
            if self.kind == "cagra":
                engine = CagraEngine.deserialize(self.op, read, self.rows, self.dim, self.options, where)
            else:
                engine = FaissEngine.deserialize(self.op, self.kind, read, self.options, where)
        except UnreadableIndex as error:
            raise ValueError(f"{self.op}: {str(self.path)!r}: {cause(error)}") from error
        if (len(engine), engine.dim) != (self.rows, self.dim):
            what, came = f"{self.op}: {str(self.path)!r}", f"{len(engine)} rows of D = {engine.dim}"
            raise ValueError(f"{what} has {came}, but its header says {self.rows} of D = {self.dim}")
        return engine

    def shard(self, where: torch.device) -> IndexShard:
        """The approximate index as a shard that is opened when it is searched."""
        part, facts = self._part, (self.kind, self.dim, self.rows)
        return IndexShard(self.path, *facts, part.size, part.blake2b, lambda: self.open(where))


def sequential_reader(array: np.ndarray) -> Callable[[int], bytes]:
    """A function that returns the next `count` bytes of an array, without copying the whole array."""
    view, at = array.data, 0

    def read(count: int) -> bytes:
        nonlocal at
        piece = bytes(view[at : at + count])
        at += len(piece)
        return piece

    return read


def _check_arguments(op: str, kind: Any, train_rows: Any, seed: Any, options: Any, memory: Any) -> None:
    if not isinstance(kind, str) or not kind:
        raise checks.refuse(op, "kind", "'exact', 'cagra', or a FAISS factory string", kind, TypeError)
    for name, value in {"train_rows": train_rows, "max_memory_bytes": memory}.items():
        if value is not None:
            checks.require_count(op, name, value)
    checks.require_draw(op, seed, 0, 0)
    good = options is None or isinstance(options, dict)
    if not good or not all(isinstance(name, str) and is_real(value) for name, value in (options or {}).items()):
        raise checks.refuse(op, "search_options", "a dict of names and numbers", options, TypeError)
    if options and kind == "exact":
        raise checks.refuse(op, "search_options", "None if kind is 'exact'", options)


def require_same_rows(op: str, name: str, index: NegativeIndex, rows: Rows) -> None:
    if (len(rows), rows.dim) != (len(index), index.dim):
        wanted = f"the rows of the index, {len(index)} of D = {index.dim}"
        raise checks.refuse(op, name, wanted, (len(rows), rows.dim))


def sample_queries(Q: int, count: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(Q, min(Q, count), replace=False))


def measure_recall(index: NegativeIndex, scan: Scan, query: Tensor, k: int) -> float:
    """The recall of an index for query (A, D), with the kernels and the corpus of an exact scan."""
    k = min(k, len(index))
    best, _ = scan.run(query, RowLists.empty(len(query)), None, k, Select(), [])
    ids = index.candidates(query, k)  # (A, k)
    at, slot = np.nonzero(ids >= 0)
    found = np.full(ids.shape, -np.inf, np.float32)
    take: Callable = lambda numbers: query[torch.from_numpy(numbers).to(query.device)]  # noqa: E731
    found[at, slot] = np.nan_to_num(
        pair_scores(scan.ops, take, scan.corpus.gather, at, ids[at, slot]), nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    wanted = sort_key.unpack(best)[0].cpu().numpy()  # (A, k), -inf past the end
    real = wanted > -np.inf
    threshold = np.where(real, wanted, np.inf).min(1, keepdims=True, initial=np.inf)  # (A, 1)
    return float((found >= threshold).sum() / real.sum()) if real.any() else 1.0
