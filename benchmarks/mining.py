"""Time dataset mining with negmine, sentence-transformers and FAISS on WordNet.

    python -m benchmarks.mining                                    all variants, 48,339 queries x 117,659 entries, D = 128
    python -m benchmarks.mining --data FOLDER --variants negmine st_torch
                                                                   with corpus.npy, queries.npy and positives.npy of FOLDER
    python -m benchmarks.mining --table                            write the tables of docs/mining.md from the newest rows

Rows are appended to results/mining/<machine>.csv. Every variant runs in a separate process, in turns, on embeddings that are
already on disk: 5 negatives for each query, relative_margin 0.05, and the default depth of each miner. `given_up` is the number
of queries with fewer than 5 negatives. If the machine has other load (`load`), `cpu_s` is more reliable than `wall_s`.
`peak_extra_mib` is the peak of the resident memory minus its value before the call. If `negmine` is among the variants, the
negatives of the others are compared with its negatives, and <machine>-differences.csv lists for how many queries they differ,
and why (differences.py). The search variants return the 54 or 10 hardest rows of each query.
"""

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import negmine
from benchmarks import wordnet
from benchmarks.differences import REASONS, explain
from benchmarks.rows import RESULTS, Row, append, commit, machine_name, read, write_between
from negmine import NegativeIndex, Select
from negmine.adapters.sentence_transformers import mine_hard_negatives as adapted

N, MARGIN = 5, 0.05
WINDOW = 10 * N + 2  # rows that sentence-transformers retrieves for a query with one positive
DOCS = RESULTS.parents[1] / "docs/mining.md"
BEGIN = "<!-- made by `python -m benchmarks.mining --table` from benchmarks/results/mining -->"


class Model:
    """A model for sentence-transformers that looks up given embeddings. The texts are 'q 17' and 'd 23'."""

    device = torch.device("cpu")

    def __init__(self, queries: np.ndarray, corpus: np.ndarray) -> None:
        self.rows = {"q": queries, "d": corpus}

    def encode(self, texts: list[str], **options: object) -> np.ndarray:
        return self.rows[texts[0][0]][[int(text[2:]) for text in texts]]

    encode_query = encode_document = encode

    def get_embedding_dimension(self) -> int:
        return self.rows["d"].shape[1]

    def similarity(self, a: np.ndarray, b: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: np.ndarray, b: torch.Tensor) -> torch.Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def load(folder: Path | None, limit: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """queries (Q, D), corpus (K, D) fp32 unit rows, positives (Q,)."""
    if folder is None:
        task = wordnet.load()
        queries, corpus, positives = task.queries.numpy(), task.corpus.numpy(), task.positives.numpy()
    else:
        queries, corpus = (np.load(folder / f"{name}.npy").astype(np.float32) for name in ("queries", "corpus"))
        queries, corpus = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, corpus))
        positives = np.load(folder / "positives.npy").astype(np.int64)
    return queries[:limit], corpus, positives[:limit]


def by_table(
    miner: Callable, queries: np.ndarray, corpus: np.ndarray, positives: np.ndarray, **options: object
) -> np.ndarray:
    from datasets import Dataset

    pairs = Dataset.from_dict(
        {"query": [f"q {i}" for i in range(len(queries))], "entry": [f"d {k}" for k in positives]}
    )
    texts = [f"d {k}" for k in range(len(corpus))]
    table = miner(
        *(pairs, Model(queries, corpus)),
        corpus=texts,
        num_negatives=N,
        relative_margin=MARGIN,
        output_format="n-tuple",
        output_scores=True,
        verbose=False,
        **options,
    )
    rows = np.full((len(queries), N), -1)
    numbers = [[int(text[2:]) for text in table[name]] for name in ("query", *(f"negative_{n + 1}" for n in range(N)))]
    rows[numbers[0]] = np.array(numbers[1:], np.int64).T
    return rows


def peer(*data: np.ndarray, **options: object) -> np.ndarray:
    from sentence_transformers.util import mine_hard_negatives

    return by_table(mine_hard_negatives, *data, **options)


def arrays(queries: np.ndarray, corpus: np.ndarray, positives: np.ndarray, **options: object) -> np.ndarray:
    select = Select(relative_margin=MARGIN)
    return negmine.mine_hard_negatives(queries, corpus, positives, select=select, num_negatives=N, **options).indices


Vectors = np.ndarray | torch.Tensor


def searched(queries: Vectors, corpus: Vectors, positives: np.ndarray, kind: str, k: int) -> np.ndarray:
    return NegativeIndex.build(corpus, kind).search(queries, k).indices


def searched_bfloat16(queries: np.ndarray, corpus: np.ndarray, positives: np.ndarray, k: int) -> np.ndarray:
    """Both are stored in bf16, and ranked by the products of the bf16 vectors."""
    stored = (torch.from_numpy(x).bfloat16() for x in (queries, corpus))
    return searched(*stored, positives, kind="exact", k=k)


# Each returns the rows that it finds, (Q, n) int64; all are -1 for a query without enough negatives.
VARIANTS: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "negmine": ("`mine_hard_negatives`", arrays),
    "negmine_uncounted": ("the same, `count_skipped=False`", lambda *data: arrays(*data, count_skipped=False)),
    "adapter": ("negmine's adapter, texts in and table out", lambda *data: by_table(adapted, *data)),
    "st_torch": ("sentence-transformers, use_faiss=False", lambda *data: peer(*data)),
    "st_faiss": ("sentence-transformers, use_faiss=True", lambda *data: peer(*data, use_faiss=True)),
    "exact": ("search: `NegativeIndex` \"exact\", k = 54", lambda *data: searched(*data, kind="exact", k=54)),
    "exact_bf16": ("the same, from bf16 storage", lambda *data: searched_bfloat16(*data, k=54)),
    "flat_ip": ("search: FAISS `IndexFlatIP`, k = 54", lambda *data: searched(*data, kind="Flat", k=54)),
    "exact_10": ("search: `NegativeIndex` \"exact\", k = 10", lambda *data: searched(*data, kind="exact", k=10)),
    "flat_ip_10": ("search: FAISS `IndexFlatIP`, k = 10", lambda *data: searched(*data, kind="Flat", k=10)),
}  # fmt: skip
MINERS = (
    "negmine_uncounted",
    "adapter",
    "st_torch",
    "st_faiss",
)  # their negatives are compared with those of "negmine"


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measured(variant: str, folder: Path | None, limit: int | None, answers: Path) -> dict[str, object]:
    """Measure one call in this process, after a small call that imports modules and starts threads."""
    run, data = VARIANTS[variant][1], load(folder, limit)
    run(data[0][:32], data[1][:2000], np.arange(32))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, usage = status_mib("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    rows = run(*data)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    sizes = {"Q": len(data[0]), "K": len(data[1]), "D": data[0].shape[1]}
    times = {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_extra_mib": round(status_mib("VmHWM") - before)}
    np.save(answers, rows)
    return sizes | times | {"given_up": int((rows < 0).any(1).sum()), "load": round(os.getloadavg()[0], 1)}


def tables(path: Path) -> list[str]:
    """Markdown tables of the newest run of each size on a machine: costs, and differences of the other miners from negmine."""
    newest: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(read(path), key=lambda row: row["date"]):
        rows = newest.setdefault(tuple(row[name] for name in ("D", "K", "Q", "variant")), [])
        rows[:] = [other for other in rows if other["date"] == row["date"]] + [row]
    differences = {}
    for row in read(path.with_name(f"{path.stem}-differences.csv")):
        differences[tuple(row[name] for name in ("D", "K", "Q", "variant"))] = row
    most = {size: max(int(Q) for *at, Q, _ in newest if (*at,) == size) for size in {key[:2] for key in newest}}
    lines = []
    for (D, K), Q in sorted(most.items(), key=lambda item: int(item[0][0])):
        lines += [f"{Q:,} queries, {int(K):,} entries, D = {D}:", "", "| miner | CPU s | wall s | memory above the inputs | "
                  "queries with too few |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
        keys = [(D, K, str(Q), variant) for variant in VARIANTS]
        for key in (key for key in keys if key in newest):
            rows = newest[key]
            cpu, wall, peak = (
                statistics.median(float(row[name]) for row in rows) for name in ("cpu_s", "wall_s", "peak_extra_mib")
            )
            given_up = f"{int(rows[0]['given_up']):,}"
            lines.append(f"| {VARIANTS[key[3]][0]} | {cpu:.1f} | {wall:.1f} | {peak:,.0f} MiB | {given_up} |")
        compared = [key for key in keys if key in differences]
        lines += ["", "| against `mine_hard_negatives` | " + " | ".join(REASONS) + " |" * bool(compared)] * bool(
            compared
        )
        lines += ["| --- |" + " --- |" * len(REASONS)] * bool(compared)
        lines += [
            " | ".join([f"| {VARIANTS[key[3]][0]}", *(f"{int(differences[key][name]):,}" for name in REASONS)]) + " |"
            for key in compared
        ]
        last = max((row for key in keys for row in newest.get(key, ())), key=lambda row: row["date"])
        loads = [float(row["load"]) for key in keys for row in newest.get(key, ())]
        lines += ["", f"{path.stem}, {last['threads']} threads, torch {last['torch']}, commit {last['commit']}, "
                  f"{last['date'][:10]}, load {min(loads):.0f} to {max(loads):.0f}.", ""]  # fmt: skip
    return lines


def write_tables() -> None:
    files = sorted(path for path in (RESULTS / "mining").glob("*.csv") if not path.stem.endswith("-differences"))
    write_between(DOCS, BEGIN, "\n".join(line for path in files for line in tables(path)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--data", type=Path, help="folder of embeddings (default: benchmarks/data, D = 128)")
    parser.add_argument("--queries", type=int, help="use only this many queries")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "mining", help="folder of the CSV files")
    parser.add_argument(
        "--alone", type=Path, help="measure one variant in this process, print its row, and save the rows that it finds"
    )
    parser.add_argument("--table", action="store_true", help="write docs/mining.md's tables from the rows")
    args = parser.parse_args()
    if args.table:
        write_tables()
        return
    if args.alone:
        print(json.dumps(measured(args.variants[0], args.data, args.queries, args.alone)))
        return
    stamp = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit()}
    stamp |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    path = args.results / f"{machine_name('cpu')}.csv"
    options = [f"--data={args.data}"] * (args.data is not None) + [f"--queries={args.queries}"] * (
        args.queries is not None
    )
    with tempfile.TemporaryDirectory() as folder:
        answers = {variant: Path(folder) / f"{variant}.npy" for variant in args.variants}
        time_all(args, path, stamp, options, answers)
        if "negmine" in answers:
            compare(path.with_name(f"{path.stem}-differences.csv"), args, stamp, answers)


def time_all(
    args: argparse.Namespace, path: Path, stamp: dict[str, object], options: list[str], answers: dict[str, Path]
) -> None:
    for _ in range(args.rounds):
        for variant in args.variants:
            command = [sys.executable, "-m", "benchmarks.mining", f"--alone={answers[variant]}"]
            command += ["--variants", variant, *options]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = stamp | {"variant": variant} | json.loads(run.stdout.splitlines()[-1])
            print(f"{VARIANTS[variant][0]:<50}{row['wall_s']:>8} s{row['cpu_s']:>8} CPU s{row['peak_extra_mib']:>7} MiB"
                  f"{row['given_up']:>8} given up")  # fmt: skip
            append(path, list(row), [row])


def compare(path: Path, args: argparse.Namespace, stamp: dict[str, object], answers: dict[str, Path]) -> None:
    data = load(args.data, args.queries)
    sizes = {"Q": len(data[0]), "K": len(data[1]), "D": data[0].shape[1]}
    for variant in (name for name in MINERS if name in answers):
        ours, theirs = (np.load(answers[name]) for name in ("negmine", variant))
        reasons = explain(ours, theirs, *data, MARGIN, WINDOW)
        print(f"{VARIANTS[variant][0]:<50}", ", ".join(f"{count:,} {name}" for name, count in reasons.items()))
        row = stamp | {"variant": variant} | sizes | reasons
        append(path, list(row), [row])


if __name__ == "__main__":
    main()
