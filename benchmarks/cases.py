"""The cases of the benchmarks, sweeps over B, K and D, and inputs that look like embeddings.

A case is (B, K, D, dtype) and the ops that make sense for it. Its vectors have unit norm and a decaying spectrum, and each
query is close to its positive. The scores are then distributed like those of trained embeddings: a few percent of the keys
are hard, the others are far away. Ids are given, and a few keys have the id of a query, so that every measurement includes
masking.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import Negatives

TOKEN_OPS = ("late_interaction", "maxsim")
QUEUE_OPS = ("info_nce", "window", "mine_hardest", "rank_thresholds", "mochi")
WITH_WHOLE_QUEUE = (*QUEUE_OPS, "whole_queue")


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    K: int
    D: int
    dtype: str
    why: str
    ops: tuple[str, ...] = QUEUE_OPS


CASES = {
    case.name: case
    for case in [
        Case("small", 256, 4096, 128, "float32", "a queue for CIFAR-size runs"),
        Case("moco", 256, 65536, 128, "float32", "MoCo's own shape", (*WITH_WHOLE_QUEUE, "guided")),
        Case("moco-bf16", 256, 65536, 128, "bfloat16", "MoCo under mixed precision", (*WITH_WHOLE_QUEUE, "guided")),
        Case("moco-bf16-1024", 1024, 65536, 128, "bfloat16", "the same with a large batch", WITH_WHOLE_QUEUE),
        Case("moco-bf16-4096", 4096, 65536, 128, "bfloat16", "the same with a very large batch", WITH_WHOLE_QUEUE),
        Case("batch-1", 1, 65536, 128, "float32", "one query, as in search"),
        Case("simclr", 4096, 4096, 128, "float32", "SimCLR's in-batch negatives", ("in_batch", "locked")),
        Case("clip", 32768, 32768, 512, "bfloat16", "CLIP's batch", ("in_batch", "locked")),
        Case("retrieval", 128, 117_659, 384, "float32", "a small sentence encoder against a corpus"),
        Case("retrieval-768", 128, 117_659, 768, "float32", "a base sentence encoder", ("info_nce", "mine_hardest")),
        Case("retrieval-1024", 128, 117_659, 1024, "float32", "a large sentence encoder", ("info_nce", "mine_hardest")),
        Case("million", 64, 1_048_576, 128, "float32", "a queue of a million", ("info_nce", "mine_hardest")),
        Case("million-bf16", 1024, 1_048_576, 256, "bfloat16", "the same with a large batch"),
        Case("widths", 256, 65536, 256, "float32", "vectors whose prefixes are used, too", ("info_nce", "matryoshka")),
        Case("widths-bf16", 256, 65536, 256, "bfloat16", "the same in bf16", ("info_nce", "matryoshka")),
        Case("tokens", 512, 65536, 128, "float32", "16 queries and 512 documents, as matrices of tokens", TOKEN_OPS),
        Case("tokens-bf16", 512, 65536, 128, "bfloat16", "the same in bf16", TOKEN_OPS),
        Case(
            "labels",
            64,
            2048,
            128,
            "float32",
            "a size that fits into memory with pytorch-metric-learning",
            ("whole_queue",),
        ),
    ]
}
QUICK = ["small", "moco"]
ON_CPU = [name for name, case in CASES.items() if case.B * case.K * case.D <= 1 << 33]
ON_GPU = ["moco-bf16", "moco-bf16-1024", "moco-bf16-4096", "million-bf16", "clip"]
SWEEP = Case("", 64, 65536, 128, "float32", "", ("info_nce", "mine_hardest"))
SWEEPS = {
    "K": [4096 * 4**power for power in range(6)],  # to 4 M
    "B": [1, 4, 16, 64, 256, 1024],
    "D": [32, 64, 128, 256, 512, 1024],
}


def sweep(letter: str) -> list[Case]:
    """The shape of SWEEP with different values of one letter. The cases are named K=4096 and so on."""
    return [replace(SWEEP, name=f"{letter}={value}", **{letter: value}) for value in SWEEPS[letter]]


@dataclass
class Inputs:
    """The inputs of all ops. The temperature is that of the demo."""

    query: Tensor  # (B, D)
    positive_key: Tensor  # (B, D)
    keys: Tensor  # (K, D)
    query_ids: Tensor  # (B,)
    negative_ids: Tensor  # (K,)
    temperature: float = 0.05

    @property
    def negatives(self) -> Negatives:
        """The keys with their ids, as negmine takes them."""
        return Negatives(self.keys, ids=self.negative_ids)


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, case.D + 1).float().pow(-0.5)  # (D,)

    def embeddings(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case.D, generator=generator) * spectrum, dim=1)  # (rows, D)

    keys, positive_key = embeddings(case.K), embeddings(case.B)  # (K, D), (B, D)
    query = F.normalize(positive_key + 0.7 * embeddings(case.B), dim=1)  # (B, D)
    negative_ids = torch.randint(case.K, (case.K,), generator=generator)  # (K,)
    query_ids = negative_ids[torch.randperm(case.K, generator=generator)[: case.B]]  # (B,)
    dtype = getattr(torch, case.dtype)
    return Inputs(
        query.to(device, dtype),
        positive_key.to(device, dtype),
        keys.to(device, dtype),
        query_ids.to(device),
        negative_ids.to(device),
    )
