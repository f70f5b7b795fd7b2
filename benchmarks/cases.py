"""Named shapes, and inputs that look like embeddings.

A case is (B, K, D, dtype). Its vectors are unit norm with a decaying spectrum, and each query lies near its positive:
scores then spread as trained embeddings' do, a few per cent of the keys hard and the rest far: no timing on noise
alone. Ids are given, and a few keys share a query's id, so that masking is part of every measurement.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    K: int
    D: int
    dtype: str
    why: str


CASES = {
    case.name: case
    for case in [
        Case("small", 256, 4096, 128, "float32", "a queue for CIFAR-size runs"),
        Case("moco", 256, 65536, 128, "float32", "MoCo's own shape"),
        Case("retrieval", 128, 117_659, 384, "float32", "a sentence encoder against a corpus"),
        Case("moco-bf16", 256, 65536, 128, "bfloat16", "MoCo under mixed precision"),
        Case("moco-bf16-1024", 1024, 65536, 128, "bfloat16", "the same queue for a large batch"),
        Case("moco-bf16-4096", 4096, 65536, 128, "bfloat16", "and for a very large one"),
        Case("million-bf16", 1024, 1_048_576, 256, "bfloat16", "a queue of a million"),
    ]
}
QUICK = ["small", "moco"]
ON_CPU = ["small", "moco", "retrieval"]
ON_GPU = ["moco-bf16", "moco-bf16-1024", "moco-bf16-4096", "million-bf16"]


@dataclass
class Inputs:
    """What every op is given; `temperature` is the demo's."""

    query: Tensor  # (B, D)
    positive_key: Tensor  # (B, D)
    keys: Tensor  # (K, D)
    query_ids: Tensor  # (B,)
    negative_ids: Tensor  # (K,)
    temperature: float = 0.05


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
