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
    """Sum of softplus over each query's negatives, with gradients: the sum that sigmoid losses are made of.

        total_b = sum over kept k of log(1 + exp(scale s_bk + bias)),   s = query . negative_key

    Parameters
    ----------
    query : Tensor (B, D)
        As in `logsumexp`.
    negative_keys : Tensor, MoCoQueue, Negatives, or None
        As in `logsumexp`.
    scale, bias : float or Tensor
        Numbers, or 0-d floating tensors that receive gradient.
    positive_key : Tensor (B, D), optional
        Needed where `select` has a margin, and for in-batch negatives.
    select : Select, optional
        Which negatives to keep.
    query_ids, query_labels : Tensor (B,), optional
        A key of equal id or label is ignored.
    seed, step, row_offset : int or Tensor
        As in `logsumexp`.
    backend : str, optional
        As in `logsumexp`.

    Returns
    -------
    Tensor (B,)
        float32 (float64 for float64 input); 0 where the pool is empty.

    Raises
    ------
    ValueError, TypeError
        For input that does not fit.

    Notes
    -----
    The gradient is computed in the forward pass, so frozen keys may be overwritten before backward.

    Examples
    --------
    >>> query, keys = torch.randn(8, 16), torch.randn(100, 16)
    >>> total = negmine.losses.softplus_sum(query, keys, scale=1.0, bias=0.0)
    >>> torch.testing.assert_close(total, F.softplus(query @ keys.T).sum(1))
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
    """The sigmoid loss of each query's positive and a pool of negatives (SigLIP).

        loss_b = log(1 + exp(-l_pos)) + sum over kept k of log(1 + exp(l_bk)),   l = scale s + bias (+ Negatives.bias)

    Parameters
    ----------
    query, positive_key : Tensor (B, D)
        As in `info_nce`.
    negative_keys : Tensor, MoCoQueue, Negatives, None, or a list of these
        As in `info_nce`; `mix` and `weight` of a `Negatives` must be None.
    scale, bias : float or Tensor
        The published code starts at 10 and -10 and learns both, the scale as its logarithm: see `SigLIPLoss`. That start
        suits a batch. The sum grows with K: against 65,536 negatives start the bias about 8 lower, or the negatives
        dominate.
    select : Select, optional
        Which negatives to keep. Each negative adds a term of its own, so dropping easy ones changes the loss by their terms
        only.
    query_ids, query_labels : Tensor (B,), optional
        A key of equal id or label is ignored.
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"``.
    seed, step, row_offset : int or Tensor
        As in `info_nce`.
    backend : str, optional
        As in `info_nce`.

    Returns
    -------
    Tensor () or (B,)
        The loss: float32, or float64 for float64 input. A row without negatives keeps its positive's term.

    Raises
    ------
    ValueError, TypeError
        For input that does not fit.

    References
    ----------
    Zhai et al. 2023 (arXiv 2303.15343). The sign of the bias is that of google-research/big_vision
    trainers/proj/image_text/siglip.py; the paper's printed exponent has the opposite sign.

    Examples
    --------
    >>> query, key = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> loss = negmine.siglip(query, key)
    >>> loss = negmine.siglip(query, key, negmine.MoCoQueue(16, 1000), bias=-14.0)
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
    """`siglip` as a module that learns its scale, as a logarithm so that it stays positive, and its bias.

    Parameters
    ----------
    scale : float or LogScale
        The scale at the start, or a `negmine.losses.LogScale` with a bound. The parameter is `log_scale`.
    bias : float
        The bias at the start.
    learn : bool
        False keeps the bias, and a scale given as a number, fixed.
    gather_distributed, process_group : optional
        The negatives of all ranks, as in `InfoNCELoss`.
    **options
        select (which may be a schedule), reduction, seed and backend of `siglip`.

    Examples
    --------
    >>> loss_of = negmine.SigLIPLoss()
    >>> query, key = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> loss_of(query, key).backward()
    >>> loss_of.bias.grad is not None
    True
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
        self.bias = nn.Parameter(torch.tensor(float(bias), dtype=torch.float32), requires_grad=learn)
        self.options = options

    @property
    def log_scale(self) -> nn.Parameter:
        """The parameter that holds the logarithm of the scale."""
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
