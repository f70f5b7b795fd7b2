"""The Triton backend: one launcher per op, each beside its kernel.  __all__ is the list of what it implements.

Signatures and meaning: kernels/README.md.  Under TRITON_INTERPRET=1, set before import, the launchers take CPU tensors.
"""

from .count_negatives import count_negatives
from .gathered_grad_keys import gathered_grad_keys
from .gathered_logsumexp import gathered_logsumexp
from .info_nce import info_nce
from .logsumexp import logsumexp
from .logsumexp_grad_keys import logsumexp_grad_keys
from .maxsim import maxsim
from .mine_hardest import mine_hardest
from .mix_logsumexp import mix_logsumexp
from .mix_negatives import mix_negatives
from .rank_thresholds import rank_thresholds
from .softplus_sum import softplus_sum
from .softplus_sum_grad_keys import softplus_sum_grad_keys

__all__ = [
    "count_negatives",
    "gathered_grad_keys",
    "gathered_logsumexp",
    "info_nce",
    "logsumexp",
    "logsumexp_grad_keys",
    "maxsim",
    "mine_hardest",
    "mix_logsumexp",
    "mix_negatives",
    "rank_thresholds",
    "softplus_sum",
    "softplus_sum_grad_keys",
]
