"""InfoNCE over a queue of negatives, with its gradient, without storing the (B, K) matrix: the function and its module.

`info_nce` checks its input, turns the options into a plan, and runs the plan in one of three ways: with the dense reference, with
the kernel op info_nce, or with several log-sum-exp ops if an option needs more than that op computes. In all of them, everything
that depends on the queue is computed in the forward pass, so the queue may be overwritten before backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.losses.false_negatives import FoundNegatives, find_false_negatives, without
from negmine.losses.gathered import Gathering
from negmine.losses.schedules import ScheduledLoss, at_step
from negmine.ops import checks, sort_key
from negmine.ops.accumulate import each_widened, narrowed, widen_once
from negmine.ops.backends import Kernels
from negmine.ops.column_lists import Columns, flat_rows, over_lists
from negmine.ops.first_derivative import fused
from negmine.ops.info_nce import InfoNCE
from negmine.ops.logsumexp import LogSumExp, MeanScore
from negmine.ops.mix_logsumexp import DifferentiatedMixLogSumExp, MixLogSumExp
from negmine.ops.negatives import check_negatives, check_pools, option_of, pools_in
from negmine.ops.own_keys import choose_for_keys
from negmine.ops.pool import Pool, hide_masked_rows, usable
from negmine.ops.vectors import for_kernels, frozen, promoted, scale_of, score_of_positive, widened
from negmine.ops.windows import Draw, bounded, mixing_draws, ranks_to_sum, sample
from negmine.options import FalseNegatives, Mix, Negatives, Select, Weight
from negmine.reference.selection import row_logsumexp
from negmine.selection import gathered_bias, learned_bias, mine_parents, mined_depth, summing_ops

# The draw arguments of a call without synthetic negatives.
NO_DRAWS = (0, 0, 0.0, 0.0, 0.0, 0.0, False, None, 0, None, None)


class InfoNCEStats(NamedTuple):
    """The statistics that `info_nce` returns in addition to the loss. They have no gradient.

    Attributes
    ----------
    logsumexp : Tensor (B,)
        The logarithm of the denominator.
    positive_rank : Tensor (B,) int64
        The number of valid negatives with a higher score than the positive, whatever `select` keeps. 0 means that the
        positive ranks first.
    num_negatives : Tensor (B,) int64
        The number of negatives in the denominator, without synthetic ones.
    clamped : Tensor (B,) bool
        True if the lower limit of `Weight` is active, so that the negatives of the row get no gradient.
    num_empty : Tensor () int64
        The number of rows without negatives. Their loss is 0.

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> loss, stats = negmine.info_nce(query, key, torch.randn(100, 16), return_stats=True)
    >>> accuracy = (stats.positive_rank == 0).float().mean()
    >>> stats.num_negatives.tolist()
    [100, 100, 100, 100, 100, 100, 100, 100]
    """

    logsumexp: Tensor  # (B,)
    positive_rank: Tensor  # (B,) int64
    num_negatives: Tensor  # (B,) int64
    clamped: Tensor  # (B,) bool
    num_empty: Tensor  # () int64


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any = None,
    *,
    temperature: float | Tensor = 0.07,
    select: Select | None = None,
    mix: Mix | None = None,
    weight: Weight | None = None,
    positive_bias: Tensor | None = None,
    false_negatives: FalseNegatives | None = None,
    support: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    decoupled: bool = False,
    reduction: str = "mean",
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
    return_stats: bool = False,
) -> Any:
    """The InfoNCE loss of each query with its positive and a pool of negatives, without storing the (B, K) matrix of logits.

        loss_b = -x_b + log(exp(x_b) + sum over kept j of exp(x_bj)),   x = inner product / temperature + bias

    Parameters
    ----------
    query : Tensor (B, D)
        fp32, bf16, fp16 or float64. The vectors are not normalised; normalise them for cosine scores. Gets a gradient if it
        requires grad.
    positive_key : Tensor (B, D)
        The positive of each query. Gets a gradient if it requires grad.
    negative_keys : Tensor (K, D) or (B, M, D), MoCoQueue, Negatives, None, or a list of these
        Keys shared by all queries (K, D), or a list of keys for each query (B, M, D). A queue means its valid rows, with its
        ids and labels if `query_ids` or `query_labels` are given. A `Negatives` has keys with ids, labels, a mask, a bias, a
        guide and options. None means in-batch negatives: the positives of the other rows. A list is several pools in one
        denominator.
    temperature : float or Tensor
        A number above 0, or a 0-d floating tensor, which gets a gradient. MoCo v1 used 0.07 and v2 0.2.
    select : Select, optional
        The negatives to keep. The default keeps all.
    mix : Mix, optional
        The synthetic negatives to add. The default adds none.
    weight : Weight, optional
        Weights for the negatives. By default all negatives have the same weight.
    positive_bias : Tensor (B,), optional
        Added to the logit of the positive. It does not change scores, margins or `positive_rank`. Gets a gradient if it
        requires grad.
    false_negatives : FalseNegatives, optional
        How to detect false negatives with `support`, and whether to remove them or to use them as positives.
    support : Tensor (B, V, D), optional
        Embeddings of V additional views of each query's image.
    query_ids, query_labels : Tensor (B,), optional
        Integer tensors. A key with an equal id or label is not a negative. -1 means unknown and is equal to nothing.
    decoupled : bool
        Whether to leave the positive out of the denominator (Yeh et al. 2021, arXiv 2110.06848). The loss may then be
        negative.
    reduction : str
        ``"mean"`` over the B rows, ``"sum"`` or ``"none"``.
    seed, step, row_offset : int or Tensor
        They determine the random draws of `mix` and ``select.sample``. row_offset is the global index of the first query.
        step and row_offset may be 0-d int64 tensors on the device of `query`.
    backend : str, optional
        ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. None chooses one automatically.
    return_stats : bool
        Whether to return statistics too.

    Returns
    -------
    Tensor () or (B,)
        The loss: float32, or float64 for float64 input. With `return_stats`, a pair of the loss and an InfoNCEStats. For
        several pools, a list of InfoNCEStats, each with the counts of its pool and the logarithm of the whole denominator.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    The gradient of the query is computed in the forward pass, so keys that do not require grad, such as a queue, may be
    overwritten before backward. Selection, mixing and masks have no gradient; weights have one unless ``weight.detach``.
    Second derivatives need ``backend="reference"``.

    The gradient of the temperature is a mean of differences between scores that may be nearly equal. Its rounding error is a
    few eps of |s| / temperature^2.

    A row without negatives has loss 0 and no gradient, and is included in the mean.

    With several pools, `select`, `mix` and `weight` apply to each pool that has no option of its own, with ranks and
    fractions of that pool. The sums Ng of `Weight` are added over the pools, and false negatives are detected in each pool.
    Each pool has its own random draws; those of the first pool are the same as for a single pool.

    References
    ----------
    MoCo, He et al. 2020 (arXiv 1911.05722; facebookresearch/moco moco/builder.py).

    Examples
    --------
    >>> query, key = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> queue = negmine.MoCoQueue(dim=16, K=100)
    >>> loss = negmine.info_nce(query.requires_grad_(), key, queue, temperature=0.2)
    >>> loss.backward()
    >>> loss = negmine.info_nce(query, key, queue, select=negmine.Select(0, 0.1))  # the hardest tenth
    >>> loss = negmine.info_nce(query, key)  # in-batch negatives
    """
    op = "info_nce"
    further: list = []
    if isinstance(negative_keys, (list, tuple)):
        negative_keys, *further = pools_in(op, negative_keys)
    pools: list[tuple[Tensor, Pool]] = []
    if further:
        further = [negative_keys, *further]
        pools = check_pools(op, query, positive_key, further, query_ids, query_labels, OPTIONS)
        keys, pool = pools[0]
    else:
        keys, pool = check_negatives(
            op, query, positive_key, negative_keys, query_ids, query_labels, own_keys=True, options=OPTIONS,
            with_bias=True,
        )  # fmt: skip
    checks.require_positive(op, positive_key, query)
    temperature = checks.require_temperature(op, temperature)
    checks.require_options(op, select=select, mix=mix, weight=weight, false_negatives=false_negatives)
    if positive_bias is not None:
        checks.require_per_row(op, "positive_bias", positive_bias, query)
    _check_support(op, query, false_negatives, support)
    checks.require_bool(op, "decoupled", decoupled)
    checks.require_bool(op, "return_stats", return_stats)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    plan = Plan(select, mix, weight, false_negatives, decoupled, draw, return_stats, positive_bias is not None)
    stats: Any
    if further:
        plans = [plan.for_pool(given, number) for number, given in enumerate(further)]
        ((rows, stats),) = run_pools(
            op, plans, query, positive_key, pools, support, positive_bias, temperature, backend
        )
        loss = reference.reduced(rows, reduction)
        return (loss, stats) if return_stats else loss
    if isinstance(negative_keys, Negatives):
        plan = plan.for_pool(negative_keys, 0)
    query, positive_key, keys, support = promoted(query, positive_key, keys, support)
    batch = Batch(query, positive_key, keys, pool, support, positive_bias)
    one_op = "info_nce" if plan.is_one_op else ""
    kernels = choose_for_keys(op, plan.ops(keys, pool.bias), backend, batch[:3], keys, pool, one_op)
    if not (one_op and kernels is not None and kernels.has(one_op)) or keys is positive_key:
        kernels, query, positive_key, keys = widen_once(kernels, query, positive_key, keys)
        batch = batch._replace(query=query, positive_key=positive_key, keys=keys)
    if kernels is None:
        rows, found = reference.info_nce_of_pools(
            widened(query), frozen(positive_key, None), [plan.columns(batch)], **plan.dense(batch, temperature)
        )
        stats = InfoNCEStats(**found[0])
    else:
        rows, stats = plan.run(kernels, batch, scale_of(temperature, query))
    loss = reference.reduced(rows, reduction)
    return (loss, stats) if return_stats else loss


OPTIONS = ("select", "mix", "weight")  # options that a Negatives may set for its own pool


def run_pools(
    op: str, plans: list["Plan"], query: Tensor, positive_key: Tensor, pools: list[tuple[Tensor, Pool]],
    support: Tensor | None, positive_bias: Tensor | None, temperature: float | Tensor, backend: str | None,
    views: Sequence[Callable[[Tensor], Tensor]] = (lambda vectors: vectors,),
) -> list[tuple[Tensor, list[InfoNCEStats]]]:  # fmt: skip
    """For each of several views of the vectors: the loss (B,) over all pools, and the statistics of each pool if wanted."""
    query, positive_key, support, *every = promoted(query, positive_key, support, *(keys for keys, _ in pools))
    batches = [
        Batch(query, positive_key, keys, pool, support, positive_bias)
        for keys, (_, pool) in zip(every, pools, strict=True)
    ]
    chosen = [
        choose_for_keys(op, plan.ops(batch.keys, batch.pool.bias), backend, batch[:3], batch.keys, batch.pool)
        for plan, batch in zip(plans, batches, strict=True)
    ]
    chosen = [narrowed(kernels, *batch[:3]) for kernels, batch in zip(chosen, batches, strict=True)]
    query, positive_key, *every = each_widened(query, positive_key, *every)
    batches = [
        batch._replace(query=query, positive_key=positive_key, keys=keys)
        for batch, keys in zip(batches, every, strict=True)
    ]
    scale = scale_of(temperature, query)
    results = []
    for view in views:
        q, positive = view(query), view(positive_key)
        seen = [batch._replace(query=q, positive_key=positive, keys=view(batch.keys)) for batch in batches]
        results.append(_loss_of_pools(plans, chosen, seen, temperature, scale))
    return results


def _loss_of_pools(
    plans: list["Plan"], chosen: list[Any], batches: list["Batch"], temperature: float | Tensor, scale: Tensor
) -> tuple[Tensor, list[InfoNCEStats]]:
    """Loss (B,) and statistics of several pools. If no kernels were chosen for one of them, the reference computes all."""
    each = list(zip(plans, batches, strict=True))
    if any(kernels is None for kernels in chosen):  # if one of them runs on the reference, all do
        columns = [plan.columns(batch) for plan, batch in each]
        rows, found = reference.info_nce_of_pools(
            widened(batches[0].query),
            frozen(batches[0].positive_key, None),
            columns,
            **plans[0].dense(batches[0], temperature),
        )
        return rows, [InfoNCEStats(**stats) for stats in found]
    positive = positive_of(batches[0], scale)
    shares = [
        plan.share(kernels, *plan.without_false(kernels, batch), scale, positive)
        for (plan, batch), kernels in zip(each, chosen, strict=True)
    ]
    return merged(shares, positive.logit, plans[0].decoupled, plans[0].want_stats)


def _check_support(op: str, query: Tensor, false_negatives: FalseNegatives | None, support: Tensor | None) -> None:
    if false_negatives is None and support is None:
        return
    if false_negatives is None or support is None:
        given, missing = ("support", "false_negatives") if support is not None else ("false_negatives", "support")
        raise checks.refuse(op, missing, f"given together with {given}", None)
    checks.require_vectors(op, "support", support, "(B, V, D)", (3,), query)
    if support.shape[0] != query.shape[0] or support.shape[1] == 0:
        wanted = f"of shape (B, V, D) with query's B = {query.shape[0]} and V of 1 or more"
        raise checks.refuse(op, "support", wanted, support)


class Batch(NamedTuple):
    """The checked tensors of a call, or of one of its pools."""

    query: Tensor  # (B, D)
    positive_key: Tensor  # (B, D)
    keys: Tensor  # (K, D) or (B, M, D)
    pool: Pool
    support: Tensor | None = None  # (B, V, D)
    positive_bias: Tensor | None = None  # (B,)


class Positive(NamedTuple):
    """The positives of a batch."""

    score: Tensor  # (B,)
    logit: Tensor  # (B,)


class _Sum(NamedTuple):
    """The columns that the log-sum-exp op of a call sums over, and how many columns it mines in the same pass."""

    kernels: Kernels  # for the queue, or for lists of columns
    pool: Pool | Columns
    ranks: Tensor | None = None  # (B, 2): only these ranks of the pool are summed
    num_mined: int = 0  # columns that are also mined, for synthetic negatives


class _Attracted(NamedTuple):
    """The false negatives of one pool that are used as additional positives."""

    lse: Tensor  # (B,) log-sum-exp of their logits
    number: Tensor  # (B,)
    total: Tensor  # (B,) sum of their logits


class Share(NamedTuple):
    """The contribution of one pool to the loss of each row."""

    lse: Tensor  # (B,) of its real and synthetic negatives, -inf if there are none
    has_negative: Tensor  # (B,) bool: the row has a negative in this pool
    attracted: _Attracted | None
    num_kept: Tensor  # (B,)
    num_above: Tensor  # (B,)
    clamped: Tensor  # (B,) bool


@dataclass(eq=False)
class Plan:
    """All arguments of a call of info_nce except its vectors and masks."""

    select: Select | None = None
    mix: Mix | None = None
    weight: Weight | None = None
    false_negatives: FalseNegatives | None = None
    decoupled: bool = False
    draw: Draw = Draw()  # noqa: RUF009  an immutable tuple
    want_stats: bool = False
    biased: bool = False  # whether the positives have a bias

    @property
    def mixes(self) -> bool:
        return self.mix is not None and self.mix.total > 0

    @property
    def samples(self) -> bool:
        return self.select is not None and self.select.sample is not None

    @property
    def attracts(self) -> bool:
        return self.false_negatives is not None and self.false_negatives.mode == "attract"

    @property
    def is_one_op(self) -> bool:
        """True if the kernel op info_nce can compute the call. It takes a window or synthetic negatives, but not both."""
        windowed_mix = self.mixes and (self.select is not None or not (self.mix is None or self.mix.detach))
        warms_up = self.mix is not None and self.mix.enabled is not None
        composed = self.biased or self.samples or self.attracts or windowed_mix or warms_up
        return self.weight is None and not composed

    def for_pool(self, given: Any, number: int) -> "Plan":
        """The plan for one of several pools, or for a pool that sets options of its own."""
        own = {name: option_of(given, name, getattr(self, name)) for name in OPTIONS}
        return replace(self, **own, draw=self.draw.of_pool(number))

    def ops(self, keys: Tensor, bias: Tensor | None) -> tuple[str, ...]:
        """The ops that the call needs if the op info_nce cannot compute it."""
        needed = list(summing_ops("logsumexp", keys, bias))
        if self.select is not None:
            needed += ["rank_thresholds", "count_negatives"]
        if self.mixes:
            needed += ["mine_hardest", "mix_logsumexp"]
        elif self.false_negatives is not None and self.false_negatives.top_k is not None:
            needed.append("mine_hardest")
        if self.samples or self.attracts or (self.mixes and self.mix is not None and not self.mix.detach):
            needed += ["gathered_logsumexp", "gathered_grad_keys"]
        return tuple(needed)

    def columns(self, batch: Batch) -> reference.Columns:
        """One pool in the form that the reference takes."""
        query, _, keys, pool, *_ = batch
        allowed = usable(pool, query, keys)
        return reference.Columns(frozen(keys, allowed), allowed, pool.bias, self.select, self.mix, self.weight)

    def dense(self, batch: Batch, temperature: float | Tensor) -> dict[str, Any]:
        """The keyword arguments of the reference that apply to all pools."""
        support = None if batch.support is None else widened(batch.support)
        return {
            "temperature": temperature, "false_negatives": self.false_negatives, "support": support,
            "positive_bias": batch.positive_bias, "decoupled": self.decoupled, **self.draw._asdict(),
        }  # fmt: skip

    def run(self, kernels: Kernels, batch: Batch, scale: Tensor) -> tuple[Tensor, InfoNCEStats | None]:
        """The loss (B,) and, if wanted, the statistics, computed by the kernels. scale (): 1 / temperature.

        reference.info_nce defines the results.
        """
        found = None
        if self.false_negatives is not None:
            batch, found = self.without_false(kernels, batch)
        if kernels.has("info_nce"):
            return self._run_one_op(kernels, batch, scale)
        positive = positive_of(batch, scale)
        share = self.share(kernels, batch, found, scale, positive)
        rows, stats = merged([share], positive.logit, self.decoupled, self.want_stats)
        return rows, stats[0] if stats else None

    def without_false(self, kernels: Kernels, batch: Batch) -> tuple[Batch, FoundNegatives | None]:
        """The batch without the false negatives that its support views detect, and those false negatives."""
        if self.false_negatives is None or batch.support is None:
            return batch, None
        keys = hide_masked_rows(batch.keys, batch.pool)  # the remaining mask is (B, K)
        with torch.no_grad():
            views, pool = batch.support.detach(), batch.pool._replace(bias=None)
            found = find_false_negatives(kernels, views, keys.detach(), self.false_negatives, pool)
        return batch._replace(keys=keys, pool=without(batch.pool, found.mask)), found

    def _run_one_op(self, kernels: Kernels, batch: Batch, scale: Tensor) -> tuple[Tensor, InfoNCEStats | None]:
        query, positive_key, keys, pool, *_ = batch
        bias = None if pool.bias is None else pool.bias.float()
        pool = pool._replace(bias=None)  # a bias changes neither scores nor ranks
        pivot = ranks = None
        hard, skip, draws = 0, 0, NO_DRAWS
        if self.want_stats or self.select is not None:
            with torch.no_grad():
                if self.want_stats or (self.select is not None and self.select.has_margin):
                    pivot = score_of_positive(query, positive_key)  # (B,)
                if self.select is not None:
                    q, n = for_kernels(query), for_kernels(keys)
                    pool, ranks = ranks_to_sum(kernels, q, n, pool, self.select, pivot)
        if self.mix is not None and self.mixes:
            hard, skip, draws = self.mix.hard, self.mix.skip, mixing_draws(self.mix, query, self.draw)
        arguments = (pivot if self.want_stats else None, self.decoupled, ranks, hard, skip, *draws)
        bias, pool = learned_bias(pool._replace(bias=bias))
        rows, *found = fused(InfoNCE, query, positive_key, keys, scale, bias, kernels, arguments, pool)
        if not self.want_stats:
            return rows, None
        total, num_kept, num_above, num_mixed = found
        empty = (num_kept + num_mixed) == 0  # (B,)
        return rows, InfoNCEStats(total, num_above, num_kept, torch.zeros_like(empty), empty.sum())

    def share(
        self, kernels: Kernels, batch: Batch, found: FoundNegatives | None, scale: Tensor, positive: Positive
    ) -> Share:
        """The contribution of a pool to the loss, computed by the log-sum-exp ops."""
        query, _, keys, pool, *_ = batch
        bias = None if pool.bias is None else pool.bias.float()
        pool = pool._replace(bias=None)  # a bias changes neither scores nor ranks
        pivot = positive.score.detach() if self.want_stats else None
        with torch.no_grad():
            columns = self._columns(kernels, batch._replace(pool=pool), positive.score)
        if bias is not None:
            each = gathered_bias(bias, columns.pool.index) if isinstance(columns.pool, Columns) else bias
            columns = columns._replace(pool=columns.pool._replace(bias=each))
        lse, num_kept, num_above, mined, clamped = self._log_sum(columns, query, keys, scale, pivot, positive.logit)
        if (
            self.samples and self.want_stats
        ):  # the rank of the positive is among all negatives, not only those of the sample
            q, n = for_kernels(query), for_kernels(keys)
            num_above = kernels.logsumexp(q, n, scale.detach()[None], pivot, False, 0, None, *pool)[3]
        has_negative = num_kept > 0  # (B,)
        if self.mix is not None and self.mixes:
            with torch.no_grad():
                if columns.num_mined:
                    parents = mined[:, self.mix.skip :].contiguous()  # (B, hard)
                else:
                    parents = mine_parents(kernels, for_kernels(query), for_kernels(keys), self.mix, pool)  # (B, hard)
            parents = reference.only_if_enabled(parents, self.mix)
            mixed = mixed_logsumexp(kernels, query, keys, scale, parents, self.mix, self.draw)  # (B,)
            has_negative = has_negative | (parents >= 0).any(1)
            lse = torch.logaddexp(lse.masked_fill(~has_negative, 0.0), mixed.masked_fill(~has_negative, 0.0))
            lse = lse.masked_fill(~has_negative, -torch.inf)
        attracted = None
        if found is not None and self.attracts:
            attracted = _attracted(kernels, query, keys, scale, bias, found)
        return Share(lse, has_negative, attracted, num_kept, num_above, clamped)

    def _columns(self, kernels: Kernels, batch: Batch, positive_score: Tensor) -> _Sum:
        """The columns that `select` keeps, as arguments of the sum."""
        query, _, keys, pool, *_ = batch
        if self.select is None:
            if self.mix is None or not self.mixes or self._is_sharpened:
                return _Sum(kernels, pool)
            return _Sum(kernels, pool, None, mined_depth(self.mix, kernels.queue_size(keys)))
        q, n, score = for_kernels(query), for_kernels(keys), positive_score.detach()
        if not self.samples:
            return _Sum(kernels, *ranks_to_sum(kernels, q, n, pool, self.select, score))
        window = bounded(kernels, q, n, pool, self.select, score)
        index = sort_key.unpack(sample(kernels, q, n, window, self.select, self.draw))[1]  # (B, sample)
        return _Sum(over_lists(kernels), Columns(index))

    @property
    def _is_sharpened(self) -> bool:
        """True if Weight needs a second log-sum-exp at another scale."""
        return self.weight is not None and self.weight.sharpens

    def _log_sum(
        self, columns: _Sum, query: Tensor, keys: Tensor, scale: Tensor, pivot: Tensor | None, x_positive: Tensor
    ) -> tuple[Tensor, ...]:
        """The weighted lse (B,) of the negatives, num_kept and num_above (B,), mined columns (B, N), and clamped (B,) bool."""
        weight, bias, pool = self.weight, *learned_bias(columns.pool)
        given = pivot, columns.num_mined, columns.ranks, columns.kernels
        scales = scale[None]  # (1,)
        if weight is not None and self._is_sharpened:
            scales = torch.stack([scale * (1.0 + weight.beta), scale * weight.beta]).float()  # (2,)
        if len(scales) == 1 or pool.bias is None:
            sums, num_kept, num_above, mined = fused(LogSumExp, query, keys, scales, bias, *given, *pool)
        else:  # the importance weights do not include the bias
            assert weight is not None
            if bias is not None and weight.detach:  # log_weighted_sum multiplies its gradient by 1 / (1 + beta)
                bias = bias.detach() + (1.0 + weight.beta) * (bias - bias.detach())
            top, num_kept, num_above, mined = fused(LogSumExp, query, keys, scales[:1], bias, *given, *pool)
            low, *_ = fused(LogSumExp, query, keys, scales[1:], None, *given, *pool._replace(bias=None))
            sums = torch.cat([top, low])
        has_negative = num_kept > 0  # (B,)
        if weight is None:
            return sums[0], num_kept, num_above, mined, torch.zeros_like(has_negative)
        importance = sums[1] if self._is_sharpened else num_kept.clamp_min(1).float().log()  # LSE of beta x
        lse, clamped = reference.log_weighted_sum(
            sums[0].masked_fill(~has_negative, 0.0), importance.masked_fill(~has_negative, 0.0), x_positive,
            num_kept.clamp_min(1), 1.0 / scale, weight,
        )  # fmt: skip
        return lse.masked_fill(~has_negative, -torch.inf), num_kept, num_above, mined, clamped & has_negative


def positive_of(batch: Batch, scale: Tensor) -> Positive:
    score = score_of_positive(batch.query, batch.positive_key)  # (B,)
    logit = score * scale  # (B,)
    return Positive(score, logit if batch.positive_bias is None else logit + batch.positive_bias)


def _attracted(
    kernels: Kernels, query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | None, found: FoundNegatives
) -> _Attracted:
    by, each = kernels, bias
    members: Any = Pool(found.mask)
    if found.columns is not None:
        by, members, each = over_lists(kernels), Columns(found.columns), gathered_bias(bias, found.columns)
    learned, with_bias = learned_bias(members._replace(bias=each))
    sums, count, *_ = fused(LogSumExp, query, keys, scale[None], learned, None, 0, None, by, *with_bias)
    mean_score, _ = fused(MeanScore, query, keys, by, *members)
    total = count * mean_score * scale  # (B,)
    if each is not None:
        inside = found.mask if found.columns is None else found.columns >= 0
        total = total + torch.where(inside, each, 0.0).sum(1)
    return _Attracted(sums[0], count, total)


def merged(
    shares: list[Share], x_positive: Tensor, decoupled: bool, want_stats: bool
) -> tuple[Tensor, list[InfoNCEStats]]:
    """The loss (B,) from the contributions of all pools, and the statistics of each pool if wanted."""
    has_negative, lse = shares[0].has_negative, shares[0].lse
    if len(shares) > 1:
        has_negative = torch.stack([share.has_negative for share in shares]).any(0)  # (B,)
        lse = row_logsumexp(torch.stack([share.lse for share in shares], 1).masked_fill(~has_negative[:, None], 0.0))
        lse = lse.masked_fill(~has_negative, -torch.inf)
    attracted = [share.attracted for share in shares if share.attracted is not None]
    positive_mean = x_positive  # (B,) mean of the positive logits
    if attracted:
        positive_mean = x_positive + sum(each.total for each in attracted)
        positive_mean = positive_mean / (1 + sum(each.number for each in attracted))
    if decoupled:
        rows = torch.where(has_negative, lse.masked_fill(~has_negative, 0.0) - positive_mean, 0.0 * x_positive)
        total = lse
    elif not attracted:
        rows = -F.logsigmoid(x_positive - lse)  # softplus(lse - x_positive), which is accurate for small losses
        total = torch.logaddexp(x_positive.detach(), lse.detach())
    else:
        denominator = x_positive
        for each in attracted:
            denominator = torch.logaddexp(denominator, each.lse)
        denominator = torch.logaddexp(denominator, lse)  # (B,)
        rows = torch.where(has_negative, denominator - positive_mean, 0.0 * x_positive)
        total = torch.where(has_negative, denominator, x_positive)
    if not want_stats:
        return rows, []
    total = total.detach()
    return rows, [InfoNCEStats(total, s.num_above, s.num_kept, s.clamped, (~s.has_negative).sum()) for s in shares]


def mixed_logsumexp(
    kernels: Kernels, query: Tensor, keys: Tensor, scale: Tensor, parents: Tensor, mix: Mix, draw: Draw
) -> Tensor:
    """The log-sum-exp (B,) over the synthetic negatives that are mixed from parents (B, hard)."""
    if mix.detach:
        return fused(MixLogSumExp, query, scale, keys.detach(), parents, kernels, mixing_draws(mix, query, draw))
    flat, rows = flat_rows(keys, parents)
    pairs, coefficients = reference.mix_draws(rows, mix, torch.float32, *draw)
    return fused(DifferentiatedMixLogSumExp, query, scale, flat, pairs, coefficients, kernels)


class InfoNCELoss(ScheduledLoss):
    """`info_nce` as a module, whose options may be schedules.

    Parameters
    ----------
    temperature : float, Tensor, LogScale or schedule
        As in `info_nce`. An nn.Parameter or a `negmine.losses.LogScale` is learned.
    select, mix, weight, false_negatives : option object or schedule, optional
        As in `info_nce`. A schedule is a callable of the step, a 0-d int64 tensor, that returns the value of that step.
    decoupled, reduction, seed, backend, return_stats : optional
        As in `info_nce`.
    gather_distributed : bool
        Whether to use the negatives of all ranks, with gradients across ranks. In-batch negatives are then the positives of
        all other rows of all ranks, and keys (K, D) are concatenated over the ranks. A queue is not gathered here, because it
        has its own `gather_distributed`. `query_ids` must be unique in the whole dataset, not only on one rank.
    process_group : ProcessGroup, optional
        The process group of torch.distributed. The default is all ranks.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

    Notes
    -----
    In training mode, calls without `step` are counted in the buffer `step`. Each call then draws new random numbers, and a
    resumed run continues with the next step.

    Examples
    --------
    >>> loss_of = negmine.InfoNCELoss(0.2, select=negmine.Select(0, 0.05))
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100, with_ids=True)
    >>> loss = loss_of(query, key, queue, query_ids=torch.arange(8))
    """

    def __init__(
        self,
        temperature: float | Tensor | Callable[[Tensor], float | Tensor] = 0.07,
        *,
        select: Select | Callable[[Tensor], Select | None] | None = None,
        mix: Mix | Callable[[Tensor], Mix | None] | None = None,
        weight: Weight | Callable[[Tensor], Weight | None] | None = None,
        false_negatives: FalseNegatives | Callable[[Tensor], FalseNegatives | None] | None = None,
        decoupled: bool = False,
        reduction: str = "mean",
        seed: int = 0,
        backend: str | None = None,
        return_stats: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        op = "InfoNCELoss"
        self.gathering = Gathering(op, gather_distributed, process_group)
        options = {"select": select, "mix": mix, "weight": weight, "false_negatives": false_negatives}
        if not callable(temperature):
            temperature = checks.require_temperature(op, temperature)
        checks.require_options(op, **{name: value for name, value in options.items() if not callable(value)})
        checks.require_bool(op, "decoupled", decoupled)
        checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
        seed, _, _ = checks.require_draw(op, seed, 0, 0)
        self.temperature = temperature
        self.options: dict[str, Any] = options
        self.fixed: dict[str, Any] = {
            "decoupled": decoupled,
            "reduction": reduction,
            "seed": seed,
            "backend": backend,
            "return_stats": return_stats,
        }

    def at(self, step: Tensor) -> dict[str, Any]:
        """The keyword arguments of info_nce at this step, with schedules evaluated."""
        return at_step({"temperature": self.temperature, **self.options}, step) | self.fixed

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Any = None,
        *,
        step: int | Tensor | None = None,
        **masks: Any,
    ) -> Any:
        """The loss of one batch.

        Parameters
        ----------
        query, positive_key, negative_keys
            As in `info_nce`.
        step : int or Tensor, optional
            The number of the training step. By default the module counts its calls.
        **masks
            query_ids, query_labels, positive_bias, support and row_offset of `info_nce`.

        Returns
        -------
        Tensor () or (B,)
            As `info_nce` returns.
        """
        step = self.count(step, query)
        options = {"step": step, **self.at(step), **masks}
        return self.gathering.paired(info_nce, query, positive_key, negative_keys, options)

    def extra_repr(self) -> str:
        given = {name: value for name, value in (self.options | self.fixed).items() if value not in (None, False)}
        return ", ".join([f"temperature={self.temperature!r}", *(f"{name}={value!r}" for name, value in given.items())])
