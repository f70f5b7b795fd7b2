"""The contrastive losses info_nce and sup_con, and the false negatives that support views detect.

query (B, D), positive_key (B, D), negative_keys (K, D) shared by all queries or (B, M, D) with M keys for each query
usable (B, K) bool: the columns that the masks allow (from negmine/ops/pool.py); None = all columns
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine.ops.vectors import disable_autocast
from negmine.options import FalseNegatives, Mix, Select, Weight
from negmine.reference.mixing import mix_negatives
from negmine.reference.selection import multiplicity, ranking, row_logsumexp, scores_of


def found_scores(support: Tensor, negative_keys: Tensor, reduce: str) -> Tensor:
    """support (B, V, D) -> (B, K): the maximum (NaN ignored) or the mean of the scores of the views."""
    equation = "bvd,kd->bvk" if negative_keys.dim() == 2 else "bvd,bkd->bvk"
    with disable_autocast(support.device):
        by_view = torch.einsum(equation, support.detach(), negative_keys.detach())  # (B, V, K)
    if reduce == "mean":
        return by_view.mean(1)
    is_nan = by_view.isnan()
    return by_view.masked_fill(is_nan, -torch.inf).amax(1).masked_fill(is_nan.all(1), torch.nan)


def false_negatives_found(
    support: Tensor, negative_keys: Tensor, options: FalseNegatives, usable: Tensor | None
) -> Tensor:
    """support (B, V, D) -> (B, K) bool: the columns that are false negatives by the scores of the support views."""
    found_score = found_scores(support, negative_keys, options.reduce)  # (B, K)
    index, count = ranking(found_score, usable)
    top = index.shape[1] if options.top_k is None else options.top_k
    in_top = torch.arange(index.shape[1], device=index.device) < count.clamp_max(top)[:, None]  # (B, K) in rank order
    found = torch.zeros_like(in_top).scatter(1, index, in_top)
    return found if options.threshold is None else found & (found_score > options.threshold)


def log_weighted_sum(
    lse: Tensor, lse_importance: Tensor, x_positive: Tensor, count: Tensor, temperature: Tensor | float, weight: Weight
) -> tuple[Tensor, Tensor]:
    """log Ng (B,) of the formula in `Weight`, and clamped (B,) bool, for rows that have negatives.

    lse (B,): log-sum-exp of (1 + beta) x; lse_importance (B,): log-sum-exp of beta x; count (B,): number of negatives N.
    """
    log_count = count.to(lse.dtype).log()
    if weight.detach and weight.sharpens:  # the same value, with the gradient of sum_j w_j exp(x_j) for constant w
        log_r = log_count + lse.detach() - lse_importance.detach() + (lse - lse.detach()) / (1 + weight.beta)
    else:
        log_r = log_count + lse - lse_importance
    if not weight.debiases:
        return log_r, torch.zeros_like(count, dtype=torch.bool)
    tau_plus = weight.tau_plus
    log_floor = log_count - 1 / temperature
    shift = torch.maximum(log_r, x_positive + log_count).detach()
    excess = (log_r - shift).exp() - tau_plus * (x_positive + log_count - shift).exp()
    log_raw = excess.clamp_min(torch.finfo(lse.dtype).tiny).log() + shift
    log_raw = log_raw - ((-tau_plus).log1p() if isinstance(tau_plus, Tensor) else math.log1p(-tau_plus))
    clamped = (excess <= 0) | (log_raw < log_floor)
    if isinstance(tau_plus, Tensor):  # a schedule may be 0 at some steps
        return torch.where(tau_plus > 0, torch.where(clamped, log_floor, log_raw), log_r), clamped & (tau_plus > 0)
    return torch.where(clamped, log_floor, log_raw), clamped


class Columns(NamedTuple):
    """One pool of negatives and its options. The fields are those of Negatives, with its masks combined in `usable`."""

    keys: Tensor  # (K, D) or (B, M, D)
    usable: Tensor | None = None  # (B, K) bool
    bias: Tensor | None = None  # (K,) or (B, M)
    select: Select | None = None
    mix: Mix | None = None
    weight: Weight | None = None


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    *,
    usable: Tensor | None = None,
    bias: Tensor | None = None,
    select: Select | None = None,
    mix: Mix | None = None,
    weight: Weight | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each row (B,) and its statistics for one pool. options: keyword arguments of info_nce_of_pools."""
    pool = Columns(negative_keys, usable, bias, select, mix, weight)
    rows, stats = info_nce_of_pools(query, positive_key, [pool], **options)
    return rows, stats[0]


def info_nce_of_pools(
    query: Tensor,
    positive_key: Tensor,
    pools: list[Columns],
    *,
    temperature: Tensor | float = 0.07,
    false_negatives: FalseNegatives | None = None,
    support: Tensor | None = None,
    positive_bias: Tensor | None = None,
    decoupled: bool = False,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The loss of each row (B,) and the statistics of each pool.

        loss = LSE over {positive unless decoupled, attracted false negatives, kept negatives, synthetic negatives} of x + log w
               - mean of the positive logits,   x = s / temperature + bias, without bias for synthetic negatives
    The log-sum-exp is over all pools together. Each pool has its own ranks, weights, random draws and false negatives. A row
    without kept or synthetic negatives in any pool has loss 0 and no gradient.
    """
    positive_score = (query * positive_key).sum(1)  # (B,)
    x_positive = positive_score / temperature  # (B,)
    if positive_bias is not None:
        x_positive = x_positive + positive_bias
    parts, attracted, has_negative_in_pool, stats = [], [], [], []
    for number, pool in enumerate(pools):
        draw = seed, step, row_offset + (number << 48)
        scores = scores_of(query, pool.keys, pool.usable)  # (B, K)
        logits = scores / temperature if pool.bias is None else scores / temperature + pool.bias.to(scores.dtype)
        usable = torch.ones_like(scores, dtype=torch.bool) if pool.usable is None else pool.usable
        found = torch.zeros_like(usable)
        if false_negatives is not None and support is not None:
            found = false_negatives_found(support, pool.keys, false_negatives, usable)
            usable = usable & ~found
        columns, has_negative, count, clamped = _kept(
            query, pool, scores, logits, positive_score, x_positive, usable, temperature, draw
        )
        parts.append(columns)
        has_negative_in_pool.append(has_negative)
        if false_negatives is not None and false_negatives.mode == "attract":
            attracted.append((found, logits))
        stats.append(
            {
                "positive_rank": (usable & (scores > positive_score[:, None])).sum(1),
                "num_negatives": count,
                "clamped": clamped,
                "num_empty": (~has_negative).sum(),
            }
        )

    has_negative = torch.stack(has_negative_in_pool).any(0)  # (B,)
    positives, num_positives = x_positive, torch.ones_like(x_positive)
    for found, logits in attracted:
        positives = positives + logits.masked_fill(~found, 0.0).sum(1)  # (B,)
        num_positives = num_positives + found.sum(1)
        parts = parts if decoupled else [logits.masked_fill(~found, -torch.inf), *parts]
    columns = torch.cat(parts if decoupled else [x_positive[:, None], *parts], 1)
    finite = columns.masked_fill(~has_negative[:, None], 0.0)  # the log-sum-exp of an empty row has a NaN gradient
    logsumexp = row_logsumexp(finite) if finite.shape[1] else finite.sum(1)
    # torch.where keeps a NaN within its row.
    loss = torch.where(has_negative, logsumexp - positives / num_positives, 0.0 * x_positive)
    total = torch.where(has_negative, logsumexp, -torch.inf if decoupled else x_positive).detach()
    return loss, [{"logsumexp": total} | each for each in stats]


def _kept(
    query: Tensor, pool: Columns, scores: Tensor, logits: Tensor, positive_score: Tensor, x_positive: Tensor,
    usable: Tensor, temperature: Tensor | float, draw: tuple[int, int | Tensor, int | Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The contribution of one pool to the log-sum-exp: logits (B, columns), and for each row (B,) whether there is any negative,
    the number of kept negatives, and whether the weight is clamped."""
    select, mix, weight, bias = pool.select, pool.mix, pool.weight, pool.bias
    times = usable.long()  # (B, K)
    if select is not None:
        times = multiplicity(scores, positive_score, select, usable, *draw)
    repeats = times.to(scores.dtype).log()  # (B, K)
    columns = (logits + repeats).masked_fill(times == 0, -torch.inf)  # (B, K)
    count = times.sum(1)  # (B,)
    has_negative = count > 0
    clamped = torch.zeros_like(has_negative)
    if weight is not None and columns.shape[1]:  # the log-sum-exp of zero columns has no gradient
        sharpened, importance = columns, repeats
        if weight.sharpens:
            importance = weight.beta * scores / temperature + repeats
            sharpened = (1 + weight.beta) * scores / temperature + repeats
            if bias is not None:
                # With detached weights, log_weighted_sum multiplies the gradient by 1 / (1 + beta). That of the bias must not
                # change, so it is multiplied by 1 + beta first.
                bias = bias.to(scores.dtype)
                factor = 1 + weight.beta if weight.detach else 1.0
                sharpened = sharpened + bias.detach() + factor * (bias - bias.detach())
        sharpened, importance = (
            x.masked_fill(times == 0, -torch.inf).masked_fill(~has_negative[:, None], 0.0)
            for x in (sharpened, importance)
        )
        log_sum, clamped = log_weighted_sum(
            row_logsumexp(sharpened), row_logsumexp(importance), x_positive, count.clamp_min(1), temperature, weight
        )
        columns, clamped = log_sum.masked_fill(~has_negative, -torch.inf)[:, None], clamped & has_negative  # (B, 1)
    if mix is not None and mix.total:
        seed, step, row_offset = draw
        vectors, parents, _ = mix_negatives(query, pool.keys, mix, usable, seed=seed, step=step, row_offset=row_offset)
        x_mixed = scores_of(query, vectors) / temperature  # (B, S)
        absent = parents[:, :, 1] < 0  # (B, S)
        columns = torch.cat([columns, x_mixed.masked_fill(absent, -torch.inf)], 1)
        has_negative = has_negative | ~absent.all(1)
    return columns, has_negative, count, clamped


def sup_con(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: Tensor | float = 0.07,
    positives: str = "out",
    denominator: str = "all",
    positive_mask: Tensor | None = None,
    positive_weights: Tensor | None = None,
    usable: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each row (B,) and its statistics, with P = the usable keys of the query's label. The label -1 is unknown.

    Instead of labels, P may be given by positive_mask (B, K) bool, or by positive_weights (B, K), which are 0 for negatives and
    are used as weights of the means over P.

        "out"  mean over p in P of -log(e^x_p / den_p)         "in"  -log of the mean over p in P of e^x_p / den_p
        den_p: "all" every usable key; "own_positive" the negatives and p; "negatives_only" the negatives
    A row without positives has loss 0 and no gradient (Khosla et al. 2020, HobbitLong/SupContrast losses.py).
    """
    x = scores_of(query, keys, usable) / temperature  # (B, K)
    usable = torch.ones_like(x, dtype=torch.bool) if usable is None else usable
    weights = None  # (B, K)
    if positive_weights is not None:
        positive_mask = positive_weights > 0
        weights = positive_weights.to(x.dtype).masked_fill(~(usable & positive_mask), 0.0)
    if positive_mask is not None:
        same = usable & positive_mask  # (B, K)
    else:
        assert query_labels is not None and key_labels is not None
        same = usable & (query_labels[:, None] == key_labels) & (query_labels != -1)[:, None]  # (B, K)
    has_positive = same.any(1)  # (B,)
    columns = usable if denominator == "all" else usable & ~same
    lse = row_logsumexp(x.masked_fill(~columns, -torch.inf).masked_fill(~columns.any(1, keepdim=True), 0.0))
    lse = lse.masked_fill(~columns.any(1), -torch.inf)  # (B,)
    below = lse[:, None].expand_as(x)  # (B, K)
    if denominator == "own_positive":
        below = torch.logaddexp(below, x)
    has_loss = has_positive & (columns.any(1) | (denominator == "own_positive"))  # (B,)
    log_ratio = (x - below).masked_fill(
        ~(same & has_loss[:, None]), 0.0 if positives == "out" else -torch.inf
    )  # (B, K)
    mass = (same if weights is None else weights).sum(1).masked_fill(~has_positive, 1).to(x.dtype)  # (B,)
    if positives == "out":
        loss = -(log_ratio if weights is None else weights * log_ratio).sum(1) / mass
    else:
        terms = log_ratio if weights is None else log_ratio + weights.masked_fill(~same, 1.0).log()  # (B, K)
        loss = mass.log() - row_logsumexp(terms.masked_fill(~has_loss[:, None], 0.0))
    stats = {"logsumexp": lse.detach(), "num_positives": same.sum(1), "num_without_positive": (~has_loss).sum()}
    return loss.masked_fill(~has_loss, 0.0), stats


def reduced(rows: Tensor, reduction: str, count: Tensor | int | None = None) -> Tensor:
    """Reduce the losses of rows. "mean" divides by `count`, by default the number of rows, and is 0 if there are no rows."""
    if reduction == "none":
        return rows
    if reduction == "sum" or len(rows) == 0:
        return rows.sum()
    return rows.mean() if count is None else rows.sum() / count
