"""softplus_sum and siglip: the sigmoid loss over a queue, with its gradients, without the (B, K) matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine import reference
from negmine.losses.gathered import Gathering
from negmine.losses.log_scale import LogScale
from negmine.losses.schedules import ScheduledLoss, at_step
from negmine.ops import checks
from negmine.ops.first_derivative import fused
from negmine.ops.negatives import pools_in
from negmine.ops.softplus_sum import SoftplusSum
from negmine.ops.vectors import frozen, scalar, score_of_positive, widened
from negmine.ops.windows import Draw
from negmine.options import Select
from negmine.selection import SummedColumns, learned_bias, summed_columns, summed_pools


def softplus_sum(
    query: Tensor,
    negative_keys: Any,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    positive_key: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """Sum of softplus over each query's negatives, with gradients to query, negative_keys, scale and bias.

        total_b = sum over kept k of log(1 + exp(scale s_bk + bias)),   s = query . negative_key

    scale, bias: numbers, or 0-d floating tensors that receive gradient. The rest as in negmine.logsumexp.
    Returns (B,) fp32 (float64 for float64 input), 0 where the pool is empty. The gradient is computed in the forward pass, so
    frozen keys may be overwritten before backward. Raises ValueError or TypeError for input that does not fit.
    """
    op = "softplus_sum"
    scale, bias = checks.require_scalar(op, "scale", scale), checks.require_scalar(op, "bias", bias)
    options = select, query_ids, query_labels, Draw(seed, step, row_offset), backend
    return _softplus_sum(summed_columns(op, (op,), query, positive_key, negative_keys, *options), scale, bias)


def _softplus_sum(columns: SummedColumns, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """(B,): the sum of softplus over the columns."""
    kernels, query, keys, pool, _, dense, _ = columns
    if kernels is None:
        return reference.softplus_sum(widened(query), frozen(keys, dense["usable"]), scale, bias, **dense)
    numbers = scalar(scale, query), scalar(bias, query)
    key_bias, pool = learned_bias(pool)
    return fused(SoftplusSum, query, keys, *numbers, key_bias, kernels, *pool)


def siglip(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any = None,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    reduction: str = "mean",
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """The sigmoid loss of each query's positive and a queue of negatives (SigLIP, Zhai et al. 2023, arXiv 2303.15343).

        loss_b = log(1 + exp(-l_pos)) + sum over kept k of log(1 + exp(l_bk)),   l = scale s + bias (+ Negatives.bias)

    No partition function: dropping easy negatives by `select` changes the loss by their own terms only. The sign of the bias
    follows google-research/big_vision trainers/proj/image_text/siglip.py; the paper's printed exponent has it the other way.
    scale, bias: the code starts at 10 and -10 and learns both, the scale as its logarithm: negmine.SigLIPLoss.
    That start suits a batch: the sum grows with K, so against 65,536 negatives start the bias some 8 lower, or it dominates.
    query, positive_key (B, D), negative_keys, a list of several pools included, and the rest: as in info_nce; mix and weight of
        a Negatives must be None. A row without negatives keeps its positive's term.
    Returns the loss, fp32 (float64 for float64 input). Raises ValueError or TypeError for input that does not fit.
    """
    op = "siglip"
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_positive(op, positive_key, query)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    scale, bias = checks.require_scalar(op, "scale", scale), checks.require_scalar(op, "bias", bias)
    pools = pools_in(op, negative_keys) if isinstance(negative_keys, (list, tuple)) else [negative_keys]
    given: dict[str, Any] = {
        "select": select,
        "query_ids": query_ids,
        "query_labels": query_labels,
        "draw": Draw(seed, step, row_offset),
        "backend": backend,
    }
    sums = ("softplus_sum",)
    if len(pools) == 1:
        columns = [summed_columns(op, sums, query, positive_key, pools[0], **given)]
    else:
        columns = summed_pools(op, sums, query, positive_key, pools, **given)
    total, *others = (_softplus_sum(each, scale, bias) for each in columns)  # (B,) each
    for other in others:
        total = total + other
    assert columns[0].positive_key is not None
    rows = total - F.logsigmoid(scale * score_of_positive(columns[0].query, columns[0].positive_key) + bias)
    return reference.reduced(rows, reduction)


class SigLIPLoss(ScheduledLoss):
    """siglip as a module that learns its scale, kept as a logarithm so that it stays positive, and its bias.

    scale: a number, or a negmine.losses.LogScale with a bound; `log_scale` is the parameter. learn=False holds the bias and
    a scale given as a number. select may be a schedule, a callable of the step. gather_distributed, process_group: the negatives
    of all ranks, as in negmine.InfoNCELoss. The other keywords are siglip's.
    """

    def __init__(
        self,
        scale: float | LogScale = 10.0,
        bias: float = -10.0,
        *,
        learn: bool = True,
        gather_distributed: bool = False,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.gathering = Gathering("SigLIPLoss", gather_distributed, process_group)
        if not isinstance(scale, LogScale):
            scale = LogScale(checks.require_number("SigLIPLoss", "scale", scale, above=0), None)
            scale.requires_grad_(learn)
        bias = checks.require_scalar("SigLIPLoss", "bias", bias)
        self.scale = scale
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn)
        self.options = options

    @property
    def log_scale(self) -> nn.Parameter:
        """The parameter that is the logarithm of the scale."""
        return self.scale.log_scale

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Any = None,
        *,
        step: int | Tensor | None = None,
        **masks: Any,
    ) -> Tensor:
        """masks: query_ids, query_labels, row_offset of siglip."""
        step = self.count(step, query)
        learned = {"scale": self.scale.scale(), "bias": self.bias, "step": step}
        options = learned | at_step(self.options, step) | masks
        return self.gathering.paired(siglip, query, positive_key, negative_keys, options)
