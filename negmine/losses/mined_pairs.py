"""multi_similarity: the multi-similarity loss over mined pairs, with its gradient, without storing the (B, K) matrix.

Mining keeps a pool of positives and a pool of negatives, each with one bound on the score. The two sums of the loss are
log-sum-exps over these pools, as in info_nce; that of the positives is computed with -query. The dense definition is in
negmine/reference/triplets.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.losses.gathered import Gathering
from negmine.losses.schedules import ScheduledLoss, at_start, at_step
from negmine.losses.triplet_mining import DISTANCES, above_score, label_masks, with_bounds
from negmine.ops import backends, checks
from negmine.ops.accumulate import widen_once
from negmine.ops.backends import Kernels
from negmine.ops.first_derivative import fused
from negmine.ops.logsumexp import LogSumExp
from negmine.ops.negatives import check_labelled_keys
from negmine.ops.pool import Pool
from negmine.ops.vectors import for_kernels, frozen, promoted, scalar, widened, with_norms
from negmine.selection import summing_ops


class MultiSimilarityStats(NamedTuple):
    """The statistics that `multi_similarity` returns in addition to the loss. They have no gradient.

    Attributes
    ----------
    num_positives : Tensor (B,) int64
        The number of positives that the mining keeps.
    num_negatives : Tensor (B,) int64
        The number of negatives that the mining keeps.
    num_empty : Tensor () int64
        The number of rows without any pair. Their loss is 0.

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> tags = {"query_ids": ids, "key_ids": ids, "return_stats": True}
    >>> loss, stats = negmine.losses.multi_similarity(rows, rows, labels, labels, **tags)
    >>> stats.num_positives.shape
    torch.Size([8])
    """

    num_positives: Tensor  # (B,) int64
    num_negatives: Tensor  # (B,) int64
    num_empty: Tensor  # () int64


def _check_numbers(op: str, alpha: Any, beta: Any, base: Any, epsilon: Any) -> dict[str, Any]:
    positive = {"alpha": alpha, "beta": beta}
    numbers = {name: checks.require_scalar(op, name, value, above=0) for name, value in positive.items()}
    return numbers | {
        name: checks.require_scalar(op, name, value) for name, value in (("base", base), ("epsilon", epsilon))
    }


def multi_similarity(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
    distance: str = "cosine",
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    return_stats: bool = False,
) -> Any:
    """The multi-similarity loss over mined pairs. Harder pairs get exponentially larger weights in the gradient.

        P = { keys p with b's label        : s_p - epsilon < largest s of the keys with other labels }
        N = { keys n with other labels     : s_n + epsilon > smallest s of the keys with b's label }
        loss_b = log(1 + sum over P of exp(-alpha (s_p - base))) / alpha + log(1 + sum over N of exp(beta (s_n - base))) / beta

    Parameters
    ----------
    query : Tensor (B, D)
        The queries. The published constants assume unit vectors. Gets a gradient if it requires grad.
    keys : Tensor (K, D)
        The keys. They get a gradient if they require grad; otherwise they may be overwritten before backward.
    query_labels : Tensor (B,)
        As in `mine_triplets`.
    key_labels : Tensor (K,)
        As in `mine_triplets`.
    alpha, beta, base, epsilon : float
        The constants of the formulas. The defaults are those of pytorch-metric-learning. The gradient does not flow through
        the conditions that define P and N.
    distance : str
        ``"cosine"``: s = inner product. ``"euclidean"``: s = -||q - k||, and ``"squared_euclidean"``: s = -||q - k||^2, for
        vectors of any norm, with -base instead of base, so that base is a distance. ``"euclidean"`` stores the (B, K) matrix
        in PyTorch on every backend.
    query_ids : Tensor (B,), optional
        As in `mine_triplets`.
    key_ids : Tensor (K,), optional
        As in `mine_triplets`.
    key_mask : Tensor (K,) or (B, K) bool, optional
        As in `mine_triplets`.
    reduction : str
        ``"mean"`` over the B rows, ``"sum"`` or ``"none"``.
    backend : str, optional
        As in `info_nce`.
    return_stats : bool
        Whether to return MultiSimilarityStats too.

    Returns
    -------
    Tensor () or (B,)
        The loss: float32, or float64 for float64 input. A row without positives or without negatives has no pairs: it has
        loss 0 and no gradient, and is included in the mean.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Keys with a NaN score are left out.

    References
    ----------
    Wang et al. 2019 (arXiv 1904.06627; pytorch-metric-learning MultiSimilarityLoss and MultiSimilarityMiner).

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.losses.multi_similarity(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    """
    op = "multi_similarity"
    pool = check_labelled_keys(op, query, keys, query_labels, key_labels, query_ids, key_ids, key_mask)
    constants = _check_numbers(op, alpha, beta, base, epsilon)
    checks.require_choice(op, "distance", distance, DISTANCES)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    checks.require_bool(op, "return_stats", return_stats)
    query, keys = promoted(query, keys)
    if distance == "squared_euclidean":  # -||q - k||^2 is computed as an inner product
        query, keys = with_norms(query, keys)
        query, distance, constants["base"] = 2 * query, "cosine", -constants["base"]
    kernels = backends.choose(op, ("mine_hardest", *summing_ops("logsumexp", keys)), backend, (query, keys))
    kernels, query, _, keys = widen_once(kernels, query, None, keys)
    if kernels is None or distance == "euclidean":
        same, other = label_masks(pool, query, keys)
        saved = frozen(keys, same | other)
        rows, *counts = reference.multi_similarity(widened(query), saved, same, other, **constants, distance=distance)
    else:
        rows, *counts = _from_kernels(kernels, query, keys, pool, **constants)
    loss = reference.reduced(rows, reduction)
    empty = (counts[0] + counts[1] == 0).sum()
    return (loss, MultiSimilarityStats(counts[0], counts[1], empty)) if return_stats else loss


def _from_kernels(
    kernels: Kernels,
    query: Tensor,
    keys: Tensor,
    others: Pool,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and counts (B,) from the kernels, as defined by reference.multi_similarity."""
    same, q, n = others._replace(same_label=True), for_kernels(query), for_kernels(keys)
    with torch.no_grad():
        highest = kernels.mine_hardest(q, n, 1, False, *others)[0][:, 0]  # (B,) of the negatives
        lowest = -kernels.mine_hardest(-q, n, 1, False, *same)[0][:, 0]  # (B,) of the positives, +inf if there is none
        # The bounds apply to the scores of -query: s < highest + epsilon is the same as -s > -(highest + epsilon).
        positives = with_bounds(same, highest, lower=above_score(-(highest + epsilon)))
        negatives = with_bounds(others, lowest, lower=above_score(lowest - epsilon))

    def scaled_log_sum(anchor: Tensor, sharpness: float, shift: float, pool: Pool) -> tuple[Tensor, Tensor]:
        """log(1 + sum over the pool of exp(sharpness (s + shift))) / sharpness (B,), and the size of the pool (B,)."""
        scales = scalar(sharpness, anchor)[None]  # (1,)
        lse, num_kept, *_ = fused(LogSumExp, anchor, keys, scales, None, None, 0, None, kernels, *pool)
        result = F.softplus(lse[0].masked_fill(num_kept == 0, 0.0) + sharpness * shift) / sharpness
        return result.masked_fill(num_kept == 0, 0.0), num_kept

    positive_part, num_positives = scaled_log_sum(-query, alpha, base, positives)
    negative_part, num_negatives = scaled_log_sum(query, beta, -base, negatives)
    return positive_part + negative_part, num_positives, num_negatives


class MultiSimilarityLoss(ScheduledLoss):
    """`multi_similarity` as a module, whose numbers may be schedules.

    Parameters
    ----------
    alpha, beta, base, epsilon : float, Tensor or schedule
        As in `multi_similarity`. A schedule is a callable of the step.
    distance, reduction, backend, return_stats : optional
        As in `multi_similarity`.
    gather_distributed : bool
        Whether to use the keys of all ranks, with their labels, key_ids and key_mask (K,), and with gradients across ranks.
        `query_ids` and `key_ids` must be unique in the whole dataset.
    process_group : ProcessGroup, optional
        The process group of torch.distributed. The default is all ranks.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

    Examples
    --------
    >>> loss_of = negmine.MultiSimilarityLoss()
    >>> queue = negmine.MoCoQueue(16, 100, with_labels=True)
    >>> query, labels = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2
    >>> loss = loss_of(query, queue.keys, labels, queue.labels)
    """

    def __init__(
        self,
        alpha: float | Tensor | Callable[[Tensor], float | Tensor] = 2.0,
        beta: float | Tensor | Callable[[Tensor], float | Tensor] = 50.0,
        base: float | Tensor | Callable[[Tensor], float | Tensor] = 0.5,
        *,
        epsilon: float | Tensor | Callable[[Tensor], float | Tensor] = 0.1,
        distance: str = "cosine",
        reduction: str = "mean",
        backend: str | None = None,
        return_stats: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        op = "MultiSimilarityLoss"
        self.gathering = Gathering(op, gather_distributed, process_group)
        _check_numbers(op, **at_start({"alpha": alpha, "beta": beta, "base": base, "epsilon": epsilon}))
        checks.require_choice(op, "distance", distance, DISTANCES)
        checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
        self.options: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "base": base,
            "epsilon": epsilon,
            "distance": distance,
            "reduction": reduction,
            "backend": backend,
            "return_stats": return_stats,
        }

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        query_labels: Tensor,
        key_labels: Tensor,
        *,
        step: int | Tensor | None = None,
        **masks: Any,
    ) -> Any:
        """The loss of one batch.

        Parameters
        ----------
        query, keys, query_labels, key_labels
            As in `multi_similarity`.
        step : int or Tensor, optional
            The number of the training step. By default the module counts its calls.
        **masks
            query_ids, key_ids and key_mask of `multi_similarity`.

        Returns
        -------
        Tensor () or (B,)
            As `multi_similarity` returns.
        """
        options = at_step(self.options, self.count(step, query)) | masks
        return self.gathering.labelled(multi_similarity, query, keys, query_labels, key_labels, options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value not in (None, False))
