"""Published losses that are computed from the positive's logit and the negatives' log-sum-exp, as functions and as a module.

Each function takes query (B, D), positive_key (B, D), negative_keys, temperature, hyperparameters of the method, reduction, and
in **pool the other keyword arguments of `negmine.logsumexp`: select, query_ids, query_labels, seed, step, row_offset and backend.
It returns the loss, of shape () or (B,), in fp32 (in float64 for float64 input). A row without negatives has loss 0 and no
gradient. Gradients flow to the query, the positive key, negatives that require grad, and a temperature that is a tensor.
Invalid arguments raise ValueError or TypeError.

    x_b = s_pos / T,   lse_b = log sum over b's kept negatives of exp(s / T),   InfoNCE = log(1 + exp(lse - x))
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine import reference
from negmine.losses.schedules import ScheduledLoss, at_step
from negmine.ops import checks, philox
from negmine.ops.negatives import UNEQUAL, UNKNOWN, has_tags
from negmine.ops.vectors import promoted, score_of_positive, widened
from negmine.ops.windows import Draw
from negmine.options import Guide, Negatives, Select, beta_quantiles
from negmine.selection import SummedColumns, summed_columns

TAGS = ("query_ids", "query_labels")
POOL = (*TAGS, *Draw._fields, "select", "backend")  # the keyword arguments in **pool


class Logits(NamedTuple):
    """The quantities from which a row of the loss is computed."""

    positive: Tensor  # (B,) s_pos / T
    lse: Tensor  # (B,) 0 if there is no negative
    has_negative: Tensor  # (B,) bool
    query: Tensor | None = None  # (B, D), in fp32 if its gradient is summed in fp32


def draw_of(op: str, pool: dict) -> Draw:
    """seed, step and row_offset among the keyword arguments of a method."""
    return Draw(*checks.require_draw(op, *(pool.get(name, 0) for name in Draw._fields)))


def columns_of(op: str, query: Tensor, negative_keys: Any, positive_key: Tensor, pool: dict) -> SummedColumns:
    """The checked columns of negmine.logsumexp, with errors that name `op`. `pool` has its other keyword arguments."""
    checks.require_known(op, pool, POOL)
    return summed_columns(
        op, ("logsumexp",), query, positive_key, negative_keys, pool.get("select"), pool.get("query_ids"),
        pool.get("query_labels"), draw_of(op, pool), pool.get("backend"),
    )  # fmt: skip


def logits(
    op: str, query: Tensor, positive_key: Tensor, negative_keys: Any, temperature: float | Tensor, pool: dict
) -> Logits:
    temperature = checks.require_temperature(op, temperature)
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_positive(op, positive_key, query)
    columns = columns_of(op, query, negative_keys, positive_key, pool)
    return _logits(columns, columns.logsumexp(temperature), temperature)


def _logits(columns: SummedColumns, lse: Tensor, temperature: float | Tensor) -> Logits:
    has_negative = lse != -torch.inf  # (B,) NaN counts as a value
    assert columns.positive_key is not None
    x_positive = score_of_positive(columns.query, columns.positive_key) / temperature
    return Logits(x_positive, lse.masked_fill(~has_negative, 0.0), has_negative, columns.query)


def reduced(op: str, rows: Tensor, x: Logits, reduction: str) -> Tensor:
    """rows (B,), with 0 for rows without negatives, after the reduction."""
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    rows = torch.where(x.has_negative, rows, 0.0 * x.positive)  # a NaN in a row affects only that row
    return reference.reduced(rows, reduction)


def with_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """x, with a gradient that is multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


def _with_keys(negative_keys: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """negative_keys of any form, with `change` applied to keys that require grad."""
    if isinstance(negative_keys, Negatives):
        return dataclasses.replace(negative_keys, keys=_with_keys(negative_keys.keys, change))
    if isinstance(negative_keys, Tensor) and negative_keys.requires_grad:
        return change(negative_keys)
    return negative_keys


def hardness_added(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.02,
    alpha: float = 9.0,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """InfoNCE with a hardness term in the logits of negatives (LLaVE, EmbeddingGemma; hardness_mode of sentence-transformers).

        loss = log(1 + exp(log sum_j exp(s_j / T + alpha sg[s_j]) - x)),   sg = no gradient

    Each negative has the weight exp(alpha s), which is neither normalised nor divided by T. This is one log-sum-exp at scale
    1 / T + alpha with the gradient of s / T. LLaVE uses alpha=9 on in-batch negatives, and EmbeddingGemma alpha=5 on explicit
    hard negatives. alpha = beta / T gives the sharpened sum of HCL without its normaliser.
    """
    op = "hardness_added"
    alpha, temperature = checks.require_scalar(op, "alpha", alpha, least=0), checks.require_temperature(op, temperature)
    sharper = temperature / (1 + alpha * temperature)  # 1 / (1 / T + alpha)
    share = sharper / temperature  # the ratio of s / T to (1 / T + alpha) s
    share = share.detach() if isinstance(share, Tensor) else share
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_positive(op, positive_key, query)
    if negative_keys is positive_key:
        negative_keys = positive_key = widened(positive_key)
    query, positive_key = widened(query), widened(positive_key)  # so that each gradient is rounded once
    keys = _with_keys(negative_keys, lambda given: with_gradient(widened(given), share))
    x = logits(op, with_gradient(query, share), with_gradient(positive_key, share), keys, sharper, pool)
    x = x._replace(positive=score_of_positive(query, positive_key) / temperature)
    return reduced(op, F.softplus(x.lse - x.positive), x, reduction)


def decoupled_weighted(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float = 0.5,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """DCLW, decoupled with weighted positives (Yeh et al. 2021, arXiv 2110.06848).

        loss_b = -w_b x_b + lse_b,   w_b = 2 - B softmax over the batch of (s_pos / sigma),   no gradient through w

    Queries whose positive is far away have larger weights. The weights of a batch add up to B. The loss may be negative. It
    differs from lightly's DCLLoss, which adds two log-sum-exps, and from a public port in which w has a gradient.
    """
    op = "decoupled_weighted"
    sigma = checks.require_scalar(op, "sigma", sigma, above=0)
    x = logits(op, query, positive_key, negative_keys, temperature, pool)
    weight = positive_weights(score_of_positive(query, positive_key), sigma)  # (B,)
    return reduced(op, x.lse - weight * x.positive, x, reduction)


def positive_weights(score: Tensor, sigma: float) -> Tensor:
    """The weights w (B,) of decoupled_weighted from the positives' scores (B,), without gradient."""
    return 2 - len(score) * F.softmax(score.detach() / sigma, dim=0)


def rince(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.5,
    r: float = 0.5,
    lam: float = 0.01,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """RINCE, robust to false positives (Chuang et al. 2022, arXiv 2201.04309; chingyaoc/RINCE README).

        loss = -exp(r x) / r + (lam (exp(x) + exp(lse)))^r / r

    r is in (0, 1]. As r approaches 0, the loss approaches InfoNCE plus log lam; r = 1 is the symmetric exponential loss. Values
    grow like exp(r / T), so with unit vectors keep r / T below 88 in fp32.
    """
    op = "rince"
    r, lam = checks.require_scalar(op, "r", r, above=0), checks.require_scalar(op, "lam", lam, above=0)
    if not isinstance(r, Tensor) and r > 1:
        raise checks.refuse(op, "r", "a number in (0, 1]", r)
    x = logits(op, query, positive_key, negative_keys, temperature, pool)
    both = torch.logaddexp(x.positive, x.lse)  # (B,)
    rows = (lam**r * torch.exp(r * both) - torch.exp(r * x.positive)) / r
    return reduced(op, rows, x, reduction)


def logq(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    positive_log_q: Tensor,
    log_q: Tensor | None = None,
    corrected: bool = False,
    temperature: float | Tensor = 0.05,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """Sampled softmax with the logQ correction of two-tower models (Yi et al. 2019, RecSys; corrected: arXiv 2507.09331).

        loss = log(1 + exp(log sum_j exp(x_j - log q_j) - (x - log q_pos)))        q: the probability that an item is drawn

    With `corrected`, which takes into account that the positive is always present and is not sampled:

        loss = sg[1 - p] (log sum_j exp(x_j - log q'_j) - x),   q' = q / (1 - q_pos)        sg = no gradient
        p = exp(x) / (exp(x) + (1 / N) sum_j exp(x_j - log q'_j))                           N negatives

    positive_log_q (B,) is the log of the probability of each query's positive. log_q (K,) or (B, M) is that of each negative,
    or None for in-batch negatives, which are the positives. The logarithm is subtracted from the logits, so frequent items are
    pushed away less. A constant factor of q has no effect, so the probabilities per batch of FrequencyEstimator can be used.
    `corrected` needs probabilities of a single draw. Its gradient is that of info_nce with a bias of -log(N q') for negatives
    and none for the positive; 1 - p is the model's probability of a wrong answer. Pass query_ids and the items' ids, so that a
    query's positive is not among its negatives.
    """
    op = "logq"
    checks.require_bool(op, "corrected", corrected)
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_per_row(op, "positive_log_q", positive_log_q, query)
    in_batch = negative_keys is None or (isinstance(negative_keys, Negatives) and negative_keys.keys is None)
    if log_q is None:
        if not in_batch:
            raise checks.refuse(op, "log_q", "given, except for in-batch negatives", None)
        log_q = positive_log_q
    checks.require_tensor(op, "log_q", log_q, query)
    own = negative_keys if isinstance(negative_keys, Negatives) else Negatives(negative_keys)
    own = dataclasses.replace(own, bias=-log_q if own.bias is None else own.bias - log_q)
    temperature = checks.require_temperature(op, temperature)
    checks.require_positive(op, positive_key, query)
    columns = columns_of(op, query, own, positive_key, pool)
    lse, count = columns.logsumexp_and_count(temperature)
    x = _logits(columns, lse, temperature)
    log_q_positive = positive_log_q.to(x.positive.dtype)
    if not corrected:
        return reduced(op, F.softplus(x.lse - (x.positive - log_q_positive)), x, reduction)
    gap = x.lse + torch.log1p(-log_q_positive.exp()) - x.positive  # (B,) log sum_j exp(x_j - log q'_j) - x
    wrong = torch.sigmoid(gap.detach() - count.clamp_min(1).to(gap.dtype).log())  # (B,) 1 - p
    return reduced(op, wrong * gap, x, reduction)


def gist(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    guide_query: Tensor,
    guide_positive: Tensor,
    guide_keys: Tensor | None = None,
    margin: float = 0.0,
    relative: bool = False,
    temperature: float | Tensor = 0.01,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """InfoNCE without the negatives that a guide model considers false (GISTEmbed, Solatorio 2024, arXiv 2402.16829).

        loss = log(1 + exp(log sum over kept j of exp(x_j) - x)),   kept: g_j <= g_pos - margin (|g_pos| if relative)

    guide_query, guide_positive (B, G) and guide_keys (K, G) or (B, M, G) are a second model's embeddings of the same texts;
    guide_keys is None for in-batch negatives. See negmine.Guide. sentence-transformers differs in two ways: with `relative` it
    uses g_pos (1 - margin), which is above g_pos if g_pos is negative; and if documents are gathered from several ranks, it
    never removes column b of row b, which may be the positive of another rank.
    """
    own = negative_keys if isinstance(negative_keys, Negatives) else Negatives(negative_keys)
    if own.guide is not None:
        raise checks.refuse("gist", "negative_keys.guide", "None, because gist creates it", own.guide)
    guide = Guide(guide_query, guide_positive, guide_keys, margin=margin, relative=relative)
    x = logits("gist", query, positive_key, dataclasses.replace(own, guide=guide), temperature, pool)
    return reduced("gist", F.softplus(x.lse - x.positive), x, reduction)


def both_sides(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any = None,
    *,
    margin: float | None = 0.1,
    document_query: bool = False,
    temperature: float | Tensor = 0.02,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """InfoNCE whose denominator also contains pairs of two queries and of two documents (Qwen3-Embedding, GTE).

        loss_i = log(1 + exp(log Z_i - s(q_i, d_i) / T)),   d_i the positive of q_i
        Z_i = sum over j != i of m e^(s(q_i, d_j) / T) + m e^(s(q_i, q_j) / T) + m e^(s(d_i, d_j) / T)
              + m e^(s(d_i, q_j) / T) if document_query, + sum over n in negative_keys of m e^(s(q_i, n) / T)
        m = 0 if the score of that pair is above s(q_i, d_i) + margin, else 1

    The other rows of the batch are always negatives. negative_keys are additional negatives, such as a list of hard negatives for
    each query (B, M, D), or None. With margin=None nothing is masked. query_ids and query_labels are those of the pairs. Rows
    with equal ids or labels, for example of the same document, are not negatives of each other; ids and labels are also compared
    with those of negative_keys. If a Negatives has a select, it replaces the mask m for its keys.
    """
    op = "gte" if document_query is True else "qwen3_embedding"  # the recipes that configure this function
    checks.require_bool(op, "document_query", document_query)
    if pool.get("select") is not None:
        raise checks.refuse(op, "select", "None, because margin determines it", pool["select"])
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_positive(op, positive_key, query)
    temperature = checks.require_temperature(op, temperature)
    pool = pool | {"select": None if margin is None else Select(absolute_margin=-margin)}
    query, positive_key = widened(query), widened(positive_key)  # so that each gradient is rounded once
    own = torch.arange(len(query), device=query.device)  # (B,)
    ids, labels = pool.get("query_ids"), pool.get("query_labels")
    columns = [columns_of(op, query, None, positive_key, pool)]
    if ids is not None:
        own = torch.where(ids == UNKNOWN, UNEQUAL + 1 + own, ids.long())
    in_batch = pool | {"query_ids": own}
    for anchor, other in ((query, positive_key), (positive_key, query)):
        columns.append(columns_of(op, anchor, Negatives(anchor, ids=own, labels=labels), other, in_batch))
    if document_query:
        columns.append(columns_of(op, positive_key, None, query, pool))
    if negative_keys is not None:
        without = {f"query_{tag}": None for tag in ("ids", "labels") if not has_tags(negative_keys, tag)}
        columns.append(columns_of(op, query, negative_keys, positive_key, pool | without))
    sums = torch.stack([each.logsumexp(temperature) for each in columns])  # (pools, B)
    has_negative = (sums != -torch.inf).any(0)  # (B,)
    lse = sums.masked_fill(~has_negative, 0.0).logsumexp(0)
    x = _logits(columns[0], lse.masked_fill(~has_negative, -torch.inf), temperature)
    return reduced(op, F.softplus(x.lse - x.positive), x, reduction)


def ifm(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.2,
    epsilon: float = 0.1,
    alpha: float = 1.0,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """Implicit feature modification (Robinson et al. 2021, arXiv 2106.11230; joshr17/IFM moco-master/moco/adv_builder.py).

        loss = (nce(0) + alpha nce(epsilon)) / (1 + alpha),   nce(e) = InfoNCE with s_pos - e and s_j + e

    The perturbation is added to the scores before they are divided by T, so nce(e) = log(1 + exp(lse - x + 2 e / T)) and one
    log-sum-exp is enough.
    """
    op = "ifm"
    temperature = checks.require_temperature(op, temperature)
    epsilon, alpha = checks.require_scalar(op, "epsilon", epsilon), checks.require_scalar(op, "alpha", alpha, least=0)
    x = logits(op, query, positive_key, negative_keys, temperature, pool)
    gap = x.lse - x.positive  # (B,)
    rows = (F.softplus(gap) + alpha * F.softplus(gap + 2 * epsilon / temperature)) / (1 + alpha)
    return reduced(op, rows, x, reduction)


def dual_temperature(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.1,
    temperature_ratio: float = 10.0,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """Dual temperature (Zhang et al. 2022, arXiv 2203.17248): one temperature within a query, another between queries.

        loss = -sg[(1 - p(T_b)) / (1 - p(T_a))] log p(T_a),   p(T) = the positive's share at T,   T_b = temperature_ratio T_a

    A small T_a separates the negatives of a query; a large T_b keeps the weights of the queries similar.
    """
    op = "dual_temperature"
    temperature = checks.require_temperature(op, temperature)
    temperature_ratio = checks.require_scalar(op, "temperature_ratio", temperature_ratio, above=0)
    x = logits(op, query, positive_key, negative_keys, temperature, pool)
    with torch.no_grad():
        between = logits(op, query, positive_key, negative_keys, temperature * temperature_ratio, pool)
        weight = torch.exp(F.logsigmoid(between.lse - between.positive) - F.logsigmoid(x.lse - x.positive))  # (B,)
    return reduced(op, weight * F.softplus(x.lse - x.positive), x, reduction)


def i_mix(
    query: Tensor,
    positive_keys: Tensor,
    negative_keys: Any,
    *,
    share: Tensor,
    partner: Tensor,
    temperature: float | Tensor = 0.2,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """i-Mix (Lee et al. 2021, arXiv 2010.08887; kibok90/imix builder.py): virtual labels for mixed inputs.

        loss_b = share_b ce_b(b) + (1 - share_b) ce_b(partner_b)
        ce_b(c) = -s(b, key c) / T + log sum over columns of exp(s / T)

    query (B, D) are the embeddings of the mixed inputs share x + (1 - share) x[partner] (see mixed_inputs). positive_keys (B,
    D) are the embeddings of the unmixed inputs. The columns are all B positive keys and the kept negatives. share (B,) floating
    is in [0, 1], partner (B,) int64. Masks and select apply to negative_keys. No row is empty, since every row has columns.
    """
    op = "i_mix"
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_positive(op, positive_keys, query)
    temperature = checks.require_temperature(op, temperature)
    for name, value, kind in (("share", share, "floating"), ("partner", partner, "int64")):
        checks.require_tensor(op, name, value, query)
        good = value.is_floating_point() if kind == "floating" else value.dtype == torch.int64
        if not good or tuple(value.shape) != (len(query),):
            raise checks.refuse(op, name, f"{kind}, of shape ({len(query)},)", value)
    whole_batch = {name: pool[name] for name in ("backend",) if name in pool}
    if query.requires_grad or positive_keys.requires_grad:  # both sums add to the gradient, which is then rounded once
        query, positive_keys = widened(query), widened(positive_keys)
    x_batch = columns_of(op, query, positive_keys, positive_keys, whole_batch).logsumexp(temperature)  # (B,)
    lse = columns_of(op, query, negative_keys, positive_keys, pool).logsumexp(temperature)  # (B,)
    lse = torch.logaddexp(x_batch, lse)
    own, other = (score_of_positive(query, k) for k in (positive_keys, positive_keys[partner]))
    pull = share.to(own.dtype) * own + (1 - share).to(own.dtype) * other  # (B,)
    x = Logits(pull / temperature, lse, torch.ones_like(lse, dtype=torch.bool))
    return reduced(op, x.lse - x.positive, x, reduction)


def un_mix(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    mixed_query: Tensor,
    share: float | Tensor,
    temperature: float | Tensor = 0.2,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """Un-Mix (Shen et al. 2022, arXiv 2003.05438; szq0214/Un-Mix unmix_c10.py): a batch that is mixed with itself in reverse.

        loss_b = nce(q_b, k_b) + share nce(m_b, k_b) + (1 - share) nce(m_r(b), k_b),   r(b) = B - 1 - b
        nce(q, k) = log(1 + exp(log sum_j exp(q . n_j / T) - q . k / T))

    mixed_query (B, D) are the embeddings m of share x + (1 - share) x.flip(0), where x are the inputs of query, or of images in
    which a box is cut from x.flip(0); share is then the rest of the area. share is one number in [0, 1] for the batch. In each
    term a row has the masks of its positive k_b. The public code for ImageNet has an option for a second temperature, of the
    mixed terms, and does not use it.
    """
    op = "un_mix"
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    share = checks.require_scalar(op, "share", share, least=0)
    if not isinstance(share, Tensor) and share > 1:
        raise checks.refuse(op, "share", "a number in [0, 1]", share)
    checks.require_vectors(op, "query", query, "(B, D)", (2,))
    checks.require_positive(op, positive_key, query)
    checks.require_vectors(op, "mixed_query", mixed_query, "(B, D)", (2,), query)
    if mixed_query.shape != query.shape:
        raise checks.refuse(op, "mixed_query", f"of query's shape {tuple(query.shape)}", mixed_query)
    in_batch = negative_keys is positive_key
    query, positive_key, mixed_query = promoted(query, positive_key, mixed_query)
    positive_key, mixed_query = widened(positive_key), widened(mixed_query)  # so that each gradient is rounded once
    keys = positive_key if in_batch else _with_keys(negative_keys, widened)

    def rows(of: Tensor) -> Tensor:
        x = logits(op, of, positive_key, keys, temperature, pool)
        return reduced(op, F.softplus(x.lse - x.positive), x, "none")

    total = rows(query) + share * rows(mixed_query) + (1 - share) * rows(mixed_query.flip(0))
    return reference.reduced(total, reduction)


def adco(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.12,
    memory_temperature: float | Tensor = 0.02,
    reduction: str = "mean",
    **pool: Any,
) -> Tensor:
    """AdCo (Hu et al. 2021, arXiv 2011.08435; maple-research-lab/AdCo training/train.py): negatives that are trained too.

        loss = nce(T),   nce(T) = log(1 + exp(log sum_j exp(q . n_j / T) - q . k / T))
        d loss / d n = d nce(T_m) / d n at T_m = memory_temperature;   the other gradients are those of nce(T)

    negative_keys are F.normalize(memory, dim=1), and an optimiser with maximize=True trains memory (K, D) by gradient ascent. The
    gradient of a negative is a mean of the queries, weighted by how likely they are to be confused with it:

        d nce(T_m) / d n_j = (1 / B) sum_b p_bj q_b / T_m,   p_b = the softmax of (q_b . k_b, q_b . n_1, ..) / T_m

    The public code also has the positives of the other rows in the denominator. Its parser's default of memory_temperature is
    0.07, and the commands of its README set 0.02.
    """
    op = "adco"
    memory_temperature = checks.require_scalar(op, "memory_temperature", memory_temperature, above=0)
    x = logits(op, query, positive_key, _with_keys(negative_keys, Tensor.detach), temperature, pool)
    if isinstance(negative_keys, Negatives) and negative_keys.bias is not None:
        negative_keys = dataclasses.replace(negative_keys, bias=negative_keys.bias.detach())
    adversary = logits(op, query.detach(), positive_key.detach(), negative_keys, memory_temperature, pool)
    gain = F.softplus(adversary.lse - adversary.positive)  # (B,)
    return reduced(op, F.softplus(x.lse - x.positive) + (gain - gain.detach()), x, reduction)


def mixed_inputs(
    inputs: Tensor,
    *,
    concentration: float = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed inputs for i-Mix: share * inputs + (1 - share) * inputs[partner].

    Parameters
    ----------
    inputs : Tensor (B, ...)
        The inputs, of a floating dtype.
    concentration : float
        share = max(l, 1 - l) with l drawn from Beta(concentration, concentration), so each row's own input has the larger
        share.
    seed, step, row_offset : int or Tensor
        They determine the random draws. row_offset is the global index of the first row. The permutation is within the batch.

    Returns
    -------
    tuple
        The mixed inputs (B, ...), share (B,) float32, and partner (B,) int64, a permutation of the rows.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    References
    ----------
    Lee et al. 2021 (arXiv 2010.08887).

    Examples
    --------
    >>> mixed, share, partner = negmine.recipes.mixed_inputs(torch.rand(8, 3, 4, 4))
    >>> mixed.shape, bool((share >= 0.5).all())
    (torch.Size([8, 3, 4, 4]), True)
    """
    op = "mixed_inputs"
    checks.require_tensor(op, "inputs", inputs)
    if not inputs.is_floating_point() or inputs.dim() == 0:
        raise checks.refuse(op, "inputs", "a floating tensor of shape (B, ...)", inputs)
    concentration = checks.require_number(op, "concentration", concentration, above=0)
    seed, step, row_offset = checks.require_draw(op, seed, step, row_offset)
    rows = torch.arange(len(inputs), device=inputs.device) + row_offset  # (B,)
    slot = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    word, sort_word, *_ = (w[:, 0] for w in philox.words(rows, slot, philox.STREAM_PARTNER, seed, step))  # (B,) each
    quantiles = beta_quantiles(float(concentration))
    share = philox.unit(word, None if quantiles is None else quantiles.to(inputs.device))  # (B,)
    share, partner = share.maximum(1 - share), sort_word.argsort(stable=True)
    across = share.to(inputs.dtype).view(-1, *[1] * (inputs.dim() - 1))  # (B, 1, ...)
    return across * inputs + (1 - across) * inputs[partner], share, partner


def _check_options(method: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Check the names of the options of a function of this file, and the values that are not schedules."""
    op, parameters = method.__name__, inspect.signature(method).parameters
    known = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        known += POOL
    checks.require_known(op, options, known)
    for name, value in options.items():
        if callable(value):  # a schedule or a LogScale
            continue
        if name == "temperature":
            checks.require_temperature(op, value)
        elif name == "reduction":
            checks.require_choice(op, name, value, checks.REDUCTIONS)
        elif value is not None and name in parameters and type(parameters[name].default) is float:
            checks.require_scalar(op, name, value)


class MethodLoss(ScheduledLoss):
    """A function of this file as a module. Hyperparameters are passed to the constructor, tensors and masks to the call.

    Any number may be a schedule, that is, a callable of the step (see `negmine.recipes.linear`). In training mode, calls without
    `step` are counted in the buffer `step`. A number that is an nn.Parameter, or a temperature that is a negmine.losses.LogScale,
    is learned. The constructor raises ValueError or TypeError for an option that the function does not have, and for an option
    that is not a number where one is needed; bounds of numbers are checked in the call.
    """

    def __init__(self, method: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        _check_options(method, options)
        self.method = method
        self.options = {
            name: value for name, value in options.items() if not isinstance(value, (nn.Parameter, nn.Module))
        }
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, nn.Module):  # a LogScale
                self.add_module(name, value)

    def at(self, step: Tensor) -> dict[str, Any]:
        """The keyword arguments of the function at this step, with schedules evaluated."""
        learned = dict(self.named_parameters(recurse=False)) | dict(self.named_children())
        return at_step(self.options | learned, step)

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

        masks: query_ids, query_labels and row_offset of negmine.logsumexp, and other arguments of the function. By default the
        module counts `step`.
        """
        step = self.count(step, query)
        return self.method(query, positive_key, negative_keys, step=step, **self.at(step), **masks)

    def extra_repr(self) -> str:
        return ", ".join([self.method.__name__, *(f"{name}={value!r}" for name, value in self.options.items())])
