"""The ops that are timed, computed by negmine and by PyTorch code.

    OPS[name].fused(inputs, backend)   negmine
    OPS[name].eager(inputs)            PyTorch, which stores the (B, K) score matrix
    OPS[name].peers[peer](inputs)      other implementations in PyTorch, timed on a GPU
    OPS[name].gemms                    the number of (B, D) by (D, K) products that every method needs; their time is the floor

A training op returns (loss (), gradient of the query (B, D)), a mining op (scores (B, N), index (B, N)), and rank_thresholds
(scores (B, 2),). `disagreement` describes how two results differ. A variant with a different result is not timed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import negmine
from benchmarks.cases import Inputs
from negmine.selection import Mixed

N = 1024
WINDOW = negmine.Select(0.001, 0.05)
MIX = negmine.Mix(hard=1024, pairs=1024, with_query=128)
GUIDE_MARGIN = 0.1
# Relative to the largest entry. negmine keeps scores in fp32 and rounds only results. Plain PyTorch rounds every score to the
# storage dtype before it selects and exponentiates, so its errors are much larger in 16-bit dtypes.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PLAIN_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}
CHUNK = 2**24  # the largest number of elements that torch.quantile accepts
Answer = tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    title: str
    fused: Callable[..., Answer]
    eager: Callable[[Inputs], Answer]
    gemms: int
    returns: tuple[str, ...] = ("loss", "gradient")
    peers: dict[str, Callable[[Inputs], Answer]] = field(default_factory=dict)
    # For an op with random draws: `eager` with the draws of `fused`, for the comparison of results. It is not timed.
    eager_same_draws: Callable[..., Answer] | None = None


def loss_and_gradient(inputs: Inputs, loss_of: Callable[[Tensor], Tensor]) -> Answer:
    query = inputs.query.detach().requires_grad_()  # (B, D)
    loss = loss_of(query)
    loss.backward()
    assert query.grad is not None
    return loss.detach(), query.grad


def fused_loss(**options: object) -> Callable[..., Answer]:
    """A training op: negmine.info_nce with these options."""

    def run(inputs: Inputs, backend: str | None = None) -> Answer:
        return loss_and_gradient(
            inputs,
            lambda query: negmine.info_nce(
                query,
                inputs.positive_key,
                inputs.negatives,
                temperature=inputs.temperature,
                query_ids=inputs.query_ids,
                backend=backend,
                **options,
            ),
        )

    return run


def fused_whole_queue(inputs: Inputs, backend: str | None = None) -> Answer:
    """Without masks, and with a normalisation of the query, as packages with a memory bank compute it."""
    return loss_and_gradient(
        inputs,
        lambda query: negmine.info_nce(
            F.normalize(query, dim=1),
            inputs.positive_key,
            inputs.keys,
            temperature=inputs.temperature,
            backend=backend,
        ),
    )


def eager_whole_queue(inputs: Inputs) -> Answer:
    def loss_of(query: Tensor) -> Tensor:
        query = F.normalize(query, dim=1)
        return cross_entropy(query, inputs, widened(query @ inputs.keys.T))

    return loss_and_gradient(inputs, loss_of)


def in_batch(inputs: Inputs, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """The negatives are the positives of the other queries. The gradients of queries and keys are stacked to (2, B, D)."""
    query, keys = (side.detach().requires_grad_() for side in (inputs.query, inputs.positive_key))  # (B, D) each
    loss = loss_of(query, keys)
    loss.backward()
    assert query.grad is not None and keys.grad is not None
    return loss.detach(), torch.stack([query.grad, keys.grad])


def locked(inputs: Inputs, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """As in_batch, but the keys are frozen, so only the queries get a gradient."""
    return loss_and_gradient(inputs, lambda query: loss_of(query, inputs.positive_key))


def batch_loss(inputs: Inputs, backend: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, keys: negmine.info_nce(query, keys, temperature=inputs.temperature, backend=backend)


def eager_batch_loss(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    own = torch.arange(len(inputs.query), device=inputs.query.device)  # (B,)
    return lambda query, keys: F.cross_entropy(widened(query @ keys.T) / inputs.temperature, own)


def fused_in_batch(inputs: Inputs, backend: str | None = None) -> Answer:
    return in_batch(inputs, batch_loss(inputs, backend))


def eager_in_batch(inputs: Inputs) -> Answer:
    return in_batch(inputs, eager_batch_loss(inputs))


def fused_locked(inputs: Inputs, backend: str | None = None) -> Answer:
    return locked(inputs, batch_loss(inputs, backend))


def eager_locked(inputs: Inputs) -> Answer:
    return locked(inputs, eager_batch_loss(inputs))


def widths_of(inputs: Inputs) -> tuple[int, ...]:
    """Four prefix widths, of which the last is D."""
    return tuple(inputs.keys.shape[1] // part for part in (8, 4, 2, 1))


def fused_matryoshka(inputs: Inputs, backend: str | None = None) -> Answer:
    return loss_and_gradient(
        inputs,
        lambda query: negmine.losses.matryoshka(
            query,
            inputs.positive_key,
            inputs.negatives,
            widths=widths_of(inputs),
            temperature=inputs.temperature,
            query_ids=inputs.query_ids,
            backend=backend,
        ),
    )


def eager_matryoshka(inputs: Inputs) -> Answer:
    def loss_of(query: Tensor) -> Tensor:
        each = [
            replace(inputs, positive_key=inputs.positive_key[:, :width], keys=inputs.keys[:, :width])
            for width in widths_of(inputs)
        ]
        queries = [query[:, :width] for width in widths_of(inputs)]
        losses = [cross_entropy(q, part, masked_scores(q, part)) for q, part in zip(queries, each, strict=True)]
        return torch.stack(losses).sum()

    return loss_and_gradient(inputs, loss_of)


def guide_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """Embeddings of queries, positives and keys by a guide, for which the first half of the columns is used."""
    return tuple(rows[:, : rows.shape[1] // 2] for rows in (inputs.query, inputs.positive_key, inputs.keys))


def fused_guided(inputs: Inputs, backend: str | None = None) -> Answer:
    guided = replace(inputs.negatives, guide=negmine.Guide(*guide_of(inputs), margin=GUIDE_MARGIN))
    return loss_and_gradient(
        inputs,
        lambda query: negmine.info_nce(
            query,
            inputs.positive_key,
            guided,
            temperature=inputs.temperature,
            query_ids=inputs.query_ids,
            backend=backend,
        ),
    )


def eager_guided(inputs: Inputs) -> Answer:
    """As in GISTEmbedLoss of sentence-transformers: the guide's scores of all pairs, and -inf where they are too high."""

    def loss_of(query: Tensor) -> Tensor:
        guide_query, guide_positive, guide_keys = guide_of(inputs)
        limit = (widened(guide_query) * widened(guide_positive)).sum(dim=1, keepdim=True) - GUIDE_MARGIN  # (B, 1)
        is_false = widened(guide_query @ guide_keys.T) > limit  # (B, K)
        return cross_entropy(query, inputs, masked_scores(query, inputs).masked_fill(is_false, float("-inf")))

    return loss_and_gradient(inputs, loss_of)


def as_tokens(inputs: Inputs, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices of tokens: 32 in a query or positive, 128 in a document, or fewer if they do not divide the rows."""
    of_query, of_document = math.gcd(len(query), 32), math.gcd(len(inputs.keys), 128)
    sides = (query, of_query), (inputs.positive_key, of_query), (inputs.keys, of_document)
    query, positive, documents = (rows.unflatten(0, (-1, tokens)) for rows, tokens in sides)
    return query, positive, documents


def fused_late_interaction(inputs: Inputs, backend: str | None = None) -> Answer:
    return loss_and_gradient(
        inputs, lambda query: negmine.losses.late_interaction(*as_tokens(inputs, query), backend=backend)
    )


def eager_late_interaction(inputs: Inputs) -> Answer:
    def loss_of(query: Tensor) -> Tensor:
        tokens, positive, documents = as_tokens(inputs, query)
        scores = widened(torch.einsum("bid,kjd->bkij", tokens, documents)).amax(3).sum(2)  # (B, K)
        own = widened(torch.einsum("bid,bjd->bij", tokens, positive)).amax(2).sum(1)  # (B,)
        nothing = torch.zeros(len(own), dtype=torch.long, device=own.device)
        return F.cross_entropy(torch.cat([own[:, None], scores], 1), nothing)

    return loss_and_gradient(inputs, loss_of)


def fused_maxsim(inputs: Inputs, backend: str | None = None) -> Answer:
    tokens, _, documents = as_tokens(inputs, inputs.query)
    return (negmine.losses.mine_late_interaction(tokens, documents, min(N, len(documents)), backend=backend).scores,)


def hardest_documents(scores: Tensor) -> Answer:
    """The result of maxsim from the scores of all documents."""
    return (scores.topk(min(N, scores.shape[1]), dim=1).values,)


def eager_maxsim(inputs: Inputs) -> Answer:
    tokens, _, documents = as_tokens(inputs, inputs.query)
    return hardest_documents(widened(torch.einsum("bid,kjd->bkij", tokens, documents)).amax(3).sum(2))


def fused_mine(inputs: Inputs, backend: str | None = None) -> Answer:
    return negmine.mine_hardest(inputs.query, inputs.negatives, N, query_ids=inputs.query_ids, backend=backend)


def ranks_of(inputs: Inputs) -> list[int]:
    """The two ends of the window as ranks in the whole queue."""
    return [int(share * len(inputs.keys)) for share in (WINDOW.range_min, WINDOW.range_max)]


def fused_thresholds(inputs: Inputs, backend: str | None = None) -> Answer:
    ids = inputs.query_ids
    return (negmine.rank_thresholds(inputs.query, inputs.negatives, ranks_of(inputs), query_ids=ids, backend=backend),)


def widened(x: Tensor) -> Tensor:
    """16-bit vectors as fp32."""
    return x if x.dtype == torch.float64 else x.float()


def masked_scores(query: Tensor, inputs: Inputs) -> Tensor:
    scores = widened(query @ inputs.keys.T)  # (B, K)
    return scores.masked_fill(inputs.query_ids[:, None] == inputs.negative_ids, float("-inf"))


def cross_entropy(query: Tensor, inputs: Inputs, negatives: Tensor) -> Tensor:
    """negatives (B, M): scores -> the mean InfoNCE loss ()."""
    positive = (widened(query) * widened(inputs.positive_key)).sum(dim=1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, negatives], dim=1) / inputs.temperature  # (B, 1 + M)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def eager_info_nce(inputs: Inputs) -> Answer:
    return loss_and_gradient(inputs, lambda query: cross_entropy(query, inputs, masked_scores(query, inputs)))


def eager_window(inputs: Inputs) -> Answer:
    def loss_of(query: Tensor) -> Tensor:
        scores = masked_scores(query, inputs)  # (B, K)
        pool = (scores > float("-inf")).sum(dim=1)  # (B,)
        first, end = WINDOW.window(pool)  # (B,), (B,)
        longest = int(WINDOW.range_max * scores.shape[1])
        hardest = scores.topk(longest, dim=1).values  # (B, longest)
        rank = torch.arange(longest, device=scores.device)
        outside = (rank < first[:, None]) | (rank >= end[:, None])  # (B, longest)
        return cross_entropy(query, inputs, hardest.masked_fill(outside, float("-inf")))

    return loss_and_gradient(inputs, loss_of)


def eager_mine(inputs: Inputs) -> Answer:
    scores, index = masked_scores(inputs.query, inputs).topk(N, dim=1)  # (B, N), (B, N)
    return scores, index


def eager_thresholds(inputs: Inputs) -> Answer:
    """torch.kthvalue, called once for each rank."""
    scores = masked_scores(inputs.query, inputs)  # (B, K)
    places = [scores.shape[1] - rank for rank in ranks_of(inputs)]  # from the smallest score, counted from 1
    return (torch.stack([scores.kthvalue(place, dim=1).values for place in places], dim=1),)


def quantile_thresholds(inputs: Inputs) -> Answer:
    """torch.quantile, with as many rows at a time as it accepts."""
    scores = masked_scores(inputs.query, inputs)  # (B, K)
    last = scores.shape[1] - 1
    levels = torch.stack([torch.full((), (last - rank) / last, device=scores.device) for rank in ranks_of(inputs)])
    parts = scores.split(max(1, CHUNK // scores.shape[1]))
    return (torch.cat([part.quantile(levels, dim=1, interpolation="nearest").T for part in parts]),)


def attention(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with the keys as values, by the op of F.scaled_dot_product_attention: mean (B, D), log-sum-exp (B,)."""
    aten = torch.ops.aten
    attend = (
        aten._scaled_dot_product_flash_attention if query.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    )
    mean, lse, *_ = attend(query[None, None], keys[None, None], keys[None, None], scale=scale)
    return mean[0, 0], lse.flatten()


def loss_by_attention(attend: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Callable[[Inputs], Answer]:
    """InfoNCE without masks, and its gradient, by attention with the queue as keys and values.

    One forward pass of attention is enough, because both can be computed from the log-sum-exp and the output.
    attend(query, keys, scale) -> mean (B, D), lse (B,).
    """

    def run(inputs: Inputs) -> Answer:
        query = inputs.query.detach().requires_grad_()  # (B, D)
        unit = F.normalize(query, dim=1)  # (B, D)
        mean, lse = attend(unit.detach(), inputs.keys, 1 / inputs.temperature)
        positive = inputs.positive_key.float()  # (B, D)
        x_positive = (unit.detach().float() * positive).sum(dim=1) / inputs.temperature  # (B,)
        share = torch.sigmoid(lse - x_positive)[:, None] / (inputs.temperature * len(positive))  # (B, 1)
        unit.backward((share * (mean.float() - positive)).to(query.dtype))
        assert query.grad is not None
        return -F.logsigmoid(x_positive - lse).mean(), query.grad

    return run


def eager_mochi(inputs: Inputs, draws: Mixed | None = None) -> Answer:
    """MoCHi with its S = pairs + with_query synthetic vectors in memory. draws: given parents and coefficients."""

    def loss_of(query: Tensor) -> Tensor:
        scores = masked_scores(query, inputs)  # (B, K)
        with torch.no_grad():
            synthetic = mixed(query, scores) if draws is None else drawn(query)  # (B, S, D)
        extra = widened(torch.einsum("bd,bsd->bs", query, synthetic.to(query.dtype)))  # (B, S)
        return cross_entropy(query, inputs, torch.cat([scores, extra], dim=1))

    def mixed(query: Tensor, scores: Tensor) -> Tensor:
        hardest = scores.topk(MIX.hard, dim=1).indices  # (B, hard)
        device, B = query.device, len(query)
        row = torch.arange(B, device=device)[:, None]
        one, other = torch.randint(MIX.hard, (2, B, MIX.pairs), device=device)  # (B, pairs) each
        share = torch.rand(B, MIX.pairs, 1, device=device)
        pairs = share * inputs.keys[hardest[row, one]] + (1 - share) * inputs.keys[hardest[row, other]]
        one = torch.randint(MIX.hard, (B, MIX.with_query), device=device)  # (B, with_query)
        share = 0.5 * torch.rand(B, MIX.with_query, 1, device=device)
        with_query = share * query[:, None] + (1 - share) * inputs.keys[hardest[row, one]]
        return F.normalize(torch.cat([pairs, with_query], dim=1), dim=2)  # (B, S, D)

    def drawn(query: Tensor) -> Tensor:
        first, second = draws.parents.unbind(dim=2)  # (B, S), (B, S)
        share = draws.coefficients[..., None]  # (B, S, 1)
        one = torch.where((first < 0)[..., None], query[:, None], inputs.keys[first.clamp(min=0)])  # (B, S, D)
        return F.normalize(share * one + (1 - share) * inputs.keys[second], dim=2)  # (B, S, D)

    return loss_and_gradient(inputs, loss_of)


def eager_mochi_same_draws(inputs: Inputs, drawn_from: Inputs | None = None) -> Answer:
    """drawn_from: the inputs from which parents are drawn, because in another dtype close scores may be ranked differently."""
    source = drawn_from or inputs
    draws = negmine.mix_negatives(source.query, source.negatives, MIX, query_ids=source.query_ids)
    return eager_mochi(inputs, draws)


OPS = {
    "info_nce": Op("InfoNCE, all negatives: loss and gradient", fused_loss(), eager_info_nce, gemms=2),
    "window": Op("InfoNCE, hardest 0.1 % to 5 %: loss and gradient", fused_loss(select=WINDOW), eager_window, gemms=2),
    "whole_queue": Op(
        "InfoNCE without masks: loss and gradient",
        fused_whole_queue,
        eager_whole_queue,
        gemms=2,
        peers={"attention": loss_by_attention(attention)},
    ),
    "in_batch": Op("InfoNCE in the batch: loss and both gradients", fused_in_batch, eager_in_batch, gemms=3),
    "locked": Op("InfoNCE in the batch, its keys frozen: loss and gradient", fused_locked, eager_locked, gemms=2),
    "mine_hardest": Op(f"mine_hardest, N = {N}", fused_mine, eager_mine, gemms=1, returns=("scores", "index")),
    "rank_thresholds": Op(
        "rank_thresholds, two ranks",
        fused_thresholds,
        eager_thresholds,
        gemms=1,
        returns=("thresholds",),
        peers={"quantile": quantile_thresholds},
    ),
    "guided": Op("InfoNCE, false negatives masked by a guide: loss and gradient", fused_guided, eager_guided, gemms=2),
    "matryoshka": Op("four prefix widths: loss and gradient", fused_matryoshka, eager_matryoshka, gemms=2),
    "late_interaction": Op(
        "MaxSim of token matrices: loss and gradient", fused_late_interaction, eager_late_interaction, gemms=1
    ),
    "maxsim": Op(
        f"MaxSim of token matrices: the {N} hardest documents", fused_maxsim, eager_maxsim, gemms=1, returns=("scores",)
    ),
    "mochi": Op(
        "MoCHi (1024, 1024, 128): loss and gradient",
        fused_loss(mix=MIX),
        eager_mochi,
        gemms=2,
        eager_same_draws=eager_mochi_same_draws,
    ),
}


def disagreement(op: str, answer: Answer, truth: Answer, inputs: Inputs, tolerance: float) -> str:
    """A sentence if the answer differs from the truth by more than `tolerance` times the largest entry; otherwise empty."""
    for name, ours, theirs in zip(OPS[op].returns, answer, truth, strict=True):
        if name == "index":
            # Columns with almost equal scores may be in another order, so the scores of the columns are compared.
            scores = masked_scores(inputs.query.float(), in_float32(inputs))  # (B, K)
            ours, theirs = scores.gather(1, ours), scores.gather(1, theirs)  # (B, N), (B, N)
        worst = (ours.float() - theirs.float()).abs().max().item()
        allowed = tolerance * theirs.float().abs().max().item()
        if not worst <= allowed:
            return f"{op}: {name} differs from plain PyTorch in float64 by {worst:.2e}, more than {allowed:.2e}"
    return ""


def stored_as(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return replace(
        inputs, query=inputs.query.to(dtype), positive_key=inputs.positive_key.to(dtype), keys=inputs.keys.to(dtype)
    )


def in_float32(inputs: Inputs) -> Inputs:
    return stored_as(inputs, torch.float32)


def for_truth(inputs: Inputs) -> Inputs:
    """The inputs in float64, or in fp32 if a float64 score matrix would take more than 4 GiB.

    Sums over millions of keys are less accurate in fp32.
    """
    fits = len(inputs.query) * len(inputs.keys) * 8 <= 4 << 30
    return stored_as(inputs, torch.float64 if fits else torch.float32)
