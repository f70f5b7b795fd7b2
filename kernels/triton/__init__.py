"""The Triton backend: one launcher for each op, in the file of its kernel. __all__ lists the ops that are implemented.

kernels/README.md has the signatures and the meaning of the ops. If TRITON_INTERPRET=1 is set before import, the launchers accept
CPU tensors.
"""

from .count_negatives import count_negatives
from .gathered_grad_keys import gathered_grad_keys
from .gathered_logsumexp import gathered_logsumexp
from .info_nce import info_nce
from .logsumexp import logsumexp
from .logsumexp_grad_bias import logsumexp_grad_bias
from .logsumexp_grad_keys import logsumexp_grad_keys
from .maxsim import maxsim
from .mine_hardest import mine_hardest
from .mix_logsumexp import mix_logsumexp
from .mix_negatives import mix_negatives
from .prefix_logsumexp import prefix_logsumexp
from .rank_thresholds import rank_thresholds
from .softplus_sum import softplus_sum
from .softplus_sum_grad_bias import softplus_sum_grad_bias
from .softplus_sum_grad_keys import softplus_sum_grad_keys

__all__ = [
    "count_negatives",
    "gathered_grad_keys",
    "gathered_logsumexp",
    "info_nce",
    "logsumexp",
    "logsumexp_grad_bias",
    "logsumexp_grad_keys",
    "maxsim",
    "mine_hardest",
    "mix_logsumexp",
    "mix_negatives",
    "prefix_logsumexp",
    "rank_thresholds",
    "softplus_sum",
    "softplus_sum_grad_bias",
    "softplus_sum_grad_keys",
]
