"""Rounds of mining and training: a model learns little from negatives that it no longer confuses with the positives.

    in turn       embed with the model as it is now, mine, train, repeat: mining_rounds(embed, train_round, ...)
    side by side  one process mines round after round into a folder; the process that trains asks for the newest complete one
                  (newest_round) whenever it likes: mining_rounds(embed, None, ..., folder=...), the method of ANCE

Either way the corpus may be embedded by the workers that search it: see corpus_embeddings of mine_hard_negatives. The model, the
data and the devices belong to the user's callables.

    round-000003.npz         the result of round 3; it is written last, so a round is complete if this file exists
    round-000003.ages.npz    the ages of its negatives and the share that is new
"""

import contextlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from negmine import reference
from negmine.mining.atomic_file import atomic_write
from negmine.mining.executors import open_queries, pair_scores
from negmine.mining.hard_negatives import OP as MINING
from negmine.mining.hard_negatives import check_options, mine_hard_negatives, open_corpus
from negmine.mining.identity import Side, resolve
from negmine.mining.numpy_file import read_npz
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.result import MiningResult
from negmine.mining.resume import require_folder
from negmine.mining.row_lists import RowLists
from negmine.ops import checks, sort_key
from negmine.options import Select, is_real

OP = "mining_rounds"
EMBEDDED = ("query_embeddings", "corpus_embeddings", "positives")
ROUND = re.compile(r"round-(\d{6,})\.npz")


@dataclass(frozen=True)
class Round:
    """One round of `mining_rounds`.

    Attributes
    ----------
    number : int
        The number of the round, from 0.
    result : MiningResult
        The negatives of the round.
    new : float
        The fraction of its negatives that were not in the previous round; 1.0 in round 0.
    ages : array (Q, n) int64
        How many rounds ago each negative was last mined: 0 for this round, more for old negatives that were kept, -1 for an
        empty entry.
    outcome : Any
        The result of train_round.

    Examples
    --------
    >>> rows = F.normalize(torch.randn(50, 16), dim=1)
    >>> (done,) = negmine.mining.mining_rounds(lambda r: (rows[:5], rows), lambda r, result: r, range(5), rounds=1)
    >>> done.number, done.new
    (0, 1.0)
    """

    number: int
    result: MiningResult
    new: float
    ages: np.ndarray
    outcome: Any = None


def mining_rounds(
    embed: Callable[[int], tuple[Any, Any]],
    train_round: Callable[[int, MiningResult], Any] | None,
    positives: Any,
    *,
    rounds: int = 3,
    keep_old: int = 0,
    max_age: int | None = None,
    min_new: float = 0.0,
    folder: str | os.PathLike | None = None,
    **mining: Any,
) -> list[Round]:
    """Alternate mining and training, or mine rounds and write them to a folder for another process that trains.

        for r = 0 .. rounds - 1:
            queries, corpus = embed(r);   result = mine_hard_negatives(queries, corpus, positives, **mining)
            stop if r > 0 and the fraction of new negatives in result is below min_new
            train_round(r, result), or write the round to `folder`

    Parameters
    ----------
    embed : callable
        embed(r) returns the (Q, D) and (K, D) embeddings of the current model, in any form that mine_hard_negatives accepts. A
        shard of the corpus may be a function without arguments that embeds it; with engine="ray" it is called in the actor
        that searches the shard. If embed returns None, the rounds end.
    train_round : callable or None
        train_round(r, result) trains the model. Its result is stored in Round.outcome. None if `folder` is given and another
        process trains.
    positives : sequence
        As in mine_hard_negatives.
    rounds : int
        The number of rounds, including those that are already in `folder`.
    keep_old : int
        How many negatives of the previous round to keep that are not among the new ones, because the model may forget
        negatives that it no longer sees. The hardest by the current scores are kept. They must pass the current filters, but
        need not be in the window. The result then has num_negatives + keep_old columns.
    max_age : int, optional
        A kept negative is removed if it was last mined more than this many rounds ago. The default is no limit.
    min_new : float
        The rounds stop if the fraction of new negatives is below this value. 0 never stops.
    folder : path, optional
        Each round is written to this folder, completely or not at all, for another process that trains: see `newest_round`.
        An interrupted run resumes after the newest round in the folder. Old rounds may be deleted.
    **mining
        Other arguments of mine_hard_negatives, such as engine, except resume_dir. seed is increased by 1 in each round. With
        process_group, embed(r) returns all queries and this rank's rows of the corpus, and train_round gets the same result
        on every rank; rank 0 writes to `folder`.

    Returns
    -------
    list of Round
        The rounds that were trained, or written to `folder` by this call.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid. An error of `embed` or of the mining on one rank is raised on all ranks; an error of
        `train_round` is not.

    References
    ----------
    ANCE, Xiong et al. 2021 (arXiv 2007.00808).

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
        if max_age is not None:
            checks.require_count(OP, "max_age", max_age, 0)
        if not is_real(min_new) or not 0 <= min_new <= 1:
            raise checks.refuse(OP, "min_new", "a share in [0, 1]", min_new)
        if not callable(embed):
            raise checks.refuse(OP, "embed", "a callable", embed, TypeError)
        known = inspect.signature(mine_hard_negatives).parameters
        checks.require_known(OP, mining, [name for name in known if name not in EMBEDDED])
        check_options(mining)
        if (train_round is None) != (folder is not None) or not (train_round is None or callable(train_round)):
            wanted = "a callable, or None if folder is given and another process trains"
            raise checks.refuse(OP, "train_round", wanted, train_round, TypeError)
        if mining.get("resume_dir") is not None:
            raise checks.refuse(
                OP,
                "resume_dir",
                "left out, because a folder has one run and each round is a run of its own",
                mining["resume_dir"],
            )
        if keep_old and mining.get("rescore") is not None:
            raise checks.refuse(
                OP, "keep_old", "0 if rescore is given, because old negatives are scored by their embeddings", keep_old
            )
        ranks.require_same({"rounds": rounds, "keep_old": keep_old, "max_age": max_age, "min_new": min_new})
        before = None
        if folder is not None:
            require_folder(OP, "folder", folder).mkdir(parents=True, exist_ok=True)
            before = newest_round(folder)
        ranks.require_same({"the newest round of folder": None if before is None else before.number})
    done: list[Round] = []
    for number in range(0 if before is None else before.number + 1, rounds):
        this = _mine_round(embed, number, before, keep_old, max_age, min_new, positives, mining, ranks)
        if this is None:
            break
        if train_round is not None:
            this = replace(this, outcome=train_round(number, this.result))
        else:
            with ranks.together():
                if ranks.rank == 0:
                    _write_round(Path(str(folder)), this, before)
        done.append(this)
        before = this
    return done


def _mine_round(
    embed: Callable, number: int, before: Round | None, keep_old: int, max_age: int | None, min_new: float, positives: Any,
    mining: dict, ranks: ProcessRanks,
) -> Round | None:  # fmt: skip
    """The round; None where the rounds end."""
    with ranks.together():
        embedded = embed(number)
        if embedded is not None and not (isinstance(embedded, (tuple, list)) and len(embedded) == 2):
            wanted = "a function that returns (query_embeddings, corpus_embeddings), or None"
            came = checks.Phrase(f"one that returns {checks.kind_of(embedded)}")
            raise checks.refuse(OP, "embed", wanted, came, TypeError)
        ranks.require_same({"embed returns None": embedded is None})
    if embedded is None:
        return None
    with contextlib.ExitStack() as stack:
        with ranks.together():
            queries = open_queries(MINING, embedded[0], ranks, positives)
            corpus = open_corpus(mining, ranks, stack, queries, embedded[1])
        seed = mining.get("seed", 0) + number
        result = mine_hard_negatives(queries, corpus, positives, **{**mining, "seed": seed})
        new = 1.0 if before is None else new_share(result.indices, before.result.indices)
        if new < min_new and before is not None:
            return None
        ages = np.where(result.indices >= 0, 0, -1)
        if keep_old:
            with ranks.together():
                given = (queries, corpus, positives, mining)
                result, ages = _add_old_negatives(result, before, keep_old, max_age, *given)
        return Round(number, result, new, ages)


def newest_round(folder: str | os.PathLike) -> Round | None:
    """The newest complete round that mining_rounds wrote to a folder; None before the first.

    It never returns a half-written round: a round that is being written, or whose writer was killed, does not count.

    Parameters
    ----------
    folder : path
        The folder that mining_rounds was given.

    Returns
    -------
    Round or None
        The round; its outcome is None. Its result has no texts.

    Raises
    ------
    ValueError
        If a file of the round is damaged.

    Examples
    --------
    >>> import tempfile
    >>> folder, rows = tempfile.mkdtemp(), F.normalize(torch.randn(50, 16), dim=1)
    >>> negmine.mining.newest_round(folder) is None
    True
    >>> done = negmine.mining.mining_rounds(lambda r: (rows[:5], rows), None, range(5), rounds=2, folder=folder)
    >>> negmine.mining.newest_round(folder).number
    1
    """
    place = require_folder("newest_round", "folder", folder)
    names = [ROUND.fullmatch(entry.name) for entry in os.scandir(place)] if place.is_dir() else []
    for number in sorted((int(name[1]) for name in names if name), reverse=True):
        path, ages_path = _paths(place, number)
        try:
            result, extra = MiningResult.load(path), read_npz(ages_path, ("ages", "new"))
        except ValueError:
            if path.is_file() and ages_path.is_file():
                raise
            continue  # deleted meanwhile
        if extra.keys() != {"ages", "new"} or extra["ages"].shape != result.indices.shape:
            raise ValueError(f"newest_round: {str(ages_path)!r} is damaged or is of another round")
        return Round(number, result, float(extra["new"]), extra["ages"])
    return None


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"round-{number:06d}.npz", folder / f"round-{number:06d}.ages.npz"


def _write_round(folder: Path, this: Round, before: Round | None) -> None:
    """Write a round, its result last; raises ValueError if the round before it is of another job."""
    if before is not None:
        was, now = (_job(each.result) for each in (before, this))
        changed = [name for name in was | now if was.get(name) != now.get(name)]
        if changed:
            wanted = "a new one, or that of the same positives and options"
            raise checks.refuse(OP, "folder", wanted, checks.Phrase(f"{folder}, which differs in {changed[0]}"))
    path, ages_path = _paths(folder, this.number)
    with atomic_write(OP, ages_path) as file:
        np.savez(file, ages=this.ages, new=np.float64(this.new))
    this.result.save(path)


def _job(result: MiningResult) -> dict[str, Any]:
    """What all rounds of one folder share."""
    config = result.config
    content = {name: content for name, content in config["content"].items() if not name.endswith("_embeddings")}
    arguments = {name: value for name, value in config["arguments"].items() if name != "seed"}
    return content | arguments | {"rows": config["corpus_rows"], "number of negatives": result.indices.shape[1]}


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
    result: MiningResult, before: Round | None, keep: int, max_age: int | None, queries: Any, corpus: Any, positives: Any,
    mining: dict,
) -> tuple[MiningResult, np.ndarray]:  # fmt: skip
    """The result with up to `keep` old negatives of each query, rescored, filtered and ranked among the new, and all ages.

    queries, corpus: as mining opened them.
    """
    Q = len(result.indices)
    kept_rows, kept_scores = np.full((Q, keep), -1), np.full((Q, keep), -np.inf, np.float32)
    kept_ages = np.full((Q, keep), -1)
    if before is not None:
        old, old_ages = before.result.indices, before.ages + 1  # (Q, m) each
        query_names, corpus_names = (
            Side.open(OP, (ids, texts), mining.get(ids), mining.get(texts), count, blank)
            for ids, texts, count, blank in (
                ("query_ids", "query_texts", Q, 0),
                ("corpus_ids", "corpus_texts", len(corpus), 1),
            )
        )
        given = (positives, mining.get("exclude"))
        hidden = resolve(OP, query_names, corpus_names, *given, Q, len(corpus), queries.row_digests, warn=False)
        usable = (old >= 0) & ~_is_in(old, result.indices) & ~_is_in(old, hidden.take(np.arange(Q)).padded())
        if max_age is not None:
            usable &= old_ages <= max_age
        scores = np.full(old.shape, np.nan, np.float32)
        asked = RowLists(np.r_[0, np.cumsum(usable.sum(1))], old[usable])
        scores[usable] = pair_scores(corpus, queries, asked, mining.get("backend"))
        select = mining.get("select") or Select()
        filters = replace(select, range_min=0, range_max=None)
        current = torch.from_numpy(scores)
        kept = reference.filtered(
            current, torch.from_numpy(result.positive_scores), filters, torch.from_numpy(usable) & current.isfinite()
        )
        sort_keys = sort_key.pack(current, torch.from_numpy(old).clamp_min(0)).masked_fill(~kept, sort_key.NOWHERE)
        best = sort_keys.sort(dim=1, descending=True)
        sort_keys, at = best.values[:, :keep], best.indices[:, :keep]
        width = sort_keys.shape[1]
        kept_scores[:, :width], kept_rows[:, :width] = (part.numpy() for part in sort_key.unpack(sort_keys))
        kept_ages[:, :width] = np.take_along_axis(old_ages, at.numpy(), 1)
    indices, scores = np.c_[result.indices, kept_rows], np.c_[result.scores, kept_scores]
    ages = np.c_[np.zeros_like(result.indices), kept_ages]
    sort_keys = sort_key.pack(torch.from_numpy(scores), torch.from_numpy(indices).clamp_min(0))
    ranked = sort_keys.masked_fill(torch.from_numpy(indices < 0), sort_key.NOWHERE).sort(dim=1, descending=True)
    scores, indices = (part.numpy() for part in sort_key.unpack(ranked.values))
    ages = np.where(indices < 0, -1, np.take_along_axis(ages, ranked.indices.numpy(), 1))
    return replace(result, indices=indices, scores=scores, num_valid=(indices >= 0).sum(1)), ages
