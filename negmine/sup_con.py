"""sup_con: the supervised contrastive loss over a batch or a queue, with its gradient, without the (B, K) matrix.

The denominator is the log-sum-exp of info_nce over another pool. The positives are a pool too, that of equal labels: their
log-sum-exp is the "in" form, and the mean of their scores, which is a log-sum-exp at scale 0, the "out" form. The dense
definition is negmine/reference.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negmine import backends, checks, reference
from negmine.derivatives import first_only
from negmine.info_nce import LogSumExp, scale_of
from negmine.mining import for_kernels, working
from negmine.pool import Pool, check_pool, usable

UNKNOWN = -(2**63)  # stands for a query's unknown label: no key has it


class SupConStats(NamedTuple):
    """What sup_con returns beside the loss; none carries gradient."""

    logsumexp: Tensor  # (B,) log of the denominator; of "own_positive", which has one a positive, the negatives'
    num_positives: Tensor  # (B,) int64
    num_without_positive: Tensor  # () int64: rows whose loss is 0


class MeanScore(torch.autograd.Function):
    """score_b (B,) = mean over b's pool of s_bk, and kept (B,): what logsumexp returns as its mean at scale 0."""

    @staticmethod
    def forward(ctx, query, keys, ops, *pool):
        zero = torch.zeros((), dtype=torch.float32, device=query.device)
        lse, mean, kept, _ = ops.logsumexp(for_kernels(query), for_kernels(keys), zero, None, True, *pool)
        *tensors, ctx.same_label = pool
        ctx.ops = ops
        ctx.save_for_backward(query, zero, lse, mean, *((keys, *tensors) if ctx.needs_input_grad[1] else ()))
        ctx.mark_non_differentiable(kept)
        return (query.float() * mean).sum(1), kept

    @staticmethod
    @first_only
    def backward(ctx, d_score, _d_kept):
        query, zero, lse, mean, *rest = ctx.saved_tensors
        d_query = d_keys = None
        if ctx.needs_input_grad[0]:
            d_query = (d_score[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            keys, *tensors = rest
            pool = (*tensors, ctx.same_label)
            d_keys = ctx.ops.logsumexp_grad_keys(for_kernels(query), for_kernels(keys), zero, lse, d_score, *pool)
            d_keys = d_keys.to(keys.dtype)  # (K, D)
        return d_query, d_keys, None, *([None] * len(Pool._fields))


def sup_con(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    positives: str = "out",
    denominator: str = "all",
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SupConStats]:
    """SupCon (Khosla et al. 2020, arXiv 2004.11362; HobbitLong/SupContrast losses.py): keys of the query's label attract.

        "out"  loss_b = mean over p in P_b of -log(exp(x_bp) / den_bp)      x = inner product / temperature
        "in"   loss_b = -log of the mean over p in P_b of exp(x_bp) / den_bp
        den_bp = sum of exp(x_bk) over   "all"             every usable key (the paper)
                                         "own_positive"    the negatives and p alone (pytorch-metric-learning's NTXent; dense)
                                         "negatives_only"  the negatives (decoupled)

    query (B, D): carries gradient. keys (K, D): a queue, the batch itself, or both concatenated; keys that require grad get
        one, frozen keys may be overwritten before backward.
    query_labels (B,), key_labels (K,): whole numbers; equal = positive. A label below 0 is unknown and equals nothing: such a
        key is a negative of every query (the label queue of MoCo forms starts at -1).
    query_ids (B,) and key_ids (K,): equal = the same sample, neither positive nor negative.
    key_mask (K,) or (B, K) bool: True = usable.
    temperature, reduction, backend: as in info_nce. The public code also multiplies by T / base_temperature, 1 by default.

    Returns the loss, fp32 (float64 for float64 input); with return_stats also SupConStats. A row without positives, or with
    "negatives_only" without negatives, has loss 0 and no gradient, and counts in the mean. "in" <= "out" (Jensen).
    Raises ValueError or TypeError for input that does not fit, before any work.
    """
    op = "sup_con"
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_vectors(op, "keys", keys, "(K, D)", (2,), query)
    checks.require_temperature(op, temperature)
    checks.require_choice(op, "positives", positives, ("out", "in"))
    checks.require_choice(op, "denominator", denominator, ("all", "own_positive", "negatives_only"))
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    checks.require_bool(op, "return_stats", return_stats)
    checks.require_tensor(op, "query_labels", query_labels, query)
    pool = check_pool(op, query, keys, key_mask, query_ids, key_ids, query_labels, key_labels, keys_are="key")
    query_labels = torch.where(query_labels < 0, UNKNOWN, query_labels.long())
    pool = pool._replace(query_labels=query_labels)
    dense = "denominator='own_positive'" if denominator == "own_positive" else ""
    ops = backends.choose(op, ("logsumexp", "logsumexp_grad_keys"), backend, (query, keys), dense)
    everything = pool._replace(query_labels=None, negative_labels=None)
    if ops is None:
        frozen = working(keys) if keys.requires_grad else working(keys).clone()
        allowed = usable(everything, query, keys)
        rows, found = reference.sup_con(
            working(query),
            frozen,
            query_labels,
            key_labels,
            temperature=temperature,
            positives=positives,
            denominator=denominator,
            usable=allowed,
        )
        stats = SupConStats(**found)
    else:
        rows, stats = _fused(ops, query, keys, temperature, pool, everything, positives, denominator)
    loss = rows
    if reduction != "none":
        loss = rows.sum() if reduction == "sum" else rows.sum() / max(len(rows), 1)
    return (loss, stats) if return_stats else loss


def _fused(
    ops: backends.Launchers,
    query: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    negatives: Pool,
    everything: Pool,
    positives: str,
    denominator: str,
) -> tuple[Tensor, SupConStats]:
    """Loss (B,) and statistics from the kernels `ops`; meaning as reference.sup_con."""
    scale = scale_of(temperature, query)
    same = negatives._replace(same_label=True)
    columns = everything if denominator == "all" else negatives
    lse, kept, _ = LogSumExp.apply(query, keys, scale, None, ops, *columns)
    if positives == "out":
        score, count = MeanScore.apply(query, keys, ops, *same)
        pull = score * scale  # (B,)
    else:
        lse_same, count, _ = LogSumExp.apply(query, keys, scale, None, ops, *same)
        pull = lse_same.masked_fill(count == 0, 0.0) - count.clamp_min(1).float().log()
    some = (count > 0) & (kept > 0)  # (B,)
    rows = torch.where(some, lse.masked_fill(~some, 0.0) - pull, 0.0)
    return rows, SupConStats(lse.detach(), count, (~some).sum())
