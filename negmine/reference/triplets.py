"""Triplet mining, the triplet loss and the multi-similarity loss.

    query (B, D), keys (K, D)
    same (B, K) bool: usable keys with the query's label; other (B, K) bool: usable keys with another label
    positive (B, P), negative (B, P, N) int64: row numbers of keys, -1 = none

Nearer means a larger score. Ties go to the lower index. Keys with a NaN score are not candidates.
"""

import torch
from torch import Tensor

from negmine.ops import philox
from negmine.ops.column_lists import gather_rows
from negmine.reference.selection import ranking, scores_of


def distance_of(score: Tensor, distance: str) -> Tensor:
    """The distance of two vectors, computed from their score in mining_scores: -s, sqrt(2 - 2 s), or 2 - 2 s."""
    if distance == "cosine":
        return -score
    squared = (2 - 2 * score).clamp_min(0)
    return squared.sqrt() if distance == "euclidean" else squared


def mining_scores(query: Tensor, keys: Tensor, distance: str) -> Tensor:
    """Scores (B, K) without gradient: inner products, or 1 - ||q - k||^2 / 2, which equals the inner product of unit vectors.

    For rows that are not finite the second is NaN, so they are never selected.
    """
    query, keys = query.detach(), keys.detach()
    if distance == "cosine":
        return scores_of(query, keys)
    q, k = query.double(), keys.double()
    squares = q.square().sum(1)[:, None] + k.square().sum(1)  # (B, K)
    finite = squares.isfinite()  # (B, K)
    return (1 + scores_of(q, k) - squares / 2).to(query.dtype).masked_fill(~finite, torch.nan)


def similarities(query: Tensor, keys: Tensor, usable: Tensor, distance: str) -> Tensor:
    """Similarities (B, K) with gradient: inner products or negated distances; 0, without gradient, for pairs not usable."""
    if distance == "cosine":
        return scores_of(query, keys, usable)
    finite = keys.isfinite().all(1)  # (K,), as in scores_of
    d = torch.cdist(query, torch.where(finite[:, None], keys, 0.0), compute_mode="donot_use_mm_for_euclid_dist")
    d = d.masked_fill(~finite, torch.nan).masked_fill(~usable, 0.0)
    return -d if distance == "euclidean" else -d.square()


def score_farther(score: Tensor, margin: float, distance: str) -> Tensor:
    """The score at a distance that is larger by `margin` than that of `score`; +inf if that distance is negative."""
    if distance == "cosine":
        return score - margin
    if distance == "squared_euclidean":
        return score - margin / 2
    farther = distance_of(score, distance) + margin
    result = torch.where(farther < 0, torch.inf, 1 - farther.square() / 2)
    return torch.where(score.isinf(), score, result)


def log_rarity(score: Tensor, D: int) -> Tensor:
    """log(1 / q(d)), where q is the density of the distance d between random unit vectors. -inf for d of 1.4 or more.

    (2 - D) log d - ((D - 3) / 2) log(1 - d^2 / 4),   d = max(sqrt(2 - 2 s), 0.5)      (Wu et al. 2017, arXiv 1706.07567)
    """
    d = distance_of(score, "euclidean").clamp_min(0.5)
    inverse = (2.0 - D) * d.log() - (D - 3) / 2 * (1 - d.square() / 4).clamp_min(torch.finfo(d.dtype).tiny).log()
    return inverse.masked_fill(~(d < 1.4), -torch.inf)


def chosen(scores: Tensor, allowed: Tensor, count: int, nearest: bool = True) -> tuple[Tensor, Tensor]:
    """The first `count` allowed columns of each row, nearest or farthest first: scores and index (B, count)."""
    index, present = ranking(scores if nearest else -scores, allowed)
    index = torch.nn.functional.pad(index[:, :count], (0, max(0, count - index.shape[1])))
    absent = torch.arange(count, device=index.device) >= present[:, None]  # (B, count)
    found = scores.gather(1, index) if scores.shape[1] else scores.new_zeros(index.shape)
    return found.masked_fill(absent, -torch.inf), index.masked_fill(absent, -1)


def mine_triplets(
    query: Tensor,
    keys: Tensor,
    same: Tensor,
    other: Tensor,
    *,
    positive: str,
    negative: str,
    margin: float,
    distance: str = "cosine",
    max_positives: int = 1,
    num_negatives: int = 1,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and index of positives (B, P) and negatives (B, P, N). negmine.losses.mine_triplets explains the arguments."""
    scores = mining_scores(query, keys, distance)  # (B, K)
    B, K = scores.shape
    if positive == "semihard":
        nearest_other = chosen(scores, other, 1, negative == "hardest")[0]  # (B, 1)
        pair = chosen(scores, same & (scores > nearest_other), 1, nearest=False)
    elif positive == "multi_similarity":
        hardest_other = chosen(scores, other, 1)[0]
        pair = chosen(scores, same & (scores < score_farther(hardest_other, -margin, distance)), max_positives, False)
    else:
        pair = chosen(scores, same, max_positives, nearest=positive != "hard")
    positive_score, positive_index = pair  # (B, P)
    P, N = positive_index.shape[1], num_negatives

    s, s_pos = scores[:, None, :].expand(B, P, K), positive_score[:, :, None]  # (B, P, K), (B, P, 1)
    allowed = other[:, None, :].expand(B, P, K)
    if negative.startswith("semihard"):
        allowed = allowed & (s < s_pos)
    if negative in ("semihard_band", "violating"):
        allowed = allowed & (s >= score_farther(s_pos, margin, distance))
    if negative == "multi_similarity":
        farthest_same = chosen(scores, same, 1, nearest=False)[0][:, :, None]  # (B, 1, 1)
        allowed = allowed & (s > score_farther(farthest_same, margin, distance))
    if negative == "distance_weighted":
        rows = torch.arange(B, device=s.device) + row_offset  # (B,)
        word = philox.words(rows, torch.arange(K, device=s.device), philox.STREAM_WEIGHTED, seed, step)[0]  # (B, K)
        drawn = log_rarity(scores.double(), query.shape[1]) + philox.gumbel(word)  # (B, K)
        kept = chosen(drawn, other & (drawn > -torch.inf), N)[1]  # (B, N)
        inside = torch.zeros(B, K + 1, dtype=torch.bool, device=s.device).scatter(1, kept % (K + 1), True)[:, :K]
        allowed = inside[:, None, :].expand(B, P, K)
    flat = (s.reshape(B * P, K), allowed.reshape(B * P, K))
    negative_score, negative_index = (t.view(B, P, N) for t in chosen(*flat, N, nearest=negative != "easiest"))
    if negative == "semihard_facenet":
        easiest = [t[:, None].expand(B, P, 1) for t in chosen(scores, other, 1, nearest=False)]
        has_none = negative_index[:, :, :1] < 0
        negative_score = torch.cat(
            [torch.where(has_none, easiest[0], negative_score[:, :, :1]), negative_score[:, :, 1:]], 2
        )
        negative_index = torch.cat(
            [torch.where(has_none, easiest[1], negative_index[:, :, :1]), negative_index[:, :, 1:]], 2
        )

    return positive_score, positive_index, negative_score, negative_index


def triplet_loss(
    query: Tensor,
    keys: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.2,
    temperature: float | None = None,
    distance: str = "cosine",
) -> Tensor:
    """The loss of each triplet (B, P, N), 0 if there is no triplet.

    v = distance(q, p) - distance(q, n) + margin;   max(0, v), or softplus(v / temperature)
    """

    def distances(anchor: Tensor, found: Tensor) -> Tensor:
        if distance == "cosine":
            return -(anchor * found).sum(-1)
        if distance == "squared_euclidean":
            return (anchor - found).square().sum(-1)
        return torch.linalg.vector_norm(anchor - found, dim=-1)  # its gradient at distance 0 is 0

    to_positive = distances(query[:, None], gather_rows(keys, positive, query.dtype))  # (B, P)
    to_negative = distances(query[:, None, None], gather_rows(keys, negative, query.dtype))  # (B, P, N)
    violation = to_positive[:, :, None] - to_negative + margin  # (B, P, N)
    loss = violation.relu() if temperature is None else torch.nn.functional.softplus(violation / temperature)
    return loss.masked_fill((positive < 0)[:, :, None] | (negative < 0), 0.0)


def multi_similarity(
    query: Tensor,
    keys: Tensor,
    same: Tensor,
    other: Tensor,
    *,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
    distance: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row (B,), and the numbers of positives and negatives that the mining kept (B,).

    base is a similarity for distance="cosine", else a distance.
    """
    scores = similarities(query, keys, same | other, distance)  # (B, K)
    base = base if distance == "cosine" else -base
    if scores.shape[1] == 0:
        return scores.sum(1), same.sum(1), other.sum(1)
    detached = scores.detach()
    lowest = detached.masked_fill(~same | detached.isnan(), torch.inf).amin(1, keepdim=True)  # (B, 1)
    highest = detached.masked_fill(~other | detached.isnan(), -torch.inf).amax(1, keepdim=True)  # (B, 1)
    positives = same & (detached < highest + epsilon)  # (B, K)
    negatives = other & (detached > lowest - epsilon)

    def log_one_plus_sum_exp(x: Tensor, pool: Tensor) -> Tensor:
        """log(1 + sum over the pool of exp(x)) (B,)."""
        columns = torch.cat([x.masked_fill(~pool, -torch.inf), torch.zeros_like(x[:, :1])], 1)
        return columns.logsumexp(1)

    loss = (
        log_one_plus_sum_exp(-alpha * (scores - base), positives) / alpha
        + log_one_plus_sum_exp(beta * (scores - base), negatives) / beta
    )
    return loss, positives.sum(1), negatives.sum(1)
