"""Mines triplets: positives and negatives of each query by a published rule, without storing the (B, K) matrix.

The positives are in the pool of equal labels. The farthest key of a pool is the nearest one to -query, and "farther than the
positive" is a bound by a sort key (negmine/ops/sort_key.py). Every rule is therefore computed by a few calls of mine_hardest,
except the sampling in negmine/losses/distance_weighted.py. The dense definition is in negmine/reference/triplets.py.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from negmine import reference
from negmine.losses.distance_weighted import distance_weighted
from negmine.ops import backends, checks, sort_key
from negmine.ops.backends import Kernels
from negmine.ops.negatives import check_labelled_keys
from negmine.ops.pool import Pool, usable
from negmine.ops.vectors import for_kernels, promoted, widened, with_norms
from negmine.ops.windows import Draw
from negmine.reference.triplets import score_farther

POSITIVES = ("easy", "hard", "semihard", "all", "multi_similarity")
NEGATIVES = (
    "hardest",
    "easiest",
    "semihard",
    "semihard_facenet",
    "semihard_band",
    "violating",
    "multi_similarity",
    "distance_weighted",
)
DISTANCES = ("cosine", "euclidean", "squared_euclidean")
SEVERAL = ("all", "multi_similarity")  # rules that may keep more than one positive for a query


class Triplets(NamedTuple):
    """The result of `mine_triplets`, without gradient. A triplet (b, p, n) exists if ``negative[b, p, n] >= 0``.

    Attributes
    ----------
    positive : Tensor (B, P) int64
        The row numbers of the positives among the keys, -1 for an empty entry.
    negative : Tensor (B, P, N) int64
        The row numbers of the negatives for each positive, -1 for an empty entry.
    positive_score : Tensor (B, P) float32
        The scores of the positives, -inf for an empty entry.
    negative_score : Tensor (B, P, N) float32
        The scores of the negatives, -inf for an empty entry.
    num_triplets : Tensor () int64
        The number of triplets.
    num_without : Tensor () int64
        The number of queries without a triplet.

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> found = negmine.losses.mine_triplets(rows, rows, labels, labels, negative="hardest", query_ids=ids, key_ids=ids)
    >>> anchor, positive, negative = found.compact()
    >>> len(anchor) == int(found.num_triplets) == 8
    True
    """

    positive: Tensor  # (B, P) int64
    negative: Tensor  # (B, P, N) int64
    positive_score: Tensor  # (B, P) fp32
    negative_score: Tensor  # (B, P, N) fp32
    num_triplets: Tensor  # () int64
    num_without: Tensor  # () int64

    def compact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The triplets that exist: anchor, positive and negative (T,) int64. T depends on the data, so this synchronises."""
        anchor, p, n = (self.negative >= 0).nonzero(as_tuple=True)
        return anchor, self.positive[anchor, p], self.negative[anchor, p, n]

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The distinct pairs in triplets, sorted: (anchor, positive, anchor, negative), 1-D int64 each. This synchronises."""
        anchor, p, n = self.compact()
        positives, negatives = (torch.stack([anchor, other]).unique(dim=1) for other in (p, n))
        return positives[0], positives[1], negatives[0], negatives[1]


def at_score(score: Tensor) -> Tensor:
    """The sort key of score (...) fp32 that keeps s >= score as a lower bound of a pool, and s < score as an upper bound."""
    return sort_key.pack(score, sort_key.LAST_INDEX)


def above_score(score: Tensor) -> Tensor:
    """The sort key of score (...) fp32 that keeps s > score as a lower bound of a pool."""
    return at_score(torch.nextafter(score, torch.full_like(score, torch.inf)))


def with_bounds(pool: Pool, like: Tensor, lower: Tensor | None = None, upper: Tensor | None = None) -> Pool:
    """The pool bounded by two sort keys for each row of `like` (B,); None is no bound."""
    infinity = torch.full_like(like, torch.inf)
    lower = at_score(-infinity) if lower is None else lower
    return pool._replace(lower=lower, upper=sort_key.pack(infinity, 0) if upper is None else upper)


def _repeated(pool: Pool, P: int) -> Pool:
    """The pool of B * P queries, in which each query is repeated P times."""

    def repeated(per_query: Tensor | None) -> Tensor | None:
        return None if per_query is None else per_query.repeat_interleave(P, 0)

    mask = pool.negative_mask
    return pool._replace(
        negative_mask=mask if mask is None or mask.dim() == 1 else repeated(mask),
        query_ids=repeated(pool.query_ids),
        query_labels=repeated(pool.query_labels),
    )


def _mined(
    kernels: Kernels,
    query: Tensor,
    keys: Tensor,
    others: Pool,
    rule: dict[str, Any],
    draw: Draw,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and indices of the positives (B, P) and negatives (B, P or 1, N) from the kernels.

    width is D without the columns of norms. If the rule does not depend on the positive, the negatives are (B, 1, N).
    """
    positive, negative, N = rule["positive"], rule["negative"], rule["num_negatives"]
    margin, distance = rule["margin"], rule["distance"]
    same, flipped = others._replace(same_label=True), -query  # the farthest of a pool is the nearest to -query

    def nearest(pool: Pool, count: int) -> tuple[Tensor, Tensor]:
        return kernels.mine_hardest(query, keys, count, False, *pool)[:2]

    def farthest(pool: Pool, count: int) -> tuple[Tensor, Tensor]:
        score, index, _ = kernels.mine_hardest(flipped, keys, count, False, *pool)
        return torch.where(index < 0, score, -score), index

    if positive in ("easy", "all"):
        pair = nearest(same, rule["max_positives"])
    elif positive == "hard":
        pair = farthest(same, 1)
    else:
        find = nearest if positive == "multi_similarity" or negative == "hardest" else farthest
        limit = find(others, 1)[0][:, 0]  # (B,) score of the nearest or the farthest negative
        if positive == "semihard":  # the scores of -query that are below -limit
            pair = farthest(with_bounds(same, limit, upper=at_score(-limit)), 1)
        else:
            within = above_score(-score_farther(limit, -margin, distance))
            pair = farthest(with_bounds(same, limit, lower=within), rule["max_positives"])
    positive_score, positive_index = pair  # (B, P)
    B, P = positive_index.shape

    if negative in ("hardest", "easiest"):
        score, index = (nearest if negative == "hardest" else farthest)(others, N)
        return positive_score, positive_index, score[:, None], index[:, None]
    if negative == "distance_weighted":
        score, index = distance_weighted(query, keys, others, N, draw, width)
        return positive_score, positive_index, score[:, None], index[:, None]
    if negative == "multi_similarity":
        limit = score_farther(farthest(same, 1)[0][:, 0], margin, distance)  # (B,)
        score, index = nearest(with_bounds(others, limit, lower=above_score(limit)), N)
        return positive_score, positive_index, score[:, None], index[:, None]
    anchor = positive_score.reshape(B * P)
    band = at_score(score_farther(anchor, margin, distance)) if negative in ("semihard_band", "violating") else None
    farther = None if negative == "violating" else at_score(anchor)
    pool = with_bounds(_repeated(others, P), anchor, lower=band, upper=farther)
    mined = kernels.mine_hardest(query.repeat_interleave(P, 0), keys, N, False, *pool)
    score, index = (t.view(B, P, N) for t in mined[:2])
    if negative == "semihard_facenet":  # if nothing is farther, the easiest negative is used
        easiest_score, easiest_index = (t[:, None] for t in farthest(others, 1))  # (B, 1, 1)
        nothing_farther = (index[:, :, :1] < 0) & (torch.arange(N, device=index.device) == 0)  # (B, P, N)
        score, index = (
            torch.where(nothing_farther, easiest_score, score),
            torch.where(nothing_farther, easiest_index, index),
        )
    return positive_score, positive_index, score, index


def check_rule(
    op: str,
    positive: Any,
    negative: Any,
    margin: Any,
    distance: Any,
    max_positives: Any,
    num_negatives: Any,
) -> dict[str, Any]:
    """The checked rule as keyword arguments of the reference. Raises an error if its parts cannot be combined."""
    checks.require_choice(op, "positive", positive, POSITIVES)
    checks.require_choice(op, "negative", negative, NEGATIVES)
    checks.require_choice(op, "distance", distance, DISTANCES)
    margin = checks.require_scalar(op, "margin", margin, least=0)
    if (positive == "multi_similarity") != (negative == "multi_similarity"):
        name, value = ("negative", negative) if positive == "multi_similarity" else ("positive", positive)
        other = "positive" if name == "negative" else "negative"
        raise checks.refuse(op, name, f"'multi_similarity' if {other} is", value)
    if positive == "semihard" and negative not in ("hardest", "easiest"):
        raise checks.refuse(op, "negative", "'hardest' or 'easiest' if positive is 'semihard'", negative)
    if positive in SEVERAL:
        max_positives = checks.require_count(op, "max_positives", max_positives)
    elif max_positives is not None:
        raise checks.refuse(op, "max_positives", f"None if positive is {positive!r}", max_positives)
    num_negatives = checks.require_count(op, "num_negatives", num_negatives)
    return {
        "positive": positive,
        "negative": negative,
        "margin": margin if isinstance(margin, Tensor) else float(margin),
        "distance": distance,
        "max_positives": max_positives or 1,
        "num_negatives": num_negatives,
    }


def label_masks(pool: Pool, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The pools of equal and of other labels as dense (B, K) bool masks for the reference. Labels are always given."""
    same, other = (cast(Tensor, usable(pool._replace(same_label=kept), query, keys)) for kept in (True, False))
    return same, other


@torch.no_grad()
def triplets_of(
    op: str,
    query: Tensor,
    keys: Tensor,
    pool: Pool,
    rule: dict[str, Any],
    draw: Draw,
    backend: str | None,
) -> Triplets:
    """The triplets for checked arguments."""
    query, keys, width = query.detach(), keys.detach(), query.shape[1]
    vectors = (query, keys) if rule["distance"] == "cosine" else with_norms(query, keys, at_zero=1.0)
    kernels = backends.choose(op, ("mine_hardest",), backend, vectors)
    if kernels is None:
        same, other = label_masks(pool, query, keys)
        mined = reference.mine_triplets(widened(query), widened(keys), same, other, **rule, **draw._asdict())
    else:
        mined = _mined(kernels, for_kernels(vectors[0]), for_kernels(vectors[1]), pool, rule, draw, width)
    positive_score, positive, negative_score, negative = mined
    alone = (negative < 0).all(2).expand_as(positive)  # (B, P): a triplet needs both
    unmatched = (positive < 0)[:, :, None]  # (B, P, 1)
    negative = negative.masked_fill(unmatched, -1)  # (B, P, N)
    exists = negative >= 0
    return Triplets(
        positive.masked_fill(alone, -1),
        negative,
        positive_score.float().masked_fill(alone, -torch.inf),
        negative_score.float().masked_fill(unmatched, -torch.inf),
        exists.sum(),
        (~exists.flatten(1).any(1)).sum(),
    )


def mine_triplets(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    positive: str = "easy",
    negative: str = "semihard",
    margin: float = 0.2,
    distance: str = "cosine",
    max_positives: int | None = None,
    num_negatives: int = 1,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Triplets:
    """Positives p of each query, that is, keys with its label, and for each positive the negatives n that a rule selects.

        s is the score, d the distance; nearer means a larger s; of equal scores, the lower index is nearer

        positive            selects
        "easy"              the nearest positive                             Xuan et al. 2020
        "hard"              the farthest positive                            Hermans et al. 2017
        "all"               the max_positives nearest positives
        "semihard"          the farthest positive that is nearer than the selected negative
        "multi_similarity"  the max_positives farthest with d_p + margin > the smallest d_n

        negative            selects the num_negatives nearest negatives with
        "hardest"           any d_n
        "easiest"           any d_n, but selects the farthest
        "semihard"          s_n < s_p; no triplet if there is none           pytorch-metric-learning BatchEasyHardMiner
        "semihard_facenet"  s_n < s_p; the farthest if there is none         FaceNet; tensorflow/addons triplet_semihard_loss
        "semihard_band"     0 < d_n - d_p <= margin                          pytorch-metric-learning TripletMarginMiner "semihard"
        "violating"         d_n - d_p <= margin                              the same, "all"; with margin=0 its "hard"
        "multi_similarity"  d_n - margin < the largest d_p                   Wang et al. 2019, where margin is epsilon = 0.1
        "distance_weighted" a random sample, weighted by 1 / density of d    Wu et al. 2017; d in [0.5, 1.4)

    Parameters
    ----------
    query : Tensor (B, D)
        The queries. They are not normalised.
    keys : Tensor (K, D)
        A queue, the batch itself, or both concatenated.
    query_labels : Tensor (B,)
        Integer tensor. Keys with an equal label are positives. -1 means unknown and is equal to nothing.
    key_labels : Tensor (K,)
        The labels of the keys.
    positive, negative : str
        The rules above.
    margin : float
        The margin, in units of the distance.
    distance : str
        ``"cosine"``: d = -inner product. ``"euclidean"``: d = ||q - k||, and ``"squared_euclidean"``: d = ||q - k||^2, for
        vectors of any norm. The latter two are mined with fp32 copies that have two more columns, (K, D + 2), and are exact
        except for the rounding of squared norms to fp32. They never select a row that is not finite.
    max_positives : int, optional
        P, the number of positives of each query. Required if `positive` is ``"all"`` or ``"multi_similarity"``; else P is 1.
    num_negatives : int
        N, the number of negatives for each positive.
    query_ids : Tensor (B,), optional
        A key with an equal id is the same sample, and so neither a positive nor a negative. Pass the ids of both queries and
        keys if the queries are also among the keys.
    key_ids : Tensor (K,), optional
        The ids of the keys.
    key_mask : Tensor (K,) or (B, K) bool, optional
        False means that the key is neither a positive nor a negative.
    seed, step, row_offset : int or Tensor
        They determine the random draws of ``"distance_weighted"``. row_offset is the global index of the first query. The
        sample of a query is drawn without replacement, and is the same for all its positives.
    backend : str, optional
        As in `info_nce`.

    Returns
    -------
    Triplets
        Row numbers and scores, without gradient. The function does not synchronise with the host.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    Keys with a NaN score are left out.

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> found = negmine.losses.mine_triplets(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    >>> found.positive.shape, found.negative.shape
    (torch.Size([8, 1]), torch.Size([8, 1, 1]))
    """
    op = "mine_triplets"
    pool = check_labelled_keys(op, query, keys, query_labels, key_labels, query_ids, key_ids, key_mask)
    rule = check_rule(op, positive, negative, margin, distance, max_positives, num_negatives)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    query, keys = promoted(query, keys)
    return triplets_of(op, query, keys, pool, rule, draw, backend)
