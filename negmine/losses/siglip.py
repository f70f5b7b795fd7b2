"""softplus_sum and siglip: the sigmoid loss over a queue, with its gradients, without storing the (B, K) matrix."""

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
    """The sum of softplus over each query's negatives, with gradients: a building block for sigmoid losses.

        total_b = sum over kept k of log(1 + exp(scale * s_bk + bias)),   s_bk = query_b . negative_keys_k

    Parameters
    ----------
    query : Tensor (B, D)
        As in `logsumexp`.
    negative_keys : Tensor, MoCoQueue, Negatives, or None
        As in `logsumexp`.
    scale, bias : float or Tensor
        Numbers, or 0-d floating tensors, which get gradients.
    positive_key : Tensor (B, D), optional
        Required if `select` has a margin, and for in-batch negatives.
    select : Select, optional
        The negatives to keep. The default keeps all.
    query_ids, query_labels : Tensor (B,), optional
        A key with an equal id or label is not a negative.
    seed, step, row_offset : int or Tensor
        As in `logsumexp`.
    backend : str, optional
        As in `logsumexp`.

    Returns
    -------
    Tensor (B,)
        float32 (float64 for float64 input); 0 if the pool is empty.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Gradients flow to query, negative_keys, scale, bias and the bias of a Negatives. That of query is computed in the forward
    pass, so keys that do not require grad may be overwritten before backward.

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
    """The sum of softplus over the columns (B,)."""
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
    """The sigmoid loss of each query with its positive and a pool of negatives (SigLIP).

        loss_b = log(1 + exp(-l_pos)) + sum over kept k of log(1 + exp(l_bk)),   l = scale * s + bias (+ Negatives.bias)

    Parameters
    ----------
    query, positive_key : Tensor (B, D)
        As in `info_nce`.
    negative_keys : Tensor, MoCoQueue, Negatives, None, or a list of these
        As in `info_nce`; `mix` and `weight` of a `Negatives` must be None.
    scale, bias : float or Tensor
        Numbers, or 0-d floating tensors, which get gradients. The published code starts with 10 and -10 and learns the
        logarithm of the scale and the bias, as `SigLIPLoss` does. These values are meant for a batch. The sum over negatives
        grows with K: for 65,536 negatives, start with a bias that is lower by about 8, or the negatives dominate the loss.
    select : Select, optional
        The negatives to keep. The default keeps all. Every negative adds its own term to the loss, so removing easy negatives
        only removes their small terms.
    query_ids, query_labels : Tensor (B,), optional
        A key with an equal id or label is not a negative.
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"``.
    seed, step, row_offset : int or Tensor
        As in `info_nce`.
    backend : str, optional
        As in `info_nce`.

    Returns
    -------
    Tensor () or (B,)
        The loss: float32, or float64 for float64 input. The loss of a row without negatives is the term of its positive.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Gradients flow to query, positive_key, scale, bias, and to negative keys and their bias if they require grad. Keys that do
    not require grad may be overwritten before backward.

    References
    ----------
    Zhai et al. 2023 (arXiv 2303.15343). The sign of the bias is that of google-research/big_vision
    trainers/proj/image_text/siglip.py; the exponent printed in the paper has the opposite sign.

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
    """`siglip` as a module with a learned scale and a learned bias. The scale is learned as its logarithm.

    Parameters
    ----------
    scale : float or LogScale
        The initial scale, or a `negmine.losses.LogScale`, which may have a limit. The parameter is `log_scale`.
    bias : float
        The initial bias.
    learn : bool
        False keeps the bias fixed, and the scale too if it is given as a number.
    gather_distributed, process_group : optional
        As in `InfoNCELoss`.
    **options
        select (which may be a schedule), reduction, seed and backend of `siglip`.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

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
        own = ("scale", "bias", "learn", "gather_distributed", "process_group")
        checks.require_known("SigLIPLoss", options, (*own, "select", "reduction", "seed", "backend"))
        if "reduction" in options:
            checks.require_choice("SigLIPLoss", "reduction", options["reduction"], checks.REDUCTIONS)
        self.scale = scale
        self.bias = nn.Parameter(torch.tensor(float(bias), dtype=torch.float32), requires_grad=learn)
        self.options = options

    @property
    def log_scale(self) -> nn.Parameter:
        """The parameter, () fp32: the logarithm of the scale."""
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
        """The loss of one batch.

        Parameters
        ----------
        query, positive_key, negative_keys
            As in `siglip`.
        step : int or Tensor, optional
            The number of the training step. By default the module counts its calls.
        **masks
            query_ids, query_labels and row_offset of `siglip`.

        Returns
        -------
        Tensor () or (B,)
            As `siglip` returns.
        """
        step = self.count(step, query)
        learned = {"scale": self.scale.scale(), "bias": self.bias, "step": step}
        options = learned | at_step(self.options, step) | masks
        return self.gathering.paired(siglip, query, positive_key, negative_keys, options)
