"""mine_hard_negatives: the hardest negatives of each query of a dataset, exact, streamed, in bounded memory.

    check    the options and the inputs
    plan     the kernels, and the numbers of queries and corpus rows to process at a time
    run      for each batch of queries
                 count what the filters keep         only where a window is given by fractions and there are filters
                 scan the corpus, chunk by chunk     masks (identity.py), filters, ranks (scan.py)
                 window, near duplicates, sampling   num_negatives rows, hardest first (batch_miner.py, dedup.py, sampling.py)
                 write the batch to resume_dir       where one is given (resume.py)

Neither the (Q, K) scores nor more than one chunk of the corpus are ever in memory.
"""

import contextlib
import inspect
import os
import platform
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from negmine.mining.batch_miner import BatchMiner, needs_count, nested_filters
from negmine.mining.dedup import Deduplicator
from negmine.mining.identity import Hidden, Side, resolve
from negmine.mining.index import NegativeIndex, measure_recall, require_same_rows, sample_queries
from negmine.mining.index_scan import IndexScan
from negmine.mining.memory_budget import DEFAULT_MEMORY, DENSE_BYTES, MAX_QUERIES, BatchSizes, plan_batches
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.progress import progress
from negmine.mining.rescoring import Rescoring
from negmine.mining.result import MiningResult
from negmine.mining.resume import RunState, require_folder
from negmine.mining.sampling import STRATEGIES, sample
from negmine.mining.scan import OPS, Corpus, Scan
from negmine.mining.sources import Rows, resolve_device
from negmine.ops import backends, checks, sort_key
from negmine.ops.backends import Kernels
from negmine.options import Select, is_real
from negmine.version import __version__

OP = "mine_hard_negatives"
# The options that decide which negatives are returned; sizes and recall measurements do not.
DECISIVE = (
    "select", "range_mode", "positive_aggregation", "num_negatives", "sampling_strategy", "sampling_temperature", "seed",
    "deduplicate", "near_duplicate_score", "index", "count_skipped",
)  # fmt: skip
DESCRIBED = (*DECISIVE, "audit_queries", "min_recall", "max_memory_bytes", "backend")
SCRATCH_BYTES = 64 << 20  # for near duplicates and for candidates of an index; at most a quarter of max_memory_bytes
AUDIT_K = 100  # the largest k at which recall is measured
LOW_RECALL = (
    "{}: index {kind!r} finds only {recall:.1%} of the {audit_k} hardest rows of {audit_queries} queries, less than "
    "min_recall={min_recall}: hard negatives are missing. Search deeper (a NegativeIndex with nprobe or efSearch), "
    "take another kind, or index='exact'"
)


@checks.refuses_select_fields(OP)
def mine_hard_negatives(
    query_embeddings: Any,
    corpus_embeddings: Any,
    positives: Any,
    *,
    query_ids: Any = None,
    corpus_ids: Any = None,
    query_texts: Any = None,
    corpus_texts: Any = None,
    exclude: Any = None,
    select: Select | None = None,
    range_mode: str = "filtered",
    positive_aggregation: str = "min",
    num_negatives: int = 3,
    sampling_strategy: str = "top",
    sampling_temperature: float = 0.05,
    seed: int = 0,
    deduplicate: str = "none",
    rescore: Any = None,
    rescore_candidates: int | None = None,
    rescore_batch_size: int = 64,
    promote: float | None = None,
    near_duplicate_score: float = 0.95,
    index: str | NegativeIndex = "exact",
    audit_queries: int = 256,
    min_recall: float = 0.9,
    count_skipped: bool = True,
    batch_size: int | None = None,
    corpus_chunk_size: int | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY,
    resume_dir: str | os.PathLike | None = None,
    process_group: Any = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    show_progress_bar: bool = False,
) -> MiningResult:
    """The hardest negatives of each query among all rows of a corpus: exact, streamed, in bounded memory.

        s_qk   = query_q . corpus_k                                      (raw inner product in fp32, vectors as given)
        pool_q = documents k that are neither a positive of q, nor excluded for q, nor q's own text, and that pass select's
                 filters against s_pos = min (max, mean) over q's positives p of s_qp
        kept_q = num_negatives of ranks [range_min, range_max) of pool_q by (s descending, k ascending)

    query_embeddings (Q, D), corpus_embeddings (K, D): NumPy arrays, tensors, paths of .npy, .safetensors ("file::tensor") or
        .parquet ("file::column") files, memory-mapped, or a list of those as shards; float32, float16, or bfloat16 tensors.
        float64 is rounded to float32. Nothing is normalised: give unit rows for cosine.
    positives: what answers each query: one entry a query, a list of lists, or a tuple (indptr, indices). Entries are row numbers
        of the corpus, or ids where corpus_ids is given.
    query_ids, corpus_ids: ints or strings, one a row. query_texts, corpus_texts: strings, one a row, or a mapping from ids to
        strings. All are read by position, from lists, arrays and columns of tables.
        Corpus rows of equal ids or of equal texts are one document, transitively, and the lowest row stands for it. Texts are
        compared after NFC normalisation, with each run of white space as one space; an empty text equals nothing.
        Query rows of equal ids or texts are one query and share their positives; without ids and texts, rows of equal
        embeddings do. A document whose text is the query's own never comes out.
    exclude: further documents that must not come out, in the forms of positives.
    select: filters and window of ranks (not sample); default: everything. Equality with a threshold keeps.
    range_mode: "filtered": the window counts the ranks of what masks and filters leave (sentence-transformers' range_min);
        "raw": it counts the ranks of all rows, positives among them, and masks and filters then thin it (FlagEmbedding).
    positive_aggregation: "min", "max" or "mean" of a query's positives, the score that margins are measured from.
    sampling_strategy: "top": the hardest of the window; "random": any members of it; "weighted": members drawn one by one
        with probability proportional to exp(s / sampling_temperature). The last two draw from the first 10 num_negatives
        ranks of the window where range_max is None, as sentence-transformers does. A draw depends on seed and the query's
        row only.
    deduplicate: "exact" takes rows of equal embeddings for one document, too: no negative comes out twice, and none equal to a
        positive or to an excluded row. It does not see copies of a text whose embeddings differ by a rounding error: give
        corpus_texts. One more pass over the corpus, and 48 bytes a row while it runs.
        "near" walks a query's window, hardest first, and drops a row whose cosine to a positive of the query, or to a row that
        the walk has kept, is near_duplicate_score or more; it looks deeper until enough are kept or the window ends.
    rescore: a callable from a list of (query text, document text) pairs to a score each, or an object with predict, such as a
        cross-encoder. select's window of ranks gives the candidates, by embeddings; then select's filters, margins from the
        positives' own new scores, the order and the draw go by the new scores, and so do the result's scores.
    rescore_candidates: how many candidates of each query are scored; default: 10 num_negatives, or select's whole window if that
        is smaller. rescore_batch_size: pairs at a time. With resume_dir the scores are kept there.
    promote: with rescore, a candidate whose score is no more than this below its query's positive becomes a positive.
    index: "exact" scans all rows; a FAISS factory string or a NegativeIndex of the same rows (kind other than "exact") proposes
        candidates, which are then scored exactly, masked, filtered and asked for again deeper, up to 4,096 a query. What it does
        not propose is not seen: recall is measured on audit_queries of the queries against a scan, stands in
        config["index"], and below min_recall warns.
    count_skipped: count what each filter drops. On a CPU the pass that mines counts for the last filter, and so does a "raw"
        window; else it is one more scoring pass a filter.
    batch_size, corpus_chunk_size: queries and rows at a time; default: what fits max_memory_bytes, which
        counts what is held beside the inputs and the result, save a few MiB a thread inside the kernels. A window that
        reaches deep makes batches small.
    resume_dir: a folder where each finished batch is written down, whole or not at all. The same call with the same folder goes
        on where it was killed and gives the same bits, in other batches too; with other inputs it is refused. One process at a
        time. The folder stays: delete it when it has served.
    process_group: of torch.distributed. Every rank calls with the same arguments, save corpus_embeddings: its own rows, of the
        corpus that all ranks' rows make in rank order; positives, exclude, corpus_ids and corpus_texts are of all rows. Every
        rank returns the same, which is what one process returns for the whole corpus.
    device: where scores are computed; default: where query_embeddings or corpus_embeddings are.
    show_progress_bar: a line on stderr, with the time left.

    Returns a MiningResult: indices and scores (Q, num_negatives), past the end of a window -1 and -inf. Its `skipped` counts
    each pair of a query and a row that was left out, once, under the first of positive, exclude, own_text, equal_to_positive,
    duplicate and the filters. Equal scores: the lower row first. A NaN score is no candidate. The same negatives, bit for bit,
    for any batch_size, corpus_chunk_size, number of ranks and cut into shards; on the "reference" backend only where sums are
    exact, and with an approximate index only for one batch_size. Raises ValueError or TypeError for input that does not fit,
    before any work; ImportError for a missing package; OSError where a disk is full.
    """
    ranks = ProcessRanks(OP, process_group)
    given = dict(
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
        device=device,
        backend=backend,
        show_progress_bar=show_progress_bar,
        rescore=rescore,
        rescore_candidates=rescore_candidates,
        rescore_batch_size=rescore_batch_size,
        promote=promote,
    )
    names = (query_ids, corpus_ids, query_texts, corpus_texts)
    with ranks.together():
        options = _check_options(**given)
        ranks.require_group()
        inputs = _open_inputs(options, ranks, query_embeddings, corpus_embeddings, *names)
        if rescore is None:
            return _run(options, inputs, _make_plan(options, inputs, positives, exclude))
        rescoring = Rescoring.open(OP, options)
        for name, column in (("query_texts", inputs.query_names.texts), ("corpus_texts", inputs.corpus_names.texts)):
            if column is None:
                raise checks.refuse(OP, name, "given where rescore is", None)
        plan = _make_plan(rescoring.first_stage(options), inputs, positives, exclude)
        if promote is not None:
            _require_positives(plan.hidden, "promote is given")
        elif options["select"].has_margin:
            _require_positives(plan.hidden, "select has a margin")
        result = rescoring.run(_run(rescoring.first_stage(options), inputs, plan), plan.hidden, options)
        judge = getattr(rescore, "__qualname__", type(rescore).__qualname__)
        arguments = _describe(options, DESCRIBED) | {"rescore": judge, "promote": promote}
        return replace(result, config=result.config | {"arguments": arguments})


def _require_positives(hidden: Hidden, why: str) -> None:
    sizes = hidden.positives.sizes
    if (sizes == 0).any():
        came = f"none for query {int(np.flatnonzero(sizes == 0)[0])}"
        raise checks.refuse(OP, "positives", f"at least one a query where {why}", came)


def check_options(given: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for the first invalid one among arguments of mine_hard_negatives other than the inputs."""
    inputs = ("query_ids", "corpus_ids", "query_texts", "corpus_texts", "exclude")
    parameters = inspect.signature(mine_hard_negatives).parameters.values()
    defaults = {
        each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in inputs
    }
    options = defaults | {name: value for name, value in given.items() if name in defaults}
    _check_options(**options | {"select": Select() if options["select"] is None else options["select"]})


def _check_options(**options: Any) -> dict[str, Any]:
    """The options; raises ValueError or TypeError for the first that is invalid."""
    select, index = options["select"], options["index"]
    checks.require_options(OP, select=select)
    checks.require_choice(OP, "range_mode", options["range_mode"], ("filtered", "raw"))
    checks.require_choice(OP, "sampling_strategy", options["sampling_strategy"], STRATEGIES)
    checks.require_choice(OP, "positive_aggregation", options["positive_aggregation"], ("min", "max", "mean"))
    checks.require_choice(OP, "deduplicate", options["deduplicate"], ("none", "exact", "near"))
    checks.require_count(OP, "num_negatives", options["num_negatives"])
    checks.require_count(OP, "audit_queries", options["audit_queries"])
    checks.require_draw(OP, options["seed"], 0, 0)
    for name in ("count_skipped", "show_progress_bar"):
        checks.require_bool(OP, name, options[name])
    for name in ("batch_size", "corpus_chunk_size", "max_memory_bytes", "rescore_candidates", "rescore_batch_size"):
        if options[name] is not None or name in ("max_memory_bytes", "rescore_batch_size"):
            checks.require_count(OP, name, options[name])
    temperature, near, min_recall = (
        options[name] for name in ("sampling_temperature", "near_duplicate_score", "min_recall")
    )
    checks.require_number(OP, "sampling_temperature", temperature, above=0)
    if not is_real(near) or not 0 < near < 1:
        raise checks.refuse(OP, "near_duplicate_score", "a cosine above 0 and below 1", near)
    if not is_real(min_recall) or not 0 <= min_recall <= 1:
        raise checks.refuse(OP, "min_recall", "a share in [0, 1]", min_recall)
    if options["promote"] is not None:
        checks.require_number(OP, "promote", options["promote"])
        if options["rescore"] is None:
            raise checks.refuse(OP, "promote", "None where rescore is None", options["promote"])
    if select.sample is not None:
        raise checks.refuse(OP, "select", "without sample: num_negatives and sampling_strategy draw", select)
    if options["range_mode"] == "raw" and select.range_max is None:
        raise checks.refuse(OP, "select.range_max", "given where range_mode is 'raw'", None)
    if not isinstance(index, (str, NegativeIndex)) or index == "":
        raise checks.refuse(OP, "index", "'exact', a FAISS factory string, or a NegativeIndex", index, TypeError)
    if options["process_group"] is not None and getattr(index, "kind", index) != "exact":
        raise checks.refuse(OP, "index", "'exact' where process_group is given", index)
    if options["resume_dir"] is not None:
        require_folder(OP, "resume_dir", options["resume_dir"])
    return options


def _describe(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The named options as values that JSON can hold."""
    given = {"select": asdict(options["select"]), "index": getattr(options["index"], "kind", options["index"])}
    return {name: given.get(name, options[name]) for name in names}


@dataclass(frozen=True)
class _Inputs:
    """The embeddings, opened and checked, and the ids and texts of their rows."""

    queries: Rows
    corpus: Corpus
    query_names: Side
    corpus_names: Side

    @property
    def ranks(self) -> ProcessRanks:
        return self.corpus.ranks


def _open_inputs(
    options: dict[str, Any],
    ranks: ProcessRanks,
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_ids: Any,
    corpus_ids: Any,
    query_texts: Any,
    corpus_texts: Any,
) -> _Inputs:
    queries = Rows.open(OP, "query_embeddings", query_embeddings)
    rows = Rows.open(OP, "corpus_embeddings", corpus_embeddings)
    if queries.dim != rows.dim:
        wanted = f"of query_embeddings' D = {queries.dim}"
        raise checks.refuse(OP, "corpus_embeddings", wanted, (len(rows), rows.dim))
    device = resolve_device(OP, options["device"], queries if queries.device else rows)
    resumes = options["resume_dir"] is not None
    dtypes = {"query dtype": queries.dtype, "corpus dtype": rows.dtype}
    ranks.require_same({**dtypes, "D": rows.dim, "resume_dir is given": resumes})
    rows_per_rank = [int(part) for part in ranks.gather(torch.tensor(len(rows), device="cpu"))]
    corpus = Corpus(rows, device, ranks, rows_per_rank)
    query_names = Side.open(OP, ("query_ids", "query_texts"), query_ids, query_texts, len(queries), 0)
    corpus_names = Side.open(OP, ("corpus_ids", "corpus_texts"), corpus_ids, corpus_texts, len(corpus), 1)
    return _Inputs(queries, corpus, query_names, corpus_names)


@dataclass(frozen=True)
class _Plan:
    """How the inputs are mined."""

    hidden: Hidden
    ops: Kernels | None
    exact: bool  # False: an approximate index proposes candidates
    sizes: BatchSizes
    scratch_bytes: int
    miner: BatchMiner  # without its source and excluded rows, which the run adds

    @property
    def needs_count(self) -> bool:
        return needs_count(self.miner.select, self.miner.raw)


def _make_plan(options: dict[str, Any], inputs: _Inputs, positives: Any, exclude: Any) -> _Plan:
    queries, corpus, ranks = inputs.queries, inputs.corpus, inputs.ranks
    rows, Q, K = corpus.rows, len(queries), len(corpus)
    select, index, memory = options["select"], options["index"], options["max_memory_bytes"]
    if sort_key.LAST_INDEX <= K:
        raise checks.refuse(OP, "corpus_embeddings", f"of fewer than {sort_key.LAST_INDEX} rows", K)
    names = (inputs.query_names, inputs.corpus_names)
    hidden = resolve(OP, *names, positives, exclude, Q, K, queries.row_digests)
    if select.has_margin:
        _require_positives(hidden, "select has a margin")
    if isinstance(index, NegativeIndex):
        require_same_rows(OP, "corpus_embeddings", index, rows)
    empty = np.empty(0, np.int64)
    examples = (queries.gather(empty, corpus.device), rows.gather(empty, corpus.device))
    ops = backends.choose(OP, OPS, options["backend"], examples)
    exact = getattr(index, "kind", index) == "exact"
    near = options["deduplicate"] == "near"
    scratch_bytes = min(SCRATCH_BYTES, memory // 4)
    deduplicator = None
    if near:
        threshold = options["near_duplicate_score"]
        deduplicator = Deduplicator(corpus.gather, hidden.positives, threshold, rows.dim, scratch_bytes)
    miner = BatchMiner(
        source=Scan(ops, corpus, 0, None),
        select=select,
        raw=options["range_mode"] == "raw",
        num_negatives=options["num_negatives"],
        strategy=options["sampling_strategy"],
        count_skipped=options["count_skipped"],
        excluded=hidden,
        deduplicator=deduplicator,
    )
    if not exact and needs_count(select, miner.raw):
        wanted = "in ranks where select has filters and index is not 'exact', for fractions need every row's score"
        raise checks.refuse(OP, "select's range", wanted, (select.range_min, select.range_max))
    dense_mask = not miner.raw and Q > 0 and bool(hidden.sizes.max() > 1)
    pair_bytes = DENSE_BYTES if ops is None else 2 * dense_mask
    remaining = memory - scratch_bytes * (near or not exact)
    limits = (options["batch_size"], options["corpus_chunk_size"], remaining)
    sizes = plan_batches(OP, queries, rows, miner.depth(K), pair_bytes, *limits)
    batch = min(int(part) for part in ranks.gather(torch.tensor(sizes.batch, device="cpu")))
    return _Plan(hidden, ops, exact, replace(sizes, batch=batch), scratch_bytes, miner)


def _run(options: dict[str, Any], inputs: _Inputs, plan: _Plan) -> MiningResult:
    queries, corpus, ranks, sizes, miner = inputs.queries, inputs.corpus, inputs.ranks, plan.sizes, plan.miner
    Q, K, device = len(queries), len(corpus), corpus.device
    select, index, seed = options["select"], options["index"], options["seed"]
    content = _content_hashes(inputs, plan, index)
    identity = _identity(options, inputs, plan, content)
    ranks.require_same(identity["arguments"] | identity["content"] | {"kernels": identity["kernels"]})

    hidden = plan.hidden
    if options["deduplicate"] == "exact":
        hidden = hidden.with_equal_rows(corpus.first_equal())
    positive_scores = np.empty(Q, np.float32)  # (Q,)
    pair_scores = []  # of hidden.given
    for begin in range(0, Q, MAX_QUERIES):
        part = slice(begin, min(begin + MAX_QUERIES, Q))
        lists = hidden.positives.take(np.arange(part.start, part.stop))
        scores_of_pairs = corpus.pair_scores(plan.ops, queries, begin + lists.queries, lists.rows)  # (P,)
        positive_scores[part] = lists.reduce(scores_of_pairs, options["positive_aggregation"])
        own = hidden.given.take(np.arange(part.start, part.stop))
        if not all(np.array_equal(*pair) for pair in zip(own, lists, strict=True)):
            scores_of_pairs = corpus.pair_scores(plan.ops, queries, begin + own.queries, own.rows)
        pair_scores.append(scores_of_pairs)

    counters = list(nested_filters(select)) if options["count_skipped"] else []
    counters += [] if miner.deduplicator is None else ["near_positive", "near_negative"]
    counters += [] if plan.exact else ["cut_short"]
    resume_dir = options["resume_dir"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        state = RunState(OP, ranks, Q, miner.num_negatives, K, counters)
        if resume_dir is not None and ranks.rank == 0:
            stack.callback(state.open(resume_dir, identity).close)
        if resume_dir is not None:
            state.broadcast()
        batches = state.unfinished(sizes.batch)
        chunks = len(list(corpus.rows.spans(sizes.chunk))) if plan.exact else 1
        passes = len(batches) * (2 if plan.needs_count else 1)
        advance = stack.enter_context(progress(passes * chunks, options["show_progress_bar"], "mining", "chunks"))
        scan = Scan(plan.ops, corpus, sizes.chunk, hidden.distinct, advance)
        source: Scan | IndexScan = scan
        index_facts = None
        if not plan.exact:
            approximate = (
                index if isinstance(index, NegativeIndex) else state.build_index(corpus.rows, index, seed, device)
            )
            k = min(AUDIT_K, max(1, miner.depth(K)))
            index_facts = _audit_index(options, approximate, replace(scan, advance=lambda chunks: None), queries, k)
            source = IndexScan(scan, approximate, plan.scratch_bytes)
        miner = replace(miner, source=source, excluded=hidden)
        for begin, end in batches:
            anchor = torch.from_numpy(positive_scores[begin:end]).to(device) if select.has_margin else None  # (B,)
            numbers = torch.arange(begin, end, device="cpu")  # (B,)
            window, dropped = miner.window(queries.block(begin, end, device), numbers, anchor)  # (B, W)
            strategy, temperature = options["sampling_strategy"], options["sampling_temperature"]
            sort_keys = sample(window.cpu(), miner.num_negatives, strategy, numbers, seed, temperature)  # (B, n)
            if isinstance(source, IndexScan):
                dropped["cut_short"] = source.pop_cut_short()
            state.record(begin, *sort_key.unpack(sort_keys), dropped)
    if index_facts is not None:
        index_facts["cut_short"] = state.skipped.pop("cut_short")
    skipped = hidden.count() | state.skipped
    config = {
        "arguments": _describe(options, DESCRIBED),
        "sizes": {
            "batch_size": sizes.batch,
            "corpus_chunk_size": sizes.chunk,
            "device": str(device),
            "ranks": ranks.size,
        },
        "index": index_facts,
        "queries": Q,
        "corpus_rows": K,
        "dimension": queries.dim,
        "rounded_to_float32": [name for name, rows in _rows(inputs).items() if rows.is_rounded],
        "content": content,
        "versions": {
            "negmine": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    num_valid = (state.indices >= 0).sum(1)
    given_scores = np.concatenate([np.empty(0, np.float32), *pair_scores])  # (P,)
    list_of = hidden.positives.list_of
    query_rows = None if (list_of == np.arange(Q)).all() else list_of
    names = {
        f"{side}_{what}": None if column is None else column.given
        for side, each in (("query", inputs.query_names), ("corpus", inputs.corpus_names))
        for what, column in (("ids", each.ids), ("texts", each.texts))
    }
    return MiningResult(
        state.indices,
        state.scores,
        positive_scores,
        num_valid,
        hidden.given,
        skipped,
        config,
        given_scores,
        **names,
        query_rows=query_rows,
    )


def _rows(inputs: _Inputs) -> dict[str, Rows]:
    return {"query_embeddings": inputs.queries, "corpus_embeddings": inputs.corpus.rows}


def _content_hashes(inputs: _Inputs, plan: _Plan, index: str | NegativeIndex) -> dict[str, str]:
    content = {
        "query_embeddings": inputs.queries.content_hash(),
        "corpus_embeddings": inputs.ranks.combined_hash(inputs.corpus.rows.content_hash()),
        "positives": plan.hidden.given.content_hash(),
        "exclude": plan.hidden.exclude.content_hash(),
        **inputs.query_names.content("query_ids", "query_texts"),
        **inputs.corpus_names.content("corpus_ids", "corpus_texts"),
    }
    if isinstance(index, NegativeIndex) and not plan.exact:
        content["index"] = index.content_hash()
    return content


def _identity(options: dict[str, Any], inputs: _Inputs, plan: _Plan, content: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the bits of the result. It must be equal on all ranks, and in a run that is resumed."""
    identity: dict[str, Any] = {
        "arguments": _describe(options, DECISIVE),
        "content": content,
        "queries": len(inputs.queries),
        "corpus_rows": len(inputs.corpus),
        "negmine": __version__,
        "kernels": _describe_kernels(plan.ops, inputs.corpus.device),
        "ranks": inputs.ranks.size,
    }
    if not plan.exact:
        identity["batch_size"] = plan.sizes.batch  # the answers of an index may depend on the batch
    return identity


def _describe_kernels(ops: Kernels | None, device: torch.device) -> str:
    """The kernels that compute scores, as far as their rounding may differ elsewhere."""
    if ops is None:
        return f"reference on {device.type}"
    cpu = f" {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
    return f"{ops.mine_hardest.__module__} on {device.type}{cpu}"


def _audit_index(options: dict[str, Any], index: NegativeIndex, scan: Scan, queries: Rows, k: int) -> dict[str, Any]:
    """The recall of an index for a sample of the queries; warns where it is below min_recall."""
    sampled = sample_queries(len(queries), options["audit_queries"], options["seed"])
    query = queries.gather(sampled, scan.corpus.device)  # (A, D)
    recall = measure_recall(index, scan, query, k) if len(sampled) else None
    facts = {
        "kind": index.kind,
        "search_options": index.search_options,
        "recall": recall,
        "audit_queries": len(sampled),
        "audit_k": k,
        "min_recall": options["min_recall"],
    }
    if recall is not None and recall < options["min_recall"]:
        warnings.warn(LOW_RECALL.format(OP, **facts), RuntimeWarning, stacklevel=4)
    return facts
