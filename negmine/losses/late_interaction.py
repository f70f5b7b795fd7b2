"""late_interaction: InfoNCE and mining with MaxSim scores of token matrices, without storing all token scores.

Documents are processed in blocks. The kernel maxsim gives the scores of a block and the best token of each pair of a query token
and a document. The log-sum-exp and the gradient of the queries are accumulated over the blocks. If documents require grad, the
blocks are scored again in backward. The dense definition is in negmine/reference/late_interaction.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine import reference
from negmine.losses.info_nce import InfoNCEStats, Share, merged
from negmine.ops import checks, sort_key
from negmine.ops.accumulate import each_widened, narrowed
from negmine.ops.backends import Kernels, choose
from negmine.ops.first_derivative import first_derivative_only, fused
from negmine.ops.negatives import check_negatives, option_of
from negmine.ops.pool import Pool, pool_of_columns, usable
from negmine.ops.vectors import disable_autocast, for_kernels, frozen, promoted, scale_of, widened
from negmine.ops.windows import Draw
from negmine.options import Negatives, Select
from negmine.selection import Mined, check_select, learned_bias

OPS = ("maxsim", "gathered_grad_keys")
PIECE = {"cpu": 1 << 20, "cuda": 1 << 24}  # how many best tokens are in memory at one time
DOCUMENT_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 18}  # approximate number of tokens in a block of documents


def late_interaction(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any = None,
    *,
    query_lengths: Tensor | None = None,
    positive_lengths: Tensor | None = None,
    negative_lengths: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    select: Select | None = None,
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
    """InfoNCE of queries and documents that are matrices of token vectors, scored by MaxSim (ColBERT).

        loss_b = -x_b + log(exp(x_b) + sum over kept k of exp(x_bk)),   x = s / temperature + bias
        s_bk = sum over tokens i of query b of (maximum over tokens j of document k of query_bi . negative_keys_kj)

    Parameters
    ----------
    query : Tensor (B, I, D)
        The token vectors of the queries. They are not normalised. Gets a gradient if it requires grad.
    positive_key : Tensor (B, J, D)
        The token vectors of the positive documents. Gets a gradient if it requires grad.
    negative_keys : Tensor (K, J, D), Negatives, or None
        The token vectors of the negative documents, whose J may differ from that of the positives. A `Negatives` may have ids,
        labels, a mask, a bias (K,) or a select. None means the positives of the other rows. Documents get a gradient if they
        require grad; otherwise they may be overwritten before backward.
    query_lengths, positive_lengths : Tensor (B,), optional
        Integer tensors, for padded queries and positives: the number of tokens of each, at most I or J. The token vectors
        after the first `length` ones are padding and may hold any values. None means that there is no padding. A query of
        length 0 has score 0 with every document.
    negative_lengths : Tensor (K,), optional
        The same for the negative documents. A document of length 0 is not a negative. For in-batch negatives it must be None,
        and `positive_lengths` applies.
    temperature : float or Tensor
        Divides the scores, which are sums over tokens. Other implementations divide the sum by the number of query tokens. A
        0-d tensor gets a gradient.
    select : Select, optional
        The negatives to keep. The default keeps all. Its sample must not be drawn with replacement.
    query_ids, query_labels : Tensor (B,), optional
        As in `info_nce`.
    decoupled, reduction : optional
        As in `info_nce`.
    seed, step, row_offset : int or Tensor
        As in `info_nce`.
    backend : str, optional
        As in `info_nce`. There are kernels for cpu and triton.
    return_stats : bool
        Whether to return InfoNCEStats too.

    Returns
    -------
    Tensor () or (B,)
        The loss: float32, or float64 for float64 input.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    The forward pass computes the score of every pair of tokens once, or twice with `select`. The token scores (B, K, I, J) are
    never stored. The document scores (B, K) are stored only with `select`, together with a mask. If several tokens have the
    largest score, the first gets the gradient. The gradient of the documents is summed in fp32, in a second pass in backward.

    References
    ----------
    Khattab and Zaharia 2020 (arXiv 2004.12832).

    Examples
    --------
    >>> query, positive = torch.randn(4, 6, 16), torch.randn(4, 10, 16)
    >>> documents, lengths = torch.randn(20, 10, 16), torch.randint(1, 11, (20,))
    >>> loss = negmine.losses.late_interaction(query, positive, documents, negative_lengths=lengths)
    """
    op = "late_interaction"
    lengths = query_lengths, positive_lengths, negative_lengths
    given = _checked(op, query, positive_key, negative_keys, lengths, query_ids, query_labels)
    temperature = checks.require_temperature(op, temperature)
    for name, value in (("decoupled", decoupled), ("return_stats", return_stats)):
        checks.require_bool(op, name, value)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    select = _checked_select(op, option_of(negative_keys, "select", select), query, positive_key)
    query, positive_key, documents = promoted(query, positive_key, given.documents)
    pool, (query_lengths, positive_lengths, negative_lengths) = given.pool, given.lengths
    kernels = narrowed(choose(op, OPS, backend, (query, documents)), query, positive_key, documents)
    query, positive_key, documents = each_widened(query, positive_key, documents)
    if kernels is None:
        allowed = usable(pool, query[:, 0], documents[:, 0])
        rows, found = reference.late_interaction(
            widened(query),
            frozen(positive_key, None),
            widened(documents) if documents.requires_grad else widened(documents).clone(),
            query_lengths=query_lengths,
            positive_lengths=positive_lengths,
            document_lengths=negative_lengths,
            usable=allowed,
            bias=pool.bias,
            temperature=temperature,
            select=select,
            decoupled=decoupled,
            **draw._asdict(),
        )
        loss, stats = reference.reduced(rows, reduction), [InfoNCEStats(**found)]
        return (loss, stats[0]) if return_stats else loss
    scale = scale_of(temperature, query)
    pair = widened(query), frozen(positive_key, None)
    score = reference.maxsim_of_pairs(*pair, query_lengths, positive_lengths)  # (B,)
    pivot, ranked = score.detach(), None
    if select is not None:  # the rank of the positive is among all valid negatives
        scored = _Scored(kernels, query.detach(), documents.detach(), query_lengths, negative_lengths)
        scores, allowed = _dense(scored, pool)
        ranked = (allowed & (scores > pivot[:, None])).sum(1)  # (B,)
        pool = Pool(reference.multiplicity(scores, pivot, select, allowed, *draw) > 0, bias=pool.bias)
    bias, pool = learned_bias(pool)
    lse, num_kept, num_above = fused(
        MaxSimLogSumExp, query, documents, scale, bias, pivot, query_lengths, negative_lengths, kernels, *pool
    )
    num_above = num_above if ranked is None else ranked
    share = Share(lse, num_kept > 0, None, num_kept, num_above, torch.zeros_like(num_kept, dtype=torch.bool))
    rows, stats = merged([share], score * scale, decoupled, return_stats)
    loss = reference.reduced(rows, reduction)
    return (loss, stats[0]) if return_stats else loss


def mine_late_interaction(
    query: Tensor,
    negative_keys: Any,
    N: int,
    *,
    positive_key: Tensor | None = None,
    query_lengths: Tensor | None = None,
    positive_lengths: Tensor | None = None,
    negative_lengths: Tensor | None = None,
    select: Select | None = None,
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Mined:
    """The N hardest documents of each query by MaxSim scores: `mine_hardest` for matrices of token vectors.

    Parameters
    ----------
    query : Tensor (B, I, D)
        As in `late_interaction`.
    negative_keys : Tensor (K, J, D), Negatives, or None
        As in `late_interaction`.
    N : int
        The number of documents to return for each query.
    positive_key : Tensor (B, J, D), optional
        Required if `select` has a margin, and for in-batch negatives.
    query_lengths, positive_lengths : Tensor (B,), optional
        As in `late_interaction`.
    negative_lengths : Tensor (K,), optional
        As in `late_interaction`.
    select : Select, optional
        As in `mine_hardest`.
    query_ids, query_labels : Tensor (B,), optional
        As in `mine_hardest`.
    seed, step, row_offset : int or Tensor
        As in `mine_hardest`.
    backend : str, optional
        As in `late_interaction`.

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
    The result is exact. Of equal scores, the one with the lower index ranks first. Documents with a NaN score are left out.
    Scores (B, K) are stored only with `select`.

    Examples
    --------
    >>> query, documents = torch.randn(4, 6, 16), torch.randn(20, 10, 16)
    >>> negmine.losses.mine_late_interaction(query, documents, 3).index.shape
    torch.Size([4, 3])
    """
    op = "mine_late_interaction"
    lengths = query_lengths, positive_lengths, negative_lengths
    given = _checked(op, query, positive_key, negative_keys, lengths, query_ids, query_labels)
    N = checks.require_count(op, "N", N)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    select = _checked_select(op, option_of(negative_keys, "select", select), query, positive_key)
    query, positive_key, documents = promoted(query, positive_key, given.documents)
    pool, (query_lengths, positive_lengths, negative_lengths) = given.pool, given.lengths
    kernels = choose(op, ("maxsim",), backend, (query, documents))
    with torch.no_grad():
        scored = _Scored(kernels, query, documents, query_lengths, negative_lengths)
        if select is None:
            blocks = _blocks(scored, pool, False)
        else:
            scores, allowed = _dense(scored, pool)
            score = None
            if positive_key is not None:
                pair = widened(query), widened(positive_key)
                score = reference.maxsim_of_pairs(*pair, query_lengths, positive_lengths)  # (B,)
            kept = reference.multiplicity(scores, score, select, allowed, *draw) > 0
            blocks = iter([_whole(documents, scores, kept)])
        best = torch.full((len(query), N), sort_key.NOWHERE, dtype=torch.int64, device=query.device)
        for block in blocks:
            column = torch.arange(block.part.start, block.part.stop, device=query.device)  # (C,)
            outside = block.scores.isnan() | ~block.allowed
            keys = sort_key.pack(block.scores.float(), column).masked_fill(outside, sort_key.NOWHERE)  # (b, C)
            best[block.rows] = torch.cat([best[block.rows], keys], 1).topk(N, dim=1).values
        return Mined(*sort_key.unpack(best))


class _Given(NamedTuple):
    """The checked arguments of a call."""

    documents: Tensor  # (K, J, D)
    pool: Pool
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None]  # of queries (B,), positives (B,) and documents (K,)


def _checked(
    op: str, query: Any, positive_key: Any, negative_keys: Any, lengths: tuple, query_ids: Any, query_labels: Any
) -> _Given:
    _require_tokens(op, "query", query, "(B, I, D)", None)
    if positive_key is not None or op == "late_interaction":
        _require_tokens(op, "positive_key", positive_key, "(B, J, D)", query)
        if len(positive_key) != len(query):
            raise checks.refuse(op, "positive_key", f"of shape (B, J, D) with query's B = {len(query)}", positive_key)
    given = negative_keys if isinstance(negative_keys, Negatives) else Negatives(negative_keys)
    if given.keys is not None:
        _require_tokens(op, "negative_keys", given.keys, "(K, J, D)", query)
    elif positive_key is None:
        raise checks.refuse(op, "negative_keys", "given if there is no positive_key", None)
    documents: Any = positive_key if given.keys is None else given.keys
    # Masks, ids, labels and biases belong to documents. A queue of the first tokens stands in for the documents in the checks.
    first = dataclasses.replace(given, keys=None if given.keys is None else given.keys[:, 0])
    tokens = query[:, 0], None if positive_key is None else positive_key[:, 0]
    _, pool = check_negatives(op, *tokens, first, query_ids, query_labels, options=("select",), with_bias=True)
    query_lengths, positive_lengths, negative_lengths = lengths
    _check_lengths(op, "query_lengths", query_lengths, query, query)
    if positive_key is not None:
        _check_lengths(op, "positive_lengths", positive_lengths, positive_key, query)
    elif positive_lengths is not None:
        raise checks.refuse(op, "positive_lengths", "None if there is no positive_key", positive_lengths)
    if given.keys is None:
        if negative_lengths is not None:
            raise checks.refuse(op, "negative_lengths", "None for in-batch negatives", negative_lengths)
        negative_lengths = positive_lengths
    _check_lengths(op, "negative_lengths", negative_lengths, documents, query)
    return _Given(documents, pool, (query_lengths, positive_lengths, negative_lengths))


def _require_tokens(op: str, name: str, value: Any, shape: str, like: Tensor | None) -> None:
    checks.require_vectors(op, name, value, shape, (3,), like)
    if value.shape[1] == 0:
        raise checks.refuse(op, name, f"of shape {shape} with at least one token", value)


def _check_lengths(op: str, name: str, lengths: Any, of: Tensor, query: Tensor) -> None:
    if lengths is None:
        return
    checks.require_tensor(op, name, lengths, query)
    whole = not lengths.is_floating_point() and not lengths.is_complex() and lengths.dtype != torch.bool
    if not whole or tuple(lengths.shape) != (len(of),):
        raise checks.refuse(op, name, f"an integer tensor of shape ({len(of)},)", lengths)


def _checked_select(op: str, select: Any, query: Tensor, positive_key: Tensor | None) -> Select | None:
    check_select(op, select, None if positive_key is None else query[:, 0], query[:, 0])
    if select is not None and select.replace:
        raise checks.refuse(op, "select", "without replace, because a document is kept at most once", select)
    return select


class _Scored(NamedTuple):
    """The vectors that a call scores, and the kernels for it."""

    kernels: Kernels | None  # None: the reference
    query: Tensor  # (B, I, D)
    documents: Tensor  # (K, J, D)
    query_lengths: Tensor | None  # (B,)
    lengths: Tensor | None  # (K,)


class _Block(NamedTuple):
    """Scores of some queries and some documents."""

    rows: slice  # of the queries
    part: slice  # of the documents
    documents: Tensor  # (C, J, D)
    scores: Tensor  # (b, C)
    token: Tensor  # (b, I, C) the best token among the C * J of the block, -1 = none; empty if not wanted
    allowed: Tensor  # (b, C) bool


def _whole(documents: Tensor, scores: Tensor, allowed: Tensor) -> _Block:
    """All pairs as one block, without best tokens."""
    (B, K), index = scores.shape, scores.new_empty(0, dtype=torch.int64)
    return _Block(slice(0, B), slice(0, K), documents, scores, index, allowed)


def _blocks(scored: _Scored, pool: Pool, want_index: bool) -> Iterator[_Block]:
    """Blocks that cover every pair of a query and a document once, in the order of the documents."""
    kernels, query, documents, query_lengths, lengths = scored
    (B, tokens, _), (K, J, _) = query.shape, documents.shape
    device = query.device.type
    C = max(1, min(DOCUMENT_TOKENS[device] // J, K)) if kernels is not None else max(1, K)
    b = max(1, PIECE[device] // (tokens * C)) if kernels is not None else max(1, B)
    for start in range(0, K, C):
        part = slice(start, min(start + C, K))
        block = documents[part]  # (C, J, D)
        allowed = usable(pool_of_columns(pool, part), query[:, 0], block[:, 0])  # (B, C)
        counted = None if lengths is None else lengths[part].long()  # (C,)
        if allowed is None:
            allowed = torch.ones(B, len(block), dtype=torch.bool, device=query.device)
        else:  # a document that is hidden from all queries is not read
            counted = torch.where(allowed.any(0), J if counted is None else counted, 0)
        if lengths is not None:
            allowed = allowed & (lengths[part] > 0)
        if kernels is None:
            yield _whole(block, reference.maxsim(query, block, query_lengths, lengths), allowed)
            continue
        for first_row in range(0, B, b):
            rows = slice(first_row, min(first_row + b, B))
            token_counts = None if query_lengths is None else query_lengths[rows].long()
            scores, index = kernels.maxsim(
                for_kernels(query[rows]), for_kernels(block), token_counts, counted, want_index
            )
            yield _Block(rows, part, block, scores, index, allowed[rows])


def _dense(scored: _Scored, pool: Pool) -> tuple[Tensor, Tensor]:
    """The scores (B, K), and a mask (B, K) bool of the pool."""
    shape = len(scored.query), len(scored.documents)
    with torch.no_grad():
        scores = torch.zeros(shape, dtype=widened(scored.query).dtype, device=scored.query.device)
        allowed = torch.zeros(shape, dtype=torch.bool, device=scored.query.device)
        for block in _blocks(scored, pool, False):
            scores[block.rows, block.part], allowed[block.rows, block.part] = block.scores, block.allowed
    return scores, allowed


class MaxSimLogSumExp(torch.autograd.Function):
    """lse (B,) = log sum over each pool of exp(scale * s_bk + bias_k), with num_kept and num_above (B,).

    d lse / d query_bi = scale * sum over k of p_bk * (the token of document k with the largest score for query_bi)

    This gradient is computed in the forward pass. The gradients of the documents and of the bias are computed by a second pass.
    """

    @staticmethod
    def forward(ctx, query, documents, scale, bias, pivot, query_lengths, lengths, kernels, *pool):
        B, want_mean = len(query), ctx.needs_input_grad[0]
        top, total, pulled = (torch.full_like(pivot, value) for value in (-torch.inf, 0.0, 0.0))  # (B,) each
        num_kept, num_above = torch.zeros(2, B, dtype=torch.int64, device=query.device).unbind(0)
        mean = torch.zeros_like(query, dtype=pivot.dtype) if want_mean else None  # (B, I, D)
        everything = Pool(*pool) if bias is None else Pool(*pool)._replace(bias=bias)
        for block in _blocks(_Scored(kernels, query, documents, query_lengths, lengths), everything, want_mean):
            rows, allowed = block.rows, block.allowed
            x = _logits(block, scale, everything.bias)  # (b, C)
            new = torch.maximum(top[rows], x.amax(1))  # (b,)
            shift = new.masked_fill(new == -torch.inf, 0.0)
            decay, weight = (top[rows] - shift).exp(), (x - shift[:, None]).exp()  # (b,), (b, C)
            top[rows] = new
            total[rows] = total[rows] * decay + weight.sum(1)
            scores = block.scores.masked_fill(~allowed, 0.0)
            pulled[rows] = pulled[rows] * decay + (weight * scores).sum(1)
            num_kept[rows] += allowed.sum(1)
            num_above[rows] += (allowed & (scores > pivot[rows, None])).sum(1)
            if mean is not None:
                mean[rows] = mean[rows] * decay[:, None, None] + _weighted_tokens(block, weight)
        norm = torch.where(num_kept > 0, total, 1.0)  # (B,)
        lse = top + norm.log()
        if mean is not None:
            mean /= norm[:, None, None]
            if query_lengths is not None:
                absent = torch.arange(query.shape[1], device=query.device) >= query_lengths[:, None]  # (B, I)
                mean.masked_fill_(absent[:, :, None], 0.0)
        *tensors, ctx.same_label = pool
        ctx.kernels, ctx.width, ctx.dtype = kernels, len(pool), query.dtype
        again = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        more = (query, documents, bias, query_lengths, lengths, *tensors) if again else ()
        ctx.save_for_backward(scale, lse, pulled / norm, mean, *more)
        ctx.mark_non_differentiable(num_kept, num_above)
        return lse, num_kept, num_above

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_lse, *_):
        scale, lse, score, mean, *more = ctx.saved_tensors
        d_query = d_documents = d_scale = d_bias = None
        if ctx.needs_input_grad[0]:
            d_query = ((d_lse * scale)[:, None, None] * mean).to(ctx.dtype)  # (B, I, D)
        if ctx.needs_input_grad[2]:
            d_scale = (d_lse * score).sum()
        if more:
            query, documents, bias, query_lengths, lengths, *tensors = more
            pool = Pool(*tensors)._replace(same_label=ctx.same_label)
            pool = pool if bias is None else pool._replace(bias=bias)
            if ctx.needs_input_grad[1]:
                d_documents = torch.zeros_like(documents, dtype=lse.dtype)  # (K, J, D)
            if ctx.needs_input_grad[3]:
                d_bias = torch.zeros_like(bias)  # (K,)
            scored = _Scored(ctx.kernels, query, documents, query_lengths, lengths)
            for block in _blocks(scored, pool, d_documents is not None):
                x = _logits(block, scale, pool.bias)
                p = (x - lse[block.rows, None]).exp().masked_fill(~block.allowed, 0.0)  # (b, C)
                weight = p * d_lse[block.rows, None]
                if d_bias is not None:
                    d_bias[block.part] += weight.sum(0)
                if d_documents is not None:
                    d_documents[block.part] += _grad_documents(ctx.kernels, query[block.rows], block, weight * scale)
            d_documents = None if d_documents is None else d_documents.to(documents.dtype)
        return d_query, d_documents, d_scale, d_bias, None, None, None, None, *([None] * ctx.width)


def _logits(block: _Block, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The logits (b, C), -inf outside the pool."""
    x = block.scores * scale
    x = x if bias is None else x + bias[block.part].to(x.dtype)
    return x.masked_fill(~block.allowed, -torch.inf)


def _weighted_tokens(block: _Block, weight: Tensor) -> Tensor:
    """(b, I, D): the sum over documents of weight (b, C) times the best token of each query token."""
    b, tokens, C = block.token.shape
    rows = widened(block.documents).flatten(0, 1).nan_to_num(0.0, 0.0, 0.0)  # (C J, D): 0 times a hidden row is 0
    each = weight[:, None].expand(b, tokens, C)
    place = block.token.clamp_min(0).view(b * tokens, C)
    with disable_autocast(weight.device):
        summed = F.embedding_bag(place, rows, per_sample_weights=each.reshape(-1, C), mode="sum")
    return summed.view(b, tokens, -1)


def _grad_documents(kernels: Kernels, query: Tensor, block: _Block, weight: Tensor) -> Tensor:
    """(C, J, D): for each token, the sum of the query tokens whose best token it is, times weight (b, C)."""
    (b, tokens, C), rows = block.token.shape, block.documents.shape[0] * block.documents.shape[1]
    each = weight[:, None].expand(b, tokens, C).reshape(-1, C)
    place = block.token.masked_fill(~block.allowed[:, None], -1).view(-1, C)
    summed = kernels.gathered_grad_keys(for_kernels(query.flatten(0, 1)), place, each, rows)
    return summed.view(block.documents.shape)
