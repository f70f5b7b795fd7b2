"""Rounds of mining and training: a model learns little from negatives that it no longer confuses with the positives.

The method is that of ANCE (Xiong et al. 2021, arXiv 2007.00808), but synchronous: embed with the current model, mine, train,
repeat. The model, the data and the devices belong to the two callables.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from negmine import reference
from negmine.mining.executors import LocalExecutor, open_queries
from negmine.mining.hard_negatives import mine_hard_negatives
from negmine.mining.identity import Side, resolve
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.result import MiningResult
from negmine.mining.row_lists import RowLists
from negmine.mining.sources import Rows, resolve_device
from negmine.ops import checks, sort_key
from negmine.options import Select, is_real

OP = "mining_rounds"


@dataclass(frozen=True)
class Round:
    """One round of `mining_rounds`.

    Attributes
    ----------
    number : int
        From 0.
    result : MiningResult
        What train_round was given.
    new : float
        The share of its negatives that the round before did not have; 1.0 in round 0.
    outcome : Any
        What train_round returned.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(50, 16), dim=1)
    >>> (done,) = negmine.mining.mining_rounds(lambda r: (rows[:5], rows), lambda r, result: r, range(5), rounds=1)
    >>> done.number, done.new
    (0, 1.0)
    """

    number: int  # from 0
    result: MiningResult  # what was handed to train_round
    new: float  # share of its negatives that the round before did not have; 1.0 in round 0
    outcome: Any  # what train_round returned


def mining_rounds(
    embed: Callable[[int], tuple[Any, Any]],
    train_round: Callable[[int, MiningResult], Any],
    positives: Any,
    *,
    rounds: int = 3,
    keep_old: int = 0,
    min_new: float = 0.0,
    **mining: Any,
) -> list[Round]:
    """Alternate mining and training.

        for r = 0 .. rounds - 1:
            queries, corpus = embed(r);   result = mine_hard_negatives(queries, corpus, positives, **mining)
            stop, before training, where less than min_new of result's negatives are new and r > 0
            train_round(r, result)

    Parameters
    ----------
    embed : callable
        embed(r) returns the (Q, D) and (K, D) embeddings of the model as it is now, in any form that mine_hard_negatives
        takes.
    train_round : callable
        train_round(r, result) trains. What it returns is kept in Round.outcome.
    positives : sequence
        As in mine_hard_negatives.
    rounds : int
        How many.
    keep_old : int
        Up to this many negatives of the round before that are not among the new ones are added, the hardest by today's
        scores first, because a negative that was learnt and dropped may be forgotten. They pass today's filters, but need
        not be in the window. The result then has num_negatives + keep_old columns.
    min_new : float
        Stop when the share of new negatives is below this; 0 never stops.
    **mining
        Further arguments of mine_hard_negatives, except resume_dir. seed grows by 1 each round. With process_group embed(r)
        returns all queries and the rank's own rows of the corpus, and train_round of every rank gets the same result.

    Returns
    -------
    list of Round
        The rounds that were trained.

    Raises
    ------
    ValueError, TypeError
        For input that does not fit. What embed or the mining raises on one rank is raised on all; what train_round raises
        is not.

    References
    ----------
    ANCE, Xiong et al. 2021 (arXiv 2007.00808), here synchronous.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(50, 16), dim=1)
    >>> done = negmine.mining.mining_rounds(lambda r: (rows[:5], rows), lambda r, result: None, range(5), rounds=2)
    >>> len(done)
    2
    """
    ranks = ProcessRanks(OP, mining.get("process_group"))
    with ranks.together():
        ranks.require_group()
        checks.require_count(OP, "rounds", rounds)
        checks.require_count(OP, "keep_old", keep_old, 0)
        if not is_real(min_new) or not 0 <= min_new <= 1:
            raise checks.refuse(OP, "min_new", "a share in [0, 1]", min_new)
        for name, function in {"embed": embed, "train_round": train_round}.items():
            if not callable(function):
                raise checks.refuse(OP, name, "a callable", function, TypeError)
        if mining.get("resume_dir") is not None:
            raise checks.refuse(
                OP, "resume_dir", "left out: a folder holds one run, and every round is one", mining["resume_dir"]
            )
        if keep_old and mining.get("rescore") is not None:
            raise checks.refuse(
                OP, "keep_old", "0 where rescore is given: old negatives are scored by their embeddings", keep_old
            )
        ranks.require_same({"rounds": rounds, "keep_old": keep_old, "min_new": min_new})
    done: list[Round] = []
    for number in range(rounds):
        with ranks.together():
            queries, corpus = embed(number)
        result = mine_hard_negatives(queries, corpus, positives, **{**mining, "seed": mining.get("seed", 0) + number})
        old = done[-1].result.indices if done else None
        new = 1.0 if old is None else new_share(result.indices, old)
        if new < min_new and number:
            break
        if keep_old:
            with ranks.together():
                result = _add_old_negatives(result, old, keep_old, queries, corpus, positives, mining, ranks)
        done.append(Round(number, result, new, train_round(number, result)))
    return done


def _is_in(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """rows (Q, n), others (Q, m) -> (Q, n) bool: the entry is in the same query's others."""
    queries = np.arange(len(rows))[:, None]
    step = max(rows.max(initial=0), others.max(initial=0)) + 2  # so that -1 is no row of the previous query
    return np.isin(queries * step + rows, queries * step + others)


def new_share(now: np.ndarray, before: np.ndarray) -> float:
    """The share of the negatives `now` (Q, n) that are not among `before` (Q, m); 0 where there are none."""
    some = now >= 0
    return float((some & ~_is_in(now, before)).sum() / max(1, some.sum()))


def _add_old_negatives(
    result: MiningResult, old: np.ndarray | None, keep: int, queries: Any, rows: Any, positives: Any, mining: dict,
    ranks: ProcessRanks,
) -> MiningResult:  # fmt: skip
    """The result with up to `keep` old negatives (Q, m) of each query, rescored, filtered and ranked among the new."""
    Q = len(result.indices)
    kept_rows, kept_scores = np.full((Q, keep), -1), np.full((Q, keep), -np.inf, np.float32)
    if old is not None:
        query_rows = open_queries(OP, queries, ranks, positives)
        rows = Rows.open(OP, "corpus_embeddings", rows)
        where = resolve_device(OP, mining.get("device"), query_rows if query_rows.device else rows)
        corpus = LocalExecutor(OP, rows, where, ranks, None)
        usable = (old >= 0) & ~_is_in(old, result.indices)
        query_names, corpus_names = (
            Side.open(OP, (ids, texts), mining.get(ids), mining.get(texts), count, blank)
            for ids, texts, count, blank in (
                ("query_ids", "query_texts", Q, 0),
                ("corpus_ids", "corpus_texts", len(corpus), 1),
            )
        )
        sides = (query_names, corpus_names)
        given = (positives, mining.get("exclude"))
        hidden = resolve(OP, *sides, *given, Q, len(corpus), query_rows.row_digests, warn=False)
        usable &= ~_is_in(old, hidden.take(np.arange(Q)).padded())
        scores = np.full(old.shape, np.nan, np.float32)
        asked = RowLists(np.r_[0, np.cumsum(usable.sum(1))], old[usable])
        scores[usable] = corpus.pair_scores(query_rows, asked, mining.get("backend"))
        select = mining.get("select") or Select()
        filters = replace(select, range_min=0, range_max=None)
        current = torch.from_numpy(scores)
        kept = reference.filtered(
            current, torch.from_numpy(result.positive_scores), filters, torch.from_numpy(usable) & ~current.isnan()
        )
        sort_keys = sort_key.pack(current, torch.from_numpy(old).clamp_min(0)).masked_fill(~kept, sort_key.NOWHERE)
        best = sort_keys.sort(dim=1, descending=True).values[:, :keep]
        width = best.shape[1]
        kept_scores[:, :width], kept_rows[:, :width] = (part.numpy() for part in sort_key.unpack(best))
    indices, scores = np.c_[result.indices, kept_rows], np.c_[result.scores, kept_scores]
    sort_keys = sort_key.pack(torch.from_numpy(scores), torch.from_numpy(indices).clamp_min(0))
    sort_keys = (
        sort_keys.masked_fill(torch.from_numpy(indices < 0), sort_key.NOWHERE).sort(dim=1, descending=True).values
    )
    scores, indices = (part.numpy() for part in sort_key.unpack(sort_keys))
    return replace(result, indices=indices, scores=scores, num_valid=(indices >= 0).sum(1))
