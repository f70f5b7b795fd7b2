"""merge_retrievers: merge the candidates of several retrievers, such as two encoders, or an encoder and BM25.

    rank_r(k)     rank of document k in retriever r's list for a query, from 1
    "rrf"         score(k) = sum over the r that found k of  w_r / (rank_constant + rank_r(k))   (Cormack et al. 2009)
    "scores"      score(k) = sum over the r that found k of  w_r (s_r(k) - min s_r) / (max s_r - min s_r); w_r if they are equal
    "round_robin" one document of each list in turn, best first, without repetitions;  score(k) = 1 / rank in the merged list

Of documents with equal scores, the one with the lower row number comes first.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from negmine.mining.result import MiningResult
from negmine.ops import checks
from negmine.options import is_real

OP = "merge_retrievers"
METHODS = ("rrf", "scores", "round_robin")


def merge_retrievers(
    retrievers: Sequence[Any],
    *,
    method: str = "rrf",
    num_negatives: int | None = None,
    weights: Sequence[float] | None = None,
    rank_constant: float = 60.0,
    exclude: Any = None,
) -> MiningResult:
    """Merge the candidates of several retrievers, such as two encoders, or an encoder and BM25, into one result.

        "rrf"         score(k) = sum over the r that found k of  w_r / (rank_constant + rank_r(k)),   ranks from 1
        "scores"      score(k) = sum over the r that found k of  w_r (s_r(k) - min s_r) / (max s_r - min s_r)
        "round_robin" one document of each list in turn, best first, without repetitions

    Parameters
    ----------
    retrievers : sequence
        The first is a MiningResult. The others are MiningResults of the same queries, corpus rows and positives, or pairs
        (scores, indices) of arrays (Q, k), hardest first and padded with -1, as NegativeIndex.search and bm25s return them.
        Positives, documents with the text of the query, and duplicates are removed from such pairs.
    method : str
        "rrf" (reciprocal ranks), "scores" (each retriever's scores of a query scaled to [0, 1]) or "round_robin".
    num_negatives : int, optional
        How many negatives each query gets; default: as many as the longest list has.
    weights : sequence of float, optional
        One weight per retriever, used by "rrf" and "scores"; default: 1 each.
    rank_constant : float
        The constant in the formula of "rrf".
    exclude : sequence, optional
        Documents to remove from such pairs, in any form that mine_hard_negatives takes.

    Returns
    -------
    MiningResult
        The merged negatives and their merged scores. `sources` (Q, n, retrievers) int32 is the rank of each negative in each
        retriever's list, from 0; -1 if it is not in the list. positive_scores are NaN.

    Raises
    ------
    ValueError, TypeError
        If the retrievers do not belong together, or an option is invalid.

    References
    ----------
    "rrf" (reciprocal rank fusion): Cormack et al. 2009.

    Examples
    --------
    >>> rows, other = F.normalize(torch.randn(50, 16), dim=1), F.normalize(torch.randn(50, 16), dim=1)
    >>> first, second = (negmine.mine_hard_negatives(each[:5], each, list(range(5))) for each in (rows, other))
    >>> negmine.mining.merge_retrievers([first, second]).sources.shape
    (5, 3, 2)
    """
    checks.require_choice(OP, "method", method, METHODS)
    if not isinstance(retrievers, (list, tuple)) or not retrievers or not isinstance(retrievers[0], MiningResult):
        raise checks.refuse(OP, "retrievers", "a list that begins with a MiningResult", retrievers, TypeError)
    R = len(retrievers)
    if weights is not None and (len(weights) != R or not all(is_real(weight) and weight >= 0 for weight in weights)):
        raise checks.refuse(OP, "weights", f"{R} numbers of 0 or more", weights)
    checks.require_number(OP, "rank_constant", rank_constant, least=0)
    if num_negatives is not None:
        checks.require_count(OP, "num_negatives", num_negatives)
    first = retrievers[0]
    Q, K = len(first.indices), first.config["corpus_rows"]
    hidden = first.hidden(exclude)
    away = hidden.take(np.arange(Q))
    away_pairs = away.queries * K + away.rows
    lists = [_pair(first, each, f"retrievers[{i}]") for i, each in enumerate(retrievers)]
    n = num_negatives or max(indices.shape[1] for _, indices in lists)

    pairs, places = [], []  # of each retriever: query * K + document (L,), and its place in the query's list
    values = []
    for scores, indices in lists:
        at, slot = np.nonzero(indices >= 0)
        found = at * K + hidden.documents(indices[at, slot])  # (L,)
        stays = ~np.isin(found, away_pairs)
        _, once = np.unique(found, return_index=True)  # the first of duplicates
        stays &= np.isin(np.arange(len(found)), once)
        kept = found[stays]
        starts = np.searchsorted(kept // K, kept // K)  # (L,): kept is in order of queries
        pairs.append(kept)
        places.append(np.arange(len(kept)) - starts)
        values.append(_scaled(kept // K, scores[at, slot][stays].astype(np.float64), Q))
    union, inverse = np.unique(np.concatenate(pairs), return_inverse=True)  # (U,), (all L,)
    retriever = np.repeat(np.arange(R), [len(part) for part in pairs])
    sources = np.full((len(union), R), -1, np.int32)
    sources[inverse.reshape(-1), retriever] = np.concatenate(places)
    share = np.ones(R) if weights is None else np.array(weights, np.float64)
    there = sources >= 0
    if method == "rrf":
        merged = (np.where(there, share / (rank_constant + 1 + sources), 0)).sum(1)
    elif method == "scores":
        scaled = np.zeros((len(union), R))
        scaled[inverse.reshape(-1), retriever] = np.concatenate(values)
        merged = (share * scaled).sum(1)
    else:
        turn = np.where(there, sources.astype(np.int64) * R + np.arange(R), np.iinfo(np.int64).max)
        merged = -turn.min(1).astype(np.float64)
    query = union // K
    ranked = np.lexsort((union % K, -merged, query))
    place = np.arange(len(union)) - np.searchsorted(query, query)[ranked]
    chosen = ranked[place < n]
    where = (query[chosen], place[place < n])
    indices, merged_scores = np.full((Q, n), -1), np.full((Q, n), -np.inf, np.float32)
    of_each = np.full((Q, n, R), -1, np.int32)
    indices[where], of_each[where] = union[chosen] % K, sources[chosen]
    merged_scores[where] = 1 / (1 + where[1]) if method == "round_robin" else merged[chosen]
    arguments = first.config["arguments"] | {"merged": R, "method": method, "num_negatives": n}
    return replace(
        first,
        indices=indices,
        scores=merged_scores,
        sources=of_each,
        positive_scores=np.full(Q, np.nan, np.float32),
        positive_pair_scores=None,
        num_valid=(indices >= 0).sum(1),
        skipped=hidden.count(0, len(hidden.own)),
        config=first.config | {"arguments": arguments},
    )


def _scaled(queries: np.ndarray, scores: np.ndarray, Q: int) -> np.ndarray:
    """scores (L,) of queries (L,), scaled to [0, 1] within each query."""
    low, high = np.full(Q, np.inf), np.full(Q, -np.inf)
    np.minimum.at(low, queries, scores)
    np.maximum.at(high, queries, scores)
    span = (high - low)[queries]
    return np.where(span > 0, (scores - low[queries]) / np.where(span > 0, span, 1), 1.0)


def _pair(first: MiningResult, each: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """scores and indices (Q, k) of a retriever."""
    Q, K = len(first.indices), first.config["corpus_rows"]
    if isinstance(each, MiningResult):
        same = len(each.indices) == Q and each.config["corpus_rows"] == K
        if not same or any(not np.array_equal(a, b) for a, b in zip(each.positives, first.positives, strict=True)):
            wanted = "of the queries, corpus rows and positives of the first"
            raise checks.refuse(
                OP, name, wanted, checks.Phrase(f"{len(each.indices)} queries and {each.config['corpus_rows']} rows")
            )
        return each.scores, each.indices
    if hasattr(each, "documents") and hasattr(each, "scores"):  # of bm25s
        each = (each.scores, each.documents)
    if not isinstance(each, tuple) or len(each) != 2:
        raise checks.refuse(OP, name, "a MiningResult, or a pair (scores, indices)", checks.kind_of(each), TypeError)
    scores, indices = (np.asarray(part) for part in each)
    if indices.ndim != 2 or len(indices) != Q or scores.shape != indices.shape or indices.dtype.kind not in "iu":
        came = checks.Phrase(f"{scores.dtype} of shape {scores.shape} and {indices.dtype} of shape {indices.shape}")
        raise checks.refuse(OP, name, f"scores and int indices of one shape ({Q}, k)", came)
    if ((indices < -1) | (indices >= K)).any():
        raise checks.refuse(OP, name, f"of corpus rows in [0, {K}), or -1", int(indices.max(initial=-1)))
    if scores.dtype.kind not in "iuf" or not np.isfinite(scores[indices >= 0]).all():
        raise checks.refuse(OP, name, "of finite scores", str(scores.dtype))
    return scores, indices.astype(np.int64)
