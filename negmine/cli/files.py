"""Read the files that options name. Nothing in a file is executed. Code is imported only for options that take MODULE:NAME.

lists     .npy with one row number per query; .npz with indptr and indices; .json or .jsonl with a number or a list per query
labels    .npy of ints or strings; a column of strings of a .parquet file ("path::column"); any other file: one per line
texts     .jsonl, each line a string or an object with "text" or "query"; .parquet as for labels; any other file: one per line
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from negmine.cli.options import Reader
from negmine.mining.numpy_file import names_in_npz, read_npy, read_npz
from negmine.mining.regular_file import cause, open_regular, read_json
from negmine.mining.text_files import read_jsonl, read_lines


def array(name: str) -> np.ndarray:
    """The array of a .npy file."""
    return read_npy(name)


def records(name: str) -> list[Any]:
    """The values in the lines of a .jsonl file; blank lines are skipped."""
    return [record for _, record in read_jsonl(name)]


def lists(name: str) -> Any:
    kind = Path(name).suffix
    if kind == ".npy":
        return array(name)
    if kind == ".npz":
        held = read_npz(name, ("indptr", "indices"))
        if held.keys() != {"indptr", "indices"}:
            came = ", ".join(names_in_npz(name)) or "nothing"
            raise ValueError(f"{name!r} must contain indptr and indices, got {came:.200}")
        return held["indptr"], held["indices"]
    if kind == ".json":
        return read_json(name)
    if ".jsonl" in Path(name).suffixes:
        return records(name)
    raise ValueError(f"{name!r} must be a .npy, .npz, .json or .jsonl file")


def lines(name: str) -> list[str]:
    return [line for _, line in read_lines(name)]


def _strings_of_table(name: str) -> list[str]:
    """The strings in a column of a Parquet file: "path::column", or the only column of strings."""
    path, _, column = name.partition("::")
    open_regular(path).close()
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{name!r} needs pyarrow: pip install pyarrow") from error
    try:
        schema = parquet.read_schema(path)
        kinds = {field.name: getattr(field.type, "value_type", field.type) for field in schema}
        fitting = [key for key, kind in kinds.items() if str(kind) in ("string", "large_string", "string_view")]
        if (column and column not in fitting) or (not column and len(fitting) != 1):
            raise ValueError(f"its columns of strings are {', '.join(fitting) or 'none'}: choose one as path::column")
        held = parquet.read_table(path, columns=[column or fitting[0]]).column(0)
        strings = held.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{name!r} must be a .parquet file with a column of strings ({cause(error)})") from error
    if held.null_count:
        raise ValueError(f"{name!r} must be a column of strings without nulls, got {held.null_count}")
    return strings


def texts(name: str) -> list[str]:
    if Path(name.partition("::")[0]).suffix == ".parquet":
        return _strings_of_table(name)
    if ".jsonl" not in Path(name).suffixes:
        return lines(name)
    found = []
    for number, record in read_jsonl(name):
        if isinstance(record, dict):
            record = record.get("text", record.get("query"))
        if not isinstance(record, str):
            raise ValueError(f'line {number} of {name!r} must be a string or an object with "text" or "query"')
        found.append(record)
    return found


def labels(name: str) -> np.ndarray:
    if Path(name.partition("::")[0]).suffix == ".parquet":
        return np.array(_strings_of_table(name))
    return array(name) if Path(name).suffix == ".npy" else np.array(lines(name))


def imported(name: str) -> Any:
    """Import `module:name`, as python would from the current folder."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{name!r} must be module:name, which Python can import")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove("")


def model(name: str) -> Any:
    """Load the embedding model in a folder, or import `module:name`.

    A folder with a model of model2vec is loaded by that package. Any other folder, or the name of a model, is passed to
    sentence-transformers.
    """
    path = Path(name)
    if not path.exists() and ":" in name:
        return imported(name)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name!r} must be the folder of a model, or module:name")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    kind = config.get("model_type") if isinstance(config, dict) else None
    package = "model2vec" if kind == "model2vec" else "sentence_transformers"
    try:
        library = importlib.import_module(package)
    except ImportError as error:
        wanted = f"pip install {package.replace('_', '-')}"
        raise ImportError(f"{name!r} is a model that needs {package}: {wanted}") from error
    try:
        if package == "model2vec":
            return library.StaticModel.from_pretrained(path)
        return library.SentenceTransformer(name)
    except Exception as error:  # each library raises its own types
        raise ValueError(f"{name!r} is not a model that {package} can open ({cause(error)})") from error


def _similarities(words: list[str]) -> dict[str, Any]:
    """Similarity measures by title, from words of the form [title=]matrix.npy or [title=]module:function."""
    found = {}
    for word in words:
        title, equals, place = word.rpartition("=")
        found[title if equals else Path(place).stem] = array(place) if place.endswith(".npy") else imported(place)
    return found


def _one_or_all(names: list[str]) -> Any:
    return names[0] if len(names) == 1 else names


def _options(words: list[str]) -> dict[str, float]:
    """Numbers by name, from words of the form name=number."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise ValueError(f"{word!r} must be name=number") from None
    return found


MODEL = Reader(model, "FOLDER|MODULE:NAME")
EMBEDDINGS = Reader(_one_or_all, "FILE", "+")
LISTS, LABELS, TEXTS = (Reader(read, "FILE") for read in (lists, labels, texts))
SIMILARITIES = Reader(_similarities, "FILE", "+")
PAIR = Reader(tuple, "FILE", 2)
NUMBERS = Reader(lambda words: tuple(map(float, words)), "NUMBER", "+")
OPTIONS = Reader(_options, "NAME=NUMBER", "+")
