"""NegativeIndex: exact search compared with loops, FAISS factory strings, damaged files, recall, and mining with an index."""

import os
import re
import stat
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import negmine
from negmine import NegativeIndex, Select
from negmine.mining import array_file, atomic_file, engines
from negmine.mining.atomic_file import atomic_write
from tests.cases import unit, whole
from tests.compare import same_result

mine = negmine.mine_hard_negatives
K, D = 400, 16


def corpus():
    return unit(K, D, seed=2)


def queries(count=60):
    return torch.nn.functional.normalize(corpus()[:count] + 0.15 * unit(count, D, seed=3), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exact_search_is_the_full_ranking(dtype):
    q, c = whole(7, 5, seed=1).to(dtype), whole(90, 5, seed=2).to(dtype)
    index = NegativeIndex.build(c[:50])
    index.add(c[50:])
    found = index.search(q, 95)
    scores = q.float() @ c.float().T
    want = scores.argsort(dim=1, descending=True, stable=True)
    np.testing.assert_array_equal(found.indices[:, :90], want.numpy())
    np.testing.assert_array_equal(found.scores[:, :90], scores.gather(1, want).numpy())
    assert (found.indices[:, 90:] == -1).all() and np.isneginf(found.scores[:, 90:]).all()
    assert (len(index), index.dim, index.kind) == (90, 5, "exact") and "90 rows" in repr(index)
    assert index.recall(q, c, k=7) == 1.0


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16", "SQ8"])
def test_faiss_kinds_search_save_and_load(kind, tmp_path):
    pytest.importorskip("faiss")
    index = NegativeIndex.build(corpus()[:300], kind, train_rows=320)
    index.add(corpus()[300:].numpy())
    assert len(index) == K
    found = index.search(queries(), 12)
    assert found.scores.dtype == np.float32 and found.indices.dtype == np.int64
    index.save(tmp_path / "index")
    again = NegativeIndex.load(tmp_path / "index")
    for before, after in zip(found, again.search(queries(), 12), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (again.kind, len(again), again.dim) == (kind, K, D) and again.content_hash() == index.content_hash()
    past = index.search(queries(), K + 3)
    assert (past.indices[:, K:] == -1).all() and np.isneginf(past.scores[:, K:]).all()


def test_recall_is_the_share_of_the_true_hardest():
    pytest.importorskip("faiss")
    c, q = corpus(), queries()
    poor = NegativeIndex.build(c, "IVF16,Flat")
    ids = poor.search(q, 10).indices
    best = (q.double() @ c.double().T).argsort(dim=1, descending=True)[:, :10].tolist()
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), best, strict=True)])
    assert poor.recall(q, c, k=10, queries=1000) == pytest.approx(share, abs=1e-9) and share < 0.9
    good = NegativeIndex.build(c, "IVF16,Flat", search_options={"nprobe": 16})
    assert good.recall(q, c, k=10) == 1.0
    assert NegativeIndex.build(c, "Flat").recall(torch.cat([q, q]), c, k=K) == 1.0


def test_mining_by_a_complete_index_is_mining_exactly():
    pytest.importorskip("faiss")
    c, q = corpus(), queries()
    c[200:260] = c[:60]
    positives = [[b, 100 + b] for b in range(60)]
    common = {"num_negatives": 5, "exclude": [[300 + b] for b in range(60)]}
    for options in (
        {},
        {"deduplicate": "exact"},
        {"deduplicate": "near", "near_duplicate_score": 0.5},
        {"select": Select(3, 40, absolute_margin=0.3)},
        {"select": Select(0.1, 0.4), "sampling_strategy": "weighted"},
        {"select": Select(2, 30, relative_margin=0.2), "range_mode": "raw", "sampling_strategy": "random"},
        {"select": Select(min_score=0.3)},
    ):
        want = mine(q, c, positives, **common, **options)
        for index in ("Flat", NegativeIndex.build(c, "HNSW32", search_options={"efSearch": K}), NegativeIndex.build(c)):
            got = mine(q, c, positives, **common, **options, index=index)
            np.testing.assert_array_equal(got.indices, want.indices)
            np.testing.assert_array_equal(got.scores, want.scores)
            assert (got.recall is None) == (getattr(index, "kind", "") == "exact")
    assert got.config["arguments"]["index"] == "exact" and "recall" not in want.summary()


def test_filters_come_before_the_cut_of_candidates():
    """The margin of a positive with a low score drops hundreds of rows, so the search returns more rows until enough are left."""
    pytest.importorskip("faiss")
    c, q = corpus(), queries(8)
    weakest = (q @ c.T).argsort(dim=1)[:, 20].tolist()
    select = Select(absolute_margin=0.0)
    got = mine(q, c, weakest, select=select, num_negatives=5, index="Flat")
    same_rows = mine(q, c, weakest, select=select, num_negatives=5)
    np.testing.assert_array_equal(got.indices, same_rows.indices)
    assert (got.num_valid == 5).all() and got.config["index"]["cut_short"] == 0


def test_queries_whose_search_is_cut_short_are_counted(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr("negmine.mining.index_scan.MAX_CANDIDATES", 50)
    c, q = corpus(), queries(8)
    weakest = (q @ c.T).argsort(dim=1)[:, 20].tolist()
    got = mine(q, c, weakest, select=Select(absolute_margin=0.0), index="Flat")
    assert got.config["index"]["cut_short"] == 8 and (got.indices == -1).all()


def test_poor_recall_warns_and_is_in_the_result():
    pytest.importorskip("faiss")
    c, q = corpus(), queries()
    with pytest.warns(RuntimeWarning, match=r"'IVF16,Flat' finds only \d+\.\d% .* less than min_recall=0.9"):
        got = mine(q, c, list(range(60)), index="IVF16,Flat", num_negatives=10)
    index = NegativeIndex.build(c, "IVF16,Flat")
    assert got.recall == index.recall(q, c, k=10, queries=256) < 0.9
    assert f"{got.recall:.1%}" in got.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(q, c, list(range(60)), index=index, num_negatives=10, min_recall=0.1)


@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_damaged_files_raise_errors(kind, tmp_path):
    if kind == "Flat":
        pytest.importorskip("faiss")
    path = tmp_path / "index"
    NegativeIndex.build(corpus(), kind).save(path)
    good = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    rng = np.random.default_rng(0)
    for at in {
        0,
        8,
        64,
        len(good) - 1,
        *rng.integers(0, len(good), 60).tolist(),
        *range(len(good) - 400, len(good), 7),
    }:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        try:
            again = NegativeIndex.load(path)
        except ValueError as error:
            assert str(error).startswith("NegativeIndex.load: ")
        else:  # one more byte between parts
            assert again.content_hash() == NegativeIndex.build(corpus(), kind).content_hash()
    for text in (b"", good[:-30], good[: len(good) // 2], good[1:], b"not a file of ours", good + b"x"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="is damaged or is not a NegativeIndex file"):
            NegativeIndex.load(path)
    with pytest.raises(ValueError, match="path must be an existing file"):
        NegativeIndex.load(tmp_path / "missing")


def forged(path, shape, size, dtype="float32", **facts):
    """Write a file with matching hashes and a wrong table of contents."""
    facts = {"kind": "exact", "dim": 4, "rows": 3, "dtype": "float32", "options": {}} | facts
    array_file.write("x", path, "NegativeIndex", facts, {"index": (dtype, shape, lambda write: write(bytes(size)))})


@pytest.mark.parametrize(
    "shape,size,facts,words",
    [
        ((1 << 40, 1 << 20), 48, {}, "needs 4611686018427387904 bytes"),
        ((3, 4), 44, {}, "needs 48 bytes"),
        ((-3, -4), 48, {}, "dtype 'float32' and shape"),
        ((3, 4), 96, {"dtype_": "float64"}, "dtype 'float64' and shape"),
        ((4, 3), 48, {}, r"its rows are float32 \(4, 3\)"),
        ((3, 4), 48, {"rows": 9}, r"its rows are float32 \(3, 4\)"),
        ((3, 4), 48, {"kind": 7}, "kind must be 'exact'"),
        ((3, 4), 48, {"options": [1]}, "this version can read"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(shape, size, facts, words, tmp_path):
    facts = dict(facts)
    forged(tmp_path / "index", shape, size, facts.pop("dtype_", "float32"), **facts)
    with pytest.raises(ValueError, match=words):
        NegativeIndex.load(tmp_path / "index")


def test_a_faiss_file_that_faiss_cannot_read(tmp_path):
    pytest.importorskip("faiss")
    forged(tmp_path / "index", None, 48, "uint8", kind="Flat")
    with pytest.raises(ValueError, match=r"FAISS \S+ cannot read this index"):
        NegativeIndex.load(tmp_path / "index")
    index = NegativeIndex.build(corpus(), "Flat")
    part = {"index": ("uint8", None, index._engine.serialize)}
    facts = {"kind": "Flat", "dim": D, "rows": K + 1, "dtype": "float32", "options": {}}
    array_file.write("x", tmp_path / "index", "NegativeIndex", facts, part)
    with pytest.raises(ValueError, match="has 400 rows of D = 16, but its header says 401"):
        NegativeIndex.load(tmp_path / "index")


def test_outputs_that_are_not_regular_files_are_kept(tmp_path, capfd):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    for path in (pipe, "/dev/null", "/dev/stdout"):
        before = os.lstat(path)
        with atomic_write("op", path) as file:
            file.write(b"lines")
        assert (
            stat.S_IFMT(os.lstat(path).st_mode) == stat.S_IFMT(before.st_mode)
            and os.lstat(path).st_ino == before.st_ino
        )
    reader.join(30)
    assert got == [b"lines"] and capfd.readouterr().out == "lines" and list(tmp_path.iterdir()) == [pipe]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "index"
    NegativeIndex.build(corpus()).save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", full)
    for kind in ("exact", "Flat"):
        with pytest.raises(
            OSError, match=r"index' could not be written \(No space left on device\); existing files are unchanged"
        ):
            NegativeIndex.build(corpus()[:9], kind).save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["index"]


def test_an_error_while_faiss_writes_comes_out(tmp_path):
    pytest.importorskip("faiss")
    index = NegativeIndex.build(corpus(), "Flat")

    def full(piece):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        index._engine.serialize(full)


def test_cagra_through_its_interface(monkeypatch, tmp_path):
    """The calls of cuVS are checked without a GPU: a fake of its interface searches by brute force."""

    class Index:
        def __init__(self, rows):
            self.rows = rows

    fake = types.SimpleNamespace(
        IndexParams=lambda metric: metric,
        SearchParams=lambda **options: options,
        build=lambda metric, rows: Index(rows) if metric == "inner_product" else None,
        save=lambda path, index: np.save(open(path, "wb"), index.rows.numpy()),  # noqa: SIM115
        load=lambda path: Index(torch.from_numpy(np.load(path))),
    )

    def search(options, index, query, k):
        assert options["itopk_size"] >= k
        return tuple((query @ index.rows.T).topk(k))

    fake.search = search
    monkeypatch.setattr(engines, "_cagra", lambda op, device: fake)
    index = NegativeIndex.build(corpus(), "cagra")
    want = NegativeIndex.build(corpus()).search(queries(), 9)
    np.testing.assert_array_equal(index.search(queries(), 9).indices, want.indices)
    index.save(tmp_path / "index")
    again = NegativeIndex.load(tmp_path / "index", device="cpu")
    np.testing.assert_array_equal(again.search(queries(), 9).indices, want.indices)
    halves = [tmp_path / "0", tmp_path / "1"]
    for path, half in zip(halves, corpus().split(K // 2), strict=True):
        NegativeIndex.build(half, "cagra").save(path)
    np.testing.assert_array_equal(NegativeIndex.load(halves, device="cpu").search(queries(), 9).indices, want.indices)
    with pytest.raises(ValueError, match="a 'cagra' index is built once"):
        index.add(corpus())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "cuvs", None)
    with pytest.raises(
        ImportError, match=r"kind needs faiss-cpu or faiss-gpu installed \(pip install negmine\[faiss\]\)"
    ):
        NegativeIndex.build(corpus(), "Flat")
    with pytest.raises(ImportError, match="kind 'cagra' needs cuVS installed"):
        NegativeIndex.build(corpus(), "cagra")


def _built(kind="exact", **options):
    return NegativeIndex.build(corpus(), kind, **options)


REFUSALS = [
    (lambda: _built("nonsense"), ValueError, "build: kind must be 'exact', 'cagra', or a factory string that FAISS takes"),
    (lambda: _built(3), TypeError, "kind must be 'exact', 'cagra', or a FAISS factory string, got 3"),
    (lambda: _built("LSH"), ValueError, "('metric == METRIC_L2' failed), got 'LSH'"),
    (lambda: _built("IVF4096,Flat"), ValueError, "embeddings must be rows enough to train 'IVF4096,Flat' on"),
    (lambda: _built("Flat", search_options={"nprobe": 3}), ValueError, "search_options must be parameters that"),
    (lambda: _built("Flat", search_options={"nprobe": "3"}), TypeError, "search_options must be a dict of names and numbers"),
    (lambda: _built(search_options={"nprobe": 3}), ValueError, "must be None if kind is 'exact'"),
    (lambda: _built(train_rows=0), ValueError, "train_rows must be an int of 1 or more"),
    (lambda: _built(seed=-1), ValueError, "seed must be"),
    (lambda: _built(device="nowhere"), ValueError, "device must be a device that torch can use here"),
    (lambda: NegativeIndex.build(corpus()[:0]), ValueError, "embeddings must be of at least 1 row, got (0, 16)"),
    (lambda: NegativeIndex.build(corpus().long()), TypeError, "embeddings must be float32, float16, bfloat16 or float64"),
    (lambda: _built().add(unit(3, 5)), ValueError, "add: embeddings must be of the index's D = 16, got 5"),
    (lambda: _built().add(corpus().half()), ValueError, "add: embeddings must be of the index's D and dtype"),
    (lambda: _built().search(unit(3, 5), 4), ValueError, "search: query_embeddings must be of the index's D = 16, got 5"),
    (lambda: _built().search(queries(), 0), ValueError, "search: k must be an int of 1 or more, got 0"),
    (lambda: _built().recall(queries(), corpus()[1:]), ValueError, "recall: corpus_embeddings must be the rows of the index"),
    (lambda: _built().recall(unit(3, 5), corpus()), ValueError, "recall: query_embeddings must be of the index's D = 16"),
    (lambda: _built().recall(queries(), corpus(), queries=0), ValueError, "recall: queries must be an int of 1 or more"),
]  # fmt: skip


@pytest.mark.parametrize("refused,error,words", REFUSALS, ids=[words[:50] for _, _, words in REFUSALS])
def test_refusals(refused, error, words):
    pytest.importorskip("faiss")
    with pytest.raises(error, match="^NegativeIndex.*" + re.escape(words)):
        refused()


def test_a_gpu_index_without_faiss_gpu_raises_an_error():
    faiss = pytest.importorskip("faiss")
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("FAISS sees a GPU")
    index = faiss.index_factory(D, "Flat", faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(ValueError, match="device must be 'cpu', because FAISS finds no GPU"):
        engines.FaissEngine("NegativeIndex.build", "Flat", index, {}, torch.device("cuda"))
    limited = NegativeIndex.build(corpus(), "Flat")
    limited._engine.max_k = 5
    with pytest.raises(ValueError, match="k must be at most 5, FAISS's limit on a GPU"):
        limited.search(queries(), 6)
    options = {"index": limited, "num_negatives": 9, "min_recall": 0.1}
    assert (mine(queries(4), corpus(), [0, 1, 2, 3], **options).num_valid <= 5).all()


CUTS = ((0, 7), (7, 150), (150, 151), (151, K))  # rows of the shards; some hold fewer than k


def shards_of(folder, kinds, c):
    """Return the paths of indices, one for each range of rows."""
    paths = [folder / f"{i}.index" for i in range(len(CUTS))]
    for path, kind, (begin, end) in zip(paths, kinds, CUTS, strict=True):
        NegativeIndex.build(c[begin:end], kind).save(path)
    return paths


@pytest.mark.parametrize("kinds", [["exact"] * 4, ["Flat"] * 4, ["Flat", "IVF1,Flat", "Flat", "IVF1,Flat"]], ids=str)
@pytest.mark.parametrize("is_small", [False, True])
def test_shards_give_the_results_of_one_index(kinds, is_small, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    q, c = whole(9, D, seed=1), whole(K, D, seed=2)
    c[160:260] = c[:100]  # so that different shards have equal scores
    paths, loads = shards_of(tmp_path, kinds, c), []
    deserialize = engines.FaissEngine.deserialize
    monkeypatch.setattr(engines.FaissEngine, "deserialize", lambda *of: loads.append(1) or deserialize(*of))
    budget = max(path.stat().st_size for path in paths) if is_small and kinds[0] != "exact" else None
    index = NegativeIndex.load(paths, max_memory_bytes=budget)
    assert (len(index), index.dim) == (K, D)
    kept = 0 if kinds[0] == "exact" else 1 if is_small else 4  # of one row
    assert len(loads) == kept
    want = NegativeIndex.build(c).search(q, K + 5)
    for k in (1, 20, K + 5):  # FAISS pads with -1, which must not become a row of the previous shard
        found = index.search(q, k)
        np.testing.assert_array_equal(found.scores, want.scores[:, :k])
        if k == K + 5:
            np.testing.assert_array_equal(found.indices, want.indices)
    assert index.recall(q, c, k=30) == 1.0
    positives = list(range(9))
    got, exact = mine(q, c, positives, index=index, num_negatives=30), mine(q, c, positives, num_negatives=30)
    np.testing.assert_array_equal(got.scores, exact.scores)
    assert got.recall == (None if kinds[0] == "exact" else 1.0)


def test_invalid_calls_of_sharded_indexes_raise_errors(tmp_path):
    pytest.importorskip("faiss")
    c = corpus()
    paths = shards_of(tmp_path, ["Flat"] * 4, c)
    index = NegativeIndex.load(paths, max_memory_bytes=17_000)
    assert index.content_hash() != NegativeIndex.load(paths[::-1]).content_hash()
    NegativeIndex.build(c).save(tmp_path / "exact")
    NegativeIndex.build(c[:, :5], "Flat").save(tmp_path / "narrow")
    for said, asked in {
        "load: max_memory_bytes must be at least 15981": lambda: NegativeIndex.load(paths, max_memory_bytes=9000),
        "load: path must be files with the same D and dtype, all or none": lambda: NegativeIndex.load(
            [*paths, tmp_path / "exact"]
        ),
        "load: path must be files with the same D and dtype": lambda: NegativeIndex.load([*paths, tmp_path / "narrow"]),
        "load: path must be an existing file, or a list of files": lambda: NegativeIndex.load([]),
        "add: rows cannot be added to an index of several files": lambda: index.add(c),
        "save: an index of several files is already saved": lambda: index.save(tmp_path / "again"),
    }.items():
        with pytest.raises(ValueError, match=f"^NegativeIndex.{said}"):
            asked()
    assert not (tmp_path / "again").exists()
    NegativeIndex.build(c[7:150].flip(0), "Flat").save(paths[1])
    with pytest.raises(ValueError, match=r"^NegativeIndex.search: '.*1.index' has changed since it was loaded"):
        index.search(queries(), 3)


LARGER_THAN_MEMORY = """
import resource, sys, faiss, negmine, torch
from tests.test_mining_index import ROWS, WIDTH
budget, paths = int(sys.argv[1]), sys.argv[2:]
negmine.NegativeIndex.build(torch.ones(8, WIDTH), "Flat").search(torch.ones(2, WIDTH), 1)  # libraries have their memory
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (3 * ROWS * WIDTH * 4), -1))  # a shard, its file mapped, and half as much
index = negmine.NegativeIndex.load(paths, max_memory_bytes=budget)
print(len(index), index.search(torch.eye(WIDTH)[:3], 2).indices.tolist())
"""
ROWS, WIDTH = 1 << 16, 64  # of each shard: 16 MiB


def test_shards_are_searched_in_less_memory_than_they_take(tmp_path):
    pytest.importorskip("faiss")
    rows = torch.zeros(ROWS, WIDTH)
    for i in range(8):
        rows[7] = torch.eye(WIDTH)[i % 3] * (1 + i)
        NegativeIndex.build(rows, "Flat").save(tmp_path / f"{i}.index")
    best = [[7 + i * ROWS for i in pair] for pair in ((6, 3), (7, 4), (5, 2))]
    paths = [str(tmp_path / f"{i}.index") for i in range(8)]
    for budget, said in ((20 << 20, f"{8 * ROWS} {best}"), (1 << 30, "MemoryError|bad_alloc|cannot allocate memory")):
        command = [sys.executable, "-c", LARGER_THAN_MEMORY, str(budget), *paths]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200)
        assert re.search(said if "|" in said else re.escape(said), done.stdout + done.stderr), done.stderr[-2000:]
        assert (done.returncode == 0) == (budget < 1 << 30)


def test_resuming_keeps_the_index(tmp_path):
    pytest.importorskip("faiss")
    c, q = corpus(), queries()
    options = {"index": "IVF16,Flat", "min_recall": 0.0, "batch_size": 20, "resume_dir": tmp_path}
    want = mine(q, c, list(range(60)), **options)
    assert (tmp_path / "index").exists()
    (tmp_path / "queries-000000000020-000000000040.negmine").unlink()
    same_result(mine(q, c, list(range(60)), **options), want)
    with pytest.raises(ValueError, match=r"differs in batch_size \(was 20, is 7\)"):
        mine(q, c, list(range(60)), **{**options, "batch_size": 7})
    index = NegativeIndex.build(c, "Flat")
    mine(q, c, list(range(60)), index=index, resume_dir=tmp_path / "other")
    index.add(c)
    with pytest.raises(ValueError, match="corpus_embeddings must be the rows of the index, 800 of D = 16"):
        mine(q, c, list(range(60)), index=index, resume_dir=tmp_path / "other")
    changed = NegativeIndex.build(-c, "Flat")
    with pytest.raises(ValueError, match=r"differs in content\.index"):
        mine(q, c, list(range(60)), index=changed, min_recall=0.0, resume_dir=tmp_path / "other")
