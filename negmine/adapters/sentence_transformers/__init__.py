"""The contrastive losses and the miner of sentence-transformers 6.2 with the same signatures, and a batch sampler.

    from negmine.adapters.sentence_transformers import mine_hard_negatives, MultipleNegativesRankingLoss

sentence-transformers itself is not imported. The docstrings of mining.py and losses.py list the differences.
"""

from negmine.adapters.sentence_transformers.batches import hard_batches
from negmine.adapters.sentence_transformers.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from negmine.adapters.sentence_transformers.mining import mine_hard_negatives

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "GISTEmbedLoss",
    "MultipleNegativesRankingLoss",
    "hard_batches",
    "mine_hard_negatives",
]
