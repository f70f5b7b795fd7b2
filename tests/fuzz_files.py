"""Read randomly damaged files of every format: python -m tests.fuzz_files --seconds 60 --seed 0

Files are damaged in these ways: they are truncated, bits are flipped, numbers become larger, JSON becomes deeply nested or gets
huge integers, and members of archives are changed with a matching checksum. Reading a file must raise an error that names it in a
sentence, or return a result; if a checksum protects the content, the result must be right. Memory and time are limited.

The files are read in a separate process, so that a crash is reported like other faults. A fault is printed with the options that
repeat it: --seed S --case N.
"""

import argparse
import gzip
import hashlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import negmine
from negmine.cli import files
from negmine.mining import MiningResult, Part, array_file
from negmine.mining.hard_negatives import mine_share
from negmine.mining.sources import Rows
from negmine.mining.text_sets import read_beir, read_msmarco, read_training_lines
from tests import fuzz
from tests.fuzz_judge import require

MEMORY, SECONDS, LONGEST = 2 << 30, 20, 1500  # limits: additional bytes, seconds per file, characters of a message
DRAW = np.random.default_rng(0)
QUERIES, CORPUS = DRAW.standard_normal((6, 8)).astype("f4"), DRAW.standard_normal((30, 8)).astype("f4")
POSITIVES = [[0], [1, 2], [3], [4], [5], [6]]


@dataclass(frozen=True)
class Form:
    """A file format: how a valid file is made in a folder, which file is damaged, and how it is read."""

    make: Callable[[Path], Any]
    damaged: str
    read: Callable[[Path], Any]
    protected: bool = False  # by a checksum: whatever can be read must be what was written


def mined(**options: Any) -> MiningResult:
    return negmine.mine_hard_negatives(QUERIES, CORPUS, POSITIVES, num_negatives=2, **options)


def fields(result: Any) -> Any:
    return [result.indices.tolist(), result.scores.tolist(), sorted(result.skipped.items())]


def report() -> Any:
    return negmine.hardness_report(QUERIES, CORPUS, [0, 1, 3, 4, 5, 6])


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def beir(folder: Path) -> None:
    (folder / "qrels").mkdir()
    documents = ({"_id": f"d{k}", "title": "t", "text": f"body {k}"} for k in range(8))
    (folder / "corpus.jsonl").write_text(lines(*documents))
    (folder / "queries.jsonl").write_text(lines(*({"_id": f"q{i}", "text": f"query {i}"} for i in range(4))))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(4))
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def msmarco(folder: Path) -> None:
    for name in ("collection", "queries"):
        (folder / f"{name}.tsv").write_text("".join(f"{k}\ttext {k}\n" for k in range(8)))
    (folder / "qrels.tsv").write_text("".join(f"{k} 0 {k} 1\n" for k in range(8)))


def text_file(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import feather
    from pyarrow import parquet as writer

    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(CORPUS.reshape(-1)), 8)
    table = pyarrow.table({"embedding": vectors, "text": [f"text {k}" for k in range(30)], "number": list(range(30))})
    writer.write_table(table, folder / "c.parquet")
    feather.write_feather(table, folder / "c.arrow")


def safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"rows": CORPUS}, folder / "c.safetensors")


def embeddings(path: Path) -> Any:
    rows = Rows.open("fuzz", "corpus_embeddings", path)
    return rows.content_hash(), len(rows)


def beir_of(path: Path) -> Any:
    folder = path.parent.parent if path.parent.name == "qrels" else path.parent
    return read_beir(folder, "train").positives


def resumed(path: Path) -> Any:
    return fields(mined(resume_dir=path.parent, batch_size=3))


TRAINING = {
    "flagembedding": [{"query": f"q{i}", "pos": [f"p{i}"], "neg": ["n"]} for i in range(5)],
    "tevatron": [
        {"query_id": f"{i}", "query": "q", "positive_passages": [{"docid": f"{i}", "title": "", "text": f"p{i}"}]}
        for i in range(5)
    ],
    "swift": [
        {"messages": [{"role": "user", "content": "q"}], "positive_messages": [[{"role": "user", "content": f"{i}"}]]}
        for i in range(5)
    ],
}


def part(folder: Path) -> None:
    given = {"query_embeddings": QUERIES, "corpus_embeddings": CORPUS, "positives": POSITIVES}
    mine_share(1, 2, given).save(folder / "1.part")


def load_report(path: Path) -> Any:
    return len(negmine.report.HardnessReport.load(path).summary())


def load_index(path: Path) -> Any:
    return negmine.NegativeIndex.load(path).search(QUERIES, 3).indices.tolist()


FORMS: dict[str, Form] = {
    "result": Form(lambda f: mined().save(f / "r.npz"), "r.npz", lambda p: len(MiningResult.load(p).summary())),
    "report json": Form(lambda f: report().save(f / "r.json"), "r.json", load_report),
    "report npz": Form(lambda f: report().save(f / "r.npz"), "r.npz", load_report),
    "index": Form(lambda f: negmine.NegativeIndex.build(CORPUS).save(f / "c.index"), "c.index", load_index, True),
    "run part": Form(
        lambda f: mined(resume_dir=f, batch_size=3), "queries-000000000000-000000000003.negmine", resumed, True
    ),
    "part": Form(part, "1.part", lambda p: Part.load(p).arrays["sort_keys"].tolist(), True),
    "run.json": Form(lambda f: mined(resume_dir=f, batch_size=3), "run.json", resumed, True),
    "lists npy": Form(lambda f: np.save(f / "p.npy", np.arange(6)), "p.npy", lambda p: files.lists(str(p)).tolist()),
    "lists npz": Form(
        lambda f: np.savez_compressed(f / "p.npz", indptr=np.arange(7), indices=np.arange(6)),
        "p.npz",
        lambda p: [part.tolist() for part in files.lists(str(p))],
    ),
    "lists json": Form(text_file("p.json", json.dumps(POSITIVES)), "p.json", lambda p: files.lists(str(p))),
    "lists jsonl": Form(text_file("p.jsonl", lines(*POSITIVES)), "p.jsonl", lambda p: files.lists(str(p))),
    "texts": Form(text_file("t.txt", "eins\nzwei\r\ndrei\n"), "t.txt", lambda p: files.texts(str(p))),
    "texts jsonl": Form(text_file("t.jsonl", lines("a", {"text": "b"})), "t.jsonl", lambda p: files.texts(str(p))),
    "texts json": Form(text_file("t.json", json.dumps(["a", {"text": "b"}])), "t.json", lambda p: files.texts(str(p))),
    "labels jsonl": Form(text_file("i.jsonl", lines("a", {"_id": "b"})), "i.jsonl", lambda p: files.labels(str(p))),
    "labels parquet": Form(parquet, "c.parquet", lambda p: files.labels(f"{p}::number")),
    "texts gz": Form(
        text_file("t.jsonl.gz", gzip.compress(lines("a", {"text": "b"}).encode() * 9)),
        "t.jsonl.gz",
        lambda p: files.texts(str(p)),
    ),
    "texts parquet": Form(parquet, "c.parquet", lambda p: files.texts(str(p))),
    "npy": Form(lambda f: np.save(f / "c.npy", CORPUS), "c.npy", embeddings),
    "npz": Form(lambda f: np.savez(f / "c.npz", rows=CORPUS), "c.npz", embeddings),
    "parquet": Form(parquet, "c.parquet", embeddings),
    "arrow": Form(parquet, "c.arrow", embeddings),
    "safetensors": Form(safetensors, "c.safetensors", embeddings),
    **{
        f"beir {Path(name).stem}": Form(beir, name, beir_of)
        for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")
    },
    **{
        f"msmarco {name}": Form(
            msmarco,
            f"{name}.tsv",
            lambda p: read_msmarco(*(p.parent / f"{n}.tsv" for n in ("collection", "queries", "qrels"))).positives,
        )
        for name in ("collection", "queries", "qrels")
    },
    **{
        name: Form(text_file("t.jsonl", lines(*records)), "t.jsonl", lambda p: read_training_lines(p).positives)
        for name, records in TRAINING.items()
    },
}


def flipped(draw: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 20])):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def truncated(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.choice([0, 1, draw.randrange(len(content)), len(content) - 1])]


def grown(draw: random.Random, content: bytes) -> bytes:
    """Replace one number in the text by another, sometimes a huge one."""
    found = list(re.finditer(rb"\d+", content))
    if not found:
        return flipped(draw, content)
    number = draw.choice(found)
    new = draw.choice([b"-1", b"0", b"99999999999", b"1e400", b"9" * 20, b"9" * 6000, b"NaN", b"1.5", b"null", b'"x"'])
    return content[: number.start()] + new + content[number.end() :]


def spliced(draw: random.Random, content: bytes) -> bytes:
    """Replace some bytes by others."""
    new = draw.choice(
        [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\x00" * 40, b"\n", b"{}", b"[]", b"\x1f\x8b\x08", b"\t"]
    )
    begin = draw.choice([0, draw.randrange(len(content))])
    return content[:begin] + new + content[begin + draw.choice([0, 1, len(new)]) :]


def zeroed(draw: random.Random, content: bytes) -> bytes:
    begin = draw.randrange(len(content))
    size = draw.choice([4, 8, 64])
    filler = draw.choice([b"\x00", b"\xff", b"\x7f"])
    return content[:begin] + filler * len(content[begin : begin + size]) + content[begin + size :]


PLAIN = (flipped, truncated, grown, spliced, zeroed)


def resealed(draw: random.Random, content: bytes) -> bytes:
    """Damage a member of an archive, or a table, and make the checksum match again."""
    change = draw.choice(PLAIN)
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = draw.choice(sorted(members))
        members[name] = change(draw, members[name])
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for member, held in members.items():
                archive.writestr(member, held)
        return out.getvalue()
    if content.startswith(b"\x1f\x8b"):
        return gzip.compress(change(draw, gzip.decompress(content)))
    if content.startswith(array_file.MAGIC):
        tail = array_file.TAIL
        length, _, magic = tail.unpack(content[-tail.size :])
        begin = len(content) - tail.size - length
        table = grown(draw, content[begin : begin + length])
        digest = hashlib.blake2b(table, digest_size=16).digest()
        return content[:begin] + table + tail.pack(len(table), digest, magic)
    return change(draw, content)


class TooLong(BaseException):
    """A file took more than SECONDS."""


def out_of_time(*_: Any) -> None:
    raise TooLong


class Files:
    """Valid files of every format, each in its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers = folder, {}
        for name, form in FORMS.items():
            home = folder / name
            home.mkdir()
            try:
                form.make(home)
            except ImportError:
                shutil.rmtree(home)
                continue
            self.answers[name] = form.read(home / form.damaged)

    def run_case(self, seed: int, number: int) -> str:
        """Return 'agrees' or 'refused'. Raise Fault, or the exception of the reader if it is unexpected."""
        draw = random.Random(f"{seed} {number}")
        name = draw.choice(sorted(self.answers))
        form, work = FORMS[name], self.folder / "case"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / name, work)
        path = work / form.damaged
        content = path.read_bytes()
        change = draw.choice([*PLAIN, resealed, resealed])
        new = change(draw, content)
        path.write_bytes(new)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            answer = form.read(path)
        except (ValueError, TypeError, OSError, ImportError) as refusal:
            said = str(refusal)
            require(
                path.name in said or name.startswith("run"),
                f"{name}, {change.__name__}: no file is named: {said[:300]}",
            )
            require(len(said.split()) > 4 and len(said) < LONGEST, f"{name}, {change.__name__}: {said[:300]}")
            return "refused"
        except TooLong:
            require(False, f"{name}, {change.__name__}: more than {SECONDS} seconds")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        is_sealed = form.protected and change is not resealed
        require(not is_sealed or answer == self.answers[name], f"{name}, {change.__name__}: another answer")
        return "agrees"


def run(seed: int, first: int, seconds: float, only: bool, at: Any, faults: Any) -> None:
    """Run cases from `first` on until the time is up. `at` is shared with the parent and holds the number of the case."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, out_of_time)
    counts = {"agrees": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        held = Files(Path(folder))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number = first + sum(counts.values())
            at.value = number
            try:
                counts[held.run_case(seed, number)] += 1
            except Exception as error:
                counts["refused"] += 1
                faults.put(f"--seed {seed} --case {number}: {type(error).__name__}: {str(error)[:500]}")
            if only:
                break
    faults.put(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat one case")
    asked = parser.parse_args()
    found, totals = fuzz.fuzz(asked.seconds, asked.seed, asked.case, run)
    print(*found, f"{len(found)} faults; files: {totals}", sep="\n")
    sys.exit(bool(found))
