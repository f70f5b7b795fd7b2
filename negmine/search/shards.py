"""One shard of embeddings, whatever holds it, as something with rows: an array, a tensor, or a file.

    "rows.npy"                 memory-mapped
    "rows.safetensors::name"   a tensor of the file, mapped; without a name its only one of two dimensions
    "rows.parquet::column"     a column of lists of floats, each of D; without a name its only one

Parquet compresses, so that its rows have no place in the file: the column is decoded once, batch by batch, into a file without
a name in the folder for temporary files, which is mapped and is gone when the process ends, however it ends.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from negmine.checks import refuse, require_stored

FORMS = "an array, a tensor, the path of a .npy, .safetensors or .parquet file, or a list of those"
PARQUET_ROWS = 4096  # decoded at a time


def opened(op: str, name: str, value: Any) -> Tensor | np.ndarray:
    """A file becomes a private map of it, which torch may wrap and nothing writes to; arrays and tensors are themselves."""
    if isinstance(value, (str, os.PathLike)):
        text, _, inner = str(value).partition("::")
        path = Path(text)
        reader = READERS.get(path.suffix)
        if reader is None or not path.is_file() or (inner and path.suffix == ".npy"):
            raise refuse(op, name, "the path of an existing .npy, .safetensors or .parquet file", str(value))
        return reader(op, name, path, inner)
    if not isinstance(value, (np.ndarray, Tensor)):
        raise refuse(op, name, FORMS, type(value).__name__, TypeError)
    if isinstance(value, Tensor):
        require_stored(op, name, value)
    return value


def _not_whole(op: str, name: str, path: Path, error: Exception) -> ValueError:
    return ValueError(f"{op}: {name} must be a whole {path.suffix} file, got {str(path)!r} ({error})")


def _missing(op: str, name: str, path: Path, package: str) -> ImportError:
    return ImportError(f"{op}: {name} is {str(path)!r}, and reading it needs {package}: pip install {package}")


def _npy(op: str, name: str, path: Path, inner: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # NumPy's parser of a damaged header raises many kinds
        raise _not_whole(op, name, path, error) from error


def _one_of(op: str, name: str, path: Path, inner: str, fitting: list[str], what: str) -> str:
    """The name asked for, or the only one that there is."""
    if inner and inner not in fitting:
        raise refuse(op, name, f"the name of {what} of {str(path)!r}: {', '.join(fitting) or 'it has none'}", inner)
    if not inner and len(fitting) != 1:
        raise refuse(op, name, f"'path::name' where a file holds {what} of other than one name", f"{path}: {fitting}")
    return inner or fitting[0]


def _safetensors(op: str, name: str, path: Path, inner: str) -> Tensor:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise _missing(op, name, path, "safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            fitting = [key for key in file.keys() if len(file.get_slice(key).get_shape()) == 2]  # noqa: SIM118
            chosen = _one_of(op, name, path, inner, fitting, "a tensor (rows, D)")
            return file.get_tensor(chosen)
    except ValueError:
        raise
    except Exception as error:  # SafetensorError is a plain Exception
        raise _not_whole(op, name, path, error) from error


def _parquet(op: str, name: str, path: Path, inner: str) -> np.ndarray:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(op, name, path, "pyarrow") from error

    def is_vector(kind: Any) -> bool:
        lists = (arrow.types.is_list, arrow.types.is_large_list, arrow.types.is_fixed_size_list)
        return any(test(kind) for test in lists) and arrow.types.is_floating(kind.value_type)

    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        fitting = [field.name for field in schema if is_vector(field.type)]
    except (arrow.ArrowException, OSError) as error:
        raise _not_whole(op, name, path, error) from error
    column = _one_of(op, name, path, inner, fitting, "a column of lists of floats")
    dtype = np.dtype(schema.field(column).type.value_type.to_pandas_dtype())
    rows, dim = 0, 0
    with file, tempfile.TemporaryFile(prefix="negmine-") as spool:
        batches = file.iter_batches(PARQUET_ROWS, columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except (arrow.ArrowException, OSError) as error:
                raise _not_whole(op, name, path, error) from error
            if batch is None:
                break
            lists = batch.column(0)
            values = lists.flatten()
            if not dim and len(lists):
                dim = len(values) // len(lists)
            even = lists.null_count == 0 and values.null_count == 0 and len(values) == dim * len(lists)
            if even and not arrow.types.is_fixed_size_list(lists.type):
                even = bool((np.diff(lists.offsets.to_numpy()) == dim).all())
            if not even:
                raise refuse(
                    op, name, f"lists of one length without gaps in column {column!r}", f"{path} near row {rows}"
                )
            try:
                spool.write(np.ascontiguousarray(values.to_numpy(zero_copy_only=False), dtype).data)
            except OSError as error:
                where = f"{op}: {name}: no room in {tempfile.gettempdir()!r} for the rows of {str(path)!r}"
                raise OSError(error.errno, f"{where} ({error.strerror}); TMPDIR names another folder") from error
            rows += len(lists)
        spool.flush()
        return np.memmap(spool, dtype, "c", 0, (rows, dim)) if rows and dim else np.empty((rows, dim), dtype)


READERS: dict[str, Callable[[str, str, Path, str], Tensor | np.ndarray]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
