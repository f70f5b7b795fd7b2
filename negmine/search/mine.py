"""mine_hard_negatives: the hardest negatives of each query of a dataset, exactly, streamed, in bounded memory.

    for each batch of queries, as many as the memory allows
        count what the filters keep              only where a window is given by fractions and there are filters
        scan the corpus, chunk by chunk          masks, filters, ranks: the places [0, end) of each query (scan.py)
        window, near duplicates, draw            n places, hardest first (miner.py, thin.py, draw.py)
        write them down                          where the run is to survive its end (resume.py)

Never in memory: the (Q, K) scores, or more of the corpus than a chunk of it.
"""

import contextlib
import os
import platform
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from negmine import backends, checks, order
from negmine.options import Select
from negmine.progress import progress
from negmine.search.approximate import IndexScan
from negmine.search.arguments import OP, RUN, checked, described
from negmine.search.draw import draw
from negmine.search.index import OPS, NegativeIndex, audit, device_of, drawn_queries, nothing_hidden, require_same_rows
from negmine.search.lists import row_lists
from negmine.search.miner import Miner, counts_first, each_filter
from negmine.search.ranks import Ranks
from negmine.search.result import MiningResult
from negmine.search.resume import Run
from negmine.search.rows import Rows
from negmine.search.scan import Corpus, Scan
from negmine.search.sizes import DENSE_BYTES, sizes_of
from negmine.search.thin import Thinner
from negmine.version import __version__

ROOM = 64 << 20  # for near duplicates and for candidates, and no more than a quarter of max_memory_bytes
AUDIT_K = 100  # ranks of an audit, where the run looks deeper
POOR = (
    "{}: index {kind!r} finds only {recall:.1%} of the {audit_k} hardest rows of {audit_queries} queries, less than "
    "min_recall={min_recall}: hard negatives are missing. Search deeper (a NegativeIndex with nprobe or efSearch), "
    "take another kind, or index='exact'"
)


def mine_hard_negatives(
    query_embeddings: Any,
    corpus_embeddings: Any,
    positives: Any,
    *,
    select: Select | None = None,
    range_mode: str = "filtered",
    positive_aggregation: str = "min",
    num_negatives: int = 3,
    sampling_strategy: str = "top",
    sampling_temperature: float = 0.05,
    seed: int = 0,
    exclude: Any = None,
    deduplicate: str = "none",
    near_duplicate_score: float = 0.95,
    index: str | NegativeIndex = "exact",
    audit_queries: int = 256,
    min_recall: float = 0.9,
    count_skipped: bool = True,
    batch_size: int | None = None,
    corpus_chunk_size: int | None = None,
    max_memory_bytes: int | None = None,
    resume_dir: str | os.PathLike | None = None,
    process_group: Any = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    show_progress_bar: bool = False,
) -> MiningResult:
    """The hardest negatives of each query among all rows of a corpus: exact, streamed, in bounded memory.

        s_qk   = query_q . corpus_k                                      (raw inner product in fp32, vectors as given)
        pool_q = rows k that are neither a positive of q nor excluded for q, and pass select's filters against
                 s_pos = min (max, mean) over q's positives p of s_qp
        kept_q = num_negatives of ranks [range_min, range_max) of pool_q by (s descending, k ascending)

    query_embeddings (Q, D), corpus_embeddings (K, D): NumPy arrays, tensors, paths of .npy, .safetensors ("file::tensor") or
        .parquet ("file::column") files, memory-mapped, or a list of those as shards; float32, float16, or bfloat16 tensors.
        Nothing is normalised: give unit rows for cosine.
    positives: the corpus rows that answer each query: one int a query, a list of int lists, or a tuple (indptr, indices).
    exclude: further rows that must not come out, in the same forms (a query's own row, known false negatives).
    select: filters and window of ranks (not sample); default: everything. Equality with a threshold keeps.
    range_mode: "filtered": the window counts the ranks of what masks and filters leave (sentence-transformers' range_min);
        "raw": it counts the ranks of all rows, positives among them, and masks and filters then thin it (FlagEmbedding).
    positive_aggregation: "min", "max" or "mean" of a query's positives, the score that margins are measured from.
    sampling_strategy: "top": the hardest of the window; "random": any members of it; "weighted": members drawn one by one
        with probability proportional to exp(s / sampling_temperature). The last two draw from the first 10 num_negatives
        ranks of the window where range_max is None, as sentence-transformers does. A draw depends on seed and the query's
        row only.
    deduplicate: "exact" takes rows of equal values for one row, the lowest: no negative comes out twice, and none equal to a
        positive or to an excluded row. One more pass over the corpus, and 48 bytes a row while it runs.
        "near" walks a query's window, hardest first, and drops a row whose cosine to a positive of the query, or to a row that
        the walk has kept, is near_duplicate_score or more; it looks deeper until enough are kept or the window ends.
    index: "exact" scans all rows; a FAISS factory string or a NegativeIndex of the same rows (kind other than "exact") proposes
        candidates, which are then scored exactly, masked, filtered and asked for again deeper, up to 4,096 a query. What it does
        not propose is not seen: recall is measured on audit_queries of the queries against a scan, stands in
        config["index"], and below min_recall warns.
    count_skipped: count what each filter drops. On a CPU the pass that mines counts for a lone filter, and so does a "raw"
        window; else it is one more scoring pass a filter.
    batch_size, corpus_chunk_size: queries and rows at a time; default: what fits max_memory_bytes (default 1 GiB), which
        counts what is held beside the inputs and the result, save a few MiB a thread inside the kernels. A window that
        reaches deep makes batches small.
    resume_dir: a folder where each finished batch is written down, whole or not at all. The same call with the same folder goes
        on where it was killed and gives the same bits, in other batches too; with other inputs it is refused. One process at a
        time. The folder stays: delete it when it has served.
    process_group: of torch.distributed. Every rank calls with the same arguments, save corpus_embeddings: its own rows, of the
        corpus that all ranks' rows make in rank order; positives and exclude number the rows of all. Every rank returns the
        same, which is what one process returns for the whole corpus.
    device: where scores are computed; default: where query_embeddings or corpus_embeddings are.
    show_progress_bar: a line on stderr, with the time left.

    Returns a MiningResult: indices and scores (Q, num_negatives), past the end of a window -1 and -inf. Equal scores: the lower
    row first. A NaN score is no candidate. The same negatives, bit for bit, for any batch_size, corpus_chunk_size, number of
    ranks and cut into shards; on the "reference" backend only where sums are exact, and with an approximate index only for one
    batch_size. Raises ValueError or TypeError for input that does not fit, before any work; ImportError for a missing package;
    OSError where a disk is full.
    """
    arguments = checked(
        select=Select() if select is None else select,
        range_mode=range_mode,
        positive_aggregation=positive_aggregation,
        num_negatives=num_negatives,
        sampling_strategy=sampling_strategy,
        sampling_temperature=sampling_temperature,
        seed=seed,
        deduplicate=deduplicate,
        near_duplicate_score=near_duplicate_score,
        index=index,
        audit_queries=audit_queries,
        min_recall=min_recall,
        count_skipped=count_skipped,
        batch_size=batch_size,
        corpus_chunk_size=corpus_chunk_size,
        max_memory_bytes=max_memory_bytes,
        resume_dir=resume_dir,
        process_group=process_group,
        backend=backend,
        show_progress_bar=show_progress_bar,
    )
    select = arguments["select"]
    ranks = Ranks(OP, process_group)
    with ranks.together(OP, "refused its input"):
        queries = Rows.open(OP, "query_embeddings", query_embeddings)
        rows = Rows.open(OP, "corpus_embeddings", corpus_embeddings)
        if queries.dim != rows.dim:
            raise checks.refuse(
                OP, "corpus_embeddings", f"of query_embeddings' D = {queries.dim}", (len(rows), rows.dim)
            )
        where = device_of(OP, device, queries if queries.device else rows)
    held = [int(part) for part in ranks.gather(torch.tensor(len(rows)))]
    corpus = Corpus(rows, where, ranks, held)
    Q, K = len(queries), len(corpus)
    with ranks.together(OP, "refused its input"):
        if order.LAST_INDEX <= K:
            raise checks.refuse(OP, "corpus_embeddings", f"of fewer than {order.LAST_INDEX} rows", K)
        given = row_lists(OP, "positives", positives, Q, K)
        further = nothing_hidden(Q) if exclude is None else row_lists(OP, "exclude", exclude, Q, K)
        if select.has_margin and (given.sizes == 0).any():
            came = f"none for query {int(np.flatnonzero(given.sizes == 0)[0])}"
            raise checks.refuse(OP, "positives", "at least one a query where select has a margin", came)
        if isinstance(index, NegativeIndex):
            require_same_rows(OP, "corpus_embeddings", index, rows)
        empty = np.empty(0, np.int64)
        ops = backends.choose(OP, OPS, backend, (queries.gather(empty, where), rows.gather(empty, where)))
        raw, exact = range_mode == "raw", index == "exact" or getattr(index, "kind", "") == "exact"
        none = nothing_hidden(Q)
        room = min(ROOM, max_memory_bytes // 4) if max_memory_bytes else ROOM
        plan = Miner(
            Scan(ops, corpus, 0, None),
            *(select, raw, num_negatives, sampling_strategy, count_skipped, none),
            Thinner(corpus.gather, given, near_duplicate_score, rows.dim, room) if deduplicate == "near" else None,
        )
        if not exact and counts_first(select, raw):
            wanted = "in ranks where select has filters and index is not 'exact', for fractions need every row's score"
            raise checks.refuse(OP, "select's range", wanted, (select.range_min, select.range_max))
        dense_mask = not raw and Q > 0 and bool((given.sizes + further.sizes).max() > 1)
        pair_bytes = DENSE_BYTES if ops is None else 2 * dense_mask
        rest = max_memory_bytes and max_memory_bytes - room * (deduplicate == "near" or not exact)
        limits = (batch_size, corpus_chunk_size, rest)
        sizes = sizes_of(OP, queries, rows, plan.depth(K), pair_bytes, *limits)
    batch = min(int(part) for part in ranks.gather(torch.tensor(sizes.batch)))
    content = {
        "query_embeddings": queries.content_hash(),
        "corpus_embeddings": ranks.joined_hash(rows.content_hash()),
        "positives": given.content_hash(),
        "exclude": further.content_hash(),
    }
    identity = {"arguments": described(arguments, RUN), "content": content, "queries": Q, "corpus_rows": K}
    identity |= {"negmine": __version__, "kernels": _kernels(ops, where), "ranks": ranks.size}
    if not exact:
        identity["batch_size"] = batch  # an index may answer a query otherwise in another batch
    if isinstance(index, NegativeIndex) and not exact:
        content["index"] = index.content_hash()
    ranks.require_same(OP, identity)

    first = corpus.first_equal() if deduplicate == "exact" else None  # (K,)
    distinct = None if first is None else first == np.arange(K)  # (K,) bool
    known, unseen = (lists if first is None else lists._replace(rows=first[lists.rows]) for lists in (given, further))
    known, hidden = known.united(none), known.united(unseen)
    pairs = corpus.pair_scores(ops, queries, given.queries, given.rows)  # (P,)
    positive_scores = given.reduce(pairs, positive_aggregation)  # (Q,)
    names = list(each_filter(select) if count_skipped else ()) + ["near_positive", "near_negative"] * (
        plan.thinner is not None
    )
    names += [] if exact else ["cut_short"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        run = Run(OP, ranks, Q, num_negatives, K, names)
        with ranks.together(OP, "could not open resume_dir"):
            if resume_dir is not None and ranks.rank == 0:
                stack.callback(run.open(resume_dir, identity).close)
        if resume_dir is not None:
            run.share()
        batches = run.missing(batch)
        passes = len(batches) * (2 if counts_first(select, raw) else 1)
        advance = stack.enter_context(
            progress(
                passes * (len(list(rows.spans(sizes.chunk))) if exact else 1), show_progress_bar, "mining", "chunks"
            )
        )
        scan = Scan(ops, corpus, sizes.chunk, distinct, advance)
        source: Scan | IndexScan = scan
        found = None
        if not exact:
            searched = index if isinstance(index, NegativeIndex) else run.index(rows, index, seed, where)
            depth = min(AUDIT_K, max(1, plan.depth(K)))
            found = _audited(searched, replace(scan, advance=lambda chunks: None), queries, audit_queries, depth, seed)
            found |= {"min_recall": min_recall}
            if found["recall"] is not None and found["recall"] < min_recall:
                warnings.warn(POOR.format(OP, **found), RuntimeWarning, stacklevel=2)
            source = IndexScan(scan, searched, room)
        miner = replace(plan, source=source, hidden=hidden)
        for begin, end in batches:
            anchor = torch.from_numpy(positive_scores[begin:end]).to(where) if select.has_margin else None  # (B,)
            numbers = torch.arange(begin, end)  # (B,)
            window, dropped = miner.window(queries.block(begin, end, where), numbers, anchor)  # (B, W)
            places = draw(window.cpu(), num_negatives, sampling_strategy, numbers, seed, sampling_temperature)  # (B, n)
            if isinstance(source, IndexScan):
                dropped["cut_short"] = source.taken_cut_short()
            run.keep(begin, *order.unpack(places), dropped)
    if found is not None:
        found["cut_short"] = run.skipped.pop("cut_short")
    skipped = {
        "positives": len(known.rows),
        "exclude": len(hidden.rows) - len(known.rows),
        "duplicates": Q * (K - scan.candidates),
    } | run.skipped
    config = {
        "arguments": described(arguments),
        "sizes": {"batch_size": batch, "corpus_chunk_size": sizes.chunk, "device": str(where), "ranks": ranks.size},
        "index": found,
        "queries": Q,
        "corpus_rows": K,
        "dimension": queries.dim,
        "content": content,
        "versions": {
            "negmine": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    return MiningResult(run.indices, run.scores, positive_scores, (run.indices >= 0).sum(1), given, skipped, config)


def _kernels(ops: Any, device: torch.device) -> str:
    """What computes scores, as far as it may round otherwise elsewhere."""
    if ops is None:
        return f"reference on {device.type}"
    cpu = f" {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
    return f"{ops.mine_hardest.__module__} on {device.type}{cpu}"


def _audited(index: NegativeIndex, scan: Scan, queries: Rows, count: int, k: int, seed: int) -> dict[str, Any]:
    """The recall of an index on a sample of the run's own queries."""
    drawn = drawn_queries(len(queries), count, seed)
    query = queries.gather(drawn, scan.corpus.device)  # (A, D)
    recall = audit(index, scan, query, k) if len(drawn) else None
    return {
        "kind": index.kind,
        "search_options": index.search_options,
        "recall": recall,
        "audit_queries": len(drawn),
        "audit_k": k,
    }
