"""Embeddings as one sequence of rows, read from arrays, tensors, files, or a list of these as shards.

    rows = Rows.open("mine_hard_negatives", "corpus_embeddings", ["a.npy", "b.npy"])
    rows.block(begin, end, device)   (C, D): a view if the storage allows it; only these rows are read
    rows.gather(numbers, device)     (M, D)

    "rows.npy"                 memory-mapped
    "rows.safetensors::name"   a tensor of the file, memory-mapped; the name may be omitted if only one tensor has two dimensions
    "rows.parquet::column"     a column of lists of D floats; the name may be omitted if there is only one such column
    "rows.arrow::column"       the same in an Arrow IPC file or stream (.arrow, .feather)
    "rows.lance::column"       the same in a Lance dataset, a folder
    "rows.npz::name"           an array of the file, read into memory; the name may be omitted if there is only one
    "s3://bucket/rows.npy"     any of these files in object storage, copied once: see remote.py
    a table                    of Arrow, pandas, polars or datasets, also streamed: see tables.py
    a function                 that takes no arguments and returns one of these

float64 rows are rounded to float32 as they are read.

Rows are numbered through all shards, in order. Content hashes and the detection of equal rows do not depend on how the rows are
divided into shards.

Parquet files, Lance datasets and streams cannot be memory-mapped. They are decoded once into an unnamed temporary file, which is
memory-mapped and disappears when the process ends. Of a Parquet file or a Lance dataset, only the row groups or fragments with
requested rows are decoded (decoding.py).
"""

import bisect
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.decoding import DECODED_ROWS, DecodedRows, decoded
from negmine.mining.numpy_file import names_in_npz, read_npz
from negmine.mining.regular_file import cause
from negmine.mining.remote import is_url, local_copy
from negmine.mining.tables import dataset_of, is_stream, is_vector, rows_of, vector_column
from negmine.ops.checks import Phrase, kind_of, refuse, require_stored, require_unmasked
from negmine.ops.vectors import for_kernels

WANTED = ".npy, .safetensors or .parquet"
FORMS = (
    f"an array, a tensor, the path of a {WANTED} file, or a list of those, "
    "or a table of Arrow, pandas, polars or datasets"
)
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LANCE_ROWS = 1 << 16  # how many rows of a Lance dataset are decoded together
Shard = Tensor | np.ndarray | DecodedRows
HASHED_ROWS = 2048  # how many rows are in memory at a time while hashing


def open_shard(op: str, name: str, value: Any) -> Shard:
    """Open one shard: a file becomes a private memory map, which torch can wrap; arrays and tensors are returned unchanged."""
    if isinstance(value, (str, os.PathLike)):
        text, _, inner = str(value).partition("::")
        path, is_remote = Path(text), is_url(text)
        reader = READERS.get(path.suffix)
        if reader is not None and not (is_remote or (path.is_dir() if reader is _open_lance else path.is_file())):
            reader = None
        if reader is None or (inner and path.suffix == ".npy"):
            raise refuse(op, name, f"the path of an existing {WANTED} file", str(value))
        if not is_remote:
            return reader(op, name, path, inner)
        if reader is _open_lance:
            return reader(op, name, text, inner)
        with local_copy(text) as copy:
            return reader(op, name, copy, inner)
    value = dataset_of(value)
    if is_stream(value):
        return _open_stream(op, name, value)
    if isinstance(value, DecodedRows):
        return value
    if callable(value):
        return open_shard(op, name, value())
    if not isinstance(value, (np.ndarray, Tensor)):
        rows = rows_of(op, name, value)
        if rows is not None:
            return rows
        raise refuse(op, name, FORMS, kind_of(value), TypeError)
    if isinstance(value, Tensor):
        require_stored(op, name, value)
    require_unmasked(op, name, value)
    return value


def _damaged(op: str, name: str, path: Path, error: Exception) -> ValueError:
    return ValueError(f"{op}: {name} must be a complete {path.suffix} file, got {str(path)!r} ({cause(error)})")


def _missing_package(op: str, name: str, path: Path, package: str) -> ImportError:
    return ImportError(f"{op}: {name} is {str(path)!r}, and reading it needs {package}: pip install {package}")


def _open_npy(op: str, name: str, path: Path, inner: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # NumPy's parser raises many types for a damaged header
        raise _damaged(op, name, path, error) from error


def _choose_name(op: str, name: str, path: Path, inner: str, fitting: list[str], what: str) -> str:
    """The requested name, or the only suitable one."""
    if inner and inner not in fitting:
        raise refuse(op, name, f"the name of {what} in {str(path)!r}: {', '.join(fitting) or 'it has none'}", inner)
    if not inner and len(fitting) != 1:
        raise refuse(
            op,
            name,
            f"'path::name' with the name of {what}, unless the file has exactly one",
            Phrase(f"{path}: {fitting}"),
        )
    return inner or fitting[0]


def _open_safetensors(op: str, name: str, path: Path, inner: str) -> Tensor:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise _missing_package(op, name, path, "safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            fitting = [key for key in file.keys() if len(file.get_slice(key).get_shape()) == 2]  # noqa: SIM118
            chosen = _choose_name(op, name, path, inner, fitting, "a tensor (rows, D)")
            return file.get_tensor(chosen)
    except ValueError:
        raise
    except Exception as error:  # SafetensorError is a plain Exception
        raise _damaged(op, name, path, error) from error


def _open_parquet(op: str, name: str, path: Path, inner: str) -> DecodedRows:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_package(op, name, path, "pyarrow") from error

    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        fitting = [field.name for field in schema if is_vector(field.type)]
    except (arrow.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise _damaged(op, name, path, error) from error
    column = _choose_name(op, name, path, inner, fitting, "a column of lists of floats")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def read(group: int) -> Iterator[Any]:
        try:
            for batch in file.iter_batches(DECODED_ROWS, row_groups=[group], columns=[column]):
                yield batch.column(0)
        except (arrow.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
            raise _damaged(op, name, path, error) from error

    return DecodedRows(op, name, str(path), column, sizes, read)


def _open_lance(op: str, name: str, path: Any, inner: str) -> DecodedRows:
    """path: a folder, or a URL; the package lance opens both."""
    try:
        import lance
    except ImportError as error:
        raise _missing_package(op, name, path, "pylance") from error
    try:
        table = lance.dataset(str(path))
        rows = table.count_rows()
        fitting = [field.name for field in table.schema if is_vector(field.type)]
    except Exception as error:  # errors from Rust have several types
        raise _damaged(op, name, Path(path), error) from error
    column = _choose_name(op, name, path, inner, fitting, "a column of lists of floats")

    def read(piece: int) -> Iterator[Any]:
        place = {"offset": piece * LANCE_ROWS, "limit": LANCE_ROWS}
        batches = iter(table.to_batches(columns=[column], batch_size=DECODED_ROWS, **place))
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise _damaged(op, name, Path(path), error) from error
            if batch is None:
                return
            yield batch.column(0)

    sizes = [min(LANCE_ROWS, rows - begin) for begin in range(0, rows, LANCE_ROWS)]
    return DecodedRows(op, name, str(path), column, sizes, read)


def _open_arrow(op: str, name: str, path: Path, inner: str) -> np.ndarray:
    try:
        import pyarrow as arrow
        from pyarrow import ipc
    except ImportError as error:
        raise _missing_package(op, name, path, "pyarrow") from error
    try:
        with arrow.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            table = (ipc.open_file if is_file else ipc.open_stream)(file).read_all()
            table.validate(full=True)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(op, name, path, error) from error
    fitting = [field.name for field in table.schema if is_vector(field.type)]
    column = _choose_name(op, name, path, inner, fitting, "a column of lists of floats")
    return rows_of(op, name, table.column(column))  # type: ignore[return-value]


def _open_stream(op: str, name: str, stream: Any) -> np.ndarray:
    """Read the only column of vectors of a streamed dataset, once."""
    if not hasattr(stream, "with_format"):  # a field of a column
        raise refuse(op, name, "a streamed dataset with a column of vectors, or that column", kind_of(stream))
    batches = stream.with_format("arrow").iter(batch_size=DECODED_ROWS)
    first = next(batches, None)
    if first is None:
        raise refuse(op, name, "a dataset with at least one row", Phrase("an empty stream"))
    column = vector_column(op, name, first)
    each = (piece for table in chain([first], batches) for piece in table.column(column).chunks)
    return decoded(op, name, "the stream", column, each)


def _open_npz(op: str, name: str, path: Path, inner: str) -> np.ndarray:
    try:
        fitting = names_in_npz(path)
        chosen = _choose_name(op, name, path, inner, fitting, "an array")
        return read_npz(path, (chosen,))[chosen]
    except ValueError as error:
        if str(error).startswith(op):
            raise
        raise _damaged(op, name, path, error) from error


READERS: dict[str, Callable[[str, str, Any, str], Shard]] = {
    ".npy": _open_npy,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
    ".npz": _open_npz,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
    ".lance": _open_lance,
}


def _is_double(shard: Shard) -> bool:
    return shard.dtype == (torch.float64 if isinstance(shard, Tensor) else np.float64)


def _dtype_of(shard: Shard) -> str:
    """The dtype as which a shard is read."""
    if _is_double(shard):
        return "float32"
    return DTYPES.get(shard.dtype, str(shard.dtype)) if isinstance(shard, Tensor) else str(shard.dtype)


def as_tensor(part: Tensor | np.ndarray) -> Tensor:
    """Rows of a shard as a tensor for the kernels.

    They are copied only if the memory is read-only, a row is not contiguous, or the dtype is float64.
    """
    if isinstance(part, Tensor):
        return for_kernels(part.float() if _is_double(part) else part)
    if _is_double(part):
        with np.errstate(over="ignore"):  # too large for float32: infinite, as in torch
            part = part.astype(np.float32)
    return torch.from_numpy(part if part.flags.writeable and part.flags.c_contiguous else np.array(part, order="C"))


class Rows:
    """Embeddings (rows, D) in one of the kernels' dtypes, in one or more shards."""

    def __init__(self, shards: Sequence[Shard], dim: int, dtype: str) -> None:
        self.shards, self.dim, self.dtype = list(shards), dim, dtype
        self.starts = [0]  # of each shard, then the total number of rows
        for shard in shards:
            self.starts.append(self.starts[-1] + len(shard))

    @classmethod
    def open(cls, op: str, name: str, value: Any) -> "Rows":
        """Open embeddings. Raises an error unless all shards are (rows, D) of one dtype."""
        if isinstance(value, Rows):
            return value
        if isinstance(value, (list, tuple)) and not value:
            raise refuse(op, name, FORMS, value)
        is_list = isinstance(value, (list, tuple))
        given = list(value) if is_list else [value]
        labels = [f"{name}[{i}]" for i in range(len(given))] if is_list else [name]
        shards = [open_shard(op, label, shard) for label, shard in zip(labels, given, strict=True)]
        for label, source, shard in zip(labels, given, shards, strict=True):

            def came(found: Any, source: Any = source) -> Phrase:
                """What was found and in which file, for an error message."""
                return Phrase(f"{found} in {source}" if isinstance(source, (str, os.PathLike)) else found)

            if _dtype_of(shard) not in DTYPES.values():
                wanted = "float32, float16, bfloat16 or float64 in native byte order"
                raise refuse(op, label, wanted, came(_dtype_of(shard)), TypeError)
            if shard.ndim != 2 or shard.shape[1] == 0:
                raise refuse(op, label, "of shape (rows, D) with D >= 1", came(tuple(shard.shape)))
            if shard.shape[1] != shards[0].shape[1] or _dtype_of(shard) != _dtype_of(shards[0]):
                wanted = f"of the D and dtype of the first shard, {shards[0].shape[1]} and {_dtype_of(shards[0])}"
                raise refuse(op, label, wanted, came((shard.shape[1], _dtype_of(shard))))
        return cls(shards, shards[0].shape[1], _dtype_of(shards[0]))

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def is_rounded(self) -> bool:
        """Whether float64 rows are rounded to float32."""
        return any(_is_double(shard) for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        return self.dim * (4 if self.dtype == "float32" else 2)

    @property
    def device(self) -> torch.device | None:
        """The device of the first shard that is a tensor; None if no shard is."""
        return next((shard.device for shard in self.shards if isinstance(shard, Tensor)), None)

    def spans(self, size: int) -> Iterator[tuple[int, int]]:
        """Consecutive ranges (begin, end) of at most `size` rows that cover all rows. Each is within one shard."""
        for start, stop in zip(self.starts, self.starts[1:], strict=False):
            for begin in range(start, stop, size):
                yield begin, min(begin + size, stop)

    def between(self, begin: int, end: int) -> "Rows":
        """Rows [begin, end), without a copy. No other row is read."""
        edges = zip(self.shards, self.starts, self.starts[1:], strict=False)
        shards = [shard[max(begin, a) - a : end - a] for shard, a, b in edges if a < end and begin < b]
        return Rows(shards or [self.shards[0][:0]], self.dim, self.dtype)

    def block(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Rows [begin, end) as (end - begin, D), copied only if they are in several shards."""
        # min, because an empty block may begin after the last row.
        shard = min(bisect.bisect_right(self.starts, begin), len(self.shards)) - 1
        if end > self.starts[shard + 1]:
            return self.gather(np.arange(begin, end), device)
        start = self.starts[shard]
        return as_tensor(self.shards[shard][begin - start : end - start]).to(device)

    def gather(self, numbers: np.ndarray, device: torch.device) -> Tensor:
        """The rows (M, D) with the given numbers (M,) int64, from any shards."""
        shard_of = np.searchsorted(self.starts, numbers, side="right") - 1  # (M,)
        shards = np.unique(shard_of)
        if len(shards) == 1:
            return self._gather_from(shards[0], numbers, device)
        dtype = next(dtype for dtype, name in DTYPES.items() if name == self.dtype)
        out = torch.empty(len(numbers), self.dim, dtype=dtype, device=device)  # (M, D)
        for shard in shards:
            at = np.flatnonzero(shard_of == shard)
            out.index_copy_(0, torch.from_numpy(at).to(device), self._gather_from(shard, numbers[at], device))
        return out

    def _gather_from(self, shard: int, numbers: np.ndarray, device: torch.device) -> Tensor:
        """The rows (M, D) with the given numbers (M,), all from one shard."""
        local, rows = numbers - self.starts[shard], self.shards[shard]
        if isinstance(rows, Tensor):
            return as_tensor(rows.index_select(0, torch.from_numpy(local).to(rows.device))).to(device)
        return as_tensor(rows[local]).to(device)  # NumPy's indexing starts no threads for a few rows, unlike torch's

    def content(self, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read all rows once: (2,) uint64, the sum of their hashes, and (M,) int64, the rows that contain NaN or infinity.

        Each hash is multiplied by a number derived from its row number. The sums of disjoint sets of rows add up to the sum of
        all rows, so the hash of a corpus does not depend on which process has which rows. first_row: the number of the first row.
        """
        total, not_finite = np.zeros(2, np.uint64), [np.empty(0, np.int64)]
        for begin, end in self.spans(HASHED_ROWS):
            block = self.block(begin, end, torch.device("cpu")).contiguous()  # (C, D)
            not_finite.append(first_row + begin + _not_finite(block))
            digests = _digests(block.view(torch.uint8).numpy())
            number = np.arange(first_row + begin, first_row + end, dtype=np.uint64)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
                number = (number ^ (number >> np.uint64(shift))) * np.uint64(factor)
            total += (digests * (number | np.uint64(1))[:, None]).sum(0, dtype=np.uint64)
        return total, np.concatenate(not_finite)

    def content_hash(self) -> str:
        """A hash of the dtype, D and all rows in their order."""
        return content_hash(self.dtype, self.dim, len(self), self.content()[0])

    def row_digests(self) -> np.ndarray:
        """(rows, 2) uint64: a 128-bit hash of each row. 0.0 and -0.0 have equal hashes, and so do NaNs with equal bits."""
        digests = np.empty((len(self), 2), np.uint64)  # (rows, 2)
        for begin, end in self.spans(HASHED_ROWS):
            digests[begin:end] = _digests((self.block(begin, end, torch.device("cpu")).float() + 0.0).numpy())
        return digests


def _not_finite(block: Tensor) -> np.ndarray:
    """block (C, D) -> (M,) int64: the rows that contain NaN or infinity."""
    sums = block.sum(
        1, dtype=torch.float32
    )  # reads the block once; large finite values may overflow, so these are read again
    suspects = sums.isfinite().logical_not_().nonzero()[:, 0]
    return suspects[~block[suspects].isfinite().all(1)].numpy()


def _digests(block: np.ndarray) -> np.ndarray:
    """(C, 2) uint64: a 128-bit hash of the bytes of each row."""
    joined = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in block)
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def content_hash(dtype: str, dim: int, rows: int, total: np.ndarray) -> str:
    """The hash of rows whose hashes have the sum `total` (2,)."""
    return hashlib.blake2b(f"{dtype} {dim} {rows}\n".encode() + total.tobytes(), digest_size=16).hexdigest()


def resolve_device(op: str, device: Any, rows: Rows) -> torch.device:
    """The requested device, else the device of the rows."""
    try:
        where = torch.device(device or rows.device or "cpu")
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise refuse(op, "device", f"a device that torch can use here ({error})", device) from error
    return where
