"""Peak memory of the fused CPU ops at the shape of MoCo, in a separate process. The (B, K) matrix alone would need 64 MB."""

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import Guide, Mix, Negatives, Select
from negmine.ops import backends
from tests.peak import peak_mib

LIMIT_MIB = 16
B, K, D = 256, 65536, 128


def probe(call):
    """The call, and two and B queries."""
    q, pos, keys = (F.normalize(torch.randn(n, D), dim=1) for n in (B, B, K))
    labels = torch.arange(K) % 100

    def loss(q, backend="cpu", guide=None, bias=None, **options):
        return negmine.info_nce(q, pos[: len(q)], Negatives(keys, guide=guide, bias=bias), **options, backend=backend)

    calls = {
        "info_nce": lambda q: loss(q).backward(),
        "info_nce, window": lambda q: loss(q, select=Select(0.001, 0.05)).backward(),
        "info_nce, easiest 95 %": lambda q: loss(q, select=Select(0.05, 1.0)).backward(),
        "info_nce, guide": lambda q: loss(q, guide=Guide(q, pos[: len(q)], keys, margin=0.1)).backward(),
        "info_nce, learned bias": lambda q: loss(q, bias=torch.zeros(K, requires_grad=True)).backward(),
        "info_nce, MoCHi": lambda q: loss(q, mix=Mix()).backward(),
        "mine_hardest": lambda q: negmine.mine_hardest(q, keys, 1024, backend="cpu"),
        "rank_thresholds": lambda q: negmine.rank_thresholds(q, keys, [65, 3276, K // 2], backend="cpu"),
        "triplet_loss": lambda q: negmine.triplet_loss(q, keys, labels[: len(q)], labels, backend="cpu").backward(),
        "distance_weighted": lambda q: negmine.triplet_loss(
            q, keys, labels[: len(q)], labels, negative="distance_weighted", backend="cpu"
        ).backward(),
        "multi_similarity": lambda q: negmine.losses.multi_similarity(
            q, keys, labels[: len(q)], labels, backend="cpu"
        ).backward(),
        "matryoshka, late_interaction": lambda q: (
            negmine.losses.matryoshka(q, pos[: len(q)], keys, widths=(32, 64, 128), backend="cpu")
            + negmine.losses.late_interaction(*(t.view(-1, 8, 16) for t in (q[:16], pos[: len(q)][:16], keys[:4096])))
        ).backward(),
        "dense": lambda q: loss(q, backend="reference").backward(),
    }
    return lambda queries: calls[call](queries.clone().requires_grad_()), q[:2], q


OPS = ["info_nce", "info_nce, window", "info_nce, easiest 95 %", "info_nce, MoCHi", "mine_hardest", "rank_thresholds"]
OPS += [
    "info_nce, guide",
    "info_nce, learned bias",
    "triplet_loss",
    "distance_weighted",
    "multi_similarity",
    "matryoshka, late_interaction",
]


@pytest.mark.parametrize("call", OPS)
def test_peak_extra_memory(call):
    row = next(row for row in backends.BACKENDS if row.name == "cpu")
    if row.refusal:
        pytest.skip(row.refusal)
    assert peak_mib(probe, call) <= LIMIT_MIB


def test_the_probe_detects_a_stored_matrix():
    assert peak_mib(probe, "dense") > 64
