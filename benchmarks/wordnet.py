"""The WordNet retrieval task of benchmarks/data: which synset does an example sentence belong to?

    task = wordnet.load()
    task.corpus    (K, D) fp32 unit rows, one per synset        K = 117,659, D = 128
    task.queries   (Q, D) fp32 unit rows, one per example       Q = 48,339
    task.positives (Q,)   int64, the corpus row of each query
    task.train, task.held_out: query numbers; no synset is the answer of both a training query and a held-out query

Texts are read separately (`load_texts`), because most commands need only the vectors.
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


class Taxonomy:
    """The graph of hypernyms (direct and instance hypernyms), and measures of how similar two synsets are in it.

    depth       depth of the deepest common ancestor: edges of the longest path from it to a root, so 0 for a root
    similarity  1 / (1 + edges of the shortest path through a common ancestor), as NLTK's path_similarity of nouns

    Both are NaN if the synsets have no common ancestor. A synset is an ancestor of itself.
    """

    def __init__(self, hypernyms: Tensor, synsets: int) -> None:
        parents: list[list[int]] = [[] for _ in range(synsets)]
        for child, parent in hypernyms.tolist():
            parents[child].append(parent)
        above: list[dict[int, int] | None] = [None] * synsets  # ancestor -> fewest edges to it
        deepest = np.zeros(synsets, np.int64)  # (K,) longest path to a root
        for start in range(synsets):
            stack = [start]
            while stack:
                row = stack[-1]
                waiting = [parent for parent in parents[row] if above[parent] is None]
                if waiting:
                    stack += waiting
                    continue
                stack.pop()
                found = {row: 0}
                for parent in parents[row]:
                    for ancestor, edges in above[parent].items():
                        found[ancestor] = min(edges + 1, found.get(ancestor, edges + 1))
                    deepest[row] = max(deepest[row], deepest[parent] + 1)
                above[row] = found
        self.starts = np.concatenate([[0], np.cumsum([len(found) for found in above])])  # (K + 1,)
        self.ancestors = np.concatenate([list(found) for found in above]).astype(np.int64)  # (E,)
        self.edges = np.concatenate([list(found.values()) for found in above]).astype(np.int64)  # (E,)
        self.deepest = deepest

    def compare(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """first, second (M,) synsets -> depth (M,), similarity (M,) float64."""
        depth, similarity = (np.full(len(first), np.nan) for _ in range(2))
        edges_to = np.full(len(self.deepest), -1)  # edges from the first synset to each of its ancestors, -1 for others
        order = np.argsort(first, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(first[order])) + 1):
            if not len(group):
                continue
            own = slice(self.starts[first[group[0]]], self.starts[first[group[0]] + 1])
            edges_to[self.ancestors[own]] = self.edges[own]
            sizes = np.diff(self.starts)[second[group]]  # (G,), 1 or more
            ends = np.cumsum(sizes)
            at = np.repeat(self.starts[second[group]] - (ends - sizes), sizes) + np.arange(ends[-1])  # (sum of sizes,)
            common = self.ancestors[at]
            shared = edges_to[common] >= 0
            path = np.minimum.reduceat(np.where(shared, edges_to[common] + self.edges[at], len(edges_to)), ends - sizes)
            lowest = np.maximum.reduceat(np.where(shared, self.deepest[common], -1), ends - sizes)
            related = lowest >= 0
            depth[group[related]], similarity[group[related]] = lowest[related], 1 / (1 + path[related])
            edges_to[self.ancestors[own]] = -1
        return depth, similarity


def load() -> Task:
    with np.load(FOLDER / "wordnet.npz", allow_pickle=False) as arrays:
        corpus, queries = (F.normalize(torch.from_numpy(arrays[name]).float(), dim=1) for name in ("corpus", "queries"))
        positives = torch.from_numpy(arrays["positives"]).long()  # (Q,)
        lexnames = arrays["lexnames"].tolist()
        lexname_of = torch.from_numpy(arrays["lexname_of"]).long()  # (K,)
        hypernyms = torch.from_numpy(arrays["hypernyms"]).long()  # (edges, 2)

    # The split has its own fixed seed, so that runs with different seeds are evaluated on the same queries.
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
