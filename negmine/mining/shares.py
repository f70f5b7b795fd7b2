"""Shares of a mining job: independent processes mine one share each, and merge_parts combines the shares into the result.

share of the rows      phase "candidates": the hardest rows of all queries among the rows of the share. The process reads the
                       rows of its share, the rows of positives if a margin needs them, and SAMPLED_ROWS rows of the whole
                       corpus, which show whether two shares belong to the same corpus.
share of the queries   phase "negatives": the final negatives of some queries among all rows. This is used if rows of different
                       shares must be compared with each other, or counted, before the scan is complete.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from negmine.mining.batch_miner import BatchMiner, nested_filters
from negmine.mining.identity import count_not_finite
from negmine.mining.memory_budget import MAX_QUERIES
from negmine.mining.merging import OP, join_parts
from negmine.mining.parts import IDS, Part, unpack_ids
from negmine.mining.result import MiningResult
from negmine.mining.row_lists import RowLists
from negmine.mining.sampling import sample
from negmine.mining.sources import Rows, content_hash
from negmine.ops import sort_key
from negmine.ops.checks import Phrase, refuse
from negmine.options import Select

SAMPLED_ROWS = 16  # number of rows of the whole corpus that every share of the rows reads


def merge_parts(parts: Sequence[Part]) -> Part | MiningResult:
    """Merge several parts of one phase into one part.

    Parts may be merged in any order, and merged parts may be merged again. The result is always the same, bit for bit.

    Parameters
    ----------
    parts : list of Part
        Parts of the same plan and phase, computed by the same kernels. No two may cover the same query and row.

    Returns
    -------
    Part or MiningResult
        The merged part. If the parts are all shares of a job (`negmine mine --part`), the MiningResult.

    Raises
    ------
    ValueError, TypeError
        If the parts belong to different jobs or phases, or overlap.

    Examples
    --------
    >>> corpus = torch.randn(50, 16)
    >>> def engine(plan, phase, queries):
    ...     high = negmine.mining.mine_part(plan, phase, queries, corpus[30:], 30)
    ...     low = negmine.mining.mine_part(plan, phase, queries, corpus[:30], 0)
    ...     return negmine.mining.merge_parts([high, low])
    >>> split = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2, engine=engine)
    >>> whole = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2)
    >>> bool((split.indices == whole.indices).all())
    True
    """
    merged = join_parts(parts)
    if "shares" not in merged.facts or len(merged.facts["shares"]) < merged.facts["num_shares"]:
        return merged
    return result_of(merged if merged.phase == "negatives" else _negatives_of(merged))


def result_of(part: Part) -> MiningResult:
    """The MiningResult of a part with the negatives of all queries. It has no texts."""
    arrays, Q = part.arrays, len(part.arrays["numbers"])
    positives = RowLists(np.r_[0, np.cumsum(arrays["positives_sizes"])], arrays["positives_rows"])
    query_rows = arrays["query_rows"]
    return MiningResult(
        arrays["indices"],
        arrays["scores"],
        arrays["positive_scores"],
        (arrays["indices"] >= 0).sum(1),
        positives,
        part.facts["skipped"],
        part.facts["config"],
        arrays["positive_pair_scores"],
        query_ids=unpack_ids("query_ids", arrays),
        corpus_ids=unpack_ids("corpus_ids", arrays),
        query_rows=None if (query_rows == np.arange(Q)).all() else query_rows,
    )


@dataclass(frozen=True)
class _MergedScan:
    """A source for BatchMiner whose scan is already done: the hardest rows of a batch of queries that passed the filters."""

    sort_keys: Tensor  # (B, depth)
    num_rows: int
    num_candidates: int

    def run(
        self,
        query: Tensor,
        excluded: RowLists,
        anchor: Tensor | None,
        depth: int,
        filters: Select,
        counted_filters: list[Select],
    ) -> tuple[Tensor, Tensor]:
        """The result of Scan.run, with zeros as counts."""
        return self.sort_keys[:, :depth], torch.zeros(len(counted_filters), len(query), dtype=torch.int64, device="cpu")


def _lists(arrays: dict[str, np.ndarray], name: str) -> RowLists:
    return RowLists(np.r_[0, np.cumsum(arrays[f"{name}_sizes"])], arrays[f"{name}_rows"])


def _negatives_of(part: Part) -> Part:
    """The part of phase "negatives" of all queries, from the candidates of all shares of the rows."""
    arrays, facts, config = part.arrays, part.facts, part.facts["config"]
    options, Q, K = config["arguments"], len(arrays["numbers"]), config["corpus_rows"]
    given, pairs, hidden = (_lists(arrays, name) for name in ("positives", "pair", "excluded"))
    covered = int((part.tiles[:, 3] - part.tiles[:, 2]).sum())
    if covered != K or not np.array_equal(arrays["pair_numbers"], np.arange(len(pairs.rows))):
        raise refuse(OP, "parts", f"of all {K} rows of the corpus", Phrase(f"{covered} of them"))
    select, raw = Select(**options["select"]), options["range_mode"] == "raw"
    # The same steps as in hard_negatives.py for one process, except for the scan.
    positive_scores = pairs.reduce(arrays["pair_scores"], options["positive_aggregation"])
    sort_keys = torch.from_numpy(arrays["sort_keys"])
    broken, broken_queries = arrays["not_finite"], arrays["not_finite_queries"]
    miner = BatchMiner(
        source=_MergedScan(sort_keys, K, facts["num_candidates"] - len(broken)),
        select=select,
        raw=raw,
        num_negatives=options["num_negatives"],
        strategy=options["sampling_strategy"],
        count_skipped=options["count_skipped"],
        excluded=hidden.without(broken),
        not_finite_queries=broken_queries,
        deduplicator=None,
    )
    skipped = dict(facts["skipped"])
    is_broken = np.isin(np.arange(Q), broken_queries)
    skipped["not_finite"] = count_not_finite(hidden.queries, hidden.rows, is_broken, facts["num_candidates"], broken)
    sampled = torch.full((Q, miner.num_negatives), sort_key.NOWHERE)  # (Q, n)
    for begin in range(0, Q, MAX_QUERIES):
        numbers = torch.arange(begin, min(begin + MAX_QUERIES, Q), device="cpu")  # (B,)
        batch_rows = slice(begin, begin + len(numbers))
        anchor = torch.from_numpy(positive_scores[batch_rows]) if select.has_margin else None  # (B,)
        batch = replace(miner, source=replace(miner.source, sort_keys=sort_keys[batch_rows]))
        window, dropped = batch.window(torch.empty(len(numbers), 0), numbers, anchor)  # (B, W)
        draw = (miner.strategy, numbers, options["seed"], options["sampling_temperature"])
        sampled[batch_rows] = sample(window, miner.num_negatives, *draw)
        for name, count in dropped.items() if raw else ():
            skipped[name] += count
    scores, indices = (each.numpy() for each in sort_key.unpack(sampled))
    corpus = content_hash(facts["corpus_dtype"], config["dimension"], K, arrays["content"][0])
    config |= {
        "content": config["content"] | {"corpus_embeddings": corpus},
        "not_finite": config["not_finite"] | {"corpus_embeddings": facts["num_not_finite"]},
    }
    kept = ("numbers", "query_rows", "positives_sizes", "positives_rows", *IDS)
    negatives = {
        **{name: arrays[name] for name in kept if name in arrays},
        "indices": indices,
        "scores": scores,
        "positive_scores": positive_scores,
        "positive_pair_scores": arrays["pair_scores"][places(given, pairs, K)],
    }
    facts = facts | {"skipped": skipped, "config": config}
    return replace(part, phase="negatives", depth=0, arrays=negatives, facts=facts)


def places(own: RowLists, lists: RowLists, K: int) -> np.ndarray:
    """The position in `lists` of each entry of `own`. Every entry of `own` occurs in `lists`."""
    wanted, pairs = (part.queries * K + part.rows for part in (own, lists))
    by_pair = np.argsort(pairs, kind="stable")
    return by_pair[np.searchsorted(pairs[by_pair], wanted)]


def sampled_hash(rows: Rows) -> str:
    """A hash of SAMPLED_ROWS rows that are spread over the corpus. It differs between shares of different corpora."""
    numbers = np.unique(np.linspace(0, max(0, len(rows) - 1), SAMPLED_ROWS).astype(np.int64))[: len(rows)]
    block = rows.gather(numbers, torch.device("cpu")).contiguous() if len(rows) else torch.empty(0)
    return hashlib.blake2b(block.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def skip_counts(miner: BatchMiner, num_dropped: np.ndarray) -> dict[str, int]:
    """The number of pairs that each filter removes, by its name, from num_dropped (B, filters) of nested filters."""
    totals = [0, *num_dropped.sum(0).tolist()]
    return {name: totals[i + 1] - totals[i] for i, name in enumerate(nested_filters(miner.select))}
