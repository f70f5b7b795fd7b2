"""hardness_report: check the arguments, process the queries in batches, and compute the figures.

for each batch of sampled queries
    rows at sampled ranks of each bin            rank_thresholds
    the hardest and the easiest tail             mine_hardest with the query, and with the negated query
    the rank of the positive                     count_negatives
    the same with an older snapshot              mine_hardest, and scores of some rows
then the nearest rows of each positive           mine_hardest with corpus rows as queries
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.atomic_file import require_output
from negmine.mining.identity import Side, resolve
from negmine.mining.memory_budget import DEFAULT_MEMORY
from negmine.mining.progress import progress
from negmine.mining.row_lists import RowLists
from negmine.mining.sources import Rows, resolve_device
from negmine.ops import checks
from negmine.options import is_real
from negmine.report import figures as fig
from negmine.report.inputs import (
    OP,
    Classes,
    Measure,
    checked_classes,
    checked_edges,
    checked_fraction,
    checked_measures,
    measured,
)
from negmine.report.ranking import Ranking, norms
from negmine.report.result import HardnessReport
from negmine.report.suspects import TOP, Suspects, near_duplicates, same_text
from negmine.version import __version__

MOST_QUERIES = 1024  # larger batches are not faster
COMPARED = 1024  # how many corpus rows are ranked for the comparison of snapshots
OVERLAPS = (1, 10, 100)  # numbers of hardest rows compared between snapshots, in addition to the tail


@dataclass
class _Run:
    """The inputs of all batches, and the results so far."""

    now: Ranking
    before: Ranking | None
    numbers: np.ndarray  # (Q,) global numbers of the sampled queries
    hidden: RowLists  # the rows outside the pools of the sampled queries
    anchor: Tensor  # (Q,) fp32 score of the best positive, NaN if there is none
    edges: tuple[float, ...]
    tail: float
    samples: int
    seed: int
    classes: Classes | None
    measures: dict[str, Measure]
    suspects: Suspects
    compared: Tensor  # (S,) corpus rows whose order is compared
    per_query: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hard_count: np.ndarray = field(default_factory=lambda: np.empty(0))
    easy_count: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def depth(self) -> int:
        """The size of the largest tail of any query."""
        return max(1, int(self.tail * len(self.now.corpus)))

    @property
    def overlap_sizes(self) -> list[int]:
        return [n for n in OVERLAPS if n < self.depth] + [self.depth]

    def keep(self, name: str, values: Tensor | np.ndarray) -> None:
        self.per_query.setdefault(name, []).append(np.asarray(values.cpu() if isinstance(values, Tensor) else values))

    def batch(self, begin: int, end: int) -> None:
        now, K, bins = self.now, len(self.now.corpus), len(self.edges) - 1
        query, pool = now.queries[begin:end], now.pool(self.hidden, begin, end)
        size = K - torch.from_numpy(self.hidden.sizes[begin:end])  # (B,)
        numbers = torch.from_numpy(self.numbers[begin:end])  # (B,)

        bounds = fig.rank_bounds(self.edges, size)  # (B, bins + 1)
        ranks = fig.sampled_ranks(bounds, self.samples, numbers, self.seed).to(query.device)  # (B, bins * samples)
        scores, found = (part.cpu().numpy() for part in now.at_ranks(query, ranks, pool))  # (B, bins * samples) each
        of_query = np.broadcast_to(self.numbers[begin:end, None], found.shape)
        self.keep("score", fig.bin_means(np.where(found >= 0, scores.astype(np.float64), np.nan), bins))
        if self.classes is not None:
            same = self.classes.queries[of_query] == self.classes.corpus[found]
            self.keep("same_class", fig.bin_means(np.where(found >= 0, same, np.nan), bins))
        for name, measure in self.measures.items():
            self.keep(f"similarity/{name}", fig.bin_means(measured(name, measure, of_query, found), bins))
        self.keep("bin_share", (bounds.diff(dim=1) / size.clamp_min(1)[:, None]).numpy())

        count = (self.tail * size.double()).floor().long().clamp_min(1).minimum(size)  # (B,)
        self.keep("tail_share", (count / size.clamp_min(1)).numpy())
        depth = self.depth
        hard_scores, hard = now.hardest(query, min(max(depth, TOP), K), pool)  # (B, depth or TOP)
        past = torch.arange(depth, device=hard.device) >= count.to(hard.device)[:, None]  # (B, depth)
        hard_tail = hard[:, :depth].masked_fill(past, -1)
        easy_tail = now.hardest(-query, depth, pool)[1].masked_fill(past, -1)
        for tally, tail in ((self.hard_count, hard_tail), (self.easy_count, easy_tail)):
            tally += np.bincount(tail[tail >= 0].cpu().numpy(), minlength=K)

        anchor = self.anchor[begin:end]
        rank = size + 1 - now.count_not_above(query, anchor, pool).cpu()  # (B,) 1 = first
        self.keep("positive_rank", torch.where(anchor.isnan().cpu(), 0, rank))
        self.suspects.batch(begin, hard_scores[:, :TOP].cpu(), hard[:, :TOP].cpu(), anchor.cpu())
        if self.before is not None:
            self.drift(begin, end, hard_tail)

    def drift(self, begin: int, end: int, hard_tail: Tensor) -> None:
        now, before = self.now, self.before
        assert before is not None
        pool = before.pool(self.hidden, begin, end)
        _, old = before.hardest(before.queries[begin:end], self.depth, pool)  # (B, depth)
        old = old.masked_fill(hard_tail < 0, -1)
        kept = [(fig.shared(hard_tail[:, :n], old[:, :n]) / (old[:, :n] >= 0).sum(1)).cpu() for n in self.overlap_sizes]
        self.keep("overlap", torch.stack(kept, 1).double())
        scores = [side.queries[begin:end].double() @ side.corpus[self.compared].double().T for side in (now, before)]
        self.keep("rank_correlation", fig.spearman(*scores))  # of (B, S) each


def _best_positive(ranking: Ranking, positives: RowLists) -> Tensor:
    """(Q,) fp32: the highest score of each query's positives; NaN if it has none."""
    pairs = ranking.pair_scores(positives.queries, positives.rows)  # (P,)
    return torch.from_numpy(positives.reduce(pairs, "max")).to(ranking.queries.device)


def _consistency(run: _Run, K: int) -> dict[str, np.ndarray]:
    """How often each row is in a tail, compared with queries that choose independently."""
    Q, chance = len(run.numbers), float(np.concatenate(run.per_query["tail_share"]).mean())
    out: dict[str, np.ndarray] = {"consistency_chance": np.array(chance)}
    for side, counts in (("hard", run.hard_count), ("easy", run.easy_count)):
        most = int(counts.max(initial=0))
        out[f"{side}_count"] = counts.astype(np.int32)  # (K,)
        ratio = fig.variance_ratio(counts, Q, chance)
        out[f"{side}_variance_ratio"], out[f"{side}_agreement"] = np.array(ratio), np.array((ratio - 1) / max(Q - 1, 1))
        out[f"{side}_histogram"] = np.bincount(counts.astype(np.int64), minlength=most + 1)
        out[f"{side}_expected"] = fig.binomial(Q, chance, most) * K
    return out


def _figures(run: _Run, classes: Classes | None) -> dict[str, np.ndarray]:
    joined = {name: np.concatenate(parts) for name, parts in run.per_query.items()}
    share = joined["bin_share"].mean(0)  # (bins,)
    out = {"edges": np.array(run.edges), "queries": run.numbers, "bin_share": share}
    for name in ("score", "same_class", *(f"similarity/{measure}" for measure in run.measures)):
        if name in joined:
            out[f"{name}_mean"], out[f"{name}_error"] = fig.over_queries(joined[name])
    for name in run.measures:
        mean = out[f"similarity/{name}_mean"]
        known = np.isfinite(mean) & (share > 0)
        weight = share[known].sum()
        out[f"similarity/{name}_overall"] = np.array((mean[known] * share[known]).sum() / weight if weight else np.nan)
    if classes is not None:
        is_own_class = classes.corpus[run.hidden.rows] == classes.queries[run.numbers[run.hidden.queries]]
        num_hidden = np.bincount(run.hidden.queries, is_own_class, minlength=len(run.numbers))  # of the query's class
        M = len(classes.corpus) - run.hidden.sizes
        rate = (classes.sizes[classes.queries[run.numbers]] - num_hidden) / np.maximum(M, 1)
        out["same_class_chance"] = np.array(rate.mean())
    out["positive_rank"], out["positive_score"] = joined["positive_rank"], run.anchor.cpu().numpy()
    for name in ("overlap", "rank_correlation"):
        if name in joined:
            out[name] = joined[name]
    return out


def _records(run: _Run, pairs: list[tuple], sides: tuple[Side, Side]) -> list[dict[str, Any]]:
    """Tuples (query, positive or -1, row, numbers) as records with ids and texts."""
    out = []
    for query, positive, row, numbers in pairs:
        record = {"query": int(run.numbers[query]), "positive": positive, "row": row, **numbers}
        for name, side in (("query", sides[0]), ("row", sides[1]), ("positive", sides[1])):
            if record[name] >= 0:
                record |= _named(name, record[name], side)
        if run.classes is not None:
            record["same_class"] = bool(run.classes.corpus[row] == run.classes.queries[record["query"]])
        if positive >= 0:
            record["same_text"] = same_text(record.get("positive_text"), record.get("row_text"))
        out.append(record)
    return out


def _named(name: str, row: int, side: Side) -> dict[str, Any]:
    """The id and the text of a row, if they are known."""
    columns = {"id": side.ids, "text": side.texts}
    found = {key: column.take(np.array([row]))[0] for key, column in columns.items() if column is not None}
    return {f"{name}_{key}": value if isinstance(value, str) else int(value) for key, value in found.items()}


def _most_frequent(counts: np.ndarray, side: Side) -> list[dict[str, Any]]:
    """The rows that are in the tails of most queries."""
    rows = np.lexsort((np.arange(len(counts)), -counts))[:TOP]
    return [
        {"row": int(row), "queries": int(counts[row])} | _named("row", int(row), side) for row in rows if counts[row]
    ]


def hardness_report(
    query_embeddings: Any,
    corpus_embeddings: Any,
    positives: Any = None,
    *,
    exclude: Any = None,
    query_labels: Any = None,
    corpus_labels: Any = None,
    class_similarity: Any = None,
    query_ids: Any = None,
    corpus_ids: Any = None,
    query_texts: Any = None,
    corpus_texts: Any = None,
    previous: Any = None,
    normalize: bool = False,
    edges: Sequence[float] = fig.EDGES,
    tail: float = 0.05,
    num_queries: int | None = 512,
    samples_per_bin: int = 16,
    near_duplicate_score: float = 0.95,
    num_suspects: int = 50,
    seed: int = 0,
    max_memory_bytes: int | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    show_progress_bar: bool = False,
    page: str | os.PathLike | None = None,
    title: str = "How hard are these negatives?",
) -> HardnessReport:
    """Measure the negatives of a dataset by difficulty, and find likely false negatives.

        difficulty of row k for query q = its rank in q's pool by (s descending, k ascending), s_qk = query_q . corpus_k,
        as a fraction of the pool;   pool_q = rows that are not a positive of q and not excluded for q

    Parameters
    ----------
    query_embeddings, corpus_embeddings : array, Tensor, path, or a list of these
        (Q, D) and (K, D), as in mine_hard_negatives.
    positives : sequence, optional
        As in mine_hard_negatives.
    exclude : sequence, optional
        As in mine_hard_negatives.
    query_labels, corpus_labels : sequence of int or str, optional
        The class of each row. With them, the report has the share of negatives of the query's own class.
    class_similarity : array, callable or dict, optional
        How similar classes are: a (C, C) matrix indexed by int labels, a callable (query numbers (M,), corpus rows (M,)) ->
        (M,), or a dict of these by name. NaN means unknown and is left out.
    query_ids, corpus_ids : sequence, optional
        As in mine_hard_negatives.
    query_texts, corpus_texts : sequence of str or mapping, optional
        As in mine_hard_negatives. Likely false negatives are listed with their texts. A row with the text of the query is
        removed from its pool; copies of a positive are kept and listed.
    previous : tuple, optional
        (query_embeddings, corpus_embeddings) of the same rows by an older model, of any D. With them, the report shows how
        much the hardest negatives have changed.
    normalize : bool
        Divide each row by its norm first. Otherwise vectors are used as given.
    edges : sequence of float
        Fractions of the pool that separate the bins of difficulty, rounded down to ranks.
    tail : float
        The share of the pool that counts as hardest, and as easiest, when agreement between queries is measured.
    num_queries : int or None
        How many queries to sample; None = all.
    samples_per_bin : int
        How many ranks to sample in each bin of each query, one from each of this many parts of equal width. Smaller bins are
        taken completely.
    near_duplicate_score : float
        A row whose score with a positive is at least this is listed as its near duplicate.
    num_suspects : int
        How many likely false negatives of each kind are listed, at most 3 per query.
    seed : int
        Seed of the random numbers.
    max_memory_bytes : int, optional
        Limit for the memory of a batch of queries, without inputs and figures; default: 1 GiB.
    device : str or torch.device, optional
        The device that computes scores; default: the device of the embeddings.
    backend : str, optional
        As in mine_hard_negatives.
    show_progress_bar : bool
        Show a line on stderr with the time left.
    page : path, optional
        The file for the HTML page; default: none is written.
    title : str
        The heading of the page.

    Returns
    -------
    HardnessReport
        The report. The notes list its figures.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid, before any work; if a row is not finite, when it is read.

    Notes
    -----
    The figures, with bins = len(edges) - 1, Q' = the number of sampled queries, and a = the share of a tail:

    - score_mean, score_error (bins,): mean score, and its standard error over queries.
    - same_class_mean, same_class_error (bins,): share of the query's class; same_class_chance: its share of the whole pool.
    - similarity/<name>_mean, similarity/<name>_error (bins,): mean similarity; similarity/<name>_overall: the mean over the
      pool, with bins weighted by their size.
    - positive_rank (Q',): the rank of the best positive in the pool, from 1; 0 if there is none. positive_score (Q',): its
      score.
    - hard_count, easy_count (K,): for how many queries a row is in the hardest, or easiest, tail.
    - hard_variance_ratio, easy_variance_ratio: Var(count) / (Q' a (1 - a)), which is 1 if queries choose independently.
    - hard_agreement, easy_agreement: (ratio - 1) / (Q' - 1), the correlation between the choices of two queries.
    - hard_histogram, easy_histogram: how many rows have each count; hard_expected, easy_expected: the same by
      Binomial(Q', a).
    - outscoring_rate: share of queries with a negative above every positive; outscoring_mean: how many of the hardest 10 are.
    - overlap (Q', sizes): share of the hardest rows that both snapshots have; overlap_sizes: how many rows these are.
    - rank_correlation (Q',): Spearman's correlation between the snapshots, over up to 1,024 corpus rows.

    Of rows with equal scores, the lower row number comes first, also in the easiest tail. No (Q, K) matrix is stored, except by
    the reference backend.

    References
    ----------
    Cai et al. 2020 (arXiv 2010.06682).

    Examples
    --------
    >>> rows, labels = F.normalize(torch.randn(200, 16), dim=1), torch.arange(200) % 4
    >>> report = negmine.hardness_report(rows[:20], rows, list(range(20)), query_labels=labels[:20], corpus_labels=labels)
    >>> report.figures["same_class_mean"].shape == report.figures["score_mean"].shape
    True
    """
    for name, count in {
        "num_queries": num_queries,
        "samples_per_bin": samples_per_bin,
        "num_suspects": num_suspects,
        "max_memory_bytes": max_memory_bytes,
    }.items():
        if count is not None or name in ("samples_per_bin", "num_suspects"):
            checks.require_count(OP, name, count)
    checks.require_draw(OP, seed, 0, 0)
    for name, flag in (("normalize", normalize), ("show_progress_bar", show_progress_bar)):
        checks.require_bool(OP, name, flag)
    bounds, share = checked_edges(edges), checked_fraction("tail", tail)
    if not is_real(near_duplicate_score):
        raise checks.refuse(OP, "near_duplicate_score", "a number", near_duplicate_score)
    if not isinstance(title, str):
        raise checks.refuse(OP, "title", "a string", title, TypeError)
    if page is not None:
        if isinstance(page, (str, os.PathLike)) and not Path(page).parent.is_dir():
            raise checks.refuse(OP, "page", "a path in an existing folder", str(page))
        require_output(OP, "page", page)
    queries = Rows.open(OP, "query_embeddings", query_embeddings)
    corpus = Rows.open(OP, "corpus_embeddings", corpus_embeddings)
    Q, K = len(queries), len(corpus)
    if queries.dim != corpus.dim:
        raise checks.refuse(OP, "corpus_embeddings", f"of query_embeddings' D = {queries.dim}", (K, corpus.dim))
    for name, rows in (("query_embeddings", Q), ("corpus_embeddings", K)):
        if rows == 0:
            raise checks.refuse(OP, name, "of at least one row", 0)
    older = _older(previous, Q, K)
    sides = (
        Side.open(OP, ("query_ids", "query_texts"), query_ids, query_texts, Q, 0),
        Side.open(OP, ("corpus_ids", "corpus_texts"), corpus_ids, corpus_texts, K, 1),
    )
    none: tuple = (np.zeros(Q + 1, np.int64), [])
    known = resolve(OP, *sides, none if positives is None else positives, exclude, Q, K, queries.row_digests)
    every = np.arange(Q)
    given, has_own = known.positives.take(every), np.flatnonzero(known.own >= 0)
    hidden = given.union(known.exclude, RowLists.of_pairs(has_own, known.own[has_own], Q))
    classes = checked_classes(query_labels, corpus_labels, Q, K)
    measures = checked_measures(class_similarity, classes)
    where = resolve_device(OP, device, queries if queries.device else corpus)

    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(Q, generator=generator, device="cpu")[: num_queries or Q].sort().values.numpy()  # (Q',)
    compared = torch.randperm(K, generator=generator, device="cpu")[:COMPARED].sort().values.to(where)  # (S,)
    named = ("query_embeddings", "corpus_embeddings")
    now = Ranking.open(OP, named, (queries, corpus), numbers, normalize, where, backend)
    before = None
    if older is not None:
        before = Ranking.open(OP, ("previous[0]", "previous[1]"), older, numbers, normalize, where, backend)
    kept, seen = given.take(numbers), hidden.take(numbers)
    deep = max(1, int(share * K), TOP)
    each = 64 * samples_per_bin * (len(bounds) - 1) + 64 * deep + (now.pair_bytes + 2 * bool(seen.sizes.max() > 1)) * K
    each += 48 * len(compared) if before is not None else 0
    batch = min(MOST_QUERIES, (max_memory_bytes or DEFAULT_MEMORY) // each)
    if batch < 1:
        raise checks.refuse(
            OP, "max_memory_bytes", f"at least {each}, the bytes that one query needs", max_memory_bytes
        )

    run = _Run(
        now, before, numbers, seen, _best_positive(now, kept), bounds, share, samples_per_bin, seed,
        classes, measures, Suspects(num_suspects), compared,
        hard_count=np.zeros(K, np.int64), easy_count=np.zeros(K, np.int64),
    )  # fmt: skip
    with torch.no_grad(), progress(len(numbers) + len(kept.rows), show_progress_bar, "hardness", "queries") as advance:
        for begin in range(0, len(numbers), batch):
            end = min(begin + batch, len(numbers))
            run.batch(begin, end)
            advance(end - begin)
        duplicates = near_duplicates(now, kept, seen, near_duplicate_score, batch, advance)
    figures = _figures(run, classes) | _consistency(run, K)
    figures |= run.suspects.figures() | {"near_duplicates": np.array(len(duplicates))}
    if before is not None:
        figures["overlap_sizes"] = np.array(run.overlap_sizes)
    closest = [(q, int(positive), row, {"score": -score}) for score, q, positive, row in duplicates[:num_suspects]]
    outscoring = [
        (q, _closest_positive(now, kept, q, row), row, {"score": score, "positive_score": positive})
        for _, q, row, score, positive in run.suspects.found
    ]
    facts = {
        "title": title,
        "version": __version__,
        "queries": Q,
        "corpus_rows": K,
        "dimension": queries.dim,
        "has_texts": sides[1].texts is not None,
        "has_positives": bool(len(kept.rows)),
        "norms": [list(norms(now.queries)), list(norms(now.corpus))],
        "arguments": {
            "normalize": normalize,
            "tail": share,
            "num_queries": num_queries,
            "samples_per_bin": samples_per_bin,
            "near_duplicate_score": near_duplicate_score,
            "num_suspects": num_suspects,
            "seed": seed,
            "backend": backend,
        },
        "similarities": list(measures),
        "suspects": _records(run, outscoring, sides),
        "near_duplicates": _records(run, closest, sides),
        "often_hard": _most_frequent(run.hard_count, sides[1]),
        "often_easy": _most_frequent(run.easy_count, sides[1]),
    }
    report = HardnessReport(figures, facts)
    if page is not None:
        report.to_html(page)
    return report


def _older(previous: Any, Q: int, K: int) -> tuple[Rows, Rows] | None:
    """The embeddings of the older snapshot, after checks that they have the same numbers of rows."""
    if previous is None:
        return None
    if not isinstance(previous, (tuple, list)) or len(previous) != 2:
        raise checks.refuse(
            OP, "previous", "a pair (query_embeddings, corpus_embeddings)", checks.kind_of(previous), TypeError
        )
    older = Rows.open(OP, "previous[0]", previous[0]), Rows.open(OP, "previous[1]", previous[1])
    if (len(older[0]), len(older[1])) != (Q, K) or older[0].dim != older[1].dim:
        came = [(len(rows), rows.dim) for rows in older]
        raise checks.refuse(OP, "previous", f"of {Q} queries and {K} corpus rows, with the same D", came)
    return older


def _closest_positive(ranking: Ranking, positives: RowLists, query: int, row: int) -> int:
    """The positive of a sampled query that is nearest to a corpus row."""
    rows = positives.rows[positives.indptr[query] : positives.indptr[query + 1]]
    near = (ranking.corpus[torch.from_numpy(rows)].float() @ ranking.corpus[row].float()).argmax()
    return int(rows[int(near)])
