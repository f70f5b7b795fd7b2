"""The definition of every op and loss: dense PyTorch code, differentiated by autograd, in the dtype of its inputs.

The code is not optimised and does not check its arguments. The public functions of the package do that, and the results of the
kernels must agree with this code. The options (Select, Mix, ...) and the formulas of selection are in negmine/options.py.
The rules: ties go to the lower index; masks apply before filters, filters before ranks, ranks before sampling; columns with a NaN
score are not candidates; selection is detached.
"""

from negmine.reference.contrastive import (
    Columns,
    false_negatives_found,
    found_scores,
    info_nce,
    info_nce_of_pools,
    log_weighted_sum,
    reduced,
    sup_con,
)
from negmine.reference.late_interaction import late_interaction, maxsim, maxsim_of_pairs
from negmine.reference.mixing import mix_draws, mix_negatives, mixed, only_if_enabled
from negmine.reference.selection import (
    filtered,
    guide_mask,
    mine_hardest,
    multiplicity,
    quantile,
    rank_thresholds,
    ranking,
    scores_of,
)
from negmine.reference.sums import gathered_grad_keys, gathered_logsumexp, kept_scores, logsumexp, softplus_sum
from negmine.reference.triplets import mine_triplets, multi_similarity, triplet_loss

__all__ = [
    "Columns",
    "false_negatives_found",
    "filtered",
    "found_scores",
    "gathered_grad_keys",
    "gathered_logsumexp",
    "guide_mask",
    "info_nce",
    "info_nce_of_pools",
    "kept_scores",
    "late_interaction",
    "log_weighted_sum",
    "logsumexp",
    "maxsim",
    "maxsim_of_pairs",
    "mine_hardest",
    "mine_triplets",
    "mix_draws",
    "mix_negatives",
    "mixed",
    "multi_similarity",
    "multiplicity",
    "only_if_enabled",
    "quantile",
    "rank_thresholds",
    "ranking",
    "reduced",
    "scores_of",
    "softplus_sum",
    "sup_con",
    "triplet_loss",
]
