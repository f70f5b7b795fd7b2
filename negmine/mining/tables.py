"""Embeddings in the columns of tables: Arrow, pandas, polars and Hugging Face datasets, without importing what is not in use.

A column of vectors contains lists of D floats, or fixed-size lists. If all columns of a frame are numeric, each row is a vector.
Rows are read by position; labels of an index are ignored.
"""

import sys
from typing import Any

import numpy as np

from negmine.ops.checks import Phrase, kind_of, refuse

WANTED = "a table with one column of vectors, or one of its columns"


def is_vector(kind: Any) -> bool:
    """Whether an Arrow type is a list of floats."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and types.is_floating(kind.value_type)


def matrix(lists: Any) -> np.ndarray | None:
    """An Arrow array of lists of floats as (rows, D); None if there is a null, or if the lengths differ."""
    from pyarrow import types

    values = lists.flatten()
    dim = len(values) // len(lists) if len(lists) else 0
    even = lists.null_count == 0 and values.null_count == 0 and len(values) == dim * len(lists)
    if even and not types.is_fixed_size_list(lists.type):
        even = bool((np.diff(lists.offsets.to_numpy()) == dim).all())
    if not even:
        return None
    dtype = np.dtype(lists.type.value_type.to_pandas_dtype())
    return np.ascontiguousarray(values.to_numpy(zero_copy_only=False), dtype).reshape(len(lists), dim)


def _from_arrow(op: str, name: str, column: Any) -> np.ndarray:
    """An Arrow array or chunked array as (rows, D)."""
    if not is_vector(column.type):
        raise refuse(op, name, "a column of lists of floats", Phrase(f"one of {column.type}"), TypeError)
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    parts: list[np.ndarray] = []
    begin = 0
    for chunk in chunks:
        part = matrix(chunk)
        if part is None or (len(part) and parts and part.shape[1] != parts[0].shape[1]):
            raise refuse(op, name, "lists of equal length without nulls", Phrase(f"other entries near row {begin}"))
        if len(part):
            parts.append(part)
        begin += len(chunk)
    if not parts:
        return np.empty((0, max(0, getattr(column.type, "list_size", 0))), np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def is_stream(value: Any) -> bool:
    """Whether a value is a streamed dataset of Hugging Face (IterableDataset), or a column of one."""
    kinds = ("IterableDataset", "IterableColumn")
    return type(value).__module__.partition(".")[0] == "datasets" and type(value).__name__ in kinds


def dataset_of(value: Any) -> Any:
    """For a column of a dataset of Hugging Face, the dataset of that column alone; any other value unchanged."""
    is_column = type(value).__module__.partition(".")[0] == "datasets" and hasattr(value, "column_name")
    if not is_column or not hasattr(value.source, "select_columns"):
        return value
    return value.source.select_columns([value.column_name])


def vector_column(op: str, name: str, table: Any) -> str:
    """The name of the only column of vectors of an Arrow table."""
    fitting = [field.name for field in table.schema if is_vector(field.type)]
    if len(fitting) != 1:
        came = Phrase(f"columns of vectors {fitting}" if fitting else f"columns {table.schema.names}")
        raise refuse(op, name, WANTED, came, TypeError)
    return fitting[0]


def _from_pandas(op: str, name: str, value: Any) -> np.ndarray:
    if value.ndim == 2 and all(getattr(kind, "kind", "O") in "fiu" for kind in value.dtypes):
        if value.isna().any(axis=None) and not all(isinstance(kind, np.dtype) for kind in value.dtypes):
            raise refuse(
                op, name, "a DataFrame without missing values", Phrase(f"{value.isna().to_numpy().sum()} of them")
            )
        return value.to_numpy(np.result_type(*(getattr(kind, "numpy_dtype", kind) for kind in value.dtypes)))
    if value.ndim == 2:
        if value.shape[1] != 1:
            came = Phrase(f"a DataFrame with columns {list(value.columns)}")
            raise refuse(op, name, "a DataFrame of numbers, or a column of vectors", came, TypeError)
        value = value.iloc[:, 0]
    try:
        rows = np.stack([np.asarray(row) for row in value.array])
    except (ValueError, TypeError) as error:
        raise refuse(
            op, name, "a column of vectors of one length", Phrase(f"a Series of {value.dtype}"), TypeError
        ) from error
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise refuse(op, name, "a column of vectors of floats", Phrase(f"a Series of {value.dtype}"), TypeError)
    return rows


def rows_of(op: str, name: str, value: Any) -> np.ndarray | None:
    """A table or a column of a known package as (rows, D); None for any other value."""
    package = type(value).__module__.partition(".")[0]
    if package not in ("pandas", "polars", "pyarrow", "datasets") or package not in sys.modules:
        return None
    if package == "pandas" and hasattr(value, "iloc"):
        return _from_pandas(op, name, value)
    if package == "polars" and hasattr(value, "to_arrow"):
        if hasattr(value, "schema") and all(kind.is_numeric() for kind in value.schema.values()):
            return value.to_numpy()
        value = value.to_arrow()
    elif package == "datasets":
        if not hasattr(value, "with_format"):
            if not hasattr(value, "features"):
                wanted = "a Dataset in memory: take its vectors to an array"
                raise refuse(op, name, wanted, kind_of(value), TypeError)
            return None
        if not hasattr(value, "__len__") or not hasattr(value, "column_names") or isinstance(value, dict):
            wanted = "one split of a dataset, in memory"
            raise refuse(op, name, wanted, kind_of(value), TypeError)
        value = value.with_format("arrow")[:]  # with the selection and the order of the dataset
    if hasattr(value, "schema") and hasattr(value, "column"):
        return _from_arrow(op, name, value.column(vector_column(op, name, value)))
    if hasattr(value, "flatten") or hasattr(value, "chunks"):
        return _from_arrow(op, name, value)
    return None
