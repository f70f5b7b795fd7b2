"""Read the files that options name. Nothing in a file is executed. Code is imported only for options that take MODULE:NAME.

lists     .npy with one row number per query; .npz with indptr and indices; .json or .jsonl with a number or a list per query
labels    .npy of ints or strings; JSON of ints, strings or objects with "_id" or "id"; a column of ints or strings of a .parquet
          file ("path::column"); any other file: one per line
texts     JSON of strings or objects with "text" or "query"; a column of strings of a .parquet file; any other file: one per line

JSON is .jsonl, one value per line, or .json, which is the same or one list. The fields of a .csv or .tsv file are not read.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from negmine.cli.options import Reader
from negmine.mining.numpy_file import names_in_npz, read_npy, read_npz
from negmine.mining.regular_file import cause, open_regular, parse_json, read_json
from negmine.mining.text_files import read_jsonl, read_lines


def array(name: str) -> np.ndarray:
    """The array of a .npy file."""
    return read_npy(name)


def records(name: str) -> list[Any]:
    """The values in the lines of a .jsonl file; blank lines are skipped."""
    return [record for _, record in read_jsonl(name)]


def _kind(name: str) -> str:
    """The extension of a file name, without that of compression."""
    return Path(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def _json_values(name: str, field: Callable[[Any], Any], wanted: str) -> list[Any]:
    """The field of each value of a JSON file: of one list, or of a value per line. Raises ValueError for one without it."""
    first = next((line.lstrip()[:1] for _, line in read_lines(name) if line.strip()), "")
    is_list = first == "[" and _kind(name) == ".json"
    if is_list:
        whole = parse_json("\n".join(lines(name)), repr(name))
    values = []
    for number, value in enumerate(whole, 1) if is_list else read_jsonl(name):
        values.append(field(value))
        if values[-1] is None:
            raise ValueError(f"{'entry' if is_list else 'line'} {number} of {name!r} must be {wanted}")
    return values


def _entries(name: str, field: Callable[[Any], Any], wanted: str) -> list[Any]:
    """The entries of a JSON file, or the lines of any other file. Raises ValueError for the name of a table of text."""
    if _kind(name) in (".csv", ".tsv"):
        instead = ".jsonl, .parquet, or a file with one entry per line"
        raise ValueError(
            f"{name!r} has several fields in a line, so its entries must be given in another form: {instead}"
        )
    return _json_values(name, field, wanted) if _kind(name) in (".json", ".jsonl") else lines(name)


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
    if _kind(name) == ".jsonl":
        return records(name)
    raise ValueError(f"{name!r} must be a .npy, .npz, .json or .jsonl file")


def lines(name: str) -> list[str]:
    return [line for _, line in read_lines(name)]


def _column_of_table(name: str, kinds: tuple[str, ...], wanted: str) -> list[Any]:
    """A column of a Parquet file, of one of the Arrow types `kinds`: "path::column", or the only such column."""
    path, _, column = name.partition("::")
    open_regular(path).close()
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{name!r} needs pyarrow: pip install pyarrow") from error
    try:
        schema = parquet.read_schema(path)
        types = {field.name: field.type for field in schema}
        types |= {key: kind.value_type for key, kind in types.items() if pyarrow.types.is_dictionary(kind)}
        fitting = [key for key, kind in types.items() if str(kind) in kinds]
        if (column and column not in fitting) or (not column and len(fitting) != 1):
            raise ValueError(f"its columns of {wanted} are {', '.join(fitting) or 'none'}: choose one as path::column")
        held = parquet.read_table(path, columns=[column or fitting[0]]).column(0)
        entries = held.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{name!r} must be a .parquet file with a column of {wanted} ({cause(error)})") from error
    if held.null_count:
        raise ValueError(f"{name!r} must be a column of {wanted} without nulls, got {held.null_count}")
    return entries


TEXT, LABEL = 'a string or an object with "text" or "query"', 'an int, a string or an object with "_id" or "id"'
STRINGS = ("string", "large_string", "string_view")
INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def _text_of(value: Any) -> str | None:
    value = value.get("text", value.get("query")) if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _label_of(value: Any) -> int | str | None:
    value = value.get("_id", value.get("id")) if isinstance(value, dict) else value
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def json_texts(name: str) -> list[str]:
    """The texts of a file of JSON, whatever its name is."""
    return _json_values(name, _text_of, TEXT)


def texts(name: str) -> list[str]:
    if _kind(name.partition("::")[0]) == ".parquet":
        return _column_of_table(name, STRINGS, "strings")
    return _entries(name, _text_of, TEXT)


def labels(name: str) -> Any:
    if _kind(name.partition("::")[0]) == ".parquet":
        return _column_of_table(name, (*STRINGS, *INTS), "ints or strings")
    if _kind(name) == ".npy":
        return array(name)
    return _entries(name, _label_of, LABEL)


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
