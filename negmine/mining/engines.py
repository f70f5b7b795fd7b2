"""The engines of NegativeIndex: an exact scan, FAISS by a factory string, or cuVS CAGRA. FAISS and cuVS are imported when used.

engine.kind, engine.dim, len(engine)
engine.max_k                       the largest k that it can search for; None: no limit
engine.add(rows)
engine.search(query (B, D), k)     scores (B, k) fp32, ids (B, k) int64, -1 past the end
engine.serialize(write)            calls `write` with its bytes; the class method `deserialize` reads them
"""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.array_file import Write
from negmine.mining.row_lists import RowLists
from negmine.mining.scan import OPS, Corpus, Scan
from negmine.mining.sources import Rows
from negmine.ops import backends, sort_key
from negmine.ops.checks import Phrase, refuse
from negmine.options import Select

TRAIN_ROWS = 1 << 18  # sampled from the corpus by default
ADDED_ROWS = 1 << 16  # converted to float32 at a time
GPU_MAX_K = 2048  # FAISS's limit on a GPU


class UnreadableIndex(ValueError):
    """The bytes of a saved index that its library does not take."""


def training_sample(rows: Rows, count: int | None, seed: int) -> np.ndarray:
    """(T, D) fp32: finite rows drawn without replacement, in row order."""
    count = min(len(rows), TRAIN_ROWS if count is None else count)
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
    sample = rows.gather(drawn, torch.device("cpu")).float().numpy()
    return sample[np.isfinite(sample).all(1)]


def _blocks(rows: Rows) -> Any:
    for begin, end in rows.spans(ADDED_ROWS):
        yield rows.block(begin, end, torch.device("cpu")).float().contiguous().numpy()  # (C, D)


def _faiss(op: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        wanted = "faiss-cpu or faiss-gpu installed (pip install negmine[faiss]), or kind='exact'"
        raise ImportError(f"{op}: kind needs {wanted}: {error}") from error
    return faiss


class ExactEngine:
    """An exact scan of the rows."""

    kind, max_k = "exact", None

    def __init__(self, op: str, rows: Rows, device: torch.device, backend: str | None) -> None:
        self.rows, self._device = rows, device
        empty = rows.gather(np.empty(0, np.int64), device)
        self.ops = backends.choose(op, OPS, backend, (empty, empty))
        self.chunk = 1 << 16

    @property
    def dim(self) -> int:
        return self.rows.dim

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Rows) -> None:
        if (rows.dim, rows.dtype) != (self.rows.dim, self.rows.dtype):
            wanted = f"of the index's D and dtype, {self.rows.dim} and {self.rows.dtype}"
            raise refuse("NegativeIndex.add", "embeddings", wanted, (rows.dim, rows.dtype))
        self.rows = Rows(self.rows.shards + rows.shards, self.rows.dim, self.rows.dtype)

    def search(self, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        scan = Scan(self.ops, Corpus(self.rows, self._device), self.chunk, None)
        sort_keys, _ = scan.run(
            query.to(self._device), RowLists.empty(len(query)), None, min(k, len(self)), Select(), []
        )
        scores, ids = (part.cpu().numpy() for part in sort_key.unpack(sort_keys))
        pad = ((0, 0), (0, k - ids.shape[1]))
        return np.pad(scores, pad, constant_values=-np.inf), np.pad(ids, pad, constant_values=-1)

    def serialize(self, write: Write) -> None:
        for begin, end in self.rows.spans(4096):
            block = self.rows.block(begin, end, torch.device("cpu")).contiguous()
            write(block.view(torch.uint8).numpy().data)


def faiss_index(op: str, name: str, kind: str, dim: int) -> Any:
    """An empty index of FAISS, by its factory string, which is the argument `name` of op."""
    faiss = _faiss(op)
    try:
        return faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        wanted = f"'exact', 'cagra', or a factory string that FAISS takes for D = {dim} ({_last_line(error)})"
        raise refuse(op, name, wanted, kind) from error


class FaissEngine:
    """Inner products by any index of FAISS's factory."""

    def __init__(self, op: str, kind: str, index: Any, options: dict, device: torch.device) -> None:
        self.kind, self._faiss, self._index = kind, _faiss(op), index
        self.max_k = GPU_MAX_K if device.type == "cuda" else None
        self._searched = index
        self._device, self._op = device, op
        if device.type == "cuda" and not getattr(self._faiss, "get_num_gpus", lambda: 0)():
            raise refuse(op, "device", "'cpu', because FAISS finds no GPU (faiss-gpu is not installed)", str(device))
        for name, value in options.items():
            try:
                self._faiss.ParameterSpace().set_index_parameter(index, name, value)
            except RuntimeError as error:
                wanted = f"parameters that a FAISS {kind} index has, such as nprobe or efSearch"
                raise refuse(op, "search_options", wanted, {name: value}) from error
        self._to_device()

    def _to_device(self) -> None:
        if self._device.type == "cuda":
            resources = self._faiss.StandardGpuResources()
            self._searched = self._faiss.index_cpu_to_gpu(resources, self._device.index or 0, self._index)

    @classmethod
    def build(
        cls, op: str, kind: str, rows: Rows, train_rows: int | None, seed: int, options: dict, device: torch.device
    ) -> "FaissEngine":
        index = faiss_index(op, "kind", kind, rows.dim)
        if not index.is_trained:
            try:
                index.train(training_sample(rows, train_rows, seed))
            except RuntimeError as error:
                wanted = f"rows enough to train {kind!r} on ({_last_line(error)})"
                raise refuse(op, "embeddings", wanted, Phrase(f"{len(rows)} rows, train_rows={train_rows}")) from error
        engine = cls(op, kind, index, options, torch.device("cpu"))
        engine.add(rows)
        return engine if device.type == "cpu" else cls(op, kind, index, options, device)

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, rows: Rows) -> None:
        for block in _blocks(rows):
            self._index.add(block)
        self._to_device()

    def search(self, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = self._searched.search(query.float().cpu().contiguous().numpy(), k)
        return np.where(ids < 0, -np.inf, scores).astype(np.float32), ids

    def serialize(self, write: Write) -> None:
        failed: list[BaseException] = []  # an exception must not cross FAISS

        def forward(piece: bytes) -> None:
            if not failed:
                try:
                    write(piece)
                except BaseException as error:
                    failed.append(error)

        self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(forward))
        if failed:
            raise failed[0]

    @classmethod
    def deserialize(
        cls, op: str, kind: str, read: Callable[[int], bytes], options: dict, device: torch.device
    ) -> "FaissEngine":
        faiss = _faiss(op)
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(read))
        except (RuntimeError, MemoryError, AssertionError) as error:
            raise UnreadableIndex(f"FAISS {faiss.__version__} cannot read this index ({_last_line(error)})") from error
        if index is None:
            raise UnreadableIndex(f"FAISS {faiss.__version__} cannot read this index")
        return cls(op, kind, index, options, device)

    @property
    def dim(self) -> int:
        return self._index.d


def _last_line(error: Exception) -> str:
    """FAISS's message without its source lines."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].rsplit(": ", 1)[-1]


class CagraEngine:
    """cuVS's graph index, on the GPU. It is built once: rows cannot be added."""

    kind, max_k = "cagra", None

    def __init__(self, op: str, index: Any, rows: int, dim: int, options: dict, device: torch.device) -> None:
        self._cagra, self._index, self._rows, self.dim = _cagra(op, device), index, rows, dim
        self._options, self._device = options, device

    @classmethod
    def build(cls, op: str, rows: Rows, options: dict, device: torch.device) -> "CagraEngine":
        cagra = _cagra(op, device)
        vectors = torch.cat([rows.block(begin, end, device) for begin, end in rows.spans(ADDED_ROWS)]).float()
        index = cagra.build(cagra.IndexParams(metric="inner_product"), vectors)
        return cls(op, index, len(rows), rows.dim, options, device)

    def __len__(self) -> int:
        return self._rows

    def add(self, rows: Rows) -> None:
        raise ValueError(
            "NegativeIndex.add: a 'cagra' index is built once from all rows and cannot be extended; build a new index"
        )

    def search(self, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        options = {"itopk_size": max(64, -(-k // 32) * 32), **self._options}
        on_device = query.float().contiguous().to(self._device)
        scores, ids = self._cagra.search(self._cagra.SearchParams(**options), self._index, on_device, k)
        ids = torch.as_tensor(ids, device=self._device).long().cpu().numpy()
        known = (ids >= 0) & (ids < self._rows)  # cuVS marks a missing neighbour by a number past the end
        scores = torch.as_tensor(scores, device=self._device).float().cpu().numpy()
        return np.where(known, scores, -np.inf).astype(np.float32), np.where(known, ids, -1)

    def serialize(self, write: Write) -> None:
        with tempfile.NamedTemporaryFile(prefix="negmine-") as file:
            self._cagra.save(file.name, self._index)
            while piece := file.read(1 << 20):
                write(piece)

    @classmethod
    def deserialize(
        cls, op: str, read: Callable[[int], bytes], rows: int, dim: int, options: dict, device: torch.device
    ) -> "CagraEngine":
        cagra = _cagra(op, device)
        with tempfile.NamedTemporaryFile(prefix="negmine-") as file:
            while piece := read(1 << 20):
                file.write(piece)
            file.flush()
            return cls(op, cagra.load(file.name), rows, dim, options, device)


def _cagra(op: str, device: torch.device) -> Any:
    try:
        from cuvs.neighbors import cagra
    except ImportError as error:
        wanted = "cuVS installed (pip install cuvs-cu12 or cuvs-cu13), a FAISS factory string, or 'exact'"
        raise ImportError(f"{op}: kind 'cagra' needs {wanted}: {error}") from error
    if device.type != "cuda":
        raise refuse(op, "device", "a CUDA device if kind is 'cagra'", str(device))
    return cagra
