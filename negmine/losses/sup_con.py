"""sup_con: the supervised contrastive loss over a batch or a queue, with its gradient, without storing the (B, K) matrix.

The denominator is a log-sum-exp over a pool, as in info_nce. The positives are another pool, that of equal labels. Their
log-sum-exp gives the "in" form of the loss, and the mean of their scores, which is computed as a log-sum-exp at scale 0, gives
the "out" form. With "own_positive", each positive has a denominator of its own, so the queue is processed in pieces. The dense
definition is in negmine/reference/contrastive.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.losses.gathered import Gathering
from negmine.losses.schedules import ScheduledLoss, at_step
from negmine.ops import backends, checks
from negmine.ops.accumulate import each_widened, narrowed
from negmine.ops.backends import Kernels
from negmine.ops.first_derivative import first_derivative_only, fused
from negmine.ops.logsumexp import LogSumExp, MeanScore
from negmine.ops.negatives import check_negatives, has_tags, labelled_pool, pools_in
from negmine.ops.pool import Pool, hide_masked_rows, pieces, pool_of_columns, usable
from negmine.ops.vectors import disable_autocast, frozen, promoted, scale_of, widened
from negmine.selection import summing_ops


class SupConStats(NamedTuple):
    """The statistics that `sup_con` returns in addition to the loss. They have no gradient.

    Attributes
    ----------
    logsumexp : Tensor (B,)
        The logarithm of the denominator. ``"own_positive"`` has a denominator for each positive; then this is the log-sum-exp
        of the negatives alone.
    num_positives : Tensor (B,) int64
        The number of positives of each row.
    num_without_positive : Tensor () int64
        The number of rows without a positive, and with ``"negatives_only"`` also of those without a negative. Their loss is 0.

    Examples
    --------
    >>> query, labels = torch.randn(8, 16), torch.arange(8) % 2
    >>> loss, stats = negmine.sup_con(query, None, labels, return_stats=True)
    >>> stats.num_positives.tolist()
    [3, 3, 3, 3, 3, 3, 3, 3]
    """

    logsumexp: Tensor  # (B,)
    num_positives: Tensor  # (B,) int64
    num_without_positive: Tensor  # () int64


class OwnPositive(torch.autograd.Function):
    """The loss of each row (B,) with one denominator for each positive, and the number of positives P (B,).

        y_bp = -log(1 + exp(lse_b - x_bp));   "out" -mean over p of y_bp;   "in" log P - log sum over p of exp(y_bp)
        lse (B,) is the log-sum-exp of the negatives

    The queue is processed in pieces of PIECE scores. The gradient of lse_b is the sum of v_bp sigmoid(lse_b - x_bp), where v is
    1 / P or the softmax of y; the gradient of query_b is the same sum with the keys n_p. Both are computed in the forward pass.
    If the keys require grad, the pieces are processed again in backward.
    """

    @staticmethod
    def forward(ctx, query, keys, scale, lse, positives, *pool):
        B, D = query.shape
        q, count = query.float(), torch.zeros(B, dtype=torch.int64, device=query.device)
        top, total, share = torch.full_like(lse, -torch.inf), torch.zeros_like(lse), torch.zeros_like(lse)  # (B,) each
        mean = torch.zeros(B, D, dtype=torch.float32, device=query.device)
        value = torch.zeros_like(lse)  # (B,) sum of y
        for part in pieces(len(query), len(keys), PIECE):
            same, y, pull, rows = _of_piece(q, keys, scale, lse, Pool(*pool), part)
            count += same.sum(1)
            if positives == "in":
                new = torch.maximum(top, y.masked_fill(~same, -torch.inf).amax(1))
                decay = (top - new).exp().masked_fill(top == -torch.inf, 0.0)  # (B,)
                weight = (y - new[:, None]).exp().masked_fill(~same, 0.0)  # (B, C)
                top, total, share, mean = new, total * decay, share * decay, mean * decay[:, None]
            else:
                weight = same.float()
            value += y.masked_fill(~same, 0.0).sum(1)
            total += weight.sum(1)
            pull = (weight * pull).masked_fill(~same, 0.0)
            share += pull.sum(1)
            with disable_autocast(query.device):
                mean += pull @ rows
        num_or_one = count.clamp_min(1)
        loss = (
            -value / num_or_one if positives == "out" else (num_or_one / torch.where(count > 0, total, 1.0)).log() - top
        )
        norm = torch.where(count > 0, total, 1.0)  # (B,)
        ctx.positives, ctx.width = positives, len(pool)
        *tensors, ctx.same_label = pool
        again = (keys, lse, top, norm, *tensors) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(query, scale, share / norm, mean / norm[:, None], *again)
        ctx.mark_non_differentiable(count)
        return loss.masked_fill(count == 0, 0.0), count

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_loss, _d_count):
        query, scale, share, mean, *again = ctx.saved_tensors
        d_query = d_keys = d_scale = None
        if ctx.needs_input_grad[0]:
            d_query = (-(d_loss * scale)[:, None] * mean).to(query.dtype)  # (B, D)
        if ctx.needs_input_grad[1]:
            keys, lse, top, norm, *tensors = again
            q, pool, d_keys = query.float(), Pool(*tensors)._replace(same_label=ctx.same_label), torch.empty_like(keys)
            for part in pieces(len(query), len(keys), PIECE):
                same, y, pull, _ = _of_piece(q, keys, scale, lse, pool, part)
                weight = (y - top[:, None]).exp() if ctx.positives == "in" else 1.0
                pull = (weight * pull * (d_loss * scale / norm)[:, None]).masked_fill(~same, 0.0)  # (B, C)
                with disable_autocast(query.device):
                    d_keys[part] = (-pull.T @ q).to(keys.dtype)  # (C, D)
        if ctx.needs_input_grad[2]:
            d_scale = -(d_loss * (query.float() * mean).sum(1)).sum()
        return d_query, d_keys, d_scale, d_loss * share, None, *([None] * ctx.width)


PIECE = 1 << 21  # how many scores are in memory at one time with one denominator for each positive


def _of_piece(q: Tensor, keys: Tensor, scale: Tensor, lse: Tensor, pool: Pool, part: slice) -> tuple[Tensor, ...]:
    """For some columns: positives (B, C) bool, y and sigmoid(lse - x) (B, C), and the keys (C, D) as fp32, masked rows as 0."""
    pool = pool_of_columns(pool, part)
    rows = hide_masked_rows(keys[part].float(), pool)
    same = usable(pool, q, rows)
    assert same is not None  # the pool has labels
    gap = lse[:, None] - scale * reference.scores_of(q, rows, same)  # (B, C)
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)  # so that 0 times a masked row is 0
    return same, -F.softplus(gap), gap.sigmoid(), rows


def sup_con(
    query: Tensor,
    keys: Any,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    positives: str = "out",
    denominator: str = "all",
    positive_mask: Tensor | None = None,
    positive_weights: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    return_stats: bool = False,
) -> Any:
    """The supervised contrastive loss: all keys with the query's label are positives P_b (SupCon).

        "out"  loss_b = mean over p in P_b of -log(exp(x_bp) / den_bp)      x = inner product / temperature
        "in"   loss_b = -log of the mean over p in P_b of exp(x_bp) / den_bp
        den_bp = sum of exp(x_bk) over   "all"             every usable key (the paper)
                                         "own_positive"    the negatives and p (NTXent of pytorch-metric-learning)
                                         "negatives_only"  the negatives (decoupled)

    Parameters
    ----------
    query : Tensor (B, D) or (B, V, D)
        One vector or V views of each sample. The views of a sample have the same labels, ids and masks. Gets a gradient if it
        requires grad.
    keys : Tensor (K, D), MoCoQueue, Negatives, list of these, or None
        A tensor may be a queue, the batch itself, or both concatenated. It gets a gradient if it requires grad; otherwise it
        may be overwritten before backward. A MoCoQueue or a Negatives is used with its labels, ids and mask. A list of them
        means the same as their concatenation, which is not computed. None means the queries themselves with all their views,
        except that a view is not a key of itself. The positives are then the queries with the same label or, without labels,
        the other views of the same sample (SimCLR; V must be 2 or more). `query_ids` and `key_ids` must be None.
    query_labels : Tensor (B,), optional
        Integer tensor. Keys with an equal label are positives. -1 means unknown and is equal to nothing.
    key_labels : Tensor (K,), optional
        The labels of the keys. A key with the label -1 is a negative of every query.
    temperature : float or Tensor
        As in `info_nce`.
    positives : str
        ``"out"`` takes the mean over the positives outside of the logarithm, ``"in"`` inside.
    denominator : str
        ``"all"``, ``"own_positive"`` or ``"negatives_only"``.
    positive_mask : Tensor (B, K) bool, optional
        The positives (True), instead of labels; for example for samples with several labels.
    positive_weights : Tensor (B, K), optional
        The weights of the positives in the mean, instead of labels. Keys with weight 0 are negatives. The weights get no
        gradient.
    query_ids : Tensor (B,), optional
        A key with an equal id is the same sample, and so neither a positive nor a negative.
    key_ids : Tensor (K,), optional
        The ids of the keys.
    key_mask : Tensor (K,) or (B, K) bool, optional
        False means that the key is neither a positive nor a negative.
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"``.
    backend : str, optional
        As in `info_nce`. `positive_weights` with ``"in"`` or ``"own_positive"`` runs on the reference.
    return_stats : bool
        Whether to return SupConStats too.

    Returns
    -------
    Tensor (), (B,) or (B, V)
        The loss: float32, or float64 for float64 input. A row without positives, and with ``"negatives_only"`` a row without
        negatives, has loss 0 and no gradient, and is included in the mean.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    The loss with ``"in"`` is never larger than with ``"out"`` (Jensen's inequality). The published code also multiplies the
    loss by temperature / base_temperature, which is 1 by default.

    References
    ----------
    Khosla et al. 2020 (arXiv 2004.11362; HobbitLong/SupContrast losses.py).

    Examples
    --------
    >>> query, labels = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2
    >>> loss = negmine.sup_con(query, None, labels)  # within the batch
    >>> queue = negmine.MoCoQueue(16, 100, with_labels=True)
    >>> loss = negmine.sup_con(query, queue.keys, labels, queue.labels)
    """
    op = "sup_con"
    tags = (query_labels, key_labels, query_ids, key_ids)
    each = _each_checked(op, query, keys, *tags, key_mask, positive_mask, positive_weights)
    temperature = checks.require_temperature(op, temperature)
    checks.require_choice(op, "positives", positives, ("out", "in"))
    checks.require_choice(op, "denominator", denominator, ("all", "own_positive", "negatives_only"))
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    checks.require_bool(op, "return_stats", return_stats)
    views, weights = query.shape[:-1], each[0].weights
    query, *every = promoted(each[0].query, *(given.keys for given in each))
    is_dense = weights is not None and (positives == "in" or denominator == "own_positive")
    if is_dense and backend not in (None, "reference"):
        why = "only the reference supports positive_weights with positives='in' or denominator='own_positive'"
        raise backends.BackendUnavailable(f"{op}: backend {backend!r} cannot run this call ({why})")
    chosen = [
        backends.choose(op, summing_ops("logsumexp", stored), "reference" if is_dense else backend, (query, stored))
        for stored in every
    ]
    chosen = [narrowed(kernels, query, None, stored) for kernels, stored in zip(chosen, every, strict=True)]
    query, *every = each_widened(query, *every)
    if any(kernels is None for kernels in chosen):
        rows, stats = _dense(query, every, temperature, each, positives, denominator)
    else:
        scale = scale_of(temperature, query)
        parts = [
            _from_kernels(kernels, stored, given, query, scale, denominator, positives)
            for kernels, stored, given in zip(chosen, every, each, strict=True)
            if kernels is not None
        ]
        rows, stats = _joined(parts, query, scale, positives, denominator)
    if len(views) == 2:
        rows, stats = rows.view(views), SupConStats(stats[0].view(views), stats[1].view(views), stats[2])
    loss = reference.reduced(rows, reduction)
    return (loss, stats) if return_stats else loss


class _Given(NamedTuple):
    """The checked columns of a call, with each view as a row."""

    query: Tensor  # (B, D)
    keys: Tensor  # (K, D)
    everything: Pool
    same: Pool  # the positives
    others: Pool  # the negatives
    weights: Tensor | None  # (B, K) of the positives


def _each_checked(
    op: str, query: Any, keys: Any, query_labels: Any, key_labels: Any, query_ids: Any, key_ids: Any, key_mask: Any,
    positive_mask: Any, positive_weights: Any,
) -> list[_Given]:  # fmt: skip
    """The checked columns of each pool."""
    by_key = {
        "key_labels": key_labels, "key_ids": key_ids, "key_mask": key_mask, "positive_mask": positive_mask,
        "positive_weights": positive_weights,
    }  # fmt: skip
    if keys is None or isinstance(keys, Tensor):
        return [_checked(op, query, keys, query_labels, key_labels, query_ids, *list(by_key.values())[1:])]
    for name, value in by_key.items():
        if value is not None:
            raise checks.refuse(op, name, "None if keys is a MoCoQueue, a Negatives or a list", value)
    checks.require_vectors(op, "query", query, "(B, D) or (B, V, D)", (2, 3))
    B, V = query.shape[0], query.shape[1] if query.dim() == 3 else 1
    rows = query if query.dim() == 2 else query.reshape(B * V, query.shape[-1])  # (B V, D)
    labels = _of_views(op, "query_labels", query_labels, B, V)
    ids = None if query_ids is None else _of_views(op, "query_ids", query_ids, B, V)
    listed = pools_in(op, keys, "keys") if isinstance(keys, (list, tuple)) else [keys]
    if ids is not None and not any(has_tags(given, "ids") for given in listed):
        raise checks.refuse(op, "query_ids", "None, because no pool of keys has ids", query_ids)
    checked = []
    for p, given in enumerate(listed):
        name = f"keys[{p}]" if isinstance(keys, (list, tuple)) else "keys"
        if given is None:
            raise checks.refuse(op, name, "a tensor, a MoCoQueue or a Negatives", None)
        for option in ("bias", "guide"):
            if getattr(given, option, None) is not None:
                raise checks.refuse(
                    op, f"{name}.{option}", f"None, because {op} has no option {option}", getattr(given, option)
                )
        own_ids = ids if has_tags(given, "ids") else None
        found, others = check_negatives(op, rows, None, given, own_ids, labels, name=name)
        everything = others._replace(query_labels=None, negative_labels=None)
        checked.append(_Given(rows, found, everything, others._replace(same_label=True), others, None))
    return checked


def _checked(
    op: str, query: Any, keys: Any, query_labels: Any, key_labels: Any, query_ids: Any, key_ids: Any, key_mask: Any,
    positive_mask: Any, positive_weights: Any,
) -> _Given:  # fmt: skip
    checks.require_vectors(op, "query", query, "(B, D) or (B, V, D)", (2, 3))
    B, V = query.shape[0], query.shape[1] if query.dim() == 3 else 1
    rows = query if query.dim() == 2 else query.reshape(B * V, query.shape[-1])  # (B V, D)
    by_pair = {"positive_mask": positive_mask, "positive_weights": positive_weights}
    named = [name for name, value in by_pair.items() if value is not None]
    if len(named) + (query_labels is not None or key_labels is not None) > 1:
        name = named[-1] if len(named) > 1 else ("query_labels" if query_labels is not None else "key_labels")
        raise checks.refuse(op, name, f"None if {named[0]} is given", by_pair.get(name, query_labels))
    if keys is None:
        for name, value in (("query_ids", query_ids), ("key_ids", key_ids), ("key_labels", key_labels)):
            if value is not None:
                raise checks.refuse(op, name, "None if keys is None", value)
        keys, own = rows, torch.arange(B * V, device=query.device)  # (B V,)
        if query_labels is None and not named and V == 1:
            wanted = "given if keys is None and query has one view, because no query would have a positive"
            raise checks.refuse(op, "query_labels", wanted, None, TypeError)
        if query_labels is None and not named:
            query_labels = torch.arange(B, device=query.device)
        labels = None if query_labels is None else _of_views(op, "query_labels", query_labels, B, V)
        query_labels, key_labels, query_ids, key_ids = labels, labels, own, own
    else:
        checks.require_vectors(op, "keys", keys, "(K, D)", (2,), query)
        if not named:
            for name, value in (("query_labels", query_labels), ("key_labels", key_labels)):
                if value is None:
                    raise checks.refuse(op, name, "given, or else positive_mask or positive_weights", None, TypeError)
                checks.require_tensor(op, name, value, query)
        query_labels, query_ids = (
            value if value is None else _of_views(op, name, value, B, V)
            for name, value in (("query_labels", query_labels), ("query_ids", query_ids))
        )
    if isinstance(key_mask, Tensor) and key_mask.dim() == 2 and V > 1 and len(key_mask) == B:
        key_mask = key_mask.repeat_interleave(V, 0)
    masks = (key_mask, query_ids, key_ids, query_labels, key_labels)
    others = labelled_pool(op, rows, keys, *masks)
    everything = others._replace(query_labels=None, negative_labels=None)
    if not named:
        return _Given(rows, keys, everything, others._replace(same_label=True), others, None)
    name, value = named[0], by_pair[named[0]]
    checks.require_tensor(op, name, value, query)
    shapes = [(B, len(keys)), (B * V, len(keys))]
    if tuple(value.shape) not in shapes:
        raise checks.refuse(op, name, f"of shape {checks.describe(shapes)}", value)
    if name == "positive_mask" and value.dtype != torch.bool:
        raise checks.refuse(op, name, "a bool tensor (True = positive)", value, TypeError)
    if name == "positive_weights" and not value.is_floating_point():
        raise checks.refuse(op, name, "a floating tensor of 0 or more", value, TypeError)
    value = value.detach() if len(value) == B * V else value.detach().repeat_interleave(V, 0)  # (B V, K)
    positive = value if value.dtype == torch.bool else value > 0
    allowed = everything.negative_mask
    same, others = (
        everything._replace(negative_mask=kept if allowed is None else kept & allowed) for kept in (positive, ~positive)
    )
    return _Given(rows, keys, everything, same, others, None if value.dtype == torch.bool else value)


def _of_views(op: str, name: str, tags: Any, B: int, V: int) -> Tensor:
    """Repeat the tags (B,) of samples for each of their views: (B V,)."""
    checks.require_tensor(op, name, tags)
    if tuple(tags.shape) != (B,):
        raise checks.refuse(op, name, f"of shape ({B},)", tags)
    return tags if V == 1 else tags.repeat_interleave(V)


def _dense(
    query: Tensor,
    every: list[Tensor],
    temperature: float | Tensor,
    each: list[_Given],
    positives: str,
    denominator: str,
) -> tuple[Tensor, SupConStats]:
    """Loss (B,) and statistics by the reference, over the concatenated keys of all pools."""
    allowed = [usable(given.everything, query, keys) for given, keys in zip(each, every, strict=True)]
    same = [usable(given.same, query, keys) for given, keys in zip(each, every, strict=True)]
    kept = [frozen(keys, mask) for keys, mask in zip(every, allowed, strict=True)]
    mask: Tensor | None = allowed[0]
    if len(each) > 1:
        shapes = [(len(query), len(keys)) for keys in every]
        mask = torch.cat([_whole(part, shape, query) for part, shape in zip(allowed, shapes, strict=True)], 1)  # (B, K)
    rows, found = reference.sup_con(
        widened(query),
        kept[0] if len(kept) == 1 else torch.cat([widened(keys) for keys in kept]),
        positive_mask=same[0] if len(same) == 1 else torch.cat([part for part in same if part is not None], 1),
        positive_weights=each[0].weights,
        temperature=temperature,
        positives=positives,
        denominator=denominator,
        usable=mask,
    )
    return rows, SupConStats(**found)


def _whole(mask: Tensor | None, shape: tuple[int, int], query: Tensor) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=query.device) if mask is None else mask


class _Part(NamedTuple):
    """The contribution of one pool to the loss of each row."""

    lse: Tensor  # (B,) of the denominator's columns
    num_kept: Tensor  # (B,) the number of these columns
    num_positives: Tensor  # (B,)
    pull: Tensor | None  # (B,) the mean of the positives' logits or, "in", the log of the mean of their exponentials
    kernels: Kernels
    keys: Tensor  # (K, D)
    same: Pool


def _from_kernels(
    kernels: Kernels, keys: Tensor, given: _Given, query: Tensor, scale: Tensor, denominator: str, positives: str
) -> _Part:
    same, columns = given.same, given.everything if denominator == "all" else given.others
    sums, num_kept, *_ = fused(LogSumExp, query, keys, scale[None], None, None, 0, None, kernels, *columns)
    pull = None
    if denominator == "own_positive":
        count = num_kept
    elif given.weights is not None:
        score, count = _weighted_score(query, keys, given.weights, same)
        pull = score * scale  # (B,)
    elif positives == "out":
        score, count = fused(MeanScore, query, keys, kernels, *same)
        pull = score * scale  # (B,)
    else:
        sums_same, count, *_ = fused(LogSumExp, query, keys, scale[None], None, None, 0, None, kernels, *same)
        pull = sums_same[0].masked_fill(count == 0, 0.0) - count.clamp_min(1).float().log()
    return _Part(sums[0], num_kept, count, pull, kernels, keys, same)


def _joined(
    parts: list[_Part], query: Tensor, scale: Tensor, positives: str, denominator: str
) -> tuple[Tensor, SupConStats]:
    """Loss (B,) and statistics of all pools, as defined by reference.sup_con over their concatenated keys."""
    num_kept, lse = parts[0].num_kept, parts[0].lse
    if len(parts) > 1:
        num_kept = torch.stack([part.num_kept for part in parts]).sum(0)
        lse = torch.stack([part.lse for part in parts]).masked_fill(num_kept == 0, 0.0).logsumexp(0)
        lse = lse.masked_fill(num_kept == 0, -torch.inf)
    if denominator == "own_positive":
        own = [fused(OwnPositive, query, part.keys, scale, lse, positives, *part.same) for part in parts]
        rows, count = _mean_over([-loss for loss, _ in own], [count for _, count in own], positives)
        return -rows.masked_fill(count == 0, 0.0), SupConStats(lse.detach(), count, (count == 0).sum())
    pull, count = _mean_over([part.pull for part in parts], [part.num_positives for part in parts], positives)
    has_loss = (count > 0) & (num_kept > 0)  # (B,)
    rows = torch.where(has_loss, lse.masked_fill(~has_loss, 0.0) - pull, 0.0)
    return rows, SupConStats(lse.detach(), count, (~has_loss).sum())


def _mean_over(pulls: list[Any], counts: list[Tensor], positives: str) -> tuple[Tensor, Tensor]:
    """Combine the means of several pools, weighted by their counts. Returns the combined mean (B,) and the total count (B,).

    For "in", the entries are logarithms of means of exponentials, and so is the result.
    """
    if len(pulls) == 1:
        return pulls[0], counts[0]
    pull, each = torch.stack(pulls), torch.stack(counts)  # (pools, B)
    count = each.sum(0)  # (B,)
    num_or_one = count.clamp_min(1).to(pull.dtype)
    if positives == "out":
        return (pull * each).masked_fill(each == 0, 0.0).sum(0) / num_or_one, count
    terms = (pull + each.clamp_min(1).to(pull.dtype).log()).masked_fill(each == 0, -torch.inf)
    return terms.masked_fill(count == 0, 0.0).logsumexp(0) - num_or_one.log(), count


def _weighted_score(query: Tensor, keys: Tensor, weights: Tensor, same: Pool) -> tuple[Tensor, Tensor]:
    """The weighted mean score of the positives (B,) and their number (B,), by one product of weights and keys."""
    allowed = usable(same, query, keys)
    assert allowed is not None  # the pool has the mask of positive_weights
    kept = weights.float().masked_fill(~allowed, 0.0)  # (B, K)
    share = kept / kept.sum(1, keepdim=True).masked_fill(~allowed.any(1, keepdim=True), 1.0)
    with disable_autocast(query.device):
        mean = share @ torch.where(allowed.any(0)[:, None], widened(keys), 0.0)  # (B, D)
    return (widened(query) * mean).sum(1), allowed.sum(1)


def _as_own_keys(
    query: Tensor, query_labels: Any, masks: dict[str, Any], rank: int
) -> tuple[Tensor, Any, dict[str, Any]]:
    """For a call with keys=None: the queries as rows (B V, D), with the labels and masks of rows, and globally unique ids."""
    B, V = query.shape[0], query.shape[1] if query.dim() == 3 else 1
    first = rank << 40
    by_pair = [name for name in ("positive_mask", "positive_weights") if masks.get(name) is not None]
    if query_labels is None and not by_pair and V > 1:
        query_labels = first + torch.arange(B, device=query.device)
    if isinstance(query_labels, Tensor) and query_labels.shape == (B,):
        query_labels = query_labels.repeat_interleave(V)  # any other shape raises an error later
    own = first + torch.arange(B * V, device=query.device)
    masks = {**masks, "query_ids": own, "key_ids": own}
    for name in by_pair:
        if isinstance(masks[name], Tensor) and len(masks[name]) == B:
            masks[name] = masks[name].repeat_interleave(V, 0)
    return query.reshape(B * V, query.shape[-1]), query_labels, masks


class SupConLoss(ScheduledLoss):
    """`sup_con` as a module.

    Parameters
    ----------
    temperature : float, Tensor, LogScale or schedule
        As in `sup_con`. A schedule is a callable of the step; an nn.Parameter or a `negmine.losses.LogScale` is learned.
    positives, denominator, reduction, backend, return_stats : optional
        As in `sup_con`.
    gather_distributed : bool
        Whether to use the keys of all ranks, with their labels, key_ids and key_mask (K,), and with gradients across ranks.
        `query_ids` and `key_ids` must be unique in the whole dataset. If keys is None, the keys are the queries of all ranks.
    process_group : ProcessGroup, optional
        The process group of torch.distributed. The default is all ranks.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

    Examples
    --------
    >>> loss_of = negmine.SupConLoss(0.1)
    >>> query, labels = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2
    >>> loss = loss_of(query, None, labels)
    """

    def __init__(
        self,
        temperature: float | Tensor | Callable[[Tensor], float | Tensor] = 0.07,
        *,
        positives: str = "out",
        denominator: str = "all",
        reduction: str = "mean",
        backend: str | None = None,
        return_stats: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        op = "SupConLoss"
        self.gathering = Gathering(op, gather_distributed, process_group)
        if not callable(temperature):
            temperature = checks.require_temperature(op, temperature)
        checks.require_choice(op, "positives", positives, ("out", "in"))
        checks.require_choice(op, "denominator", denominator, ("all", "own_positive", "negatives_only"))
        checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
        self.temperature = temperature
        self.options: dict[str, Any] = {
            "positives": positives,
            "denominator": denominator,
            "reduction": reduction,
            "backend": backend,
            "return_stats": return_stats,
        }

    def forward(
        self,
        query: Tensor,
        keys: Tensor | None,
        query_labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        *,
        step: int | Tensor | None = None,
        **masks: Any,
    ) -> Any:
        """The loss of one batch.

        Parameters
        ----------
        query, keys, query_labels, key_labels
            As in `sup_con`.
        step : int or Tensor, optional
            The number of the training step. By default the module counts its calls.
        **masks
            positive_mask, positive_weights, query_ids, key_ids and key_mask of `sup_con`.

        Returns
        -------
        Tensor (), (B,) or (B, V)
            As `sup_con` returns.
        """
        # With keys=None, ids and key_labels are not allowed. A call with both raises an error in sup_con.
        tagged = any(tags is not None for tags in (key_labels, masks.get("query_ids"), masks.get("key_ids")))
        if (
            self.gathering.wanted
            and keys is None
            and not tagged
            and isinstance(query, Tensor)
            and query.dim() in (2, 3)
        ):
            query, query_labels, masks = _as_own_keys(query, query_labels, masks, self.gathering.rank)
            keys, key_labels = query, query_labels
        options = at_step({"temperature": self.temperature, **self.options}, self.count(step, query)) | masks
        return self.gathering.labelled(sup_con, query, keys, query_labels, key_labels, options)

    def extra_repr(self) -> str:
        return ", ".join([f"temperature={self.temperature!r}", *(f"{k}={v!r}" for k, v in self.options.items() if v)])
