"""What other packages do with the same inputs: each answer is checked before it is timed, like every variant's.

    variants(op, inputs) -> {name: callable}      the packages that are installed here and do this op
    ABSENT                                        what was looked for in vain, and why

What a package prepares once and keeps (an index over the keys, a filled memory bank) is made here, outside the timing.
Search packages know no mask per query: they are asked for a few more rows than N, and the query's own are dropped after.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from benchmarks.cases import Inputs
from benchmarks.peers import Answer, N, loss_and_gradient

ABSENT: dict[str, str] = {}
PAIRS_LIMIT = 1 << 26  # entries of the (positives, negative pairs) table that one package builds


def load(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        ABSENT[module.split(".")[0]] = str(error)
        return None


def dropped(scores: np.ndarray, index: np.ndarray, inputs: Inputs) -> Answer:
    """The first N of each row that do not share the query's id: scores and index (B, N) of (B, N + more), sorted."""
    found = torch.from_numpy(index.astype(np.int64))  # (B, N + more)
    own = inputs.negative_ids[found] == inputs.query_ids[:, None]  # (B, N + more)
    first = own.byte().argsort(dim=1, stable=True)[:, :N]  # (B, N)
    return torch.from_numpy(scores).gather(1, first), found.gather(1, first)


def enough(inputs: Inputs) -> int:
    """N and as many rows as share any one query's id, at most K."""
    shared = (inputs.query_ids[:, None] == inputs.negative_ids).sum(dim=1).max().item()
    return min(N + int(shared), len(inputs.keys))


def faiss_flat(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    faiss = load("faiss")
    if faiss is None or inputs.keys.dtype != torch.float32 or inputs.keys.is_cuda:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(inputs.keys.shape[1])
    index.add(inputs.keys.numpy())
    query, k = inputs.query.numpy(), enough(inputs)
    return lambda _: dropped(*index.search(query, k), inputs)


def usearch_exact(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    usearch = load("usearch.index")
    if usearch is None or inputs.keys.dtype != torch.float32 or inputs.keys.is_cuda:
        return None
    query, keys, k = inputs.query.numpy(), inputs.keys.numpy(), enough(inputs)

    def run(_: Inputs) -> Answer:
        found = usearch.search(keys, query, k, usearch.MetricKind.IP, exact=True, threads=torch.get_num_threads())
        index = found.keys.reshape(len(query), -1)  # (B, k); its distance is 1 - inner product
        return dropped(1 - found.distances.reshape(len(query), -1), index, inputs)

    return run


def metric_learning(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """pytorch-metric-learning's NTXentLoss over a reference set, its pairs given: it builds a positives x pairs table."""
    losses = load("pytorch_metric_learning.losses")
    B, K = len(inputs.query), len(inputs.keys)
    if losses is None or B * B * K > PAIRS_LIMIT or inputs.keys.dtype != torch.float32:
        return None
    own = torch.arange(B)
    pairs = (own, own, own.repeat_interleave(K), B + torch.arange(K).repeat(B))
    everything = torch.cat([inputs.positive_key, inputs.keys])  # (B + K, D)
    labels = torch.arange(B + K)
    loss = losses.NTXentLoss(temperature=inputs.temperature)
    return lambda _: loss_and_gradient(
        inputs, lambda query: loss(query, own, pairs, ref_emb=everything, ref_labels=labels)
    )


def lightly_bank(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """lightly's NTXentLoss with a memory bank of the same keys; each call copies the bank and enqueues, as in training."""
    losses = load("lightly.loss")
    if losses is None or inputs.keys.dtype != torch.float32:
        return None
    loss = losses.NTXentLoss(temperature=inputs.temperature, memory_bank_size=tuple(inputs.keys.shape))
    loss.memory_bank.bank = inputs.keys.clone()
    return lambda _: loss_and_gradient(inputs, lambda query: loss(query, inputs.positive_key))


MAKERS = {
    "mine_hardest": {"FAISS IndexFlatIP": faiss_flat, "usearch exact": usearch_exact},
    "whole_queue": {"pytorch-metric-learning": metric_learning, "lightly": lightly_bank},
}


def variants(op: str, inputs: Inputs) -> dict[str, Callable[[Inputs], Answer]]:
    """The packages that are here and do this op on these inputs."""
    made = {name: make(inputs) for name, make in MAKERS.get(op, {}).items()}
    return {name: run for name, run in made.items() if run is not None}
