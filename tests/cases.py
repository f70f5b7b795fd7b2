"""Shapes and inputs that several tests use, with the reason for each shape."""

import os

import torch
import torch.nn.functional as F

from negmine import Negatives
from negmine.ops.negatives import check_negatives
from negmine.ops.pool import Pool, usable
from tests.conftest import interpreted

# B, K, D, N                      why; few values of D, because a GPU kernel is compiled for each
SHAPES = [
    (1, 1, 1, 1),  # the smallest sizes
    (0, 9, 7, 3),  # no query
    (3, 5, 7, 9),  # fewer candidates than N, odd D
    (5, 33, 7, 4),  # K slightly larger than a tile
    (17, 200, 16, 40),  # B slightly larger than a tile of 16
    (4, 130, 130, 8),  # D slightly larger than a power of two
]
INTERPRETED_SHAPES = [  # the same reasons, with as few tiles as possible
    *SHAPES[:4],
    (17, 40, 16, 30),
    (4, 66, 66, 8),  # a queue above 64 keys is scanned
]
COMPILED_SHAPES = SHAPES[
    4:
]  # for tests/test_ptx.py, where compilation takes most of the time: nearly the same instructions
WIDE_SHAPES = [  # too slow for an interpreter
    (65, 1000, 16, 100),  # B slightly larger than a block of 64 queries
    (3, 300, 1000, 5),  # large D
    (2, 20_000, 16, 1024),  # several splits of the queue
    (130, 700, 128, 700),  # N = K
]
FEW_SHAPES = os.environ.get("NEGMINE_PTX_SHAPES") == "few"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shapes_for(backend: str) -> list[tuple[int, int, int, int]]:
    """Return the shapes that this backend runs in reasonable time. Triton's kernels are interpreted on the CPU, which is slow."""
    if interpreted(backend):
        return INTERPRETED_SHAPES
    return COMPILED_SHAPES if FEW_SHAPES else SHAPES + WIDE_SHAPES


def unit(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Random unit vectors, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype).to(device)


def whole(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Random small integers. Their products and sums are exact in fp32 for every storage dtype, and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(device)


def ids(B: int, K: int, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    """query_ids and negative_ids, many of which are equal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "query_ids": torch.randint(0, 4, (B,), generator=generator).to(device),
        "negative_ids": torch.randint(0, 4, (K,), generator=generator).to(device),
    }


def masks(kind: str, B: int, K: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return the mask arguments of one kind: none, ids, labels, columns, pairs or everything."""
    generator = torch.Generator().manual_seed(7)
    columns = {"negative_mask": (torch.rand(K, generator=generator) < 0.7).to(device)}
    pairs = {"negative_mask": (torch.rand(B, K, generator=generator) < 0.7).to(device)}
    labels = dict(zip(("query_labels", "negative_labels"), ids(B, K, device, 3).values(), strict=True))
    return {
        "none": {},
        "ids": ids(B, K, device),
        "labels": labels,
        "columns": columns,
        "pairs": pairs,
        "everything": {**ids(B, K, device), **labels, **pairs},
        "nothing left": {"negative_mask": torch.zeros(K, dtype=torch.bool, device=device)},
    }[kind]


def negatives(keys: torch.Tensor, given: dict) -> torch.Tensor | Negatives:
    """Keys with the ids, labels and mask among the mask arguments of a case, as the public functions take them."""
    own = {name: given[f"negative_{name}"] for name in ("ids", "labels", "mask") if f"negative_{name}" in given}
    return Negatives(keys, **own) if own else keys


def tags(given: dict) -> dict[str, torch.Tensor]:
    """The ids and labels of the queries among the mask arguments of a case, as the public functions take them."""
    return {name: given[name] for name in ("query_ids", "query_labels") if name in given}


def pool_of(q: torch.Tensor, keys: torch.Tensor, given: dict) -> Pool:
    """The mask arguments of a case as a Pool, which the kernels take."""
    return check_negatives("test", q, None, negatives(keys, given), **tags(given), own_keys=True)[1]


def dense_mask(q: torch.Tensor, keys: torch.Tensor, given: dict) -> torch.Tensor | None:
    """The mask arguments of a case as one dense (B, K) mask, or None if nothing is masked."""
    return usable(pool_of(q, keys, given), q, keys)


LABELLED = (
    "batch_hard",
    "distance_weighted",
    "ephn",
    "facenet",
    "multi_similarity",
    "sup_con",
)  # recipes called with labels


def feed(recipe: str, q: torch.Tensor, pos: torch.Tensor, keys: torch.Tensor) -> tuple[list, dict]:
    """Return the positional arguments and the keywords with which a training loop calls the loss of this recipe."""
    labels, key_labels = (torch.arange(len(t), device=q.device) % 5 for t in (q, keys))
    if recipe == "vse_plus_plus":
        return [q, pos], {}
    if recipe in LABELLED:
        return [q, keys, labels, key_labels], {"key_mask": key_labels * 7 % 3 > 0}
    own = {"ids": torch.arange(len(keys), device=q.device)}
    given = {"query_ids": labels}
    if recipe == "false_negative_cancellation":
        # Support views of each query: a row of the queue, and the positive.
        given["support"] = torch.stack([keys.detach()[: len(q)], pos.detach()], 1)
    if recipe == "i_mix":
        share = torch.linspace(0.5, 1, len(q), device=q.device)
        given |= {"share": share, "partner": torch.arange(len(q), device=q.device).flip(0)}
    if recipe == "un_mix":
        given |= {"mixed_query": 0.7 * q + 0.3 * q.flip(0), "share": torch.tensor(0.7, device=q.device)}
    if recipe == "logq":
        given |= {
            "positive_log_q": -1.0 - labels.to(q.dtype),
            "log_q": -1.0 - key_labels.to(q.dtype).expand(len(q), -1),
        }
        keys = keys.expand(len(q), -1, -1)  # keys of each query's own, because every backend takes a bias of these
        own["ids"] = own["ids"].expand(len(q), -1)
    if recipe == "gist":
        given |= {f"guide_{name}": v.detach()[:, :5] for name, v in (("query", q), ("positive", pos), ("keys", keys))}
    if recipe == "mochi":
        given["query_labels"], own["labels"] = labels, key_labels  # oracle labels of MoCHi
    return [q, pos, Negatives(keys, **own)], given


MASKS = ["none", "ids", "labels", "columns", "pairs", "everything", "nothing left"]
