"""Sources of embeddings: .npy, .safetensors and .parquet files, shards, tensors, and unreadable files."""

import gzip
import itertools
import re
import sys
import tempfile
import types

import numpy as np
import pytest
import torch

import negmine
from negmine import NegativeIndex
from negmine.cli import files
from negmine.mining import decoding, sources
from negmine.mining.sources import Rows
from tests.cases import unit
from tests.compare import same_result

mine = negmine.mine_hard_negatives
Q, C = unit(6, 8, seed=1).numpy(), unit(40, 8, seed=2).numpy()
POSITIVES = [3, 4, 5, 6, 7, 8]


def to_parquet(path, kind="fixed", dtype="float32", rows=C, name="embedding", group=7):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    value = {"float16": arrow.float16(), "float32": arrow.float32(), "float64": arrow.float64()}[dtype]
    flat = arrow.array(np.ascontiguousarray(rows, dtype).reshape(-1), value)
    if kind == "fixed":
        column = arrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    else:
        ends = np.arange(len(rows) + 1) * rows.shape[1]
        lists = arrow.LargeListArray if kind == "large" else arrow.ListArray
        column = lists.from_arrays(arrow.array(ends, arrow.int64() if kind == "large" else arrow.int32()), flat)
    table = arrow.table({"id": list(range(len(rows))), name: column})
    parquet.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_parquet_columns(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DECODED_ROWS", 6)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    path, rows = tmp_path / "c.parquet", C.astype(dtype)
    to_parquet(path, kind, dtype)
    want = mine(Q.astype(dtype), rows, POSITIVES)
    same_result(mine(Q.astype(dtype), path, POSITIVES, corpus_chunk_size=9), want)
    got = mine(Q.astype(dtype), [f"{path}::embedding", rows[:5]], POSITIVES)
    same_result(got, mine(Q.astype(dtype), [rows, rows[:5]], POSITIVES))
    assert not list((tmp_path / "spool").iterdir()), "the decoded rows have no name"


@pytest.mark.parametrize(
    "rows", [slice(9, 15), slice(14, 14), slice(39, 99), slice(None), np.array([3, 33, 4]), np.arange(0)]
)
def test_only_the_row_groups_that_hold_the_rows_are_decoded(rows, tmp_path):
    to_parquet(tmp_path / "c.parquet", group=7)
    shard = sources.open_shard("mine", "rows", tmp_path / "c.parquet")
    assert shard.is_decoded.sum() == 0 and shard.shape == C.shape
    np.testing.assert_array_equal(shard[rows], C[rows])
    assert set(np.flatnonzero(shard.is_decoded)) == set((np.arange(40)[rows] // 7).tolist())


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    for dtype in (torch.float32, torch.bfloat16):
        q, c = torch.from_numpy(Q).to(dtype), torch.from_numpy(C).to(dtype)
        save_file({"rows": c, "norms": torch.ones(40)}, tmp_path / "one.safetensors")
        save_file({"a": c[:11].clone(), "b": c[11:].clone()}, tmp_path / "two.safetensors")
        want = mine(q, c, POSITIVES)
        same_result(mine(q, tmp_path / "one.safetensors", POSITIVES), want)
        same_result(mine(q, [f"{tmp_path}/two.safetensors::{name}" for name in "ab"], POSITIVES), want)


def test_files_of_every_kind_make_one_corpus(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    np.save(tmp_path / "0.npy", C[:10])
    save_file({"rows": torch.from_numpy(C[10:20].copy())}, tmp_path / "1.safetensors")
    to_parquet(tmp_path / "2.parquet", rows=C[20:33])
    files = [tmp_path / name for name in ("0.npy", "1.safetensors", "2.parquet")]
    everything = [*files, C[33:36], torch.from_numpy(C[36:])]
    for order in itertools.islice(itertools.permutations(everything[:3]), 3):
        mine(Q, list(order), POSITIVES)
    got = mine(Q, everything, POSITIVES, batch_size=4, corpus_chunk_size=11, deduplicate="exact")
    same_result(got, mine(Q, C, POSITIVES, deduplicate="exact"))
    index = NegativeIndex.build(everything)
    np.testing.assert_array_equal(index.search(Q, 40).indices, NegativeIndex.build(C).search(Q, 40).indices)


def broken(tmp_path, name):
    """Return the path of a file that is not a valid shard."""
    path = tmp_path / name.partition("::")[0]
    if name.startswith("garbage"):
        path.write_bytes(b"\x93NUMPY\x01\x00PAR1 not what its name says")
    elif name.startswith("half."):
        to_parquet(path)
        path.write_bytes(path.read_bytes()[:200])
    elif name == "gap.parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = arrow.array([[1.0, 2.0], None, [3.0, 4.0]], arrow.list_(arrow.float32()))
        parquet.write_table(arrow.table({"embedding": rows}), path)
    elif name == "ragged.parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = arrow.array([[1.0] * 7, [1.0] * 9], arrow.list_(arrow.float32()))
        parquet.write_table(arrow.table({"embedding": rows}), path)
    elif name == "page.parquet":
        to_parquet(path)
        text = bytearray(path.read_bytes())
        text[400:460] = bytes(60)
        path.write_bytes(text)
    elif name.startswith("two."):
        pytest.importorskip("safetensors.torch").save_file({"a": torch.ones(3, 8), "b": torch.ones(3, 8)}, path)
    elif name.startswith("scalars."):
        to_parquet(path, name="x")
    return str(tmp_path / name)


UNREADABLE = [
    ("missing.npy", ValueError, "must be the path of an existing .npy, .safetensors or .parquet file"),
    ("rows.csv", ValueError, "must be the path of an existing .npy, .safetensors or .parquet file"),
    ("garbage.npy", ValueError, "must be a complete .npy file"),
    ("garbage.npy::x", ValueError, "must be the path of an existing"),
    ("garbage.safetensors", ValueError, "must be a complete .safetensors file"),
    ("garbage.parquet", ValueError, "must be a complete .parquet file"),
    ("half.parquet", ValueError, "must be a complete .parquet file"),
    ("page.parquet", ValueError, "must be a complete .parquet file"),
    ("gap.parquet", ValueError, "must be lists of equal length without nulls in column 'embedding'"),
    ("ragged.parquet", ValueError, "must be lists of equal length without nulls in column 'embedding'"),
    (
        "two.safetensors",
        ValueError,
        "must be 'path::name' with the name of a tensor (rows, D)",
    ),
    ("two.safetensors::c", ValueError, "must be the name of a tensor (rows, D) in"),
    ("scalars.parquet::id", ValueError, "must be the name of a column of lists of floats in"),
]


@pytest.mark.parametrize("name,error,words", UNREADABLE, ids=[name for name, _, _ in UNREADABLE])
def test_unreadable_shards(name, error, words, tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("safetensors")
    path = broken(tmp_path, name)
    with pytest.raises(error, match=r"^mine_hard_negatives: corpus_embeddings\[1\] " + re.escape(words)):
        mine(Q, [C, path], POSITIVES)


def test_missing_readers_are_named(tmp_path, monkeypatch):
    for package, suffix in (("safetensors", ".safetensors"), ("pyarrow", ".parquet")):
        (tmp_path / f"c{suffix}").write_bytes(b"")
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"reading it needs {package}: pip install {package}"):
            mine(Q, tmp_path / f"c{suffix}", POSITIVES)


def test_a_full_disk_while_decoding_raises_an_error(tmp_path, monkeypatch):
    to_parquet(tmp_path / "c.parquet")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding.os, "pwrite", full)
    with pytest.raises(OSError, match=r"no space left in .* \(No space left on device\); set TMPDIR to another folder"):
        mine(Q, tmp_path / "c.parquet", POSITIVES)


@pytest.mark.parametrize("made", [torch.Tensor.to_sparse, lambda t: t.to("meta")], ids=["sparse", "meta"])
def test_a_tensor_without_rows_in_memory_is_refused(made):
    words = "must be a dense tensor|must be a tensor with data"
    q, c, positives = torch.from_numpy(Q), torch.from_numpy(C), torch.tensor(POSITIVES)
    for arguments in ((made(q), c, positives), (q, made(c), positives), (q, c, made(positives))):
        with pytest.raises(TypeError, match=words):
            mine(*arguments)
    with pytest.raises(TypeError, match=words):
        NegativeIndex.build(c).search(made(q), 3)


def test_damaged_shard_is_refused(tmp_path):
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    with pytest.raises(ValueError, match=r"corpus_embeddings must be a complete .npy file"):
        mine(Q, tmp_path / "c.npy", POSITIVES)


def stored(name, content):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open(name, "wb") as file:
        file.write(content)
    return name


def test_files_in_object_storage(tmp_path, monkeypatch):
    """Files are read from URLs like local files: embeddings, texts, compressed or not, and damaged ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = unit(20, 4, seed=1).numpy()
    np.save(tmp_path / "rows.npy", rows)
    url = stored("memory://negmine/rows.npy", (tmp_path / "rows.npy").read_bytes())
    held = Rows.open("mine", "corpus_embeddings", [url, str(tmp_path / "rows.npy")])
    assert torch.equal(held.block(0, 40, torch.device("cpu")), torch.from_numpy(np.concatenate([rows, rows])))
    texts = stored("memory://negmine/texts.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert files.texts(texts) == ["a", "b"]
    bad = stored("memory://negmine/bad.npy", b"no array")
    with pytest.raises(ValueError, match=r"mine: rows must be a complete \.npy file, got 'memory://negmine/bad.npy'"):
        Rows.open("mine", "rows", bad)
    for missing, words in (("memory://negmine/none.npy", "cannot be read"), ("nowhere://a.npy", "cannot be read")):
        with pytest.raises(ValueError, match=f"'{missing}' {words}"):
            Rows.open("mine", "rows", missing)
        with pytest.raises(ValueError, match=f"'{missing}' {words}"):
            files.texts(missing)
    assert not list(tmp_path.glob("negmine-*")), "copies are gone"


def test_a_url_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(
        ImportError, match=r"'s3://b/rows\.npy' is a URL, and reading it needs fsspec: pip install fsspec"
    ):
        Rows.open("mine", "rows", "s3://b/rows.npy")


def test_lance_datasets(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    rows = unit(50, 4, seed=1).numpy()
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), 4)
    table = arrow.table({"id": list(range(50)), "vector": lists})
    folder = tmp_path / "rows.lance"
    try:
        import lance

        lance.write_dataset(table, str(folder), max_rows_per_file=20)
    except ImportError:
        folder.mkdir()

        def to_batches(columns, batch_size, offset, limit):
            return table.select(columns).slice(offset, limit).to_batches(max_chunksize=20)

        opened = types.SimpleNamespace(schema=table.schema, to_batches=to_batches, count_rows=lambda: 50)
        monkeypatch.setitem(sys.modules, "lance", types.SimpleNamespace(dataset=lambda path: opened))
    monkeypatch.setattr(sources, "LANCE_ROWS", 15)
    for name in (folder, f"{folder}::vector"):
        held = Rows.open("mine", "rows", name)
        assert held.dtype == "float32" and torch.equal(held.block(0, 50, torch.device("cpu")), torch.from_numpy(rows))
    with pytest.raises(ValueError, match="rows must be the name of a column of lists of floats"):
        Rows.open("mine", "rows", f"{folder}::id")
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ImportError, match="and reading it needs pylance: pip install pylance"):
        Rows.open("mine", "rows", folder)


def test_a_file_without_the_rows_of_its_header_is_refused():
    with pytest.raises(ValueError, match=r"^f: c must be a complete file, got 'a.parquet', which has fewer rows"):
        decoding.DecodedRows("f", "c", "a.parquet", "v", [0, 3], lambda piece: iter(()))
