"""sentence-transformers' miner and contrastive losses by their own signatures (6.2), and a batch sampler for its trainer.

    from negmine.adapters.sentence_transformers import mine_hard_negatives, MultipleNegativesRankingLoss

The package itself is not imported: mining.py and losses.py name the differences.
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
