"""softplus_sum and siglip: the sigmoid loss over a queue, with its gradients, without the (B, K) matrix."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine import checks, reference, reference_methods
from negmine.derivatives import first_only
from negmine.logsumexp import columns
from negmine.options import Select, is_real
from negmine.selection import for_kernels, frozen, score_of_positive, working
from negmine.stepped import Stepped, at_step


class SoftplusSum(torch.autograd.Function):
    """total_b (B,) = sum over b's pool of log(1 + exp(scale s_bk + bias)).

    d total / d query = scale * pull, d total / d scale = query . pull, d total / d bias = mass, all known after the forward pass;
    d total / d negative_keys is a second kernel, run only for keys that require grad.
    """

    @staticmethod
    def forward(ctx, query, negative_keys, scale, bias, ops, *pool):
        want_pull = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        factors = scale.detach(), bias.detach()
        total, pull, mass, _ = ops.softplus_sum(
            for_kernels(query), for_kernels(negative_keys), *factors, want_pull, *pool
        )
        *tensors, ctx.same_label = pool
        ctx.ops, ctx.width = ops, len(pool)
        wants_keys = ctx.needs_input_grad[1]
        ctx.save_for_backward(query, *factors, pull, mass, *((negative_keys, *tensors) if wants_keys else ()))
        return total

    @staticmethod
    @first_only
    def backward(ctx, d_total):
        query, scale, bias, pull, mass, *rest = ctx.saved_tensors
        d_query = d_keys = d_scale = d_bias = None
        if ctx.needs_input_grad[0]:
            d_query = ((d_total * scale)[:, None] * pull).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
            d_keys = ctx.ops.softplus_sum_grad_keys(
                for_kernels(query), for_kernels(keys), scale, bias, d_total * scale, *pool
            )
            d_keys = d_keys.to(keys.dtype)  # (K, D)
        if ctx.needs_input_grad[2]:
            d_scale = (d_total * (query.float() * pull).sum(1)).sum()
        if ctx.needs_input_grad[3]:
            d_bias = (d_total * mass).sum()
        return d_query, d_keys, d_scale, d_bias, None, *([None] * ctx.width)


def _require_factor(op: str, name: str, value: Any) -> None:
    good = value.dim() == 0 and value.is_floating_point() if isinstance(value, Tensor) else is_real(value)
    if not good:
        raise checks.refuse(op, name, "a finite number or a 0-d floating tensor", value)


def _as_tensor(value: float | Tensor, query: Tensor) -> Tensor:
    """A 0-d fp32 tensor beside the query; carries the gradient of a tensor."""
    if isinstance(value, Tensor):
        return value.to(device=query.device, dtype=torch.float32)
    return torch.full((), value, dtype=torch.float32, device=query.device)


def softplus_sum(
    query: Tensor,
    negative_keys: Tensor,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    positive_key: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Sum of softplus over each query's negatives, with gradients to query, negative_keys, scale and bias.

        total_b = sum over kept k of log(1 + exp(scale s_bk + bias)),   s = query . negative_key

    scale, bias: numbers, or 0-d floating tensors that receive gradient. The rest as in negmine.logsumexp.
    Returns (B,) fp32 (float64 for float64 input), 0 where the pool is empty. The gradient is computed in the forward pass, so
    frozen keys may be overwritten before backward. Raises ValueError or TypeError for input that does not fit.
    """
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    draw = (seed, step, row_offset)
    return _pooled("softplus_sum", query, negative_keys, scale, bias, positive_key, select, masks, draw, backend)


def _pooled(
    op: str,
    query: Tensor,
    negative_keys: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    positive_key: Tensor | None,
    select: Select | None,
    masks: tuple[Tensor | None, ...],
    draw: tuple[int, int, int],
    backend: str | None,
) -> Tensor:
    _require_factor(op, "scale", scale)
    _require_factor(op, "bias", bias)
    kernels = ("softplus_sum", "softplus_sum_grad_keys")
    ops, pool, _, dense = columns(op, kernels, query, negative_keys, positive_key, select, masks, draw, backend)
    if ops is None:
        return reference_methods.softplus_sum(
            working(query), frozen(negative_keys, dense["usable"]), scale, bias, **dense
        )
    return SoftplusSum.apply(query, negative_keys, _as_tensor(scale, query), _as_tensor(bias, query), ops, *pool)


def siglip(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_mask: Tensor | None = None,
    reduction: str = "mean",
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The sigmoid loss of each query's positive and a queue of negatives (SigLIP, Zhai et al. 2023, arXiv 2303.15343).

        loss_b = log(1 + exp(-l_pos)) + sum over kept k of log(1 + exp(l_bk)),   l = scale s + bias

    No partition function: dropping easy negatives by `select` changes the loss by their own terms only. The sign of the bias
    follows google-research/big_vision trainers/proj/image_text/siglip.py; the paper's printed exponent has it the other way.
    scale, bias: the code starts at 10 and -10 and learns both, the scale as its logarithm: negmine.SigLIPLoss.
    That start suits a batch: the sum grows with K, so against 65,536 negatives start the bias some 8 lower, or it dominates.
    query, positive_key (B, D), negative_keys (K, D), the rest: as in info_nce. A row without negatives keeps its positive's term.
    Returns the loss, fp32 (float64 for float64 input). Raises ValueError or TypeError for input that does not fit.
    """
    op = "siglip"
    checks.require_query_and_keys(op, query, negative_keys)
    checks.require_positive(op, positive_key, query)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    masks = (negative_mask, query_ids, negative_ids, query_labels, negative_labels)
    draw = (seed, step, row_offset)
    total = _pooled(op, query, negative_keys, scale, bias, positive_key, select, masks, draw, backend)  # (B,)
    rows = total - F.logsigmoid(scale * score_of_positive(query, positive_key) + bias)
    return reference.reduced(rows, reduction)


class SigLIPLoss(Stepped):
    """siglip as a module that learns its scale, kept as a logarithm so that it stays positive, and its bias.

    learn=False holds both. select may be a schedule, a callable of the step. The other keywords are siglip's.
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0, *, learn: bool = True, **options: Any) -> None:
        super().__init__()
        checks.require_number("SigLIPLoss", "scale", scale, above=0)
        _require_factor("SigLIPLoss", "bias", bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn)
        self.options = options

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor, *, step: int | None = None, **masks: Any
    ) -> Tensor:
        """masks: query_ids, negative_ids, query_labels, negative_labels, negative_mask, row_offset of siglip."""
        step = self.count(step)
        options = at_step(self.options, step) | masks
        return siglip(
            query, positive_key, negative_keys, scale=self.log_scale.exp(), bias=self.bias, step=step, **options
        )
