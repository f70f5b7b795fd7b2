"""Embeddings in tables: every type of column gives the same rows as an array."""

import re
import zlib

import numpy as np
import pytest

import negmine
from negmine.cli.files import labels, texts
from tests.cases import unit
from tests.compare import same_result

Q, C = unit(6, 8, seed=1).numpy(), unit(30, 8, seed=2).numpy()
POSITIVES = [3, 4, 5, 6, 7, 8]


def mine(corpus):
    queries = Q.astype(np.float16) if str(getattr(corpus, "dtype", "")) == "float16" else Q
    return negmine.mine_hard_negatives(queries, corpus, POSITIVES)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["fixed", "list", "large", "chunked", "sliced"])
def test_arrow_columns(kind, dtype):
    arrow = pytest.importorskip("pyarrow")
    rows = C.astype(dtype)
    flat = arrow.array(rows.reshape(-1))
    ends = arrow.array(np.arange(len(C) + 1) * 8, arrow.int64() if kind == "large" else arrow.int32())
    if kind in ("fixed", "sliced"):
        column = arrow.FixedSizeListArray.from_arrays(flat, 8)
    else:
        column = (arrow.LargeListArray if kind == "large" else arrow.ListArray).from_arrays(ends, flat)
    if kind == "chunked":
        column = arrow.chunked_array([column.slice(0, 11), column.slice(11)])
    if kind == "sliced":
        column = arrow.concat_arrays([column.slice(5), column]).slice(25)
    want = negmine.mine_hard_negatives(Q.astype(dtype), rows, POSITIVES)
    table = arrow.table({"id": [str(k) for k in range(len(C))], "embedding": column})
    for corpus in (column, table, table["embedding"]):
        same_result(negmine.mine_hard_negatives(Q.astype(dtype), corpus, POSITIVES), want)


def test_arrow_files_and_archives(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc

    table = arrow.table(
        {"embedding": arrow.FixedSizeListArray.from_arrays(arrow.array(C.reshape(-1)), 8), "x": [1] * 30}
    )
    feather.write_feather(table, tmp_path / "c.feather")
    with ipc.new_stream(tmp_path / "c.arrow", table.schema) as stream:
        stream.write_table(table)
    np.savez(tmp_path / "c.npz", rows=C, other=C[:3])
    want = mine(C)
    for name in ("c.feather", "c.arrow", "c.arrow::embedding", "c.npz::rows"):
        same_result(mine(f"{tmp_path}/{name}"), want)
    with pytest.raises(ValueError, match=r"corpus_embeddings must be 'path::name' with the name of an array"):
        mine(tmp_path / "c.npz")
    for name in ("c.feather", "c.arrow", "c.npz"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=re.escape(name)):
            mine(path)


def test_frames_are_read_by_position():
    pandas = pytest.importorskip("pandas")
    want, label = mine(C), np.arange(30)[::-1]
    series = pandas.Series(list(C), index=label)
    nullable = pandas.DataFrame(C, index=label).astype("Float32")
    for corpus in (pandas.DataFrame(C, index=label), nullable, series, pandas.DataFrame({"embedding": series})):
        same_result(mine(corpus), want)
    with pytest.raises(ValueError, match="corpus_embeddings must be a DataFrame without missing values, got 9 of them"):
        mine(nullable.mask(np.arange(240).reshape(30, 8) < 9))
    for bad in (pandas.Series([C[0], C[1, :3]]), pandas.Series(["a"]), pandas.DataFrame({"a": [1.0], "b": ["x"]})):
        with pytest.raises(TypeError, match="corpus_embeddings must be a "):
            mine(bad)


def test_polars_frames():
    polars = pytest.importorskip("polars")
    want = mine(C)
    column = polars.Series("embedding", C.tolist(), dtype=polars.Array(polars.Float32, 8))
    lists = polars.Series("embedding", C.tolist(), dtype=polars.List(polars.Float32))
    for corpus in (polars.DataFrame(C), column, lists, polars.DataFrame([column, polars.Series("id", ["a"] * 30)])):
        same_result(mine(corpus), want)


def test_datasets_are_read_as_they_are_selected():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["t"] * 60, "embedding": np.concatenate([C, -C]).tolist()})
    rows = rows.cast_column("embedding", datasets.Sequence(datasets.Value("float32")))
    same_result(mine(rows.select(range(29, -1, -1)).select(range(29, -1, -1))), mine(C))
    stream = rows.select(range(30)).to_iterable_dataset()
    column = rows.select(range(30))["embedding"]
    numpy, torch = (rows.select(range(30)).with_format(kind)["embedding"] for kind in ("numpy", "torch"))
    for corpus in (stream, stream["embedding"], column, numpy, torch):
        same_result(mine(corpus), mine(C))
    for given in (stream, stream["text"]):
        result = negmine.mining.from_texts(encoded, given, [f"d{i}" for i in range(30)], list(range(30)))
        assert result.query_texts == ["t"] * 30
    for bad in (datasets.DatasetDict({"train": rows}), rows.remove_columns("embedding")):
        with pytest.raises(TypeError, match="corpus_embeddings must be "):
            mine(bad)


@pytest.mark.parametrize("rows", [[[1.0, 2.0], None], [[1.0, 2.0], [3.0]], [[1.0, None], [2.0, 3.0]]])
def test_gaps_are_refused(rows):
    arrow = pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="corpus_embeddings must be lists of equal length without nulls"):
        mine(arrow.array(rows, arrow.list_(arrow.float32())))


def test_texts_of_a_parquet_file(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    words = arrow.array(["a", "b", "a"])
    columns = {
        "text": words.dictionary_encode(),
        "n": [1, 2, 3],
        "words": [["a"], ["b"], ["c"]],
        "tokens": [[1], [2], [3]],
    }
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    assert texts(f"{tmp_path}/t.parquet") == ["a", "b", "a"] == labels(f"{tmp_path}/t.parquet::text")
    assert labels(f"{tmp_path}/t.parquet::n") == [1, 2, 3]
    with pytest.raises(ValueError, match=r"t.parquet::n' must be a .parquet file with a column of strings"):
        texts(f"{tmp_path}/t.parquet::n")


class Stream:
    """The interface of a streamed dataset."""

    def __init__(self, table):
        self.table, self.column_names = table, table.column_names

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, batch_size):
        for begin in range(0, len(self.table), 7):
            yield self.table.slice(begin, 7)

    def __iter__(self):
        return iter(self.table.to_pylist())


IterableDataset = type("IterableDataset", (Stream,), {"__module__": "datasets.iterable_dataset"})


def encoded(texts):
    return np.stack([np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8) for text in texts])


def test_streamed_datasets():
    """Vectors are decoded batch by batch, and texts are read from the only column of strings."""
    arrow = pytest.importorskip("pyarrow")
    words = [f"text {i}" for i in range(30)]
    lists = arrow.array(C.tolist(), arrow.list_(arrow.float32()))
    stream = IterableDataset(arrow.table({"text": words, "embedding": lists}))
    same_result(mine(stream), mine(C))
    result = negmine.mining.from_texts(encoded, stream, stream, list(range(30)))
    assert result.corpus_texts == words == result.query_texts
    two = IterableDataset(arrow.table({"a": words, "b": words}))
    with pytest.raises(
        TypeError, match=r"queries must be a streamed dataset with one column of strings, .* got columns a, b"
    ):
        negmine.mining.from_texts(encoded, two, stream, [0])
    with pytest.raises(TypeError, match="corpus_embeddings must be a table with one column of vectors"):
        mine(two)
    with pytest.raises(
        ValueError, match="corpus_embeddings must be a dataset with at least one row, got an empty stream"
    ):
        mine(IterableDataset(arrow.table({"a": []})))
