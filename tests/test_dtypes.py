"""Mixed dtypes: float64 in any vector makes the call float64; fp32, bf16 and fp16 can be mixed."""

import itertools

import pytest
import torch

import negmine
from negmine import Mix, losses, recipes
from tests.cases import unit

labels = torch.arange(4) % 2
key_labels = torch.arange(20) % 2
CALLS = {
    "info_nce": lambda q, p, k: negmine.info_nce(q, p, k),
    "in_batch": lambda q, p, k: negmine.info_nce(q, p),
    "mixed": lambda q, p, k: negmine.info_nce(q, p, k, mix=Mix(4, 3, 2)),
    "siglip": lambda q, p, k: negmine.siglip(q, p, k),
    "logsumexp": lambda q, p, k: negmine.logsumexp(q, k),
    "mine_hardest": lambda q, p, k: negmine.mine_hardest(q, k, 3).scores,
    "rank_thresholds": lambda q, p, k: negmine.rank_thresholds(q, k, [0, 3]),
    "quantile": lambda q, p, k: negmine.quantile(q, k, 0.5),
    "mix_negatives": lambda q, p, k: negmine.mix_negatives(q, k, Mix(4, 3, 2)).vectors,
    "sup_con": lambda q, p, k: negmine.sup_con(q, k, labels, key_labels),
    "triplet_loss": lambda q, p, k: negmine.triplet_loss(q, k, labels, key_labels),
    "mine_triplets": lambda q, p, k: losses.mine_triplets(q, k, labels, key_labels).negative_score,
    "multi_similarity": lambda q, p, k: losses.multi_similarity(q, k, labels, key_labels),
    "synco": lambda q, p, k: recipes.synco(6, 2, 2, 2, 2, 2, 2)(q, p, k),
    "rince": lambda q, p, k: recipes.rince()(q, p, k),
    "un_mix": lambda q, p, k: recipes.un_mix()(q, p, k, mixed_query=p.flip(0), share=0.7),
    "adco": lambda q, p, k: recipes.adco()(q, p, k),
    "mixgcf": lambda q, p, k: recipes.mixgcf(8, 2)(q, p, k),
    "simans": lambda q, p, k: recipes.simans(3, candidates=8)(q, p, k),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("call", CALLS)
def test_2h_any_mix_of_dtypes_is_computed_at_the_widest(call):
    vectors = [
        unit(n, 8, seed=i).bfloat16().float() for i, n in enumerate((4, 4, 20))
    ]  # the same in every dtype but fp16
    for dtypes in itertools.product(DTYPES[:3], repeat=3):
        got = CALLS[call](*(t.to(dtype) for t, dtype in zip(vectors, dtypes, strict=True)))
        assert torch.isfinite(got.float()).all(), dtypes
        exact = CALLS[call](*(t.double() for t in vectors))
        torch.testing.assert_close(
            got.double(), exact.double(), rtol=2e-2, atol=2e-2, msg=lambda m, d=dtypes: f"{d}: {m}"
        )


@pytest.mark.parametrize("call", ["info_nce", "siglip", "logsumexp", "sup_con", "multi_similarity", "triplet_loss"])
def test_2h_gradients_come_in_the_dtype_of_each_argument(call):
    for dtypes in itertools.permutations(DTYPES, 3):
        leaves = [
            unit(n, 8, seed=i).to(d).requires_grad_() for i, (n, d) in enumerate(zip((4, 4, 20), dtypes, strict=True))
        ]
        CALLS[call](*leaves).sum().backward()
        for leaf, dtype in zip(leaves, dtypes, strict=True):
            assert leaf.grad is None or leaf.grad.dtype == dtype
