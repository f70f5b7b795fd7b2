"""Public functions for the parts of a loss: hardest negatives, scores at ranks and quantiles, synthetic negatives, log-sum-exp.

None of them stores the (B, K) score matrix, except on the reference backend.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine import reference
from negmine.ops import backends, checks, sort_key
from negmine.ops.accumulate import each_widened, narrowed
from negmine.ops.backends import Kernels
from negmine.ops.column_lists import Columns, over_lists
from negmine.ops.first_derivative import fused
from negmine.ops.logsumexp import LogSumExp
from negmine.ops.negatives import check_negatives, check_pools, option_of
from negmine.ops.own_keys import choose_for_keys
from negmine.ops.pool import Pool, usable
from negmine.ops.vectors import for_kernels, frozen, promoted, scale_of, score_of_positive, widened
from negmine.ops.windows import Draw, bounded, mixing_draws, pool_size, ranks_to_sum, sample
from negmine.options import Mix, Select, is_real, plain

__all__ = ["Mined", "Mixed", "logsumexp", "mine_hardest", "mix_negatives", "quantile", "rank_thresholds"]


class Mined(NamedTuple):
    """The result of `mine_hardest`.

    Attributes
    ----------
    scores : Tensor (B, N) float32
        The scores in descending order; -inf at the end if a query has fewer than N candidates.
    index : Tensor (B, N) int64
        The row numbers of the keys; -1 at the end if a query has fewer than N candidates.

    Examples
    --------
    >>> scores, index = negmine.mine_hardest(torch.randn(8, 16), torch.randn(100, 16), 5)
    >>> scores.shape, index.dtype
    (torch.Size([8, 5]), torch.int64)
    """

    scores: Tensor  # (B, N) fp32
    index: Tensor  # type: ignore[assignment]  # (B, N) int64; hides tuple.index


class Mixed(NamedTuple):
    """The result of `mix_negatives`: S = mix.pairs + mix.with_query synthetic negatives for each query, the pairs first.

    Attributes
    ----------
    vectors : Tensor (B, S, D)
        The synthetic negatives.
    parents : Tensor (B, S, 2) int64
        The row numbers of the two keys that were mixed. -1 stands for the query or, if the pool is empty, for no parent.
    coefficients : Tensor (B, S) float32
        The coefficient c of the first parent.

    Examples
    --------
    >>> mixed = negmine.mix_negatives(torch.randn(8, 16), torch.randn(100, 16), negmine.Mix(20, pairs=4, with_query=2))
    >>> mixed.vectors.shape
    torch.Size([8, 6, 16])
    """

    vectors: Tensor  # (B, S, D)
    parents: Tensor  # (B, S, 2) int64
    coefficients: Tensor  # (B, S) fp32


def check_select(op: str, select: Any, positive_key: Tensor | None, query: Tensor) -> None:
    """Require that select is a Select or None, and that positive_key is given if select has a margin."""
    checks.require_options(op, select=select)
    if positive_key is not None:
        checks.require_positive(op, positive_key, query)
    elif select is not None and select.has_margin:
        raise checks.refuse(op, "positive_key", "given if select has a margin", None)


def mine_hardest(
    query: Tensor,
    negative_keys: Any,
    N: int,
    *,
    positive_key: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Mined:
    """The N hardest negatives of each query: the keys with the largest inner products. The result is exact.

        s_bk = query_b . negative_keys_k;   index_b = the first N keys of b's pool by (s descending, k ascending)

    Parameters
    ----------
    query : Tensor (B, D)
        fp32, bf16, fp16, or float64 (on the reference backend). The vectors are not normalised.
    negative_keys : Tensor (K, D) or (B, M, D), MoCoQueue, Negatives, or None
        The candidate keys: shared by all queries (K, D), or a list for each query (B, M, D). None uses the rows of
        `positive_key` of the other queries (in-batch negatives). The bias of a Negatives does not change scores or ranks.
    N : int
        The number of negatives to return for each query.
    positive_key : Tensor (B, D), optional
        The positives. Required if `select` has a margin, and for in-batch negatives.
    select : Select, optional
        The negatives that are candidates. If its rank window starts at rank r, the results start at rank r. If it has a
        `sample`, the results are the N hardest negatives of the sample.
    query_ids, query_labels : Tensor (B,), optional
        Integer tensors. A key with an equal id or label is not a negative. -1 means unknown and is equal to nothing.
    seed, step, row_offset : int or Tensor
        They determine the random draws of ``select.sample``. row_offset is the global index of the first query.
    backend : str, optional
        ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. None chooses one automatically.

    Returns
    -------
    Mined
        scores (B, N) float32 and index (B, N) int64, hardest first; -inf and -1 if a query has fewer than N candidates. They
        have no gradient.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Of equal scores, the one with the lower index ranks first. Keys with a NaN score are left out.

    Examples
    --------
    >>> query, keys = torch.randn(8, 16), torch.randn(100, 16)
    >>> mined = negmine.mine_hardest(query, keys, 5)
    >>> mined.index.shape
    torch.Size([8, 5])
    >>> torch.testing.assert_close(mined.scores[:, 0], (query @ keys.T).max(1).values)
    """
    op = "mine_hardest"
    keys, pool = check_negatives(
        op, query, positive_key, negative_keys, query_ids, query_labels, own_keys=True, options=("select",)
    )
    select = option_of(negative_keys, "select", select)
    N = checks.require_count(op, "N", N)
    check_select(op, select, positive_key, query)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    if select is not None and select.replace:
        raise checks.refuse(op, "select", "without replace, because every index is returned once", select)
    query, positive_key, keys = promoted(query, positive_key, keys)
    needed = ("mine_hardest",) if select is None else ("mine_hardest", "rank_thresholds", "count_negatives")
    kernels = choose_for_keys(op, needed, backend, (query, keys), keys, pool)
    with torch.no_grad():
        anchor = None if positive_key is None else score_of_positive(query, positive_key)  # (B,)
        return mined(kernels, query, keys, pool, N, select, anchor, draw)


def mined(
    kernels: Kernels | None, query: Tensor, keys: Tensor, pool: Pool, N: int, select: Select | None,
    anchor: Tensor | None, draw: Draw,
) -> Mined:  # fmt: skip
    """The N hardest of the negatives that `select` keeps, without gradient. anchor (B,): scores of the positives, for margins."""
    if kernels is None:
        q, n = widened(query.detach()), widened(keys.detach())
        allowed = usable(pool, query, keys)
        if select is not None:
            allowed = reference.multiplicity(reference.scores_of(q, n), anchor, select, allowed, *draw) > 0
        scores, index = reference.mine_hardest(q, n, N, allowed)
        return Mined(scores.float(), index)
    q, n = for_kernels(query), for_kernels(keys)
    if select is not None:
        pool = bounded(kernels, q, n, pool, select, anchor)
    if select is not None and select.sample is not None:
        sampled = sample(kernels, q, n, pool, select, draw)  # (B, sample)
        sampled = torch.nn.functional.pad(sampled, (0, max(0, N - select.sample)), value=sort_key.NOWHERE)
        return Mined(*sort_key.unpack(sampled.topk(N, dim=1).values))
    scores, index, _ = kernels.mine_hardest(q, n, N, False, *pool)
    return Mined(scores, index)


def rank_thresholds(
    query: Tensor,
    negative_keys: Any,
    ranks: int | list[int] | Tensor,
    *,
    positive_key: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores at given ranks of each query's negatives. Rank 0 is the hardest negative.

        threshold_br = element ranks_r of the scores of b's pool in descending order

    Parameters
    ----------
    query : Tensor (B, D)
        As in `mine_hardest`.
    negative_keys : Tensor, MoCoQueue, Negatives, or None
        As in `mine_hardest`.
    ranks : int, list of int, or Tensor (R,) or (B, R)
        0-based ranks, the same for all queries or a row for each.
    positive_key : Tensor (B, D), optional
        Required for in-batch negatives.
    query_ids, query_labels : Tensor (B,), optional
        As in `mine_hardest`.
    backend : str, optional
        As in `mine_hardest`.

    Returns
    -------
    Tensor (B, R) float32
        The scores, without gradient; -inf for a rank that is negative or past the end of the pool. NaN scores have no rank.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Examples
    --------
    >>> query, keys = torch.randn(8, 16), torch.randn(100, 16)
    >>> negmine.rank_thresholds(query, keys, [0, 10]).shape
    torch.Size([8, 2])
    """
    op = "rank_thresholds"
    keys, pool = check_negatives(op, query, positive_key, negative_keys, query_ids, query_labels, own_keys=True)
    wanted = checks.whole_numbers(op, "ranks", ranks, query.device)
    checks.require_tensor(op, "ranks", wanted, query)
    if wanted.dim() == 2 and wanted.shape[0] != query.shape[0]:
        raise checks.refuse(op, "ranks", f"of shape (R,) or (B, R) with query's B = {query.shape[0]}", wanted)
    wanted = wanted.expand(query.shape[0], wanted.shape[-1]).contiguous()  # (B, R)
    query, keys = promoted(query, keys)
    kernels = choose_for_keys(op, ("rank_thresholds",), backend, (query, keys), keys, pool)
    with torch.no_grad():
        if kernels is None:
            allowed = usable(pool, query, keys)
            return reference.rank_thresholds(widened(query), widened(keys), wanted, allowed).float()
        return sort_key.unpack(kernels.rank_thresholds(for_kernels(query), for_kernels(keys), wanted, *pool))[0]


def _levels(q: Any, device: torch.device) -> Tensor:
    """Convert q, a number, a sequence of numbers or a floating (R,) tensor, in [0, 1], to (R,) float64."""
    if not isinstance(q, Tensor):
        q = [plain(each) for each in q] if isinstance(q, (list, tuple)) else plain(q)
    if is_real(q):
        q = [q]
    if isinstance(q, (list, tuple)) and q and all(is_real(v) and 0 <= v <= 1 for v in q):
        return torch.stack([torch.full((), float(v), dtype=torch.float64, device=device) for v in q])
    if isinstance(q, Tensor) and q.is_floating_point() and q.dim() == 1:
        return q.double()
    raise checks.refuse("quantile", "q", "a number in [0, 1], a sequence of them, or a floating (R,) tensor", q)


def quantile(
    query: Tensor,
    negative_keys: Any,
    q: float | list[float] | Tensor,
    *,
    positive_key: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Quantiles of the scores of each query's negatives, with the linear interpolation of torch.quantile, for any K.

        position = q * (size of b's pool - 1);   value = linear interpolation of the ascending scores at this position

    Parameters
    ----------
    query : Tensor (B, D)
        As in `mine_hardest`.
    negative_keys : Tensor, MoCoQueue, Negatives, or None
        As in `mine_hardest`.
    q : float, list of float, or Tensor (R,)
        Levels in [0, 1]. For example, 5 % of the scores are above the quantile 0.95. The values of a tensor are not checked,
        because reading them would synchronise.
    positive_key : Tensor (B, D), optional
        Required for in-batch negatives.
    query_ids, query_labels : Tensor (B,), optional
        As in `mine_hardest`.
    backend : str, optional
        As in `mine_hardest`.

    Returns
    -------
    Tensor (B, R) float32
        The quantiles, without gradient; NaN for an empty pool. A NaN score ranks below all others, so low quantiles of a row
        with NaN scores are NaN.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Examples
    --------
    >>> query, keys = torch.randn(8, 16), torch.randn(100, 16)
    >>> negmine.quantile(query, keys, [0.5, 0.95]).shape
    torch.Size([8, 2])
    """
    op = "quantile"
    keys, pool = check_negatives(op, query, positive_key, negative_keys, query_ids, query_labels, own_keys=True)
    wanted = _levels(q, query.device)  # (R,)
    checks.require_tensor(op, "q", wanted, query)
    query, keys = promoted(query, keys)
    kernels = choose_for_keys(op, ("rank_thresholds", "count_negatives"), backend, (query, keys), keys, pool)
    with torch.no_grad():
        if kernels is None:
            allowed = usable(pool, query, keys)
            return reference.quantile(widened(query), widened(keys), wanted, allowed).float()
        vectors = for_kernels(query), for_kernels(keys)
        size = pool_size(kernels, *vectors, pool)
        if not isinstance(size, Tensor):
            size = torch.full((len(query),), size, dtype=torch.int64, device=query.device)
        last = size[:, None] - 1  # (B, 1)
        position = last * wanted  # (B, R) float64
        ranks = torch.cat([last - position.floor().long(), last - position.ceil().long()], 1)  # (B, 2R)
        found = kernels.rank_thresholds(*vectors, ranks, *pool)
        scores = sort_key.unpack(found)[0].masked_fill(found == sort_key.NOWHERE, torch.nan)  # (B, 2R)
        below, above = scores.chunk(2, 1)
        return torch.lerp(below, above, position.frac().float())


def mined_depth(mix: Mix, K: int) -> int:
    """The number of columns to mine so that ranks [skip, skip + hard) of each pool are among them."""
    return min(mix.skip + mix.hard, max(K, mix.skip + 1))


def mine_parents(kernels: Kernels, query: Tensor, negative_keys: Tensor, mix: Mix, pool: Pool) -> Tensor:
    """The columns that synthetic negatives are mixed from: (B, hard) int64, -1 past the end of the pool."""
    N = mined_depth(mix, kernels.queue_size(negative_keys))
    return kernels.mine_hardest(query, negative_keys, N, False, *pool)[1][:, mix.skip :].contiguous()


def mix_negatives(
    query: Tensor,
    negative_keys: Any,
    mix: Mix,
    *,
    positive_key: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Mixed:
    """Synthetic negatives for each query, mixed from its hardest negatives (MoCHi). `Mix` has the formulas.

    ``info_nce(mix=..., seed=..., step=...)`` uses the same random draws.

    Parameters
    ----------
    query : Tensor (B, D)
        As in `mine_hardest`.
    negative_keys : Tensor (K, D), MoCoQueue, Negatives, or None
        As in `mine_hardest`, except that a list of keys for each query (B, M, D) is not supported.
    mix : Mix
        The number of synthetic negatives, and how they are mixed.
    positive_key : Tensor (B, D), optional
        Required for in-batch negatives.
    query_ids, query_labels : Tensor (B,), optional
        As in `mine_hardest`.
    seed : int
        The seed of the random draws, in [0, 2**32).
    step, row_offset : int or Tensor
        The number of the training step, and the global index of the first query (rank * B in data-parallel training). A
        tensor must be 0-d int64 on the device of `query`.
    backend : str, optional
        As in `mine_hardest`.

    Returns
    -------
    Mixed
        vectors (B, S, D) in the query's dtype, parents (B, S, 2) int64 and coefficients (B, S) float32. A query without
        negatives gets zero vectors and parents of -1. With ``mix.detach=False`` the vectors have a gradient with respect to
        `query` and `negative_keys`.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    A draw depends on seed, step, the global index of the query and the number of the synthetic negative, but not on the
    backend or the batch split.

    References
    ----------
    Kalantidis et al. 2020 (arXiv 2010.01028).

    Examples
    --------
    >>> query, keys = torch.randn(8, 16), torch.randn(100, 16)
    >>> mixed = negmine.mix_negatives(query, keys, negmine.Mix(hard=20, pairs=4, with_query=0), seed=1)
    >>> mixed.vectors.shape
    torch.Size([8, 4, 16])
    """
    op = "mix_negatives"
    keys, pool = check_negatives(op, query, positive_key, negative_keys, query_ids, query_labels)
    if not isinstance(mix, Mix):
        raise checks.refuse(op, "mix", "a negmine.Mix", mix, TypeError)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    query, keys = promoted(query, keys)
    kernels = backends.choose(op, ("mine_hardest", "mix_negatives"), backend, (query, keys), "", pool.extra)
    if kernels is None:
        vectors, parents, coefficients = reference.mix_negatives(
            widened(query), widened(keys), mix, usable(pool, query, keys), seed=seed, step=step, row_offset=row_offset
        )
        return Mixed(vectors.to(query.dtype), parents, coefficients.float())
    with torch.no_grad():
        q, n = for_kernels(query), for_kernels(keys)
        index = mine_parents(kernels, q, n, mix, pool)
        if mix.detach or not (query.requires_grad or keys.requires_grad):
            return Mixed(*kernels.mix_negatives(q, n, index, *mixing_draws(mix, query, draw)))
        parents, coefficients = reference.mix_draws(index, mix, torch.float32, *draw)
    vectors = reference.mixed(widened(query), keys, parents, coefficients)
    return Mixed(vectors.to(query.dtype), parents, coefficients)


def logsumexp(
    query: Tensor,
    negative_keys: Any,
    *,
    temperature: float | Tensor = 0.07,
    positive_key: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """The log-sum-exp of each query's logits over its negatives, with gradients: a building block for contrastive losses.

        lse_b = log sum over kept k of exp(s_bk / temperature + bias_k),   s_bk = query_b . negative_keys_k

    Parameters
    ----------
    query : Tensor (B, D)
        As in `info_nce`.
    negative_keys : Tensor (K, D) or (B, M, D), MoCoQueue, Negatives, or None
        As in `info_nce`, but one pool, not a list.
    temperature : float or Tensor
        A number above 0, or a 0-d floating tensor, which gets a gradient.
    positive_key : Tensor (B, D), optional
        The positives. Required if `select` has a margin, and for in-batch negatives. A margin does not give it a gradient.
    select : Select, optional
        The negatives to keep. The default keeps all.
    query_ids, query_labels : Tensor (B,), optional
        Integer tensors. A key with an equal id or label is not a negative. -1 means unknown and is equal to nothing.
    seed, step, row_offset : int or Tensor
        They determine the random draws of ``select.sample``. row_offset is the global index of the first query.
    backend : str, optional
        ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. None chooses one automatically.

    Returns
    -------
    Tensor (B,)
        float32 (float64 for float64 input); -inf, without gradient, if the pool is empty.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Gradients flow to query, negative_keys, temperature and a bias. That of query is computed in the forward pass, so keys
    that do not require grad may be overwritten before backward. Selection and masks have no gradient.

    Examples
    --------
    InfoNCE computed from the log-sum-exp:

    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> lse = negmine.logsumexp(query, queue, temperature=0.2)
    >>> loss = F.softplus(lse - (query * key).sum(1) / 0.2).mean()
    >>> torch.testing.assert_close(loss, negmine.info_nce(query, key, queue, temperature=0.2))
    """
    temperature = checks.require_temperature("logsumexp", temperature)
    columns = summed_columns(
        "logsumexp", ("logsumexp",), query, positive_key, negative_keys, select, query_ids, query_labels,
        Draw(seed, step, row_offset), backend,
    )  # fmt: skip
    return columns.logsumexp(temperature)


class SummedColumns(NamedTuple):
    """The columns of a sum over a queue: kernels with a pool or lists, or None with keyword arguments for the reference."""

    kernels: Kernels | None
    query: Tensor  # (B, D)
    keys: Tensor  # (K, D) or (B, M, D)
    pool: tuple[Any, ...]  # a Pool, or Columns for kernels over lists
    ranks: Tensor | None  # (B, 2): the op logsumexp narrows the pool to these ranks
    dense: dict[str, Any]
    positive_key: Tensor | None = None  # (B, D); like query and keys, after each_widened

    def logsumexp(self, temperature: float | Tensor) -> Tensor:
        """The log-sum-exp (B,) of s / temperature + bias over the columns."""
        if self.kernels is None:
            keys = frozen(self.keys, self.dense["usable"])
            return reference.logsumexp(widened(self.query), keys, temperature, **self.dense)
        return self._summed(temperature)[0][0]

    def logsumexp_and_count(self, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """The log-sum-exp (B,) and the number of columns in it (B,)."""
        if self.kernels is None:
            pool = {name: value for name, value in self.dense.items() if name != "key_bias"}
            _, times = reference.kept_scores(widened(self.query), widened(self.keys), **pool)  # (B, K)
            return self.logsumexp(temperature), times.sum(1)
        sums, count, *_ = self._summed(temperature)
        return sums[0], count

    def _summed(self, temperature: float | Tensor) -> tuple[Tensor, ...]:
        scales = scale_of(temperature, self.query)[None]  # (1,)
        bias, pool = learned_bias(self.pool)
        return fused(LogSumExp, self.query, self.keys, scales, bias, None, 0, self.ranks, self.kernels, *pool)


def summing_ops(op: str, keys: Any, bias: Tensor | None = None) -> tuple[str, ...]:
    """The names of the kernels for a sum over keys, including those for the gradients of the keys and the bias if needed."""
    of_keys, of_bias = keys.requires_grad, bias is not None and bias.requires_grad
    return (op, *[f"{op}_grad_keys"] * of_keys, *[f"{op}_grad_bias"] * of_bias)


def learned_bias(pool: Any) -> tuple[Tensor | None, Any]:
    """The bias of a Pool or of Columns if it requires grad, else None; and the pool with a detached bias."""
    if pool.bias is None or not pool.bias.requires_grad:
        return None, pool
    return pool.bias, pool._replace(bias=pool.bias.detach())


def gathered_bias(bias: Tensor | None, index: Tensor) -> Tensor | None:
    """The bias (B, sample) of the columns index (B, sample), gathered from bias (K,) or (B, M), with its gradient."""
    if bias is None:
        return None
    each = bias.expand(len(index), -1) if bias.dim() == 1 else bias  # (B, K)
    return each.gather(1, index.clamp_min(0)) if each.shape[1] else each.new_zeros(index.shape)


def summed_columns(
    caller: str,
    sums: tuple[str, ...],
    query: Tensor,
    positive_key: Tensor | None,
    negative_keys: Any,
    select: Select | None,
    query_ids: Tensor | None,
    query_labels: Tensor | None,
    draw: Draw,
    backend: str | None,
) -> SummedColumns:
    """Check the arguments and return the columns for the ops `sums`: logsumexp or softplus_sum.

    Only the op logsumexp narrows a pool to a window of ranks by itself.
    """
    keys, pool = check_negatives(
        caller, query, positive_key, negative_keys, query_ids, query_labels, own_keys=True, options=("select",),
        with_bias=True,
    )  # fmt: skip
    select = option_of(negative_keys, "select", select)
    draw = Draw(*checks.require_draw(caller, *draw))
    check_select(caller, select, positive_key, query)
    query, positive_key, keys = promoted(query, positive_key, keys)
    stored = (query, positive_key, keys)
    return _columns_of(caller, sums, stored, each_widened(*stored), pool, select, draw, backend)


def summed_pools(
    caller: str,
    sums: tuple[str, ...],
    query: Tensor,
    positive_key: Tensor,
    negative_keys: list,
    select: Select | None,
    query_ids: Tensor | None,
    query_labels: Tensor | None,
    draw: Draw,
    backend: str | None,
) -> list[SummedColumns]:
    """summed_columns for several pools, each with its own select and random draws."""
    pools = check_pools(caller, query, positive_key, negative_keys, query_ids, query_labels, ("select",))
    selects = [option_of(given, "select", select) for given in negative_keys]
    draw = Draw(*checks.require_draw(caller, *draw))
    for each in selects:
        check_select(caller, each, positive_key, query)
    query, positive_key, *every = promoted(query, positive_key, *(keys for keys, _ in pools))
    wide_query, wide_positive, *wide = each_widened(query, positive_key, *every)
    vectors = [
        ((query, positive_key, keys), (wide_query, wide_positive, wide_keys))
        for keys, wide_keys in zip(every, wide, strict=True)
    ]
    return [
        _columns_of(caller, sums, *stored_and_wide, pool, each, draw.of_pool(number), backend)
        for number, (stored_and_wide, (_, pool), each) in enumerate(zip(vectors, pools, selects, strict=True))
    ]


def _columns_of(
    caller: str,
    sums: tuple[str, ...],
    stored: tuple[Any, ...],
    wide: tuple[Any, ...],
    pool: Pool,
    select: Select | None,
    draw: Draw,
    backend: str | None,
) -> SummedColumns:
    """The columns of one pool. stored: the checked query, positive_key or None, and keys; wide: the same after each_widened."""
    query, positive_key, keys = stored
    tensors = (query, keys) if positive_key is None else (query, positive_key, keys)
    needed = [name for op in sums for name in summing_ops(op, keys, pool.bias)]
    if select is not None:
        needed += ["rank_thresholds", "count_negatives"]
        if select.sample is not None:
            needed += ["gathered_logsumexp", "gathered_grad_keys"]
    kernels = narrowed(choose_for_keys(caller, tuple(needed), backend, tensors, keys, pool), *stored)
    query, positive_key, keys = wide
    bias = pool.bias
    pool = pool._replace(bias=None)  # a bias does not change scores or ranks
    with torch.no_grad():
        anchor = None if positive_key is None else score_of_positive(query, positive_key)  # (B,)
        if kernels is None:
            allowed = usable(pool, query, keys)
            dense = {"usable": allowed, "positive_score": anchor, "select": select, "draw": draw, "key_bias": bias}
            return SummedColumns(None, query, keys, pool, None, dense, positive_key)
        ranks = index = None
        if select is not None:
            q, n = for_kernels(query), for_kernels(keys)
            if select.sample is None and sums == ("logsumexp",):
                pool, ranks = ranks_to_sum(kernels, q, n, pool, select, anchor)
            else:
                pool = bounded(kernels, q, n, pool, select, anchor)
            if select.sample is not None:
                index = sort_key.unpack(sample(kernels, q, n, pool, select, draw))[1]  # (B, sample)
    bias = None if bias is None else bias.float()
    if index is not None:
        columns = Columns(index, gathered_bias(bias, index))
        return SummedColumns(over_lists(kernels), query, keys, columns, None, {}, positive_key)
    return SummedColumns(kernels, query, keys, pool._replace(bias=bias), ranks, {}, positive_key)
