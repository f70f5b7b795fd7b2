"""mine_hard_negatives: the hardest negatives of each query of a dataset, exactly, streamed, in bounded memory.

    for each batch of queries, as many as the memory allows
        count what the filters keep              only where a window is given by fractions and there are filters
        scan the corpus, chunk by chunk          masks, filters, ranks: the places [0, end) of each query (scan.py)
        window, draw                             n places, hardest first (draw.py)

Never in memory: the (Q, K) scores, or more of the corpus than a chunk of it.
"""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine import backends, checks, order, reference
from negmine.options import Select, is_real
from negmine.search.draw import STRATEGIES, draw, ranks_needed, window_of
from negmine.search.lists import RowLists, row_lists
from negmine.search.result import MiningResult
from negmine.search.rows import Rows
from negmine.search.scan import Scan, pair_scores
from negmine.version import __version__

OP = "mine_hard_negatives"
FILTERS = ("min_score", "max_score", "absolute_margin", "relative_margin")
DEFAULT_MEMORY = 1 << 30
MOST_QUERIES, MOST_ROWS = 8192, 65_536  # beyond them a batch and a chunk gain nothing
PLACE_BYTES = 160  # one kept place: twice in the merge, its score, its index, and the words of a draw


@dataclass(frozen=True)
class _Sizes:
    batch: int
    chunk: int


def _sizes(
    queries: Rows, corpus: Rows, depth: int, pair_bytes: int, batch: int | None, chunk: int | None, memory: int | None
) -> _Sizes:
    """Queries a batch and rows a chunk that fit the memory: half of it for the batch, half for the chunk and its masks."""
    query_bytes = queries.row_bytes + PLACE_BYTES * max(depth, 1)
    half = (memory or DEFAULT_MEMORY) // 2
    most = max(1, min(len(queries), MOST_QUERIES, half // query_bytes))
    batch = most if batch is None else min(batch, max(1, len(queries)))
    row_bytes = corpus.row_bytes + 16 + pair_bytes * batch
    most = max(1, min(len(corpus), MOST_ROWS, half // row_bytes))
    chunk = most if chunk is None else min(chunk, max(1, len(corpus)))
    needed = batch * query_bytes + chunk * row_bytes
    if memory is not None and needed > memory:
        wanted = f"at least {needed} for a batch of {batch} queries, {depth} ranks of each, and chunks of {chunk} rows"
        raise checks.refuse(OP, "max_memory_bytes", wanted, memory)
    return _Sizes(batch, chunk)


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Any]:
    """A callable that moves a bar; it does nothing where no bar is wanted or tqdm is not installed."""
    bar = None
    if show:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            bar = tqdm(total=total, desc="mining", unit="chunk")
    try:
        yield bar.update if bar is not None else (lambda chunks: None)
    finally:
        if bar is not None:
            bar.close()


def _check_options(
    select: Select, range_mode: Any, num_negatives: Any, strategy: Any, temperature: Any, seed: Any, flags: dict
) -> None:
    checks.require_options(OP, select=select)
    checks.require_choice(OP, "range_mode", range_mode, ("filtered", "raw"))
    checks.require_choice(OP, "sampling_strategy", strategy, STRATEGIES)
    checks.require_count(OP, "num_negatives", num_negatives)
    checks.require_draw(OP, seed, 0, 0)
    for name, value in flags.items():
        checks.require_bool(OP, name, value)
    if not is_real(temperature) or temperature <= 0:
        raise checks.refuse(OP, "sampling_temperature", "a number above 0", temperature)
    if select.sample is not None:
        raise checks.refuse(OP, "select", "without sample: num_negatives and sampling_strategy draw", select)
    if range_mode == "raw" and select.range_max is None:
        raise checks.refuse(OP, "select.range_max", "given where range_mode is 'raw'", None)


def _each_filter(select: Select) -> dict[str, Select]:
    """A Select for each filter alone."""
    given = {name: getattr(select, name) for name in FILTERS}
    return {name: Select(**{name: value}) for name, value in given.items() if value is not None}


def _counts_first(select: Select, raw: bool) -> bool:
    """True where the size of a filtered pool decides which ranks are wanted."""
    by_fraction = isinstance(select.range_min, float) or isinstance(select.range_max, float)
    return by_fraction and select.has_filter and not raw


@dataclass(frozen=True)
class _Miner:
    """What every batch of a run shares: the options, and the rows that no query or that one query may not see."""

    scan: Scan
    select: Select
    raw: bool
    n: int
    strategy: str
    count_skipped: bool
    hidden: RowLists  # distinct rows of each query's positives and exclusions
    candidates: int  # rows of the corpus that are no copies

    @property
    def filters(self) -> Select:
        return replace(self.select, range_min=0, range_max=None)

    def ranks(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """size (B,) -> first, end (B,): the ranks to look at."""
        return ranks_needed(self.select, size, self.n, self.strategy, cut=not self.raw)

    def window(self, query: Tensor, begin: int, end: int, anchor: Tensor | None) -> tuple[Tensor, dict[str, int]]:
        """query (B, D) = queries [begin, end), anchor (B,) -> the window (B, W) order, and pairs dropped by each filter."""
        hidden = self.hidden.of(begin, end)
        if self.raw:
            size = torch.full((end - begin,), self.candidates, device=query.device)  # (B,)
            first, last = self.ranks(size)
            nothing = (hidden[0][:0], hidden[1][:0])
            places, _ = self.scan.run(query, nothing, None, int(last.max()), Select(), [])
            return self._filter(window_of(places, first, last), hidden, anchor)
        size = self.candidates - torch.from_numpy(np.diff(self.hidden.indptr[begin : end + 1])).to(query.device)  # (B,)
        pool = size
        if _counts_first(self.select, self.raw):
            pool = self.scan.run(query, hidden, anchor, 0, self.filters, [self.filters])[1][0]  # (B,)
        first, last = self.ranks(pool)
        counted = _each_filter(self.select) if self.count_skipped else {}
        places, counts = self.scan.run(query, hidden, anchor, int(last.max()), self.filters, list(counted.values()))
        dropped = {name: int((size - count).sum()) for name, count in zip(counted, counts, strict=True)}
        return window_of(places, first, last), dropped

    def _filter(
        self, window: Tensor, hidden: tuple[np.ndarray, np.ndarray], anchor: Tensor | None
    ) -> tuple[Tensor, dict[str, int]]:
        """The window (B, W) of raw ranks without hidden rows and what filters drop, packed to the left."""
        scores, rows = order.unpack(window)  # (B, W) each
        K = len(self.scan.corpus)
        keys = torch.from_numpy(hidden[0] * K + hidden[1]).to(window.device)  # (E,)
        queries = torch.arange(len(window), device=window.device)[:, None]  # (B, 1)
        pool = (window != order.NOWHERE) & ~torch.isin(queries * K + rows, keys)  # (B, W)
        counted = _each_filter(self.select) if self.count_skipped else {}
        dropped = {
            name: int((pool & ~reference.filtered(scores, anchor, select, pool)).sum())
            for name, select in counted.items()
        }
        kept = reference.filtered(scores, anchor, self.filters, pool)  # (B, W)
        return window.masked_fill(~kept, order.NOWHERE).sort(dim=1, descending=True).values, dropped


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
    count_skipped: bool = True,
    batch_size: int | None = None,
    corpus_chunk_size: int | None = None,
    max_memory_bytes: int | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    show_progress_bar: bool = False,
) -> MiningResult:
    """The hardest negatives of each query among all rows of a corpus: exact, streamed, in bounded memory.

        s_qk   = query_q . corpus_k                                      (raw inner product in fp32, vectors as given)
        pool_q = rows k that are neither a positive of q nor excluded for q, and pass select's filters against
                 s_pos = min (max, mean) over q's positives p of s_qp
        kept_q = num_negatives of ranks [range_min, range_max) of pool_q by (s descending, k ascending)

    query_embeddings (Q, D), corpus_embeddings (K, D): NumPy arrays, tensors, paths of .npy files (memory-mapped), or a list of
        those as shards; float32, float16, or bfloat16 tensors. Nothing is normalised: give unit rows for cosine.
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
    count_skipped: count what each filter drops. One more scoring pass a filter, except where range_mode is "raw".
    batch_size, corpus_chunk_size: queries and rows at a time; default: what fits max_memory_bytes (default 1 GiB), which
        counts what is held beside the inputs and the result, save a few MiB a thread inside the kernels. A window that
        reaches deep makes batches small.
    device: where scores are computed; default: where query_embeddings or corpus_embeddings are.
    show_progress_bar: a bar, where tqdm is installed.

    Returns a MiningResult: indices and scores (Q, num_negatives), past the end of a window -1 and -inf. Equal scores: the lower
    row first. A NaN score is no candidate. The same negatives, bit for bit, for any batch_size, corpus_chunk_size and cut into
    shards; on the "reference" backend only where sums are exact. Raises ValueError or TypeError for input that does not fit,
    before any work.
    """
    select = Select() if select is None else select
    flags = {"count_skipped": count_skipped, "show_progress_bar": show_progress_bar}
    _check_options(select, range_mode, num_negatives, sampling_strategy, sampling_temperature, seed, flags)
    checks.require_choice(OP, "positive_aggregation", positive_aggregation, ("min", "max", "mean"))
    checks.require_choice(OP, "deduplicate", deduplicate, ("none", "exact"))
    for name, limit in {
        "batch_size": batch_size,
        "corpus_chunk_size": corpus_chunk_size,
        "max_memory_bytes": max_memory_bytes,
    }.items():
        if limit is not None:
            checks.require_count(OP, name, limit)
    arguments = {
        "select": asdict(select),
        "range_mode": range_mode,
        "positive_aggregation": positive_aggregation,
        "num_negatives": num_negatives,
        "sampling_strategy": sampling_strategy,
        "sampling_temperature": sampling_temperature,
        "seed": seed,
        "deduplicate": deduplicate,
        "count_skipped": count_skipped,
        "max_memory_bytes": max_memory_bytes,
        "backend": backend,
    }
    queries = Rows.open(OP, "query_embeddings", query_embeddings)
    corpus = Rows.open(OP, "corpus_embeddings", corpus_embeddings)
    Q, K = len(queries), len(corpus)
    if queries.dim != corpus.dim:
        raise checks.refuse(OP, "corpus_embeddings", f"of query_embeddings' D = {queries.dim}", (K, corpus.dim))
    if order.LAST_INDEX <= K:
        raise checks.refuse(OP, "corpus_embeddings", f"of fewer than {order.LAST_INDEX} rows", K)
    given = row_lists(OP, "positives", positives, Q, K)
    none = RowLists(np.zeros(Q + 1, np.int64), np.empty(0, np.int64))
    further = none if exclude is None else row_lists(OP, "exclude", exclude, Q, K)
    if select.has_margin and (given.sizes == 0).any():
        came = f"none for query {int(np.flatnonzero(given.sizes == 0)[0])}"
        raise checks.refuse(OP, "positives", "at least one a query where select has a margin", came)
    try:
        where = torch.device(device or queries.device or corpus.device or "cpu")
        empty = np.empty(0, np.int64)
        samples = (queries.gather(empty, where), corpus.gather(empty, where))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise checks.refuse(OP, "device", f"a device that torch has here ({error})", device) from error
    ops = backends.choose(OP, ("mine_hardest", "count_negatives"), backend, samples)

    raw = range_mode == "raw"
    depth = int(ranks_needed(select, torch.tensor([K]), num_negatives, sampling_strategy, cut=not raw)[1])
    dense_mask = not raw and Q > 0 and bool((given.sizes + further.sizes).max() > 1)
    pair_bytes = 64 if ops is None else 2 * dense_mask
    sizes = _sizes(queries, corpus, depth, pair_bytes, batch_size, corpus_chunk_size, max_memory_bytes)

    first = corpus.first_equal() if deduplicate == "exact" else None  # (K,)
    distinct = None if first is None else first == np.arange(K)  # (K,) bool
    candidates = K if distinct is None else int(distinct.sum())
    known, unseen = (lists if first is None else lists._replace(rows=first[lists.rows]) for lists in (given, further))
    known, hidden = known.united(none), known.united(unseen)
    pairs = pair_scores(ops, queries, corpus, given.queries, given.rows, where)  # (P,)
    positive_scores = given.reduce(pairs, positive_aggregation)  # (Q,)
    indices = np.empty((Q, num_negatives), np.int64)
    scores = np.empty((Q, num_negatives), np.float32)
    skipped = {
        "positives": len(known.rows),
        "exclude": len(hidden.rows) - len(known.rows),
        "duplicates": Q * (K - candidates),
    }
    skipped |= dict.fromkeys(_each_filter(select) if count_skipped else (), 0)
    batches = list(queries.spans(sizes.batch))
    passes = len(batches) * (2 if _counts_first(select, raw) else 1)
    with torch.no_grad(), _progress(passes * len(list(corpus.spans(sizes.chunk))), show_progress_bar) as advance:
        scan = Scan(ops, corpus, sizes.chunk, where, distinct, advance)
        miner = _Miner(scan, select, raw, num_negatives, sampling_strategy, count_skipped, hidden, candidates)
        for begin, end in batches:
            anchor = torch.from_numpy(positive_scores[begin:end]).to(where) if select.has_margin else None  # (B,)
            window, dropped = miner.window(queries.block(begin, end, where), begin, end, anchor)  # (B, W)
            rows = torch.arange(begin, end)  # (B,)
            places = draw(window.cpu(), num_negatives, sampling_strategy, rows, seed, sampling_temperature)  # (B, n)
            kept_scores, kept_rows = order.unpack(places)
            scores[begin:end], indices[begin:end] = kept_scores.numpy(), kept_rows.numpy()
            for name, count in dropped.items():
                skipped[name] += count
    config = {
        "arguments": arguments,
        "sizes": {"batch_size": sizes.batch, "corpus_chunk_size": sizes.chunk, "device": str(where)},
        "queries": Q,
        "corpus_rows": K,
        "dimension": queries.dim,
        "content": {
            "query_embeddings": queries.content_hash(),
            "corpus_embeddings": corpus.content_hash(),
            "positives": given.content_hash(),
            "exclude": further.content_hash(),
        },
        "versions": {
            "negmine": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    return MiningResult(indices, scores, positive_scores, (indices >= 0).sum(1), given, skipped, config)
