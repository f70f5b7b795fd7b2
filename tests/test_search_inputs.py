"""What embeddings may lie in, and what becomes of input that cannot be mined: one line for each."""

import itertools
import re
import sys
import tempfile

import numpy as np
import pytest
import torch

import negmine
from negmine import NegativeIndex, Select
from negmine.search import shards
from tests.cases import unit
from tests.test_search import same

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
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_columns(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PARQUET_ROWS", 6)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    path, rows = tmp_path / "c.parquet", C.astype(dtype)
    to_parquet(path, kind, dtype)
    want = mine(Q.astype(dtype), rows, POSITIVES)
    same(mine(Q.astype(dtype), path, POSITIVES, corpus_chunk_size=9), want)
    got = mine(Q.astype(dtype), [f"{path}::embedding", rows[:5]], POSITIVES)
    same(got, mine(Q.astype(dtype), [rows, rows[:5]], POSITIVES))
    assert not list((tmp_path / "spool").iterdir()), "the decoded rows have no name"


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    for dtype in (torch.float32, torch.bfloat16):
        q, c = torch.from_numpy(Q).to(dtype), torch.from_numpy(C).to(dtype)
        save_file({"rows": c, "norms": torch.ones(40)}, tmp_path / "one.safetensors")
        save_file({"a": c[:11].clone(), "b": c[11:].clone()}, tmp_path / "two.safetensors")
        want = mine(q, c, POSITIVES)
        same(mine(q, tmp_path / "one.safetensors", POSITIVES), want)
        same(mine(q, [f"{tmp_path}/two.safetensors::{name}" for name in "ab"], POSITIVES), want)


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
    same(got, mine(Q, C, POSITIVES, deduplicate="exact"))
    index = NegativeIndex.build(everything)
    np.testing.assert_array_equal(index.search(Q, 40).indices, NegativeIndex.build(C).search(Q, 40).indices)


def broken(tmp_path, name):
    """The path of a file that cannot be a shard."""
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
    elif name == "double.parquet":
        to_parquet(path, dtype="float64")
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
    ("garbage.npy", ValueError, "must be a whole .npy file"),
    ("garbage.npy::x", ValueError, "must be the path of an existing"),
    ("garbage.safetensors", ValueError, "must be a whole .safetensors file"),
    ("garbage.parquet", ValueError, "must be a whole .parquet file"),
    ("half.parquet", ValueError, "must be a whole .parquet file"),
    ("page.parquet", ValueError, "must be a whole .parquet file"),
    ("gap.parquet", ValueError, "must be lists of one length without gaps in column 'embedding'"),
    ("ragged.parquet", ValueError, "must be lists of one length without gaps in column 'embedding'"),
    ("double.parquet", TypeError, "must be float32, float16 or bfloat16 in native byte order, got 'float64'"),
    (
        "two.safetensors",
        ValueError,
        "must be 'path::name' where a file holds a tensor (rows, D) of other than one name",
    ),
    ("two.safetensors::c", ValueError, "must be the name of a tensor (rows, D) of"),
    ("scalars.parquet::id", ValueError, "must be the name of a column of lists of floats of"),
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


def test_no_room_to_decode(tmp_path, monkeypatch):
    to_parquet(tmp_path / "c.parquet")
    real = tempfile.TemporaryFile

    def full(**options):
        file = real(**options)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, piece):
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"no room in .* \(No space left on device\); TMPDIR names another folder"):
        mine(Q, tmp_path / "c.parquet", POSITIVES)


def nan_rows():
    c = C.copy()
    c[20:25] = np.nan
    return c


# What cannot be mined is refused before any work; what can be, in part, comes back with -1 and a count.
REFUSED = [
    ("wrong D", {"corpus": C[:, :5]}, "corpus_embeddings must be of query_embeddings' D = 8, got (40, 5)"),
    ("a positive out of range", {"positives": [0, 1, 2, 3, 4, 40]}, "in [0, 40), got '40 for query 5'"),
    ("a positive below 0", {"positives": [0, 1, 2, 3, 4, -1]}, "in [0, 40), got '-1 for query 5'"),
    ("too few positives", {"positives": [0, 1]}, "positives must be as long as there are queries (6)"),
    ("a margin and no positive", {"positives": [[1], [], [2], [3], [4], [5]], "select": Select(absolute_margin=0.1)},
     "positives must be at least one a query where select has a margin, got 'none for query 1'"),
    ("positives of an empty corpus", {"corpus": C[:0]}, "positives must be row numbers of the corpus, in [0, 0)"),
    ("an unknown range_mode", {"range_mode": "ranks"}, "range_mode must be 'filtered' or 'raw', got 'ranks'"),
    ("an unknown strategy", {"sampling_strategy": "best"}, "sampling_strategy must be"),
    ("an unknown deduplicate", {"deduplicate": "fuzzy"}, "deduplicate must be 'none' or 'exact' or 'near', got 'fuzzy'"),
    ("an unknown aggregation", {"positive_aggregation": "sum"}, "positive_aggregation must be"),
    ("an unknown index", {"index": "no such kind"}, "kind must be 'exact', 'cagra', or a factory string that FAISS takes"),
    ("no index", {"index": ""}, "index must be 'exact', a FAISS factory string, or a NegativeIndex, got ''"),
    ("an index of other rows", {"index": NegativeIndex.build(C[:9])}, "must be the rows that the index holds, 9 of D = 8"),
    ("a cosine of 1", {"near_duplicate_score": 1.0}, "near_duplicate_score must be a cosine above 0 and below 1, got 1.0"),
    ("a recall of 2", {"min_recall": 2}, "min_recall must be a share in [0, 1], got 2"),
    ("fractions, filters and candidates", {"index": "Flat", "select": Select(0.1, 0.5, max_score=0.9)},
     "select's range must be in ranks where select has filters and index is not 'exact'"),
    ("no memory", {"max_memory_bytes": 50}, "max_memory_bytes must be at least"),
]  # fmt: skip


@pytest.mark.parametrize("options,words", [line[1:] for line in REFUSED], ids=[line[0] for line in REFUSED])
def test_refused_in_words(options, words):
    if "index" in options:
        pytest.importorskip("faiss")
    options = dict(options)
    corpus, positives = options.pop("corpus", C), options.pop("positives", POSITIVES)
    error = TypeError if options.get("index") == "" else ValueError
    with pytest.raises(error, match=re.escape(words)):
        mine(Q, corpus, positives, **options)


@pytest.mark.parametrize("made", [torch.Tensor.to_sparse, lambda t: t.to("meta")], ids=["sparse", "meta"])
def test_a_tensor_without_rows_in_memory_is_refused(made):
    words = "must be a dense tensor|must be a tensor that holds numbers"
    q, c, positives = torch.from_numpy(Q), torch.from_numpy(C), torch.tensor(POSITIVES)
    for arguments in ((made(q), c, positives), (q, made(c), positives), (q, c, made(positives))):
        with pytest.raises(TypeError, match=words):
            mine(*arguments)
    with pytest.raises(TypeError, match=words):
        NegativeIndex.build(c).search(made(q), 3)


PADDED = [
    ("an empty corpus", {"corpus": C[:0], "positives": [[]] * 6}, [0] * 6),
    ("a corpus smaller than k", {"corpus": C[:4], "positives": [0, 1, 2, 3, 0, 1]}, [3] * 6),
    ("NaN rows", {"corpus": nan_rows(), "num_negatives": 40}, [34] * 6),
    ("a NaN query", {"query": np.concatenate([Q[:5], Q[:1] * np.nan]), "num_negatives": 9}, [9] * 5 + [0]),
    ("no positives", {"positives": [[]] * 6, "num_negatives": 45}, [40] * 6),
    ("everything filtered", {"select": Select(max_score=-9.0)}, [0] * 6),
    ("everything excluded", {"exclude": [list(range(40))] * 6}, [0] * 6),
    ("everything near a positive", {"deduplicate": "near", "near_duplicate_score": 1e-9, "corpus": abs(C)}, [0] * 6),
]


@pytest.mark.parametrize("options,valid", [line[1:] for line in PADDED], ids=[line[0] for line in PADDED])
@pytest.mark.parametrize("index", ["exact", "Flat"])
def test_padded_and_counted(options, valid, index):
    options = {"num_negatives": 7, **options}
    corpus, positives = options.pop("corpus", C), options.pop("positives", POSITIVES)
    if index == "Flat" and not len(corpus):
        pytest.skip("FAISS holds no empty index")
    if index == "Flat":
        pytest.importorskip("faiss")
    got = mine(options.pop("query", Q), corpus, positives, index=index, min_recall=0.0, **options)
    assert got.num_valid.tolist() == valid and ((got.indices >= 0).sum(1) == valid).all()
    assert np.isneginf(got.scores[got.indices < 0]).all() and np.isfinite(got.scores[got.indices >= 0]).all()
