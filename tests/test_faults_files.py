"""Regression tests for faults with files: deleted files, links, allocations, replaced and incomplete files."""

import functools
import json
import os
import stat
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest

import negmine
from negmine import NegativeIndex
from negmine.cli import checkout, main
from negmine.mining import MiningResult, array_file, atomic_file
from negmine.mining.atomic_file import atomic_write
from negmine.mining.regular_file import open_regular
from tests.cases import unit
from tests.compare import same_result

mine = negmine.mine_hard_negatives
Q, K = 6, 40
QUERIES, CORPUS, POSITIVES = unit(Q, 8, seed=1).numpy(), unit(K, 8, seed=2).numpy(), list(range(Q))
TEXTS = [f"query {i}" for i in range(Q)], [f"row {i}" for i in range(K)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inputs(folder):
    """Write the input files, and return the arguments of `negmine mine` for them."""
    np.save("q.npy", QUERIES)
    np.save("c.npy", CORPUS)
    np.save("p.npy", np.arange(Q))
    for name, texts in zip(("q.txt", "c.txt"), TEXTS, strict=True):
        (folder / name).write_text("".join(f"{text}\n" for text in texts))
    return ["mine", "--query-embeddings", "q.npy", "--corpus-embeddings", "c.npy", "--positives", "p.npy"]


def run(**options):
    return mine(QUERIES, CORPUS, POSITIVES, **options)


def test_4a_a_resumed_run_deletes_only_what_it_made(folder):
    others = ["movie.mkv.partial", ".queries-1.negmine.0123456789abcdef.partial", ".notes.0123456789abcdef.partial"]
    others += ["queries-old.negmine", "lock.txt"]
    for name in others:
        (folder / name).write_text("mine")
    unfinished = folder / ".queries-000000000000-000000000003.negmine.0123456789abcdef.partial"
    unfinished.write_text("half")
    run(resume_dir=".", batch_size=3)
    same_result(run(resume_dir="."), run())
    assert all((folder / name).read_text() == "mine" for name in others) and not unfinished.exists()
    for bad in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"mine_hard_negatives: resume_dir must be the path of a folder"):
            run(resume_dir=bad)


def test_4b_writing_follows_no_link(folder):
    notes = folder / "notes.txt"
    notes.write_text("mine")
    (folder / "run").mkdir()
    (folder / "run/lock").symlink_to(notes)
    with pytest.raises(OSError, match=r"resume_dir's .*lock' cannot be opened for writing"):
        run(resume_dir="run")
    (folder / "run/lock").unlink()
    (folder / "run/lock").write_text("of another program")
    run(resume_dir="run")
    assert (folder / "run/lock").read_text() == "of another program"
    (folder / "out.npz").symlink_to(notes)
    run().save("out.npz")
    assert notes.read_text() == "mine" and MiningResult.load("out.npz").num_valid.all()
    assert not list(folder.glob(".*"))


def bomb(path, claimed):
    """Write a .npz file of a few KiB with an array that decompresses to `claimed` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("indices.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": (claimed // 8,)})
        for _ in range(claimed >> 20):
            member.write(bytes(1 << 20))


LIMITED = """
import resource, sys
import negmine
from negmine.cli import checkout, main
import numpy as np
resource.setrlimit(resource.RLIMIT_AS, ((4 << 30) + int(open("/proc/self/statm").read().split()[0]) * 4096,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    exec(sys.argv[1])
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_4c_sizes_are_checked_before_memory_is_taken(folder):
    bomb("bomb.npz", 1 << 28)
    np.savez("positives.npz", indptr=np.arange(Q + 1), indices=np.arange(Q))
    (folder / "deep.npy").write_bytes(
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", 70)
        + b"{'descr':'<f4','fortran_order':False,'shape':(99999999999,9)}".ljust(69)
        + b"\n"
    )
    run(resume_dir="run")
    (folder / "run/run.json").write_bytes(b'{"a": [' + b"[]," * (1 << 20) + b"0]}")
    text = json.dumps({"kind": "NegativeIndex", "facts": {}, "parts": {"x": "y" * (1 << 21)}}).encode()
    digest = array_file.hashlib.blake2b(text, digest_size=16).digest()
    tail = array_file.TAIL.pack(len(text), digest, array_file.MAGIC)
    (folder / "big.index").write_bytes(array_file.MAGIC + text + tail)
    calls = """
for call in (
    lambda: negmine.mining.MiningResult.load("bomb.npz"),
    lambda: negmine.cli.files.lists("bomb.npz"),
    lambda: negmine.cli.files.lists("deep.npy"),
    lambda: negmine.NegativeIndex.load("big.index"),
    lambda: negmine.mine_hard_negatives(np.eye(2, dtype="f4"), np.eye(2, dtype="f4"), [0, 1], resume_dir="run"),
):
    try:
        call()
        print("no error")
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *sys.path])}
    command = [sys.executable, "-c", LIMITED, calls]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    *said, grown = done.stdout.splitlines() or [done.stderr, "0"]
    files = ("bomb.npz", "bomb.npz", "deep.npy", "big.index", "run.json")
    assert len(said) == len(files), done.stderr
    for sentence, name in zip(said, files, strict=True):
        assert name in sentence and len(sentence) < 600, sentence
    assert int(grown) < 120  # MiB
    assert negmine.cli.files.lists("positives.npz")[1].tolist() == list(range(Q))


def test_4d_only_regular_files_are_opened(folder, inputs, capsys, monkeypatch):
    monkeypatch.setattr(atomic_file, "PIPE_SECONDS", 0.05)
    os.mkfifo("pipe")
    (folder / "run").mkdir()
    os.mkfifo("run/run.json")
    with pytest.raises(ValueError, match=r"run.json' is damaged .*not a regular file"):
        run(resume_dir="run")
    os.rename("run/run.json", "run/lock2")
    os.unlink("run/lock")
    os.mkfifo("run/lock")
    with pytest.raises(OSError, match=r"lock' cannot be opened for writing"):
        run(resume_dir="run")
    with pytest.raises(ValueError, match=r"'pipe' is not a regular file"):
        open_regular("pipe")
    with pytest.raises(OSError, match=r"MiningResult.save: 'pipe' could not be written"):
        run().save("pipe")  # no process reads it
    for load in (MiningResult.load, NegativeIndex.load):
        with pytest.raises(ValueError, match=r"path must be an existing file, got 'pipe'"):
            load("pipe")
    for words in (["--positives", "pipe"], ["--query-texts", "pipe"], ["--query-embeddings", "pipe"]):
        assert main([*inputs, "--jsonl", "o.jsonl", "--query-texts", "q.txt", "--corpus-texts", "c.txt", *words]) == 2
        assert "pipe" in capsys.readouterr().err


def test_4e_permissions_are_kept(folder):
    result, index = run(), NegativeIndex.build(CORPUS)
    writers = {"a.npz": result.save, "a.html": result.to_html, "a.index": index.save}
    writers["a.jsonl"] = lambda path: result.to_jsonl(path, *TEXTS)
    for name, write in writers.items():
        (folder / name).write_text("old")
        os.chmod(name, 0o640)
        write(name)
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o640 and (folder / name).read_bytes() != b"old"
        before = os.umask(0o077)
        write(f"new {name}")
        os.umask(before)
        assert stat.S_IMODE(os.stat(f"new {name}").st_mode) == 0o600


CRAFTED = [
    ({"begin": 3.5}, "from query 3.5"),
    ({"begin": True}, "from query True"),
    ({"begin": -1}, "from query -1"),
    ({"dropped": None}, "its counters are None"),
    ({"dropped": {"positives": 3}}, "its counters are"),
    ({"dropped": {"min_score": 2.5}}, "its counters count"),
    ({"dropped": {"min_score": 10**9}}, "its counters count"),
    ({"run": "0" * 32}, "it was written by another run"),
]


@pytest.mark.parametrize("changed, words", CRAFTED, ids=[words for _, words in CRAFTED])
def test_4f_a_crafted_part_changes_no_count(folder, changed, words):
    options = {"select": negmine.Select(min_score=-0.5), "num_negatives": 4, "batch_size": 3}
    want = run(**options, resume_dir="run")
    path = folder / "run/queries-000000000000-000000000003.negmine"
    facts, parts = array_file.read("x", path, "mined queries")
    arrays = {name: array_file.array_part(np.array(array_file.map_array(path, part))) for name, part in parts.items()}
    array_file.write("x", path, "mined queries", facts | changed, arrays)
    with pytest.warns(RuntimeWarning, match=rf"queries-.*{words}.*mined again"):
        got = run(**options, resume_dir="run")
    same_result(got, want)
    assert got.skipped == want.skipped


def test_4f_raw_errors_are_sentences(folder, inputs, capsys):
    def damaged(name: str, content: bytes, read) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            read(name)
        assert len(str(caught.value)) < 500 and len(str(caught.value).split()) > 4

    from negmine.cli.files import lists, texts

    deep, huge = b"[" * 100_000 + b"]" * 100_000, b"[" + b"9" * 6000 + b"]"
    damaged("a.json", deep, lists)
    damaged("b.json", huge, lists)
    damaged("c.jsonl", b'"a"\n' + deep, texts)
    damaged("d.jsonl", b"[1]\n" + huge, lists)
    damaged("e.npy", b"", lists)
    damaged("f.npz", b"PK", lists)
    damaged("g.json", b"[NaN]", lists)
    damaged("h.json", b'{"format": 1, "facts": {}, "figures": {}}', negmine.report.HardnessReport.load)
    damaged("i.json", deep, negmine.report.HardnessReport.load)
    run(resume_dir="run")
    (folder / "run/run.json").write_bytes(b'{"a":' * 900 + b"1" + b"}" * 900)
    with pytest.raises(ValueError, match=r"run.json' is damaged|differs in"):
        run(resume_dir="run")
    (folder / "file").write_text("")
    for bad in ("file", "file/run"):
        with pytest.raises(ValueError, match=r"resume_dir must be the path of a folder, got .*file"):
            run(resume_dir=bad)
    result = run()
    for name, value in (("skipped", None), ("skipped", {"positives": "many"}), ("config", {}), ("config", [])):
        MiningResult(**{**vars(result), name: value}).save("x.npz")
        with pytest.raises(ValueError, match=r"MiningResult.load: 'x.npz' .*" + name):
            MiningResult.load("x.npz")
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match=r"MiningResult.save: '/dev/full' could not be written"):
            result.save("/dev/full")
    for words, said in ((["--positives", "e.npy"], "e.npy"), (["--query-embeddings", "e.npy"], "e.npy")):
        assert main([*inputs, *words, "--output", "o.npz"]) == 2
        assert said in capsys.readouterr().err


def test_4f_a_faiss_file_is_named(folder):
    pytest.importorskip("faiss")
    facts = {"kind": "Flat", "dim": 4, "rows": 3, "dtype": "float32", "options": {}}
    array_file.write("x", "bad.index", "NegativeIndex", facts, {"index": ("uint8", None, lambda emit: emit(bytes(48)))})
    with pytest.raises(ValueError, match=r"NegativeIndex.load: 'bad.index': FAISS \S+ cannot read this index"):
        NegativeIndex.load("bad.index")


def test_1f_an_output_is_whole_or_as_it_was(folder):
    result = run()
    (folder / "out.jsonl").write_text("earlier")
    queries = [*TEXTS[0][:4], "half \ud800", TEXTS[0][5]]
    with pytest.raises(ValueError, match=r"to_jsonl: .*surrogate.* 4"):
        result.to_jsonl("out.jsonl", queries, TEXTS[1])
    assert (folder / "out.jsonl").read_text() == "earlier" and [p.name for p in folder.iterdir()] == ["out.jsonl"]
    with pytest.raises(RuntimeError), atomic_write("x", "out.jsonl") as file:
        file.write(b"half")
        raise RuntimeError
    assert (folder / "out.jsonl").read_text() == "earlier" and [p.name for p in folder.iterdir()] == ["out.jsonl"]


@functools.wraps(mine)
def no_work(*arguments, **options):
    raise AssertionError("mined before the outputs were checked")


REFUSED_OUTPUTS = [
    ("--output no/such/x.npz", "no/such/x.npz"),
    ("--jsonl no/x.jsonl", "no/x.jsonl"),
    ("--jsonl o.jsonl --form st", "form must be"),
    ("--output c.npy", "must not replace the input --corpus-embeddings"),
    ("--output c.npy --overwrite", "must not replace the input --corpus-embeddings"),
    ("--output link.npz --overwrite", "must not replace the input --query-embeddings"),
    ("--output ./p.npy --overwrite", "must not replace the input --positives"),
    ("--jsonl q.txt --overwrite", "must not replace the input --query-texts"),
    ("--output old.npz", "must be a new file, unless --overwrite is given: 'old.npz' exists"),
    ("--output x --jsonl ./x", "must be different files"),
    ("--output .", "."),
]


@pytest.mark.parametrize("words, said", REFUSED_OUTPUTS, ids=[words for words, _ in REFUSED_OUTPUTS])
def test_1j_outputs_are_checked_before_the_work(folder, inputs, monkeypatch, capsys, words, said):
    monkeypatch.setattr("negmine.cli.mine.mine_hard_negatives", no_work)
    (folder / "old.npz").write_text("old")
    os.link("q.npy", "link.npz")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*inputs, "--query-texts", "q.txt", "--corpus-texts", "c.txt", *words.split()]) in (1, 2)
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_1j_an_existing_output_needs_overwrite(folder, inputs, capsys):
    index = "index build --embeddings c.npy --output c.index"
    search = "index search --index c.index --query-embeddings q.npy --k 3 --output found.npz"
    analyze = "analyze --query-embeddings q.npy --corpus-embeddings c.npy --output f.json --page p.html"
    for words in ([*inputs, "--output", "o.npz"], index.split(), search.split(), analyze.split()):
        assert main(words) == 0
        assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
        assert main([*words, "--overwrite"]) == 0
    assert main(["index", "search", *search.split()[2:], "--overwrite", "--output", "c.index"]) == 2
    assert main(["analyze", *analyze.split()[1:], "--overwrite", "--page", "c.npy"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.load("c.npy"), CORPUS)


def test_1i_a_file_of_the_wrong_dtype_or_shape_is_named(folder):
    np.save("ints.npy", np.ones((K, 8), np.int64))
    np.save("empty.npy", np.ones((K, 0), np.float32))
    np.save("wide.npy", np.ones((K, 9), np.float32))
    for corpus, name in (("ints.npy", "ints.npy"), ("empty.npy", "empty.npy"), ([CORPUS, "wide.npy"], "wide.npy")):
        with pytest.raises((TypeError, ValueError), match=f"corpus_embeddings.* must be .*{name}"):
            mine(QUERIES, corpus, POSITIVES)
