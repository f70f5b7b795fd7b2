"""negmine: hard negatives at the speed of the matrix product.

Fused kernels for contrastive learning with a queue of negatives. Start with `info_nce`, `MoCoQueue` and `mine_hardest`.
"""

from negmine.version import __version__

try:
    import torch as _torch  # noqa: F401  the compiled ops take their symbols from its libraries
except ModuleNotFoundError as _missing:  # NumPy programs without torch use negmine._C alone
    if _missing.name != "torch":
        raise
else:
    from negmine import mining, recipes
    from negmine.losses.info_nce import InfoNCELoss, info_nce
    from negmine.losses.mined_pairs import MultiSimilarityLoss
    from negmine.losses.siglip import SigLIPLoss, siglip
    from negmine.losses.sup_con import SupConLoss, sup_con
    from negmine.losses.triplet import TripletLoss, triplet_loss
    from negmine.mining import NegativeIndex, mine_hard_negatives
    from negmine.options import FalseNegatives, Guide, Mix, Negatives, Select, Weight
    from negmine.queues.moco import MoCoQueue
    from negmine.report import hardness_report
    from negmine.selection import logsumexp, mine_hardest, mix_negatives, quantile, rank_thresholds

__all__ = [
    "FalseNegatives",
    "Guide",
    "InfoNCELoss",
    "Mix",
    "MoCoQueue",
    "MultiSimilarityLoss",
    "NegativeIndex",
    "Negatives",
    "Select",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "Weight",
    "__version__",
    "hardness_report",
    "info_nce",
    "logsumexp",
    "mine_hard_negatives",
    "mine_hardest",
    "mining",
    "mix_negatives",
    "quantile",
    "rank_thresholds",
    "recipes",
    "siglip",
    "sup_con",
    "triplet_loss",
]
