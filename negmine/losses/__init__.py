"""The losses. Each file has a function and its module. negmine.recipes configures them as published methods."""

from negmine.losses.frequency import FrequencyEstimator
from negmine.losses.gathered import gathered
from negmine.losses.grad_cache import grad_cache
from negmine.losses.info_nce import InfoNCELoss, InfoNCEStats
from negmine.losses.late_interaction import late_interaction, mine_late_interaction
from negmine.losses.log_scale import LogScale
from negmine.losses.matryoshka import MatryoshkaStats, matryoshka
from negmine.losses.mined_pairs import MultiSimilarityLoss, MultiSimilarityStats, multi_similarity
from negmine.losses.siglip import SigLIPLoss, softplus_sum
from negmine.losses.sup_con import SupConLoss, SupConStats
from negmine.losses.triplet import TripletLoss, triplet_loss
from negmine.losses.triplet_mining import Triplets, mine_triplets

__all__ = [
    "FrequencyEstimator",
    "InfoNCELoss",
    "InfoNCEStats",
    "LogScale",
    "MatryoshkaStats",
    "MultiSimilarityLoss",
    "MultiSimilarityStats",
    "SigLIPLoss",
    "SupConLoss",
    "SupConStats",
    "TripletLoss",
    "Triplets",
    "gathered",
    "grad_cache",
    "late_interaction",
    "matryoshka",
    "mine_late_interaction",
    "mine_triplets",
    "multi_similarity",
    "softplus_sum",
    "triplet_loss",
]
