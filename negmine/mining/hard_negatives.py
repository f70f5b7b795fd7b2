"""mine_hard_negatives: the hardest negatives of each query of a dataset, by an exact search in bounded memory.

    check    the options and the inputs
    plan     which documents are hidden from each query, and how many queries and corpus rows to process at a time
    run      for each batch of queries, in phases (parts.py), which an executor computes from the corpus (executors.py)
                 count the rows that pass the filters   only if the window is given in fractions and there are filters
                 scan the corpus, chunk by chunk        masks (identity.py), filters, ranks (scan.py)
                 window, near duplicates, sampling      num_negatives rows, hardest first (batch_miner.py, dedup.py, sampling.py)
                 write the batch to resume_dir          if it is given (resume.py)

The (Q, K) scores are never stored, and at most one chunk of the corpus is in memory at a time.
"""

import contextlib
import hashlib
import inspect
import json
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from negmine.mining.batch_miner import BatchMiner, needs_count, nested_filters
from negmine.mining.dedup import Deduplicator, first_equal
from negmine.mining.engines import faiss_index
from negmine.mining.executors import ExecutorScan, LocalExecutor, open_queries
from negmine.mining.identity import Hidden, Side, resolve, warn_not_finite
from negmine.mining.index import NegativeIndex, measure_recall, require_same_rows, sample_queries
from negmine.mining.index_scan import IndexScan
from negmine.mining.memory_budget import DEFAULT_MEMORY, DENSE_BYTES, MAX_QUERIES, BatchSizes, plan_batches
from negmine.mining.parts import MiningPlan, Part, PartMiner, Phase, pack_ids
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.progress import progress
from negmine.mining.ray_executor import RayExecutor
from negmine.mining.rescoring import Rescoring
from negmine.mining.result import MiningResult
from negmine.mining.resume import RunState, require_folder
from negmine.mining.row_lists import RowLists
from negmine.mining.sampling import STRATEGIES, sample
from negmine.mining.scan import Scan
from negmine.mining.shares import places, result_of, sampled_hash, skip_counts
from negmine.mining.sources import Rows, content_hash, resolve_device
from negmine.ops import checks, sort_key
from negmine.options import Select, is_real
from negmine.version import __version__

OP = "mine_hard_negatives"
INPUTS = (
    "query_embeddings", "corpus_embeddings", "positives", "exclude", "query_ids", "corpus_ids", "query_texts", "corpus_texts"
)  # fmt: skip
# The options that affect which negatives are returned. Batch sizes and recall measurements do not.
DECISIVE = (
    "select", "range_mode", "positive_aggregation", "num_negatives", "sampling_strategy", "sampling_temperature", "seed",
    "deduplicate", "near_duplicate_score", "index", "count_skipped",
)  # fmt: skip
DESCRIBED = (*DECISIVE, "audit_queries", "min_recall", "backend")
SCRATCH_BYTES = 64 << 20  # memory for near duplicates or for candidates of an index, but at most max_memory_bytes / 4
AUDIT_K = 100  # the largest k at which recall is measured
LOW_RECALL = (
    "{}: index {kind!r} finds only {recall:.1%} of the {audit_k} hardest rows of {audit_queries} queries, less than "
    "min_recall={min_recall}, so hard negatives are missing. Search more of the index (a NegativeIndex with nprobe or efSearch), "
    "or use another kind, or index='exact'"
)


@checks.refuses_unknown_names(OP)
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
    engine: str | Callable | None = None,
    engine_options: dict[str, Any] | None = None,
    process_group: Any = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    show_progress_bar: bool = False,
) -> MiningResult:
    """Find the hardest negatives of each query among all rows of a corpus, by an exact search in bounded memory.

        s_qk   = query_q . corpus_k                                   (raw inner product in fp32; vectors are not normalised)
        pool_q = documents k that are not a positive of q, are not excluded for q, do not have the text of q, and pass the
                 filters of select, with s_pos = min (or max, or mean) of s_qp over the positives p of q
        kept_q = num_negatives of the ranks [range_min, range_max) of pool_q by (s descending, k ascending)

    Parameters
    ----------
    query_embeddings, corpus_embeddings : array, Tensor, path, or a list of these
        (Q, D) and (K, D): NumPy arrays, tensors, tables, or paths of .npy, .safetensors ("file::tensor") or .parquet
        ("file::column") files. A list of these is read as shards. The dtype is float32, float16 or bfloat16; float64 is
        rounded to float32. A shard may also be a function without arguments that returns one of these, for example one that
        embeds texts; with engine="ray", an actor calls it. Pass rows of unit norm for cosine scores.
    positives : sequence
        The positives of each query: a sequence with one entry per query, a list of lists, or a tuple (indptr, indices) as in
        a CSR matrix. The entries are row numbers of the corpus, or ids if `corpus_ids` is given.
    query_ids, corpus_ids : sequence of int or str, optional
        One id per row. Corpus rows with equal ids are one document. Query rows with equal ids are one query and share their
        positives.
    query_texts, corpus_texts : sequence of str or mapping, optional
        One text per row, or a mapping from ids to texts. Rows with equal texts are one document or one query. Texts are
        compared after NFC normalisation, with each run of white space replaced by one space. Empty texts are never equal; a
        warning gives the number of empty texts in the corpus. A document with the text of the query is never its negative.
        Without ids and texts, query rows of equal embeddings are one query.
    exclude : sequence, optional
        Other documents that must not be negatives, in the forms of `positives`.
    select : Select, optional
        Score filters and a window of ranks. Its `sample` must be None. The default keeps all documents. A score equal to a
        threshold passes.
    range_mode : str
        ``"filtered"``: ranks are counted among the documents that remain after masks and filters. ``"raw"``: ranks are
        counted among all rows, including positives, and masks and filters then remove rows from the window, as in
        FlagEmbedding.
    positive_aggregation : str
        Whether margins are measured from the ``"min"``, ``"max"`` or ``"mean"`` score of a query's positives. With
        ``"min"``, one positive with a low score can leave a query with few negatives.
    num_negatives : int
        The number of negatives to find for each query.
    sampling_strategy : str
        ``"top"``: the hardest rows of the window. ``"random"``: a random subset of the window. ``"weighted"``: rows are drawn
        one by one, without replacement, with probability proportional to exp(s / sampling_temperature). If range_max is
        None, ``"random"`` and ``"weighted"`` use the first 10 * num_negatives ranks of the window.
    sampling_temperature : float
        The temperature of the sampling strategy ``"weighted"``.
    seed : int
        The seed of the random numbers. The draws of a query depend only on the seed and on the query's row number.
    deduplicate : str
        ``"exact"``: rows with equal embeddings are one document. This takes another pass over the corpus and 48 bytes per
        row. It does not find copies of a text whose embeddings differ by rounding; pass corpus_texts for those. ``"near"``:
        a row of the window is removed if its cosine with a positive of the query, or with a harder row that is kept, is at
        least near_duplicate_score. ``"none"``: neither of these.
    rescore : callable, optional
        A second model that scores pairs of texts, such as a cross-encoder: a callable that maps a list of (query text,
        document text) to one score each, or an object with a method `predict` that does so. The embeddings and the window of
        select choose the candidates. Filters, margins, order, sampling and the result then use the new scores.
    rescore_candidates : int, optional
        The number of candidates of each query that are scored again. The default is 10 * num_negatives, or the size of the
        window of select if that is smaller.
    rescore_batch_size : int
        The number of pairs that are scored at a time.
    promote : float, optional
        With rescore: a candidate becomes a positive if its score is at least that of the query's positive minus this number.
    near_duplicate_score : float
        The smallest cosine of near duplicates, for deduplicate="near".
    index : str or NegativeIndex
        ``"exact"`` scans all rows. A FAISS factory string, or a NegativeIndex of the same rows, proposes candidates, which
        are then scored exactly, masked and filtered. If too few remain, more candidates are requested, up to 4,096 per
        query. Rows that the index does not propose are missed.
    audit_queries : int
        The number of queries with which the recall of an approximate index is measured, for `recall` of the result.
    min_recall : float
        A warning is given if the measured recall is lower than this.
    count_skipped : bool
        Whether to count the documents that each filter removes. This may take one more scoring pass for each filter.
    batch_size, corpus_chunk_size : int, optional
        The number of queries and of corpus rows that are processed at a time. The default is as many as max_memory_bytes
        allows.
    max_memory_bytes : int
        The most memory to use in addition to the inputs and the result, except for a few MiB per thread in the kernels. With
        a window of many ranks, batches are small.
    resume_dir : path, optional
        A folder to which each finished batch is written atomically. After an interruption, the same call with the same
        folder continues the run and gives the same result. An error is raised if the folder belongs to a run with other
        inputs. Only one process at a time may use the folder. It is not deleted at the end.
    engine : str or callable, optional
        None mines in this process, or in the ranks of process_group. ``"ray"`` mines in actors of Ray (pip install
        negmine[ray]), each of which holds shards of the corpus. For any other engine, pass a function that maps (plan,
        phase, queries) to a Part; `negmine.mining.mine_part` has an example.
    engine_options : dict, optional
        For ``"ray"``: num_cpus, num_gpus, resources and runtime_env of each actor, and num_actors. The default of num_actors
        is the number of shards.
    process_group : ProcessGroup, optional
        A process group of torch.distributed whose ranks share the corpus. Each rank passes its own rows as
        corpus_embeddings; the corpus consists of the rows of all ranks, in rank order. All other arguments must be equal on
        all ranks, and positives, exclude, ids and texts are those of the whole corpus. query_embeddings are all queries, or
        the queries of this rank if positives has an entry for each query of all ranks. Every rank returns the result that
        one process with all rows would return.
    device : str or torch.device, optional
        The device that computes scores. The default is the device of the embeddings.
    backend : str, optional
        ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. None chooses one automatically.
    show_progress_bar : bool
        Whether to show the progress and the remaining time on stderr.

    Returns
    -------
    MiningResult
        indices and scores (Q, num_negatives), padded with -1 and -inf for queries with fewer negatives. `skipped` has the
        number of removed (query, row) pairs by reason. A pair is counted once, for the first reason of: positive, exclude,
        own_text, equal_to_positive, duplicate, not_finite, and the filters.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid. This is checked before any work.
    ImportError
        If a required package is not installed.
    OSError
        If a file cannot be written, for example because the disk is full.

    Notes
    -----
    Of rows with equal scores, the lower row number ranks first. A row of the corpus that contains NaN or infinity is never a
    negative, and a query that does gets no negatives. A warning lists such rows, `skipped` counts the pairs as "not_finite",
    and config["not_finite"] counts the rows. The result is the same, bit for bit, for every batch size, chunk size, number of
    ranks and number of shards. There are two exceptions: the "reference" backend gives equal bits only if its sums are exact,
    and an approximate index only for equal batch sizes.

    Examples
    --------
    >>> corpus = F.normalize(torch.randn(1000, 16), dim=1)
    >>> queries = F.normalize(corpus[:20] + 0.1 * torch.randn(20, 16), dim=1)
    >>> select = negmine.Select(relative_margin=0.05)
    >>> result = negmine.mine_hard_negatives(queries, corpus, list(range(20)), num_negatives=5, select=select)
    >>> result.indices.shape
    (20, 5)
    >>> triplets = result.to_triplets()  # query, positive, negative
    """
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
        engine=engine,
        engine_options=engine_options,
        process_group=process_group,
        device=device,
        backend=backend,
        show_progress_bar=show_progress_bar,
        rescore=rescore,
        rescore_candidates=rescore_candidates,
        rescore_batch_size=rescore_batch_size,
        promote=promote,
    )
    inputs = dict(
        query_embeddings=query_embeddings,
        corpus_embeddings=corpus_embeddings,
        positives=positives,
        exclude=exclude,
        query_ids=query_ids,
        corpus_ids=corpus_ids,
        query_texts=query_texts,
        corpus_texts=corpus_texts,
    )
    return _mine(given, inputs)


def mine_share(share: int, num_shares: int, arguments: dict[str, Any]) -> Part:
    """Mine one of num_shares equal shares of a job: a share of the rows, or of the queries (shares.py).

    share: from 1 to num_shares; arguments: of mine_hard_negatives. merge_parts makes a MiningResult of all shares.
    """
    refused = {
        "rescore": "None when a share of a job is mined: rescore the merged result",
        "index": "'exact' when a share of a job is mined",
    }
    for name, wanted in refused.items():
        given = arguments.get(name)
        if given is not None and getattr(given, "kind", given) != "exact":
            raise checks.refuse(OP, name, wanted, given)
    return _mine(*_split(arguments), (share, num_shares))


def check_arguments(arguments: dict[str, Any]) -> None:
    """Check all arguments of mine_hard_negatives, and open the inputs, as a run does before it reads a row of the corpus."""
    given, held = _split(arguments)
    _check_options(**given)
    with contextlib.ExitStack() as stack:
        _prepared(given | {"engine": None, "engine_options": None}, held, ProcessRanks(OP, None), stack)


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the inputs of mine_hard_negatives, with the defaults of those that are not given."""
    parameters = inspect.signature(mine_hard_negatives).parameters.values()
    values = {each.name: arguments.get(each.name, each.default) for each in parameters}
    values["select"] = Select() if values["select"] is None else values["select"]
    held = {name: values.pop(name) for name in INPUTS}
    return values, held


def _mine(given: dict[str, Any], held: dict[str, Any], share: tuple[int, int] | None = None) -> Any:
    """The MiningResult, or the Part of a share of the queries. given: the options; held: the inputs."""
    ranks = ProcessRanks(OP, given["process_group"])
    with ranks.together(), contextlib.ExitStack() as stack:
        options, inputs, plan, rescoring = _prepared(given, held, ranks, stack)
        if rescoring is None:
            if share is not None and _shares_rows(options, ranks):
                return _run_rows(options, inputs, plan, share)
            part = _run(options, inputs, plan, share)
            return part if share is not None else _result(part, inputs)
        first_stage = rescoring.first_stage(options)
        result = rescoring.run(_result(_run(first_stage, inputs, plan), inputs), plan.hidden, options)
        rescore = given["rescore"]
        judge = getattr(rescore, "__qualname__", type(rescore).__qualname__)
        arguments = _describe(options, DESCRIBED) | {"rescore": judge, "promote": given["promote"]}
        return replace(result, config=result.config | {"arguments": arguments})


def _prepared(
    given: dict[str, Any], held: dict[str, Any], ranks: ProcessRanks, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], "_Inputs", "_Plan", Rescoring | None]:
    """The options, the inputs, the plan of the search, and how candidates are scored again. stack: closes the inputs."""
    options = _check_options(**given)
    ranks.require_group()
    inputs = _open_inputs(options, ranks, stack, held)
    lists = (held["positives"], held["exclude"])
    if given["rescore"] is None:
        return options, inputs, _make_plan(options, inputs, *lists), None
    rescoring = Rescoring.open(OP, options)
    for name, column in (("query_texts", inputs.query_names.texts), ("corpus_texts", inputs.corpus_names.texts)):
        if column is None:
            raise checks.refuse(OP, name, "given if rescore is", None)
    plan = _make_plan(rescoring.first_stage(options), inputs, *lists)
    if given["promote"] is not None:
        _require_positives(plan.hidden, "promote is given")
    elif options["select"].has_margin:
        _require_positives(plan.hidden, "select has a margin")
    return options, inputs, plan, rescoring


def _result(part: Part, inputs: "_Inputs") -> MiningResult:
    """The MiningResult, with ids and texts as the user gave them."""
    names: dict[str, Any] = {
        f"{side}_{what}": None if column is None else column.given
        for side, each in (("query", inputs.query_names), ("corpus", inputs.corpus_names))
        for what, column in (("ids", each.ids), ("texts", each.texts))
    }
    return replace(result_of(part), **names)


def _require_positives(hidden: Hidden, why: str) -> None:
    sizes = hidden.positives.sizes
    if (sizes == 0).any():
        came = checks.Phrase(f"none for query {int(np.flatnonzero(sizes == 0)[0])}")
        raise checks.refuse(OP, "positives", f"at least one per query if {why}", came)


def check_options(given: dict[str, Any]) -> None:
    """Check the options of mine_hard_negatives. Raises ValueError or TypeError for the first that is invalid."""
    parameters = inspect.signature(mine_hard_negatives).parameters.values()
    defaults = {
        each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in INPUTS
    }
    options = defaults | {name: value for name, value in given.items() if name in defaults}
    _check_options(**options | {"select": Select() if options["select"] is None else options["select"]})


def _check_options(**options: Any) -> dict[str, Any]:
    """The options. Raises ValueError or TypeError for the first that is invalid."""
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
            raise checks.refuse(OP, "promote", "None if rescore is None", options["promote"])
    if select.sample is not None:
        raise checks.refuse(OP, "select", "without sample: use num_negatives and sampling_strategy", select)
    if options["range_mode"] == "raw" and select.range_max is None:
        raise checks.refuse(OP, "select.range_max", "given if range_mode is 'raw'", None)
    if not isinstance(index, (str, NegativeIndex)) or index == "":
        raise checks.refuse(OP, "index", "'exact', a FAISS factory string, or a NegativeIndex", index, TypeError)
    if options["process_group"] is not None and getattr(index, "kind", index) != "exact":
        raise checks.refuse(OP, "index", "'exact' if process_group is given", index)
    engine, engine_options = options["engine"], options["engine_options"]
    if engine is not None and engine != "ray" and not callable(engine):
        raise checks.refuse(OP, "engine", "None, 'ray', or a function (plan, phase, queries) -> Part", engine)
    if engine is not None and options["process_group"] is not None:
        raise checks.refuse(OP, "engine", "None if process_group is given", engine)
    if engine is not None and getattr(index, "kind", index) != "exact":
        raise checks.refuse(OP, "index", "'exact' if engine is given", index)
    if engine_options is not None and (engine != "ray" or not isinstance(engine_options, dict)):
        raise checks.refuse(OP, "engine_options", "a dict if engine is 'ray', else None", engine_options, TypeError)
    if options["resume_dir"] is not None:
        require_folder(OP, "resume_dir", options["resume_dir"])
    return options


def _describe(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The named options as values that can be written as JSON."""
    given = {"select": asdict(options["select"]), "index": getattr(options["index"], "kind", options["index"])}
    return {name: given.get(name, options[name]) for name in names}


@dataclass(frozen=True)
class _Inputs:
    """The embeddings, opened and checked, with the ids and texts of their rows."""

    queries: Any  # Rows, or RankRows
    corpus: Any  # an executor
    ranks: ProcessRanks
    query_names: Side
    corpus_names: Side


def open_corpus(
    options: dict[str, Any], ranks: ProcessRanks, stack: contextlib.ExitStack, queries: Any, corpus_embeddings: Any
) -> Any:
    """The executor that holds the corpus; corpus_embeddings itself if it is one. stack: closes what is opened."""
    if isinstance(corpus_embeddings, (LocalExecutor, RayExecutor)):
        return corpus_embeddings
    device, engine = options.get("device"), options.get("engine")
    if engine == "ray":
        corpus = RayExecutor(OP, corpus_embeddings, device, options.get("engine_options") or {})
        stack.callback(corpus.close)
        return corpus
    rows = Rows.open(OP, "corpus_embeddings", corpus_embeddings)
    return LocalExecutor(OP, rows, resolve_device(OP, device, queries if queries.device else rows), ranks, engine)


def _open_inputs(
    options: dict[str, Any],
    ranks: ProcessRanks,
    stack: contextlib.ExitStack,
    given: dict[str, Any],
) -> _Inputs:
    """Open and check the inputs. stack: closes them."""
    queries = open_queries(OP, given["query_embeddings"], ranks, given["positives"])
    corpus = open_corpus(options, ranks, stack, queries, given["corpus_embeddings"])
    if queries.dim != corpus.dim:
        wanted = f"of query_embeddings' D = {queries.dim}"
        raise checks.refuse(OP, "corpus_embeddings", wanted, (len(corpus), corpus.dim))
    ranks.require_same({"corpus dtype": corpus.dtype, "resume_dir is given": options["resume_dir"] is not None})
    query_ids, query_texts, corpus_ids, corpus_texts = (
        given[f"{side}_{what}"] for side in ("query", "corpus") for what in ("ids", "texts")
    )
    query_names = Side.open(OP, ("query_ids", "query_texts"), query_ids, query_texts, len(queries), 0)
    corpus_names = Side.open(OP, ("corpus_ids", "corpus_texts"), corpus_ids, corpus_texts, len(corpus), 1)
    return _Inputs(queries, corpus, ranks, query_names, corpus_names)


@dataclass(frozen=True)
class _Plan:
    """The plan of a run."""

    hidden: Hidden
    exact: bool  # False: an approximate index proposes candidates
    sizes: BatchSizes
    scratch_bytes: int
    miner: BatchMiner  # its source and excluded rows are set by _run
    content: dict[str, str]  # hashes of the inputs, without corpus_embeddings
    not_finite_queries: np.ndarray  # (M,): the queries that contain NaN or infinity
    parts: MiningPlan

    def finite(self, not_finite: np.ndarray) -> Hidden:
        """The hidden documents of the queries, where not_finite (M,) are the corpus rows that contain NaN or infinity."""
        return replace(self.hidden, not_finite_queries=self.not_finite_queries, not_finite=not_finite)

    @property
    def needs_count(self) -> bool:
        return needs_count(self.miner.select, self.miner.raw)


def _make_plan(options: dict[str, Any], inputs: _Inputs, positives: Any, exclude: Any) -> _Plan:
    queries, corpus, ranks = inputs.queries, inputs.corpus, inputs.ranks
    Q, K = len(queries), len(corpus)
    select, index, memory = options["select"], options["index"], options["max_memory_bytes"]
    if sort_key.LAST_INDEX <= K:
        raise checks.refuse(OP, "corpus_embeddings", f"of fewer than {sort_key.LAST_INDEX} rows", K)
    names = (inputs.query_names, inputs.corpus_names)
    total, not_finite = queries.content()
    warn_not_finite(OP, "query_embeddings", not_finite, Q, 7)
    hidden = resolve(OP, *names, positives, exclude, Q, K, lambda: _query_digests(queries, not_finite))
    if select.has_margin:
        _require_positives(hidden, "select has a margin")
    if isinstance(index, NegativeIndex):
        require_same_rows(OP, "corpus_embeddings", index, corpus.rows)
    elif index not in ("exact", "cagra"):
        faiss_index(OP, "index", index, queries.dim)  # refuses what FAISS does not know, before any work
    is_dense = corpus.is_dense(options["backend"], queries.dtype)
    exact = getattr(index, "kind", index) == "exact"
    near = options["deduplicate"] == "near"
    scratch_bytes = min(SCRATCH_BYTES, memory // 4)
    content = _content_hashes(inputs, hidden, index, total)
    described = {"arguments": _describe(options, DECISIVE), "content": content, "queries": Q, "negmine": __version__}
    parts = MiningPlan(
        digest=hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest(),
        corpus_rows=K,
        dim=queries.dim,
        dtypes=(queries.dtype, corpus.dtype),
        backend=options["backend"],
        chunk_size=1,
        distinct=None,
    )
    source = ExecutorScan(corpus, parts)
    deduplicator = None
    if near:
        threshold = options["near_duplicate_score"]
        deduplicator = Deduplicator(source.gather, hidden.positives, threshold, queries.dim, scratch_bytes)
    miner = BatchMiner(
        source=source,
        select=select,
        raw=options["range_mode"] == "raw",
        num_negatives=options["num_negatives"],
        strategy=options["sampling_strategy"],
        count_skipped=options["count_skipped"],
        excluded=hidden,
        not_finite_queries=not_finite,
        deduplicator=deduplicator,
    )
    if not exact and needs_count(select, miner.raw):
        wanted = (
            "in ranks if select has filters and index is not 'exact', because fractions need the scores of all rows"
        )
        raise checks.refuse(OP, "select's range", wanted, (select.range_min, select.range_max))
    dense_mask = not miner.raw and Q > 0 and bool(hidden.sizes.max() > 1)
    pair_bytes = DENSE_BYTES if is_dense else 2 * dense_mask
    remaining = memory - scratch_bytes * (near or not exact)
    limits = (options["batch_size"], options["corpus_chunk_size"], remaining)
    sizes = plan_batches(OP, queries, corpus, miner.depth(K), pair_bytes, *limits)
    sizes = replace(sizes, batch=min(ranks.counts(sizes.batch)))
    parts = replace(parts, chunk_size=sizes.chunk)
    return _Plan(hidden, exact, sizes, scratch_bytes, miner, content, not_finite, parts)


def _run(options: dict[str, Any], inputs: _Inputs, plan: _Plan, share: tuple[int, int] | None = None) -> Part:
    """Mine all queries, or one share of them."""
    queries, corpus, ranks, sizes, miner = inputs.queries, inputs.corpus, inputs.ranks, plan.sizes, plan.miner
    Q, K, device = len(queries), len(corpus), corpus.device
    select, index, seed = options["select"], options["index"], options["seed"]
    ranks.require_same(_describe(options, DECISIVE) | plan.content)
    documents = corpus.execute(plan.parts, Phase("documents", RowLists.empty(1)), None)
    total = documents.arrays["content"][0]
    content = {"corpus_embeddings": content_hash(corpus.dtype, corpus.dim, K, total)} | plan.content
    identity = _identity(options, inputs, plan, content, documents.kernels)
    number, num_shares = (1, 1) if share is None else share
    first, last = Q * (number - 1) // num_shares, Q * number // num_shares
    if share is not None:
        identity["share"] = f"{number}/{num_shares}"

    not_finite = documents.arrays["not_finite"]
    warn_not_finite(OP, "corpus_embeddings", not_finite, K, 6)
    hidden = plan.finite(not_finite)
    if options["deduplicate"] == "exact":
        digests = corpus.execute(plan.parts, Phase("digests", RowLists.empty(1)), None).arrays["digests"]
        hidden = hidden.with_equal_rows(first_equal(digests))
    parts = replace(plan.parts, distinct=hidden.distinct)
    positive_scores = np.empty(Q, np.float32)  # (Q,)
    given_scores = [np.empty(0, np.float32)]  # the score of each entry of hidden.given
    for begin in range(first, last, MAX_QUERIES):
        numbers = np.arange(begin, min(begin + MAX_QUERIES, last))
        lists, own = hidden.positives.take(numbers), hidden.given.take(numbers)
        query = queries.block(begin, begin + len(numbers), device)
        scores = corpus.execute(parts, Phase("positives", lists), query).arrays["scores"]  # (P,)
        positive_scores[numbers] = lists.reduce(scores, options["positive_aggregation"])
        given_scores.append(scores[places(own, lists, K)])

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
        batches = state.unfinished(sizes.batch, first, last)
        passes = len(batches) * (2 if plan.needs_count else 1)
        steps = corpus.steps(parts) if plan.exact else 1
        advance = stack.enter_context(progress(passes * steps, options["show_progress_bar"], "mining", "chunks"))
        source: ExecutorScan | IndexScan = ExecutorScan(corpus, parts)
        index_facts = None
        if not plan.exact:
            approximate = (
                index if isinstance(index, NegativeIndex) else state.build_index(corpus.rows, index, seed, device)
            )
            k = min(AUDIT_K, max(1, miner.depth(K)))
            scan = corpus.miner(parts).scan
            index_facts = _audit_index(options, approximate, scan, queries, k)
            source = IndexScan(scan, approximate, plan.scratch_bytes)
        corpus.advance = advance
        miner = replace(miner, source=source, excluded=hidden)
        for begin, end in batches:
            anchor = torch.from_numpy(positive_scores[begin:end]).to(device) if select.has_margin else None  # (B,)
            of_batch = torch.arange(begin, end, device="cpu")  # (B,)
            window, dropped = miner.window(queries.block(begin, end, device), of_batch, anchor)  # (B, W)
            strategy, temperature = options["sampling_strategy"], options["sampling_temperature"]
            sort_keys = sample(window.cpu(), miner.num_negatives, strategy, of_batch, seed, temperature)  # (B, n)
            if isinstance(source, IndexScan):
                dropped["cut_short"] = source.pop_cut_short()
            state.record(begin, *sort_key.unpack(sort_keys), dropped)
    if index_facts is not None:
        index_facts["cut_short"] = state.skipped.pop("cut_short")
    counts = {"query_embeddings": len(plan.not_finite_queries), "corpus_embeddings": len(not_finite)}
    config = _config(options, inputs, content, counts, documents.kernels, index_facts)
    given = hidden.given.take(np.arange(first, last))
    arrays = {
        "numbers": np.arange(first, last),
        "indices": state.indices[first:last],
        "scores": state.scores[first:last],
        "positive_scores": positive_scores[first:last],
        "positives_sizes": given.sizes,
        "query_rows": hidden.positives.list_of[first:last],
        "positives_rows": given.rows,
        "positive_pair_scores": np.concatenate(given_scores),
    }
    if share is not None:
        query_ids, corpus_ids = inputs.query_names.ids, inputs.corpus_names.ids
        arrays |= {} if query_ids is None else pack_ids("query_ids", query_ids.block(first, last))
        arrays |= {} if corpus_ids is None or number > 1 else pack_ids("corpus_ids", corpus_ids.block(0, K))
    skipped = hidden.count(first, last) | state.skipped
    facts = {"shares": [number], "num_shares": num_shares, "config": config, "skipped": skipped}
    tiles = np.array([[first, last, 0, K]])
    return Part("negatives", parts.digest, parts.digest, documents.kernels, 0, tiles, arrays, facts)


def _config(
    options: dict[str, Any],
    inputs: _Inputs,
    content: dict[str, str],
    not_finite: dict[str, int],
    kernels: str,
    index: dict[str, Any] | None,
) -> dict[str, Any]:
    """The config of the result: arguments, sizes, hashes and versions. not_finite: how many rows contain NaN or infinity."""
    return {
        "arguments": _describe(options, DESCRIBED),
        "kernels": kernels,
        "index": index,
        "queries": len(inputs.queries),
        "corpus_rows": len(inputs.corpus),
        "dimension": inputs.queries.dim,
        "rounded_to_float32": [name for name, rows in _rows(inputs).items() if rows.is_rounded],
        "not_finite": not_finite,
        "content": content,
        "versions": {
            "negmine": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _shares_rows(options: dict[str, Any], ranks: ProcessRanks) -> bool:
    """Whether a share of a job can be a share of the rows: no step compares or counts rows of different shares."""
    one_pass = options["deduplicate"] == "none" and not needs_count(options["select"], options["range_mode"] == "raw")
    return one_pass and options["engine"] is None and ranks.size == 1


def _run_rows(options: dict[str, Any], inputs: _Inputs, plan: _Plan, share: tuple[int, int]) -> Part:
    """Find the hardest rows of all queries in a share of the rows.

    No other rows are read, except positives if there are margins, and the rows that sampled_hash uses.
    """
    queries, corpus, miner, hidden = inputs.queries, inputs.corpus, plan.miner, plan.hidden
    Q, K, device, select = len(queries), len(corpus), corpus.device, miner.select
    number, num_shares = share
    edges = [[count * at // num_shares for at in (number - 1, number)] for count in (Q, K)]
    (first_query, last_query), (first_row, last_row) = edges
    rows = corpus.rows.between(first_row, last_row)
    document = PartMiner(OP, plan.parts, rows, first_row, device)(Phase("documents", RowLists.empty(1)), None)
    not_finite = document.arrays["not_finite"]
    warn_not_finite(OP, "corpus_embeddings", not_finite, K, 6)
    finite = plan.finite(not_finite)  # without what is not finite in other shares
    parts = replace(plan.parts, distinct=finite.distinct)
    own = PartMiner(OP, parts, rows, first_row, device, lambda chunks: corpus.advance(chunks))
    content = {"corpus_embeddings": sampled_hash(corpus.rows)} | plan.content
    identity = _identity(options, inputs, plan, content, own.kernels)
    identity |= {"share of the rows": f"{number}/{num_shares}", "own rows": document.arrays["content"].tolist()}

    is_early = select.has_margin and not miner.raw  # the scores of positives are needed for the scan
    positive_scores = np.empty(Q, np.float32)  # (Q,)
    pair_numbers, pair_scores, num_pairs = [np.empty(0, np.int64)], [np.empty(0, np.float32)], 0
    for begin in range(0, Q, MAX_QUERIES):
        numbers = np.arange(begin, min(begin + MAX_QUERIES, Q))
        lists = hidden.positives.take(numbers)
        phase, query = Phase("positives", lists), queries.block(begin, begin + len(numbers), device)
        if is_early:
            scores = corpus.execute(parts, phase, query).arrays["scores"]  # (P,)
            positive_scores[numbers] = lists.reduce(scores, options["positive_aggregation"])
            at = np.flatnonzero((first_row <= lists.rows) & (lists.rows < last_row))
            scores = scores[at]
        else:
            arrays = own(phase, query).arrays
            at, scores = arrays["numbers"], arrays["scores"]
        pair_numbers.append(num_pairs + at)
        pair_scores.append(scores)
        num_pairs += len(lists.rows)

    filters = list(nested_filters(select)) if options["count_skipped"] else []
    counters = [] if miner.raw else filters
    depth, resume_dir = miner.depth(K), options["resume_dir"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        state = RunState(OP, inputs.ranks, Q, depth, K, counters)
        if resume_dir is not None:
            stack.callback(state.open(resume_dir, identity).close)
        batches = state.unfinished(plan.sizes.batch, 0, Q)
        steps = len(batches) * len(list(rows.spans(parts.chunk_size)))
        corpus.advance = stack.enter_context(progress(steps, options["show_progress_bar"], "mining", "chunks"))
        for begin, end in batches:
            excluded, anchor, of_batch = RowLists.empty(end - begin), None, np.arange(begin, end)
            if not miner.raw:
                excluded = finite.take(of_batch)
                anchor = positive_scores[of_batch] if is_early else None
            limits = (
                (Select(), ()) if miner.raw else (miner.filters, tuple(nested_filters(select)[c] for c in counters))
            )
            phase = Phase("scan", excluded, anchor, depth, *limits)
            arrays = own(phase, queries.block(begin, end, device)).arrays
            broken = np.isin(of_batch, plan.not_finite_queries)
            arrays["sort_keys"][broken], arrays["num_dropped"][broken] = sort_key.NOWHERE, 0
            dropped = skip_counts(miner, arrays["num_dropped"]) if counters else {}
            state.record(begin, *sort_key.unpack(torch.from_numpy(arrays["sort_keys"])), dropped)
    indices = torch.from_numpy(state.indices)
    sort_keys = sort_key.pack(torch.from_numpy(state.scores), indices).masked_fill(indices < 0, sort_key.NOWHERE)
    arrays = {
        "numbers": np.arange(Q),
        "sort_keys": sort_keys.numpy(),
        "content": document.arrays["content"],
        "not_finite": not_finite[hidden.documents(not_finite) == not_finite],
        "pair_numbers": np.concatenate(pair_numbers),
        "pair_scores": np.concatenate(pair_scores),
    }
    if number == 1:
        every = np.arange(Q)
        lists_of = {"positives": hidden.given, "pair": hidden.positives.take(every), "excluded": hidden.take(every)}
        for name, lists in lists_of.items():
            arrays |= {f"{name}_sizes": lists.sizes, f"{name}_rows": lists.rows}
        arrays |= {"query_rows": hidden.positives.list_of, "not_finite_queries": plan.not_finite_queries}
        for name, column in {"query_ids": inputs.query_names.ids, "corpus_ids": inputs.corpus_names.ids}.items():
            arrays |= {} if column is None else pack_ids(name, column.block(0, len(column)))
    facts = {
        "shares": [number],
        "num_shares": num_shares,
        "config": _config(
            options, inputs, content, {"query_embeddings": len(plan.not_finite_queries)}, own.kernels, None
        ),
        "skipped": hidden.count(first_query, last_query) | dict.fromkeys(filters, 0) | state.skipped,
        "num_candidates": K if hidden.distinct is None else int(hidden.distinct.sum()),
        "num_not_finite": len(not_finite),
        "corpus_dtype": corpus.dtype,
    }
    tiles = np.array([[0, Q, first_row, last_row]])
    return Part("candidates", parts.digest, parts.digest, own.kernels, depth, tiles, arrays, facts)


def _rows(inputs: _Inputs) -> dict[str, Any]:
    return {"query_embeddings": inputs.queries, "corpus_embeddings": inputs.corpus}


def _query_digests(queries: Any, not_finite: np.ndarray) -> np.ndarray:
    """(Q, 2) uint64 hashes, equal for queries with equal embeddings; queries that are not finite equal no other."""
    digests = np.array(queries.row_digests())
    digests[not_finite, 0], digests[not_finite, 1] = not_finite, 0
    return digests


def _content_hashes(inputs: _Inputs, hidden: Hidden, index: str | NegativeIndex, total: np.ndarray) -> dict[str, str]:
    """Hashes of all inputs except corpus_embeddings, by name. total: the sum of the hashes of the queries."""
    queries = inputs.queries
    content = {
        "query_embeddings": content_hash(queries.dtype, queries.dim, len(queries), total),
        "positives": hidden.given.content_hash(),
        "exclude": hidden.exclude.content_hash(),
        **inputs.query_names.content("query_ids", "query_texts"),
        **inputs.corpus_names.content("corpus_ids", "corpus_texts"),
    }
    if isinstance(index, NegativeIndex) and index.kind != "exact":
        content["index"] = index.content_hash()
    return content


def _identity(
    options: dict[str, Any], inputs: _Inputs, plan: _Plan, content: dict[str, str], kernels: str
) -> dict[str, Any]:
    """All values that affect the result. They must be equal when a run is resumed."""
    identity: dict[str, Any] = {
        "arguments": _describe(options, DECISIVE),
        "content": content,
        "queries": len(inputs.queries),
        "corpus_rows": len(inputs.corpus),
        "negmine": __version__,
        "kernels": kernels,
    }
    if not plan.exact:
        identity["batch_size"] = plan.sizes.batch  # what an index finds may depend on the batch
    return identity


def _audit_index(options: dict[str, Any], index: NegativeIndex, scan: Scan, queries: Rows, k: int) -> dict[str, Any]:
    """Measure the recall of an index on a sample of the queries. Warns if it is below min_recall."""
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
        warnings.warn(LOW_RECALL.format(OP, **facts), RuntimeWarning, stacklevel=6)
    return facts
