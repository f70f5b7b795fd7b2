"""Mine, train, mine again: negatives that a model no longer confuses teach it little (ANCE, Xiong et al. 2021, arXiv 2007.00808).

Here a round is synchronous: embed with the model as it is, mine, hand the negatives over, repeat. The callables own the model,
the data and the devices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from negmine import backends, checks, order, reference
from negmine.options import Select, is_real
from negmine.search.index import OPS, device_of
from negmine.search.lists import row_lists
from negmine.search.mine import mine_hard_negatives
from negmine.search.result import MiningResult
from negmine.search.rows import Rows
from negmine.search.scan import pair_scores

OP = "mining_rounds"
NOT_A_ROUNDS = ("resume_dir", "process_group")  # one folder holds one run; old negatives are scored by one process


@dataclass(frozen=True)
class Round:
    """One round of mining_rounds."""

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
    """Alternate mining and training, `rounds` times.

        for r = 0 .. rounds - 1:
            queries, corpus = embed(r);   result = mine_hard_negatives(queries, corpus, positives, **mining)
            stop, before training, where less than min_new of result's negatives are new and r > 0
            train_round(r, result)

    embed(r): the (Q, D) and (K, D) embeddings as the model now makes them, in any form that mine_hard_negatives takes.
    train_round(r, result): trains; what it returns is kept as Round.outcome.
    keep_old: up to so many negatives of the round before that are not among the new ones join them, hardest by today's scores
        first: a negative learnt and dropped may be forgotten. They pass today's filters, never the window. result then has
        num_negatives + keep_old columns, hardest first.
    min_new: share of new negatives below which another round would teach the same again; 0 never stops.
    mining: mine_hard_negatives' own arguments, save resume_dir and process_group. seed grows by 1 a round.

    Returns the rounds that were trained. Raises ValueError or TypeError for what does not fit.
    """
    checks.require_count(OP, "rounds", rounds)
    checks.require_count(OP, "keep_old", keep_old, 0)
    if not is_real(min_new) or not 0 <= min_new <= 1:
        raise checks.refuse(OP, "min_new", "a share in [0, 1]", min_new)
    for name, function in {"embed": embed, "train_round": train_round}.items():
        if not callable(function):
            raise checks.refuse(OP, name, "a callable", function, TypeError)
    for name in NOT_A_ROUNDS:
        if mining.get(name) is not None:
            raise checks.refuse(OP, name, "left out: a round is mined by one process, in one go", mining[name])
    done: list[Round] = []
    for number in range(rounds):
        queries, corpus = embed(number)
        result = mine_hard_negatives(queries, corpus, positives, **{**mining, "seed": mining.get("seed", 0) + number})
        old = done[-1].result.indices if done else None
        new = 1.0 if old is None else share_new(result.indices, old)
        if new < min_new and number:
            break
        if keep_old:
            result = _joined(result, old, keep_old, queries, corpus, mining)
        done.append(Round(number, result, new, train_round(number, result)))
    return done


def _among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """rows (Q, n), others (Q, m) -> (Q, n) bool: the entry is in the same query's others."""
    queries = np.arange(len(rows))[:, None]
    step = max(rows.max(initial=0), others.max(initial=0)) + 2  # -1 stays apart from the query before
    return np.isin(queries * step + rows, queries * step + others)


def share_new(now: np.ndarray, before: np.ndarray) -> float:
    """The share of the negatives `now` (Q, n) that are not among `before` (Q, m); 0 where there are none."""
    some = now >= 0
    return float((some & ~_among(now, before)).sum() / max(1, some.sum()))


def _joined(
    result: MiningResult, old: np.ndarray | None, keep: int, queries: Any, corpus: Any, mining: dict
) -> MiningResult:
    """The result with up to `keep` old negatives (Q, m) of each query, rescored, filtered and ranked among the new."""
    Q = len(result.indices)
    kept_rows, kept_scores = np.full((Q, keep), -1), np.full((Q, keep), -np.inf, np.float32)
    if old is not None:
        asked, rows = Rows.open(OP, "query_embeddings", queries), Rows.open(OP, "corpus_embeddings", corpus)
        where = device_of(OP, mining.get("device"), asked if asked.device else rows)
        empty = np.empty(0, np.int64)
        ops = backends.choose(OP, OPS, mining.get("backend"), (asked.gather(empty, where), rows.gather(empty, where)))
        given = mining.get("exclude")
        excluded = None if given is None else row_lists(OP, "exclude", given, Q, len(rows))
        fit = (old >= 0) & ~_among(old, result.indices)
        for lists in (result.positives, excluded):
            if lists is not None:
                fit &= ~_among(old, lists.padded())
        at, slot = np.nonzero(fit)
        scores = np.full(old.shape, np.nan, np.float32)
        with torch.no_grad():
            scores[at, slot] = pair_scores(
                ops, lambda some: asked.gather(some, where), lambda some: rows.gather(some, where), at, old[at, slot]
            )
        select = mining.get("select") or Select()
        filters = replace(select, range_min=0, range_max=None)
        today = torch.from_numpy(scores)
        usable = reference.filtered(
            today, torch.from_numpy(result.positive_scores), filters, torch.from_numpy(fit) & ~today.isnan()
        )
        places = order.pack(today, torch.from_numpy(old).clamp_min(0)).masked_fill(~usable, order.NOWHERE)
        best = places.sort(dim=1, descending=True).values[:, :keep]
        width = best.shape[1]
        kept_scores[:, :width], kept_rows[:, :width] = (part.numpy() for part in order.unpack(best))
    indices, scores = np.c_[result.indices, kept_rows], np.c_[result.scores, kept_scores]
    places = order.pack(torch.from_numpy(scores), torch.from_numpy(indices).clamp_min(0))
    places = places.masked_fill(torch.from_numpy(indices < 0), order.NOWHERE).sort(dim=1, descending=True).values
    scores, indices = (part.numpy() for part in order.unpack(places))
    return replace(result, indices=indices, scores=scores, num_valid=(indices >= 0).sum(1))
