"""THE definition of every op: dense PyTorch, differentiable by plain autograd, in the dtype of its inputs.

    query (B, D), positive_key (B, D), negative_keys (K, D) shared by all queries or (B, M, D) each query's own
    usable (B, K) bool: what the masks leave (negmine/pool.py makes it); None = everything

Nothing here is fast and nothing is checked: the public functions of the package check, and their kernels must agree with
these lines. Options (Select, Mix, ...) are those of negmine/options.py, where the formulas of selection stand.
Rules of meaning: ties go to the lower index; masks before filters before ranks before sampling; a NaN score is no
candidate; selection is detached.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import philox
from negmine.options import FalseNegatives, Mix, Select, Weight


def unshortened(device: torch.device) -> AbstractContextManager:
    """Products in the dtype of their inputs, also where the caller's autocast would shorten them."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def scores_of(query: Tensor, negative_keys: Tensor) -> Tensor:
    """Inner products (B, K) of query (B, D) with shared (K, D) or own (B, K, D) keys."""
    with unshortened(query.device):
        if negative_keys.dim() == 2:
            return query @ negative_keys.T
        return torch.einsum("bd,bkd->bk", query, negative_keys)


def ranking(scores: Tensor, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns of each row, candidates first and hardest first: index (B, K), number of candidates (B,)."""
    scores = scores.detach()
    pool = ~scores.isnan() if usable is None else usable & ~scores.isnan()  # (B, K)
    index = scores.argsort(dim=1, descending=True, stable=True)  # (B, K)
    outside_last = (~pool).gather(1, index).byte().argsort(dim=1, stable=True)  # (B, K)
    return index.gather(1, outside_last), pool.sum(1)


def mine_hardest(query: Tensor, negative_keys: Tensor, N: int, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scores (B, N) descending, index (B, N) int64; (-inf, -1) past the end of the pool."""
    scores = scores_of(query, negative_keys)  # (B, K)
    index, count = ranking(scores, usable)
    index = F.pad(index[:, :N], (0, max(0, N - index.shape[1])))  # (B, N)
    present = torch.arange(N, device=index.device) < count[:, None]  # (B, N)
    if scores.shape[1]:
        scores = scores.gather(1, index)
    else:
        scores = scores.new_zeros(index.shape)
    return scores.masked_fill(~present, -torch.inf), index.masked_fill(~present, -1)


def rank_thresholds(query: Tensor, negative_keys: Tensor, ranks: Tensor, usable: Tensor | None = None) -> Tensor:
    """The score at each 0-based descending rank: ranks (B, R) int64 -> (B, R), -inf past the end of the pool."""
    K = negative_keys.shape[-2]
    scores, _ = mine_hardest(query, negative_keys, K + 1, usable)  # (B, K + 1), the last column past every end
    return scores.gather(1, ranks.clamp(0, K)).masked_fill(ranks < 0, -torch.inf)


def percentile(query: Tensor, negative_keys: Tensor, q: Tensor, usable: Tensor | None = None) -> Tensor:
    """q (R,) in [0, 1] -> (B, R): torch.quantile's linear interpolation over each row's pool; NaN for an empty pool.

    A NaN score counts in the pool and lies below everything: the low quantiles of its row are NaN.
    """
    scores, index = mine_hardest(query, negative_keys, negative_keys.shape[-2] + 1, usable)  # (B, K + 1)
    scores = scores.masked_fill(index < 0, torch.nan)
    everything = torch.full_like(scores[:, :1], negative_keys.shape[-2], dtype=torch.long)  # (B, 1)
    count = everything if usable is None else usable.sum(1, keepdim=True)
    place = (count - 1).clamp_min(0).double() * q.double()  # (B, R) ascending, between two neighbours
    below, above = (count - 1 - place.floor().long()), (count - 1 - place.ceil().long())  # (B, R) descending ranks
    weight = place.frac().to(scores.dtype)
    return torch.lerp(scores.gather(1, below.clamp_min(0)), scores.gather(1, above.clamp_min(0)), weight)


def filtered(scores: Tensor, positive_score: Tensor | None, select: Select, usable: Tensor | None) -> Tensor:
    """The pool (B, K) bool that the masks and the score filters leave; equality keeps, and NaN passes no filter."""
    pool = torch.ones_like(scores, dtype=torch.bool) if usable is None else usable
    if select.has_filter:
        pool = pool & ~scores.isnan()
    if select.min_score is not None:
        pool = pool & (scores >= select.min_score)
    if select.max_score is not None or select.has_margin:
        anchor = scores.new_zeros(len(scores)) if positive_score is None else positive_score.detach()
        pool = pool & (scores <= select.highest_score(anchor)[:, None])
    return pool


def multiplicity(
    scores: Tensor,
    positive_score: Tensor | None,
    select: Select,
    usable: Tensor | None,
    seed: int,
    step: int,
    row_offset: int,
) -> Tensor:
    """How often each column is kept: (B, K) int64, 0 or 1, and more only when drawn with replacement."""
    scores = scores.detach()
    B, K = scores.shape
    pool = filtered(scores, positive_score, select, usable)
    index, candidates = ranking(scores, pool)  # (B, K), (B,)
    first, end = select.window(pool.sum(1))  # (B,), (B,)
    end = end.minimum(candidates)
    rank = torch.arange(K, device=scores.device)  # (K,)
    kept = ((rank >= first[:, None]) & (rank < end[:, None])).long()  # (B, K) in rank order
    if select.sample is not None and K:
        rows = torch.arange(B, device=scores.device) + row_offset  # (B,)
        count = (end - first).clamp_min(0)  # (B,)
        drawn = philox.sample(
            count, K, select.sample, select.replace, rows, seed, step
        )  # (B, sample) members of the window
        at = (first[:, None] + drawn).clamp(0, K - 1)  # (B, sample) ranks
        kept = torch.zeros_like(kept).scatter_add(1, at, (drawn >= 0).long())
    return torch.zeros_like(kept).scatter(1, index, kept)


def mix_draws(
    hard_index: Tensor, mix: Mix, dtype: torch.dtype, seed: int, step: int, row_offset: int
) -> tuple[Tensor, Tensor]:
    """hard_index (B, hard) -> parents (B, S, 2) int64 (-1 = the query), coefficients (B, S); stated in kernels/README.md."""
    device = hard_index.device
    count = (hard_index >= 0).sum(1, keepdim=True)  # (B, 1)
    slots = torch.arange(mix.total, device=device)  # (S,)
    rows = torch.arange(len(hard_index), device=device) + row_offset  # (B,)
    u0, u1, u2, _ = philox.words(rows, slots, philox.STREAM_MIX, seed, step)  # (B, S) each
    is_pair = slots < mix.pairs  # (S,)

    first = philox.below(u0, count)  # (B, S)
    apart = mix.distinct & is_pair & (count > 1)  # (B, S)
    second = philox.below(u1, count - apart.long())
    second = second + (apart & (second >= first)).long()
    parents = torch.stack([hard_index.gather(1, first), hard_index.gather(1, second)], 2)  # (B, S, 2)
    parents[:, :, 0] = parents[:, :, 0].masked_fill(~is_pair, -1)

    table = None if mix.quantiles is None else mix.quantiles.to(device, non_blocking=True)  # (4097,)
    fraction = philox.unit(u2, table).to(dtype)  # (B, S)
    low, high = (torch.where(is_pair, p, w) for p, w in zip(mix.pair_range, mix.query_range, strict=True))  # (S,) each
    return parents, (low + (high - low) * fraction).to(dtype).masked_fill(count == 0, 0.0)


def mixed(query: Tensor, negative_keys: Tensor, parents: Tensor, coefficients: Tensor) -> Tensor:
    """vectors (B, S, D) of the given parents (B, S, 2) and coefficients (B, S); zeros where there is no second parent."""
    if negative_keys.shape[-2] == 0:
        return query.new_zeros(*coefficients.shape, query.shape[1])
    rows = torch.arange(len(query), device=query.device)[:, None]  # (B, 1), used where the keys are each query's own
    n_a, n_b = (
        negative_keys[at] if negative_keys.dim() == 2 else negative_keys[rows, at]
        for at in parents.clamp_min(0).unbind(2)
    )  # (B, S, D) each
    n_a = torch.where((parents[:, :, :1] >= 0), n_a, query[:, None, :])
    vectors = F.normalize(coefficients[:, :, None] * n_a + (1 - coefficients[:, :, None]) * n_b, dim=2, eps=1e-12)
    return vectors.masked_fill(parents[:, :, 1:] < 0, 0.0)


def mix_negatives(
    query: Tensor,
    negative_keys: Tensor,
    mix: Mix,
    usable: Tensor | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """vectors (B, S, D), parents (B, S, 2) int64 (-1 = the query), coefficients (B, S) of the first parent.

    Pairs come first, then mixes with the query. A query without negatives has parents -1, coefficients 0 and vectors 0.
    """
    _, hard_index = mine_hardest(query.detach(), negative_keys.detach(), mix.skip + mix.hard, usable)
    parents, coefficients = mix_draws(hard_index[:, mix.skip :], mix, query.dtype, seed, step, row_offset)
    vectors = mixed(query, negative_keys, parents, coefficients)
    return (vectors.detach() if mix.detach else vectors), parents, coefficients


def listed_logsumexp(
    query: Tensor, negative_keys: Tensor, index: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (B, M), log-sum-exp (B,) and softmax mean (B, D) of the columns index (B, M) names; -1 = none, repeats count."""
    absent = index < 0  # (B, M)
    rows = negative_keys[index.clamp_min(0)].masked_fill(absent[:, :, None], 0.0)  # (B, M, D)
    scores = scores_of(query, rows).masked_fill(absent, -torch.inf)  # (B, M)
    lse = (scale * scores).masked_fill(absent, -torch.inf).logsumexp(1)  # (B,)
    p = (scale * scores - lse[:, None]).exp().masked_fill(absent, 0.0)  # (B, M)
    return scores, lse, torch.einsum("bm,bmd->bd", p, rows)


def listed_grad_keys(query: Tensor, index: Tensor, weight: Tensor, K: int) -> Tensor:
    """(K, D): row k = sum of weight_bm query_b over the cells of index (B, M) that name k; weight (B, M)."""
    named = index[:, :, None] == torch.arange(K, device=index.device)  # (B, M, K)
    return torch.einsum("bmk,bd->kd", weight[:, :, None].where(named, 0.0), query)


def found_scores(support: Tensor, negative_keys: Tensor, reduce: str) -> Tensor:
    """support (B, V, D) -> (B, K): the largest (a NaN is passed over) or the mean of the views' scores."""
    equation = "bvd,kd->bvk" if negative_keys.dim() == 2 else "bvd,bkd->bvk"
    with unshortened(support.device):
        by_view = torch.einsum(equation, support.detach(), negative_keys.detach())  # (B, V, K)
    if reduce == "mean":
        return by_view.mean(1)
    nothing = by_view.isnan()
    return by_view.masked_fill(nothing, -torch.inf).amax(1).masked_fill(nothing.all(1), torch.nan)


def false_negatives_found(
    support: Tensor, negative_keys: Tensor, options: FalseNegatives, usable: Tensor | None
) -> Tensor:
    """support (B, V, D) -> (B, K) bool: the columns that the support views give away."""
    found_score = found_scores(support, negative_keys, options.reduce)  # (B, K)
    index, count = ranking(found_score, usable)
    top = index.shape[1] if options.top_k is None else options.top_k
    among = torch.arange(index.shape[1], device=index.device) < count.clamp_max(top)[:, None]  # (B, K) in rank order
    found = torch.zeros_like(among).scatter(1, index, among)
    return found if options.threshold is None else found & (found_score > options.threshold)


def log_weighted_sum(
    lse: Tensor, lse_importance: Tensor, x_positive: Tensor, count: Tensor, temperature: Tensor | float, weight: Weight
) -> tuple[Tensor, Tensor]:
    """log Ng (B,) of Weight's docstring and clamped (B,) bool, for rows that have negatives.

    lse (B,): LSE of (1 + beta) x; lse_importance (B,): LSE of beta x; count (B,): negatives N.
    """
    log_count = count.to(lse.dtype).log()
    if weight.detach and weight.beta:  # the value as it is, the gradient of sum_j w_j exp(x_j) with w held
        log_r = log_count + lse.detach() - lse_importance.detach() + (lse - lse.detach()) / (1 + weight.beta)
    else:
        log_r = log_count + lse - lse_importance
    if weight.tau_plus == 0:
        return log_r, torch.zeros_like(count, dtype=torch.bool)
    log_floor = log_count - 1 / temperature
    shift = torch.maximum(log_r, x_positive + log_count).detach()
    excess = (log_r - shift).exp() - weight.tau_plus * (x_positive + log_count - shift).exp()
    log_raw = excess.clamp_min(torch.finfo(lse.dtype).tiny).log() + shift - math.log1p(-weight.tau_plus)
    clamped = (excess <= 0) | (log_raw < log_floor)
    return torch.where(clamped, log_floor, log_raw), clamped


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    *,
    temperature: Tensor | float = 0.07,
    usable: Tensor | None = None,
    select: Select | None = None,
    mix: Mix | None = None,
    weight: Weight | None = None,
    false_negatives: FalseNegatives | None = None,
    support: Tensor | None = None,
    decoupled: bool = False,
    seed: int = 0,
    step: int = 0,
    row_offset: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each row (B,) and its statistics.

        loss = LSE over {positive unless decoupled, attracted false negatives, kept negatives, synthetic negatives} of x + log w
               - mean of the positive logits,   x = s / temperature
    A row without kept or synthetic negatives has loss 0 and no gradient.
    """
    scores = scores_of(query, negative_keys)  # (B, K)
    positive_score = (query * positive_key).sum(1)  # (B,)
    x_positive = positive_score / temperature  # (B,)
    usable = torch.ones_like(scores, dtype=torch.bool) if usable is None else usable
    found = torch.zeros_like(usable)
    if false_negatives is not None and support is not None:
        found = false_negatives_found(support, negative_keys, false_negatives, usable)
        usable = usable & ~found

    times = usable.long()  # (B, K)
    if select is not None:
        times = multiplicity(scores, positive_score, select, usable, seed, step, row_offset)
    x = (scores / temperature + times.to(scores.dtype).log()).masked_fill(times == 0, -torch.inf)  # (B, K)
    count = times.sum(1)  # (B,)
    columns, some = x, count > 0
    clamped = torch.zeros_like(some)

    if weight is not None:
        safe = x.masked_fill(~some[:, None], 0.0)
        importance = (weight.beta * scores / temperature + times.to(scores.dtype).log()).masked_fill(
            times == 0, -torch.inf
        )
        importance = importance.masked_fill(~some[:, None], 0.0)
        sharpened = safe + importance - times.clamp_min(1).to(scores.dtype).log() if weight.beta else safe
        log_sum, clamped = log_weighted_sum(
            sharpened.logsumexp(1), importance.logsumexp(1), x_positive, count.clamp_min(1), temperature, weight
        )
        columns, clamped = log_sum.masked_fill(~some, -torch.inf)[:, None], clamped & some  # (B, 1)
    if mix is not None and mix.total:
        vectors, parents, _ = mix_negatives(
            query, negative_keys, mix, usable, seed=seed, step=step, row_offset=row_offset
        )
        x_mixed = scores_of(query, vectors) / temperature  # (B, S)
        columns = torch.cat([columns, x_mixed.masked_fill(parents[:, :, 1] < 0, -torch.inf)], 1)
        some = some | (parents[:, :, 1] >= 0).any(1)

    attracted = found if false_negatives is not None and false_negatives.mode == "attract" else torch.zeros_like(found)
    x_attracted = (scores / temperature).masked_fill(~attracted, 0.0)  # (B, K)
    positives = (x_positive + x_attracted.sum(1)) / (1 + attracted.sum(1))  # (B,)
    if not decoupled:
        columns = torch.cat([x_positive[:, None], x_attracted.masked_fill(~attracted, -torch.inf), columns], 1)
    finite = columns.masked_fill(~some[:, None], 0.0)  # an empty row must not differentiate LSE of nothing
    logsumexp = finite.logsumexp(1) if finite.shape[1] else torch.zeros_like(x_positive)
    loss = torch.where(some, logsumexp - positives, 0.0 * x_positive)  # NaN in a row stays in that row
    stats = {
        "logsumexp": torch.where(some, logsumexp, -torch.inf if decoupled else x_positive).detach(),
        "positive_rank": (usable & (scores > positive_score[:, None])).sum(1),
        "num_negatives": count,
        "clamped": clamped,
        "num_empty": (~some).sum(),
    }
    return loss, stats


def sup_con(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    temperature: Tensor | float = 0.07,
    positives: str = "out",
    denominator: str = "all",
    usable: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each row (B,) and its statistics, with P = usable keys of the query's label; below 0 it is unknown.

        "out"  mean over p in P of -log(e^x_p / den_p)         "in"  -log of the mean over p in P of e^x_p / den_p
        den_p: "all" every usable key; "own_positive" the negatives and p; "negatives_only" the negatives
    A row without positives has loss 0 and no gradient (Khosla et al. 2020, HobbitLong/SupContrast losses.py).
    """
    x = scores_of(query, keys) / temperature  # (B, K)
    usable = torch.ones_like(x, dtype=torch.bool) if usable is None else usable
    same = usable & (query_labels[:, None] == key_labels) & (query_labels >= 0)[:, None]  # (B, K)
    has_positive = same.any(1)  # (B,)
    columns = usable if denominator == "all" else usable & ~same
    lse = x.masked_fill(~columns, -torch.inf).masked_fill(~columns.any(1, keepdim=True), 0.0).logsumexp(1)
    lse = lse.masked_fill(~columns.any(1), -torch.inf)  # (B,)
    below = lse[:, None].expand_as(x)  # (B, K)
    if denominator == "own_positive":
        below = torch.logaddexp(below, x)
    some = has_positive & (columns.any(1) | (denominator == "own_positive"))  # (B,)
    log_ratio = (x - below).masked_fill(~(same & some[:, None]), 0.0 if positives == "out" else -torch.inf)  # (B, K)
    count = same.sum(1).clamp_min(1)
    if positives == "out":
        loss = -log_ratio.sum(1) / count
    else:
        loss = count.to(x.dtype).log() - log_ratio.masked_fill(~some[:, None], 0.0).logsumexp(1)
    stats = {"logsumexp": lse.detach(), "num_positives": same.sum(1), "num_without_positive": (~some).sum()}
    return loss.masked_fill(~some, 0.0), stats


def reduced(rows: Tensor, reduction: str, count: Tensor | int | None = None) -> Tensor:
    """Losses under a reduction: "mean" divides by `count`, by default of all rows, and is 0 where there are none."""
    if reduction == "none":
        return rows
    if reduction == "sum" or len(rows) == 0:
        return rows.sum()
    return rows.mean() if count is None else rows.sum() / count
