"""negmine: hard negatives at the speed of the matrix product.

Fused kernels for contrastive learning with a queue of negatives. Start with `info_nce`, `MoCoQueue` and `mine_hardest`.
"""

import torch as _torch  # noqa: F401  the compiled ops take their symbols from its libraries

from negmine import recipes
from negmine.info_nce import InfoNCEStats, info_nce
from negmine.logsumexp import logsumexp
from negmine.losses import InfoNCELoss, SupConLoss
from negmine.mining import MiningResult, NegativeIndex, mine_hard_negatives, mining_rounds
from negmine.mixing import Mixed, mix_negatives
from negmine.multi_similarity import MultiSimilarityLoss, MultiSimilarityStats, multi_similarity
from negmine.options import FalseNegatives, Mix, Select, Weight
from negmine.queue import MoCoQueue
from negmine.report import HardnessReport, hardness_report
from negmine.selection import Mined, mine_hardest, percentile, rank_thresholds
from negmine.sharded import ShardedMoCoQueue
from negmine.softplus_sum import SigLIPLoss, siglip, softplus_sum
from negmine.sup_con import SupConStats, sup_con
from negmine.triplet_loss import TripletLoss, triplet_loss
from negmine.triplets import Triplets, mine_triplets
from negmine.version import __version__

__all__ = [
    "FalseNegatives",
    "HardnessReport",
    "InfoNCELoss",
    "InfoNCEStats",
    "Mined",
    "MiningResult",
    "Mix",
    "Mixed",
    "MoCoQueue",
    "MultiSimilarityLoss",
    "MultiSimilarityStats",
    "NegativeIndex",
    "Select",
    "ShardedMoCoQueue",
    "SigLIPLoss",
    "SupConLoss",
    "SupConStats",
    "TripletLoss",
    "Triplets",
    "Weight",
    "__version__",
    "hardness_report",
    "info_nce",
    "logsumexp",
    "mine_hard_negatives",
    "mine_hardest",
    "mine_triplets",
    "mining_rounds",
    "mix_negatives",
    "multi_similarity",
    "percentile",
    "rank_thresholds",
    "recipes",
    "siglip",
    "softplus_sum",
    "sup_con",
    "triplet_loss",
]
