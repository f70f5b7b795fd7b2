"""The WordNet retrieval task of benchmarks/data: which synset does an example sentence belong to?

    task = wordnet.load()
    task.corpus    (K, D) fp32 unit rows, one a synset          K = 117,659, D = 128
    task.queries   (Q, D) fp32 unit rows, one an example        Q = 48,339
    task.positives (Q,)   int64, the corpus row of each query
    task.train, task.held_out: query numbers; no held-out answer is the answer of a training query

Texts are read apart (`load_texts`), since only the demo's page shows them.
"""

import lzma
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "data"
HELD_OUT_SYNSETS = 12_000
HELD_OUT_QUERIES = 3_000


@dataclass
class Task:
    corpus: Tensor  # (K, D)
    queries: Tensor  # (Q, D)
    positives: Tensor  # (Q,)
    train: Tensor  # query numbers
    held_out: Tensor  # (HELD_OUT_QUERIES,) query numbers
    lexnames: list[str]
    lexname_of: Tensor  # (K,)
    hypernyms: Tensor  # (edges, 2) child, parent

    def to(self, device: str) -> "Task":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass
class Texts:
    lemmas: list[list[str]]  # K of them
    glosses: list[str]  # K of them
    examples: list[str]  # Q of them


def load() -> Task:
    with np.load(FOLDER / "wordnet.npz", allow_pickle=False) as arrays:
        corpus, queries = (F.normalize(torch.from_numpy(arrays[name]).float(), dim=1) for name in ("corpus", "queries"))
        positives = torch.from_numpy(arrays["positives"]).long()  # (Q,)
        lexnames = arrays["lexnames"].tolist()
        lexname_of = torch.from_numpy(arrays["lexname_of"]).long()  # (K,)
        hypernyms = torch.from_numpy(arrays["hypernyms"]).long()  # (edges, 2)

    # The split has its own fixed seed: a run's --seed changes the training, never what it is measured on.
    shuffled = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(1))  # (K,)
    is_held_out = torch.zeros(len(corpus), dtype=torch.bool).index_fill_(0, shuffled[:HELD_OUT_SYNSETS], True)  # (K,)
    asks_held_out = is_held_out[positives]  # (Q,)
    return Task(
        corpus,
        queries,
        positives,
        train=(~asks_held_out).nonzero()[:, 0],
        held_out=asks_held_out.nonzero()[:HELD_OUT_QUERIES, 0],
        lexnames=lexnames,
        lexname_of=lexname_of,
        hypernyms=hypernyms,
    )


def load_texts() -> Texts:
    entries = [
        line.split("\t") for line in lzma.decompress((FOLDER / "corpus.tsv.xz").read_bytes()).decode().split("\n")
    ]
    examples = lzma.decompress((FOLDER / "queries.txt.xz").read_bytes()).decode().split("\n")
    return Texts([lemmas.split(", ") for _, lemmas, _ in entries], [gloss for *_, gloss in entries], examples)
