"""One mining job in parts that any engine can compute, in any order and on any machine, and the merge of their results.

A job is a sequence of phases. Each asks something about queries and the rows of the corpus, and any rectangle of some queries and
some rows answers for itself:

    phase       asks                                                                          what merging does
    documents   a hash of all rows                                                            sums
    digests     the digest of each row, where equal rows are one document                     joins
    positives   the score of each query and its positives                                     joins
    counts      how many rows the filters drop                                                sums
    scan        the `depth` hardest rows of each query as sort keys; how many rows filters drop   keeps the hardest, sums
    rows        the vectors of some rows                                                      joins
    negatives   the finished negatives of a share of the queries                              joins

mine_part computes a part and depends on nothing but its arguments; merge_parts (merging.py) joins parts. Sort keys hold the score
and the number of the row in the whole corpus, and no two are equal, so every tree of merges gives the bits of one process.

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
from negmine.ops.checks import describe, refuse, require_count
from negmine.options import Select

FORMAT = 1
MAX_HEADER_BYTES = 1 << 20  # of a part's JSON, which takes a few thousand
IDS = tuple(f"{side}_ids{form}" for side in ("query", "corpus") for form in ("", "_bytes", "_sizes"))
TILES = ("query_begin", "query_end", "row_begin", "row_end")


@dataclass(frozen=True, eq=False)
class MiningPlan:
    """What all parts of one job have in common; made by mine_hard_negatives, and small beside the corpus."""

    digest: str  # of the arguments, the queries and what is hidden from them
    corpus_rows: int
    dim: int
    dtypes: tuple[str, str]  # of queries and corpus
    backend: str | None
    chunk_size: int  # corpus rows that one kernel call takes
    distinct: np.ndarray | None  # (K,) bool: rows that stand for their document, once that is known; None = all do


@dataclass(frozen=True, eq=False)
class Phase:
    """One question about B queries and all rows of the corpus; see the module's table for `name`."""

    name: str
    lists: RowLists  # of each query: the rows to score ("positives"), or the documents that are hidden from it
    anchor: np.ndarray | None = None  # (B,) fp32, the scores that margins are measured from
    depth: int = 0
    filters: Select = field(default_factory=Select)
    counted_filters: tuple[Select, ...] = ()
    rows: np.ndarray | None = None  # (M,) int64 ascending: the rows that are asked for

    @property
    def num_queries(self) -> int:
        """B; 1 for a phase that asks about rows alone."""
        return len(self.lists.sizes)

    @cached_property
    def digest(self) -> str:
        """A hash of the question, by which parts of different phases are told apart."""
        said = [self.name, self.depth, asdict(self.filters), [asdict(each) for each in self.counted_filters]]
        hashed = hashlib.blake2b(json.dumps(said).encode(), digest_size=16)
        for array in (*self.lists, self.anchor, self.rows):
            hashed.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True, eq=False)
class Part:
    """What is known of a phase from some rectangles of (queries, rows). Made by mine_part and merge_parts."""

    phase: str
    phase_digest: str
    plan: str  # the digest of its MiningPlan
    kernels: str  # and the instruction set; parts of others may have rounded scores otherwise
    depth: int
    tiles: np.ndarray  # (T, 4) int64: query_begin, query_end, row_begin, row_end of each rectangle, none overlapping
    arrays: dict[str, np.ndarray]  # "numbers" (M,) int64 ascending: queries, pairs or rows; the others (M, ...)
    facts: dict[str, Any]  # of "negatives": what the whole result says of itself, and counters

    def header(self) -> dict[str, Any]:
        names = ("phase", "phase_digest", "plan", "kernels", "depth", "facts")
        return {"format": FORMAT} | {name: getattr(self, name) for name in names}

    def write(self, file: IO[bytes]) -> None:
        text = np.frombuffer(json.dumps(self.header()).encode(), np.uint8)
        np.savez(file, header=text, tiles=self.tiles, **self.arrays)  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike) -> None:
        """Write one .npz file at exactly this path, atomically."""
        with atomic_write("Part.save", path) as file:
            self.write(file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Part":
        """Read a file that `save` wrote; nothing in it is executed. Raises ValueError for a damaged one and any other."""
        if not Path(path).is_file():
            raise refuse("Part.load", "path", "an existing file", str(path))
        try:
            return cls._of_arrays(read_npz(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"Part.load: {describe(str(path))} is damaged or was not written by save"
            raise ValueError(f"{what} ({cause(error)})") from error

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        self.write(buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Part":
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
        """Raise ValueError where arrays do not fit each other."""
        tiles, wanted = self.tiles, ARRAYS.get(self.phase)
        if wanted is None:
            raise ValueError(f"its phase is {describe(self.phase)}")
        if tiles.dtype != np.int64 or tiles.ndim != 2 or tiles.shape[1] != len(TILES) or (tiles < 0).any():
            raise ValueError(f"its tiles are {tiles.dtype} of shape {tiles.shape}")
        optional = set() if self.phase != "negatives" else {*OPTIONAL}
        if not wanted.keys() <= self.arrays.keys() <= wanted.keys() | optional:
            raise ValueError(f"its arrays are {', '.join(self.arrays)}")
        counts = {len(array) for name, array in self.arrays.items() if name not in RAGGED}
        for name, array in self.arrays.items():
            dtype, ndim = {**OPTIONAL, **wanted}[name]
            if array.dtype != dtype or array.ndim != ndim:
                raise ValueError(f"its {name} are {array.dtype} of shape {array.shape}")
        if len(counts) != 1 or (np.diff(self.arrays["numbers"]) <= 0).any():
            raise ValueError("its arrays do not fit each other")
        if self.phase == "scan" and self.arrays["sort_keys"].shape[1] != self.depth:
            raise ValueError(f"its sort keys are not {self.depth} deep")

    def require_complete(self, op: str, phase: Phase, plan: MiningPlan) -> None:
        """Raise ValueError unless the part answers `phase` of `plan` for all its queries and all rows of the corpus."""
        wanted = "one that returns the part of all queries and all rows for the phase that it is given"
        if (self.plan, self.phase_digest) != (plan.digest, phase.digest):
            raise refuse(op, "engine", wanted, f"a part of another plan or phase, {self.phase}")
        edges = np.unique(np.r_[0, phase.num_queries, self.tiles[:, :2].ravel()])
        for begin in edges[:-1].tolist():
            over = self.tiles[(self.tiles[:, 0] <= begin) & (begin < self.tiles[:, 1])]
            covered = int((over[:, 3] - over[:, 2]).sum())
            if covered != plan.corpus_rows:
                came = f"{covered} of the {plan.corpus_rows} rows for query {begin} in phase {phase.name}"
                raise refuse(op, "engine", wanted, came)


# The arrays of each phase's parts: their dtype and their number of dimensions.
ARRAYS: dict[str, dict[str, tuple[type, int]]] = {
    "documents": {"numbers": (np.int64, 1), "content": (np.uint64, 2)},
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
}
# Arrays of "negatives" whose length is not that of "numbers"; of ids, ints or the bytes of strings and the size of each.
RAGGED = ("positives_rows", "positive_pair_scores", *IDS)  # checked when a result of them is made
OPTIONAL = {name: (np.int64, 1) for name in IDS} | {name: (np.uint8, 1) for name in IDS if name.endswith("_bytes")}


def pack_ids(name: str, entries: list) -> dict[str, np.ndarray]:
    """The arrays that hold ids: ints, or the UTF-8 bytes of strings and the size of each."""
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
    """The kernels that compute scores, and their instruction set: as far as their rounding may differ elsewhere."""
    if ops is None:
        return f"reference on {device.type}"
    isa = f" {compiled.isa_for(*dtypes)}" if device.type == "cpu" else ""
    return f"{ops.mine_hardest.__module__} on {device.type}{isa}"


class PartMiner:
    """Computes parts for the rows of the corpus that one process holds."""

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
            raise refuse(op, "first_row", f"such that all rows are of the corpus's {plan.corpus_rows}", first_row)
        if (rows.dim, rows.dtype) != (plan.dim, plan.dtypes[1]):
            raise refuse(op, "corpus", f"of the plan's D = {plan.dim} and {plan.dtypes[1]}", (rows.dim, rows.dtype))
        by_name = {name: dtype for dtype, name in DTYPES.items()}
        dtypes = [by_name[name] for name in plan.dtypes]
        examples = [torch.empty(0, plan.dim, dtype=dtype, device=device) for dtype in dtypes]
        self.ops = backends.choose(op, OPS, plan.backend, tuple(examples))
        self.kernels = describe_kernels(self.ops, device, dtypes)
        self.scan = Scan(self.ops, Corpus(rows, device, first_row), plan.chunk_size, plan.distinct, advance)

    def __call__(self, phase: Phase, query: Tensor | None, first_query: int = 0) -> Part:
        """query (b, D): the vectors of queries [first_query, first_query + b) of the phase."""
        queries = (0, 1) if query is None else (first_query, first_query + len(query))
        with torch.no_grad():
            arrays = getattr(self, f"_{phase.name}")(phase, query, *queries)
        tiles = np.array([[*queries, self.first_row, self.first_row + len(self.rows)]], np.int64)
        depth = phase.depth
        return Part(phase.name, phase.digest, self.plan.digest, self.kernels, depth, tiles, arrays, {})

    def _mine(self, phase: Phase, query: Tensor, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """numbers (b,), sort_keys (b, depth) and num_dropped (b, len(counted_filters))."""
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
        here = (queries >= begin) & (queries < end) & (rows >= self.first_row) & (rows < last)
        numbers = np.flatnonzero(here)  # of the phase's pairs
        scores = pair_scores(
            self.ops,
            lambda at: query[torch.from_numpy(at).to(query.device)].to(self.device),
            lambda at: self.rows.gather(at, self.device),
            queries[numbers] - begin,
            rows[numbers] - self.first_row,
        )
        return {"numbers": numbers, "scores": scores}

    def _rows(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        assert phase.rows is not None
        low, high = np.searchsorted(phase.rows, (self.first_row, self.first_row + len(self.rows)))
        numbers = phase.rows[low:high]
        vectors = self.rows.gather(numbers - self.first_row, torch.device("cpu")).float().numpy()  # (M, D)
        return {"numbers": numbers, "vectors": vectors}

    def _documents(self, phase: Phase, query: Tensor, begin: int, end: int) -> dict[str, np.ndarray]:
        return {"numbers": np.zeros(1, np.int64), "content": self.rows.content_sum(self.first_row)[None]}

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
    """The answer of some queries and some rows of the corpus to one phase of a mining job.

    A function of its arguments alone: any machine may compute it, in any order, again after a failure.

    Parameters
    ----------
    plan, phase
        What mine_hard_negatives asks of an engine. Both can be pickled.
    queries
        Vectors (b, D) of queries first_query to first_query + b of the phase; None for a phase that asks about rows alone.
    corpus
        Rows (C, D) of the corpus from first_row on, in any form that mine_hard_negatives takes: paths are read here.
    device
        Where scores are computed; default: where queries or corpus are.

    Returns
    -------
    Part
        To be joined with the parts of other queries and rows by merge_parts.

    Raises
    ------
    ValueError, TypeError
        For queries or rows that are not of the plan.
    """
    op = "mine_part"
    for name, value, kind in (("plan", plan, MiningPlan), ("phase", phase, Phase)):
        if not isinstance(value, kind):
            raise refuse(op, name, f"a {kind.__name__}, as mine_hard_negatives gives its engine", value, TypeError)
    for name, number in (("first_row", first_row), ("first_query", first_query)):
        require_count(op, name, number, 0)
    rows = Rows.open(op, "corpus", corpus)
    if queries is None:
        return PartMiner(op, plan, rows, first_row, resolve_device(op, device, rows))(phase, None)
    held = Rows.open(op, "queries", queries)
    if (held.dim, held.dtype) != (plan.dim, plan.dtypes[0]):
        raise refuse(op, "queries", f"of the plan's D = {plan.dim} and {plan.dtypes[0]}", (held.dim, held.dtype))
    if first_query + len(held) > phase.num_queries:
        wanted = f"at most {phase.num_queries - first_query} rows from query {first_query} on"
        raise refuse(op, "queries", wanted, len(held))
    where = resolve_device(op, device, held if held.device else rows)
    miner = PartMiner(op, plan, rows, first_row, where)
    return miner(phase, held.block(0, len(held), where), first_query)
