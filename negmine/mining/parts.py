"""A mining job split into parts, which any engine may compute in any order and on any machine.

A job is a sequence of phases. A phase computes something from queries and rows of the corpus. It can be computed separately for
any range of queries and any range of rows:

    phase       content of a part                                                             how parts are merged
    documents   a hash of the rows, and the numbers of those that contain NaN or infinity     added; concatenated
    digests     a hash of each row, only if equal rows are one document                       concatenated
    positives   the score of each query with each of its positives                            concatenated
    counts      the number of rows that each filter removes                                   added
    scan        the sort keys of each query's `depth` hardest rows, and the counts above      the hardest are kept; added
    rows        the vectors of some rows                                                      concatenated
    negatives   the final negatives of a share of the queries                                 concatenated
    candidates  the content of "documents", "positives" and "scan" for a share of the rows    as in these phases

mine_part computes a part. The part depends only on the arguments. merge_parts (shares.py) merges parts. A sort key consists of a
score and the number of the row in the whole corpus, so no two sort keys are equal, and merging in any order gives the same bits
as one process.

    def engine(plan, phase, queries):
        return merge_parts([mine_part(plan, phase, queries, shard, first_row) for first_row, shard in shards])

    mine_hard_negatives(..., engine=engine)
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.atomic_file import atomic_write
from negmine.mining.numpy_file import read_npz
from negmine.mining.regular_file import cause, parse_json
from negmine.mining.row_lists import RowLists
from negmine.mining.scan import OPS, Corpus, Scan, pair_scores
from negmine.mining.sources import DTYPES, Rows, resolve_device
from negmine.ops import backends, compiled
from negmine.ops.backends import Kernels
from negmine.ops.checks import Phrase, describe, refuse, require_count
from negmine.options import Select

FORMAT = 1
MAX_HEADER_BYTES = 1 << 20  # limit on the size of a part's JSON, which takes a few thousand bytes
IDS = tuple(f"{side}_ids{form}" for side in ("query", "corpus") for form in ("", "_bytes", "_sizes"))
TILES = ("query_begin", "query_end", "row_begin", "row_end")


@dataclass(frozen=True, eq=False)
class MiningPlan:
    """The settings that all parts of a mining job have in common. `mine_hard_negatives` passes it to its engine.

    It can be pickled, and it does not contain rows of the corpus.

    Attributes
    ----------
    digest : str
        A hash of the arguments, the queries and the rows that are excluded for them.
    corpus_rows : int
        K, the number of rows of the corpus.
    dim : int
        D, the width of a row.
    dtypes : tuple of two str
        The dtypes of the queries and of the corpus.
    backend : str or None
        The requested backend.
    chunk_size : int
        The number of rows of the corpus that one kernel call reads.
    distinct : array (K,) bool or None
        True for the row that represents its document, False for the other rows of the document and for rows that contain NaN
        or infinity. None if there are no such rows.

    Examples
    --------
    >>> plans = []
    >>> def engine(plan, phase, queries):
    ...     plans.append(plan)
    ...     return negmine.mining.mine_part(plan, phase, queries, corpus, 0)
    >>> corpus = torch.randn(50, 16)
    >>> result = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2, engine=engine)
    >>> plans[0].corpus_rows, plans[0].dim, plans[0].dtypes
    (50, 16, ('float32', 'float32'))
    """

    digest: str
    corpus_rows: int
    dim: int
    dtypes: tuple[str, str]
    backend: str | None
    chunk_size: int
    distinct: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Phase:
    """One step of a mining job, for B queries and all rows of the corpus. `mine_hard_negatives` passes it to its engine.

    It can be pickled.

    Attributes
    ----------
    name : str
        "documents", "digests", "positives", "counts", "scan", "rows" or "negatives".
    lists : RowLists
        For each query, the rows to score (in "positives") or the documents that are excluded (in all other phases).
    anchor : array (B,) float32, optional
        The score of each query's positives, from which margins are measured.
    depth : int
        The number of hardest rows to keep for each query.
    filters : Select
        The filters that a row must pass.
    counted_filters : tuple of Select
        The filters for which the removed rows are counted.
    rows : array (M,) int64, optional
        The numbers of the rows whose vectors are requested, ascending.

    Examples
    --------
    >>> names = []
    >>> def engine(plan, phase, queries):
    ...     names.append(phase.name)
    ...     return negmine.mining.mine_part(plan, phase, queries, corpus, 0)
    >>> corpus = torch.randn(50, 16)
    >>> result = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2, engine=engine)
    >>> "scan" in names
    True
    """

    name: str
    lists: RowLists
    anchor: np.ndarray | None = None
    depth: int = 0
    filters: Select = field(default_factory=Select)
    counted_filters: tuple[Select, ...] = ()
    rows: np.ndarray | None = None

    @property
    def num_queries(self) -> int:
        """B; 1 for a phase that needs no queries."""
        return len(self.lists.sizes)

    @cached_property
    def digest(self) -> str:
        """A hash of all attributes, which identifies the phase that a part belongs to."""
        settings = [self.name, self.depth, asdict(self.filters), [asdict(each) for each in self.counted_filters]]
        hashed = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        for array in (*self.lists, self.anchor, self.rows):
            hashed.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True, eq=False)
class Part:
    """The result of a phase for some queries and some rows of the corpus, returned by `mine_part` and `merge_parts`.

    Attributes
    ----------
    phase : str
        The name of its Phase.
    phase_digest : str
        The digest of its Phase.
    plan : str
        The digest of its MiningPlan.
    kernels : str
        The kernels and the instruction set that computed the scores. Other kernels may round differently.
    depth : int
        The depth of its Phase.
    tiles : array (T, 4) int64
        query_begin, query_end, row_begin and row_end of each computed range of queries and rows. No two tiles overlap.
    arrays : dict of arrays
        "numbers" (M,) int64, the ascending numbers of queries, pairs or rows, and the values (M, ...) for each of them.
    facts : dict
        In phase "negatives", the description and the counters of the result.

    Examples
    --------
    >>> def engine(plan, phase, queries):
    ...     part = negmine.mining.mine_part(plan, phase, queries, corpus, 0)
    ...     return negmine.mining.Part.from_bytes(part.to_bytes())  # as if another machine had sent it
    >>> corpus = torch.randn(50, 16)
    >>> result = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2, engine=engine)
    >>> result.indices.shape
    (5, 2)
    """

    phase: str
    phase_digest: str
    plan: str
    kernels: str
    depth: int
    tiles: np.ndarray
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]

    def header(self) -> dict[str, Any]:
        """All attributes except the arrays, in a form that can be written as JSON."""
        names = ("phase", "phase_digest", "plan", "kernels", "depth", "facts")
        return {"format": FORMAT} | {name: getattr(self, name) for name in names}

    def write(self, file: IO[bytes]) -> None:
        """Write the content of a .npz file to an open file."""
        text = np.frombuffer(json.dumps(self.header()).encode(), np.uint8)
        np.savez(file, header=text, tiles=self.tiles, **self.arrays)  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike) -> None:
        """Write the part to one .npz file, atomically.

        Parameters
        ----------
        path : path
            The file. No suffix is added.
        """
        with atomic_write("Part.save", path) as file:
            self.write(file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Part":
        """Read a file that `save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : path
            The file.

        Returns
        -------
        Part
            The part that was saved.

        Raises
        ------
        ValueError
            If the file does not exist, is damaged or was not written by `save`.
        """
        if not Path(path).is_file():
            raise refuse("Part.load", "path", "an existing file", str(path))
        try:
            return cls._of_arrays(read_npz(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"Part.load: {describe(str(path))} is damaged or was not written by save"
            raise ValueError(f"{what} ({cause(error)})") from error

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        buffer = io.BytesIO()
        self.write(buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Part":
        """The part whose `to_bytes` returned `content`. Nothing in it is executed."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls._of_arrays(dict(arrays))

    @classmethod
    def _of_arrays(cls, arrays: dict[str, np.ndarray]) -> "Part":
        text = arrays.pop("header").tobytes()
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"its header holds {len(text):,} bytes")
        header = parse_json(text, "its header")
        kinds = {"phase": str, "phase_digest": str, "plan": str, "kernels": str, "depth": int, "facts": dict}
        if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if header.keys() != kinds.keys() or any(type(header[name]) is not kind for name, kind in kinds.items()):
            raise ValueError(f"its header holds {', '.join(header)}")
        part = cls(**header, tiles=arrays.pop("tiles"), arrays=arrays)
        part._require_whole()
        return part

    def _require_whole(self) -> None:
        """Raise ValueError if the arrays do not match the phase or each other."""
        tiles, wanted = self.tiles, ARRAYS.get(self.phase)
        if wanted is None:
            raise ValueError(f"its phase is {describe(self.phase)}")
        if tiles.dtype != np.int64 or tiles.ndim != 2 or tiles.shape[1] != len(TILES) or (tiles < 0).any():
            raise ValueError(f"its tiles are {tiles.dtype} of shape {tiles.shape}")
        optional = OPTIONAL.get(self.phase, {})
        if not wanted.keys() <= self.arrays.keys() <= wanted.keys() | optional.keys():
            raise ValueError(f"its arrays are {', '.join(self.arrays)}")
        counts = {len(array) for name, array in self.arrays.items() if name not in RAGGED}
        for name, array in self.arrays.items():
            dtype, ndim = {**optional, **wanted}[name]
            if array.dtype != dtype or array.ndim != ndim:
                raise ValueError(f"its {name} are {array.dtype} of shape {array.shape}")
        if len(counts) != 1 or (np.diff(self.arrays["numbers"]) <= 0).any():
            raise ValueError("its arrays do not fit each other")
        if self.phase in ("scan", "candidates") and self.arrays["sort_keys"].shape[1] != self.depth:
            raise ValueError(f"its sort keys are not {self.depth} deep")

    def require_complete(self, op: str, phase: Phase, plan: MiningPlan) -> None:
        """Raise ValueError unless this is the part of `phase` and `plan` for all queries of the phase and all corpus rows."""
        wanted = "one that returns the part of all queries and all rows for the given phase"
        if (self.plan, self.phase_digest) != (plan.digest, phase.digest):
            raise refuse(op, "engine", wanted, Phrase(f"a part of another plan or phase, {self.phase}"))
        edges = np.unique(np.r_[0, phase.num_queries, self.tiles[:, :2].ravel()])
        for begin in edges[:-1].tolist():
            over = self.tiles[(self.tiles[:, 0] <= begin) & (begin < self.tiles[:, 1])]
            covered = int((over[:, 3] - over[:, 2]).sum())
            if covered != plan.corpus_rows:
                came = Phrase(f"{covered} of the {plan.corpus_rows} rows for query {begin} in phase {phase.name}")
                raise refuse(op, "engine", wanted, came)


# The arrays of each phase's parts: their dtype and their number of dimensions.
ARRAYS: dict[str, dict[str, tuple[type, int]]] = {
    "documents": {"numbers": (np.int64, 1), "content": (np.uint64, 2), "not_finite": (np.int64, 1)},
    "digests": {"numbers": (np.int64, 1), "digests": (np.uint64, 2)},
    "positives": {"numbers": (np.int64, 1), "scores": (np.float32, 1)},
    "counts": {"numbers": (np.int64, 1), "num_dropped": (np.int64, 2)},
    "scan": {"numbers": (np.int64, 1), "sort_keys": (np.int64, 2), "num_dropped": (np.int64, 2)},
    "rows": {"numbers": (np.int64, 1), "vectors": (np.float32, 2)},
    "negatives": {
        "numbers": (np.int64, 1),
        "indices": (np.int64, 2),
        "scores": (np.float32, 2),
        "positive_scores": (np.float32, 1),
        "positives_sizes": (np.int64, 1),
        "query_rows": (np.int64, 1),
        "positives_rows": (np.int64, 1),
        "positive_pair_scores": (np.float32, 1),
    },
    "candidates": {
        "numbers": (np.int64, 1),
        "sort_keys": (np.int64, 2),
        "content": (np.uint64, 2),
        "not_finite": (np.int64, 1),
        "pair_numbers": (np.int64, 1),
        "pair_scores": (np.float32, 1),
    },
}
# Arrays whose length differs from that of "numbers". Their lengths are checked when the MiningResult is created.
RAGGED = (
    "positives_rows", "positive_pair_scores", "content", "pair_numbers", "pair_scores", "pair_rows", "excluded_rows",
    "not_finite", "not_finite_queries", *IDS
)  # fmt: skip
# Ids are stored as ints, or as bytes with the size of each id. In "candidates", only the first share has the arrays that are
# the same for all shares.
STORED_IDS: dict[str, tuple[type, int]] = {name: (np.uint8 if name.endswith("_bytes") else np.int64, 1) for name in IDS}
LISTS = [f"{of}_{what}" for of in ("positives", "pair", "excluded") for what in ("sizes", "rows")]
OPTIONAL: dict[str, dict[str, tuple[type, int]]] = {
    "negatives": STORED_IDS,
    "candidates": STORED_IDS | {name: (np.int64, 1) for name in (*LISTS, "query_rows", "not_finite_queries")},
}


def pack_ids(name: str, entries: list) -> dict[str, np.ndarray]:
    """The arrays that store ids: one of ints, or one of the UTF-8 bytes of strings and one of their sizes."""
    if all(isinstance(entry, (int, np.integer)) for entry in entries):
        return {name: np.array(entries, np.int64)}
    parts = [entry.encode("utf-8", "surrogatepass") for entry in entries]
    sizes = np.array([len(part) for part in parts], np.int64)
    return {f"{name}_bytes": np.frombuffer(b"".join(parts), np.uint8), f"{name}_sizes": sizes}


def unpack_ids(name: str, arrays: dict[str, np.ndarray]) -> list | None:
    """The ids that pack_ids stored."""
    if f"{name}_bytes" not in arrays:
        return arrays[name].tolist() if name in arrays else None
    text, ends = arrays[f"{name}_bytes"].tobytes(), np.r_[0, np.cumsum(arrays[f"{name}_sizes"])].tolist()
    return [text[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(ends)]


def describe_kernels(ops: Kernels | None, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """The name of the kernels that compute scores and of their instruction set. Both affect how scores are rounded."""
    if ops is None:
        return f"reference on {device.type}"
    isa = f" {compiled.isa_for(*dtypes)}" if device.type == "cpu" else ""
    return f"{ops.mine_hardest.__module__} on {device.type}{isa}"


class PartMiner:
    """Computes parts for a range of corpus rows."""

    def __init__(
        self,
        op: str,
        plan: MiningPlan,
        rows: Rows,
        first_row: int,
        device: torch.device,
        advance: Callable[[int], object] = lambda chunks: None,
    ) -> None:
        self.plan, self.rows, self.first_row, self.device = plan, rows, first_row, device
        end = first_row + len(rows)
        if not 0 <= first_row <= end <= plan.corpus_rows:
            wanted = f"at most {plan.corpus_rows} - {len(rows)}, the rows of the whole corpus minus those of `corpus`"
            raise refuse(op, "first_row", wanted, first_row)
        if (rows.dim, rows.dtype) != (plan.dim, plan.dtypes[1]):
            wanted = f"of D = {plan.dim} and {plan.dtypes[1]}, as the plan says"
            raise refuse(op, "corpus", wanted, (rows.dim, rows.dtype))
        by_name = {name: dtype for dtype, name in DTYPES.items()}
        dtypes = [by_name[name] for name in plan.dtypes]
        examples = [torch.empty(0, plan.dim, dtype=dtype, device=device) for dtype in dtypes]
        self.ops = backends.choose(op, OPS, plan.backend, tuple(examples))
        self.kernels = describe_kernels(self.ops, device, dtypes)
        self.scan = Scan(self.ops, Corpus(rows, device, first_row), plan.chunk_size, plan.distinct, advance)

    def __call__(self, phase: Phase, query: Tensor | None, first_query: int = 0) -> Part:
        """Compute the part for query (b, D), the queries [first_query, first_query + b) of the phase."""
        queries = (0, 1) if query is None else (first_query, first_query + len(query))
        with torch.no_grad():
            arrays = getattr(self, f"_{phase.name}")(phase, query, *queries)
        tiles = np.array([[*queries, self.first_row, self.first_row + len(self.rows)]], np.int64)
        depth = phase.depth
        return Part(phase.name, phase.digest, self.plan.digest, self.kernels, depth, tiles, arrays, {})

    def _mine(self, phase: Phase, query: Tensor, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scan the rows: numbers (b,), sort_keys (b, depth) and num_dropped (b, len(counted_filters))."""
        hidden = phase.lists.take(np.arange(begin, end))
        anchor = None if phase.anchor is None else torch.from_numpy(phase.anchor[begin:end]).to(self.device)
        limits = (phase.depth, phase.filters, list(phase.counted_filters))
        sort_keys, dropped = self.scan.run(query.to(self.device), hidden, anchor, *limits)
        return np.arange(begin, end), sort_keys.cpu().numpy(), dropped.T.contiguous().cpu().numpy()

    def _counts(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        numbers, _, num_dropped = self._mine(phase, query, begin, end)
        return {"numbers": numbers, "num_dropped": num_dropped}

    def _scan(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        return dict(zip(ARRAYS["scan"], self._mine(phase, query, begin, end), strict=True))

    def _positives(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        queries, rows = phase.lists.queries, phase.lists.rows
        last = self.first_row + len(self.rows)
        in_tile = (queries >= begin) & (queries < end) & (rows >= self.first_row) & (rows < last)
        numbers = np.flatnonzero(in_tile)  # positions among the pairs of the phase
        scores = pair_scores(
            self.ops,
            lambda at: query[torch.from_numpy(at).to(query.device)].to(self.device),
            lambda at: self.rows.gather(at, self.device),
            queries[numbers] - begin,
            rows[numbers] - self.first_row,
        )
        scores[~np.isfinite(scores)] = np.nan  # no margin can be measured from the score of a row with infinity
        return {"numbers": numbers, "scores": scores}

    def _rows(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        assert phase.rows is not None
        low, high = np.searchsorted(phase.rows, (self.first_row, self.first_row + len(self.rows)))
        numbers = phase.rows[low:high]
        vectors = self.rows.gather(numbers - self.first_row, torch.device("cpu")).float().numpy()  # (M, D)
        return {"numbers": numbers, "vectors": vectors}

    def _documents(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        total, not_finite = self.rows.content(self.first_row)
        return {"numbers": np.zeros(1, np.int64), "content": total[None], "not_finite": not_finite}

    def _digests(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        numbers = np.arange(self.first_row, self.first_row + len(self.rows))
        return {"numbers": numbers, "digests": self.rows.row_digests()}


def mine_part(
    plan: MiningPlan,
    phase: Phase,
    queries: Any,
    corpus: Any,
    first_row: int,
    *,
    first_query: int = 0,
    device: str | torch.device | None = None,
) -> Part:
    """Compute one phase of a mining job for some queries and some rows of the corpus.

    The result depends only on the arguments. Any machine may compute it, in any order, and again after a failure.

    Parameters
    ----------
    plan : MiningPlan
        The plan that `mine_hard_negatives` passed to the engine.
    phase : Phase
        The phase that `mine_hard_negatives` passed to the engine.
    queries : array, Tensor, path, a list of these, or None
        (b, D), the queries [first_query, first_query + b) of the phase; None for a phase that needs no queries.
    corpus : array, Tensor, path, or a list of these
        (C, D), the rows [first_row, first_row + C) of the corpus. Paths are opened by this call.
    first_row : int
        The number in the whole corpus of the first row in `corpus`.
    first_query : int
        The number in the phase of the first query in `queries`.
    device : device, optional
        The device that computes scores. The default is the device of the queries, or else that of the corpus.

    Returns
    -------
    Part
        The result for these queries and rows. `merge_parts` merges it with the parts of other queries and rows.

    Raises
    ------
    ValueError, TypeError
        If the queries or the rows do not fit the plan.

    Examples
    --------
    >>> corpus = torch.randn(50, 16)
    >>> shards = [(0, corpus[:30]), (30, corpus[30:])]
    >>> def engine(plan, phase, queries):
    ...     parts = [negmine.mining.mine_part(plan, phase, queries, rows, first_row) for first_row, rows in shards]
    ...     return negmine.mining.merge_parts(parts)
    >>> result = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2, engine=engine)
    >>> result.indices.shape
    (5, 2)
    """
    op = "mine_part"
    for name, value, kind in (("plan", plan, MiningPlan), ("phase", phase, Phase)):
        if not isinstance(value, kind):
            raise refuse(op, name, f"a {kind.__name__} that mine_hard_negatives passes to its engine", value, TypeError)
    for name, number in (("first_row", first_row), ("first_query", first_query)):
        require_count(op, name, number, 0)
    rows = Rows.open(op, "corpus", corpus)
    if queries is None:
        return PartMiner(op, plan, rows, first_row, resolve_device(op, device, rows))(phase, None)
    query_rows = Rows.open(op, "queries", queries)
    if (query_rows.dim, query_rows.dtype) != (plan.dim, plan.dtypes[0]):
        wanted = f"of D = {plan.dim} and {plan.dtypes[0]}, as the plan says"
        raise refuse(op, "queries", wanted, (query_rows.dim, query_rows.dtype))
    if first_query + len(query_rows) > phase.num_queries:
        wanted = f"at most {phase.num_queries - first_query} rows from query {first_query} on"
        raise refuse(op, "queries", wanted, len(query_rows))
    where = resolve_device(op, device, query_rows if query_rows.device else rows)
    miner = PartMiner(op, plan, rows, first_row, where)
    return miner(phase, query_rows.block(0, len(query_rows), where), first_query)
