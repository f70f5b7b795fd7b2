"""Time dataset mining against sentence-transformers and FAISS on the WordNet task; append rows to results/mining/<machine>.csv.

    python -m benchmarks.mining                                    all variants, 48,339 queries x 117,659 entries, D = 128
    python -m benchmarks.mining --data FOLDER --variants negmine st_torch
                                                                   FOLDER holds corpus.npy, queries.npy, positives.npy

Every variant runs in a process of its own, in turns, on embeddings that lie ready: 5 negatives a query, relative_margin 0.05,
each miner's default depth. `given_up` counts the queries that come out with fewer than 5. `cpu_s` says more than `wall_s` where
the machine does other work (`load`). `peak_extra_mib` is the resident high-water mark above what was held before the call.

The searches (exact, flat_ip) return the 54 hardest rows of each query, which is what sentence-transformers asks of FAISS here.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import negmine
from benchmarks import wordnet
from benchmarks.rows import RESULTS, append, commit, machine_name
from negmine import NegativeIndex, Select
from negmine.adapters.sentence_transformers import mine_hard_negatives as adapted

N, MARGIN, SEARCHED = 5, 0.05, 54


class Model:
    """What sentence-transformers asks of a model; the texts are 'q 17' and 'd 23', the embeddings lie ready."""

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


def by_table(miner: Callable, queries: np.ndarray, corpus: np.ndarray, positives: np.ndarray, **options: object) -> int:
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
    return len(table)


def peer(*data: np.ndarray, **options: object) -> int:
    from sentence_transformers.util import mine_hard_negatives

    return by_table(mine_hard_negatives, *data, **options)


def arrays(queries: np.ndarray, corpus: np.ndarray, positives: np.ndarray, **options: object) -> int:
    select = Select(relative_margin=MARGIN)
    result = negmine.mine_hard_negatives(queries, corpus, positives, select=select, num_negatives=N, **options)
    return int((result.num_valid == N).sum())


def searched(queries: np.ndarray, corpus: np.ndarray, positives: np.ndarray, kind: str) -> int:
    found = NegativeIndex.build(corpus, kind).search(queries, SEARCHED)
    return int((found.indices[:, -1] >= 0).sum())


VARIANTS: dict[str, tuple[str, Callable[..., int]]] = {
    "negmine": ("mine_hard_negatives, counting what filters drop", arrays),
    "negmine_uncounted": ("mine_hard_negatives, count_skipped=False", lambda *data: arrays(*data, count_skipped=False)),
    "adapter": ("negmine's sentence-transformers adapter", lambda *data: by_table(adapted, *data)),
    "st_torch": ("sentence-transformers, use_faiss=False", lambda *data: peer(*data)),
    "st_faiss": ("sentence-transformers, use_faiss=True", lambda *data: peer(*data, use_faiss=True)),
    "exact": ("NegativeIndex 'exact', k = 54", lambda *data: searched(*data, kind="exact")),
    "flat_ip": ("FAISS IndexFlatIP, k = 54", lambda *data: searched(*data, kind="Flat")),
}  # fmt: skip


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measured(variant: str, folder: Path | None, limit: int | None) -> dict[str, object]:
    """One call in this process; a small one goes before it, so that imports and thread pools are not its cost."""
    run, data = VARIANTS[variant][1], load(folder, limit)
    run(data[0][:32], data[1][:2000], np.arange(32))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, usage = status_mib("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    complete = run(*data)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    sizes = {"Q": len(data[0]), "K": len(data[1]), "D": data[0].shape[1]}
    times = {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_extra_mib": round(status_mib("VmHWM") - before)}
    return sizes | times | {"given_up": len(data[0]) - complete, "load": round(os.getloadavg()[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--data", type=Path, help="folder of embeddings (default: benchmarks/data, D = 128)")
    parser.add_argument("--queries", type=int, help="only the first so many")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "mining", help="folder of the CSV files")
    parser.add_argument("--alone", action="store_true", help="measure the one variant here and print its row as JSON")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measured(args.variants[0], args.data, args.queries)))
        return
    stamp = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit()}
    stamp |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    path = args.results / f"{machine_name('cpu')}.csv"
    options = [f"--data={args.data}"] * (args.data is not None) + [f"--queries={args.queries}"] * (
        args.queries is not None
    )
    for _ in range(args.rounds):
        for variant in args.variants:
            command = [sys.executable, "-m", "benchmarks.mining", "--alone", "--variants", variant, *options]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = stamp | {"variant": variant} | json.loads(run.stdout.splitlines()[-1])
            print(f"{VARIANTS[variant][0]:<50}{row['wall_s']:>8} s{row['cpu_s']:>8} CPU s{row['peak_extra_mib']:>7} MiB"
                  f"{row['given_up']:>8} given up")  # fmt: skip
            append(path, list(row), [row])


if __name__ == "__main__":
    main()
