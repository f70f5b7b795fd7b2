"""engine="ray": actors of Ray hold the corpus and answer the phases of a mining job; the driver holds one batch of queries.

pieces     shards of corpus_embeddings, in order: a path is opened, and a function called, by the actor that holds it; an array
           goes into the object store once. Where there are more actors than shards, arrays and files that need not be read as
           a whole are cut into ranges of rows.
actors     each answers for its rows by a PartMiner and holds nothing that a restart would lose: Ray restarts one that died,
           on another node if need be, and asks it again
merges     by actors, MERGED parts at a time, until one part of all rows is left for the driver
"""

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.executors import NO_CALLS, is_dense
from negmine.mining.merging import join_parts
from negmine.mining.parts import MiningPlan, Part, PartMiner, Phase
from negmine.mining.remote import is_url
from negmine.mining.sources import Rows, open_shard, resolve_device
from negmine.ops.checks import Phrase, refuse, require_count

NAME = "corpus_embeddings"
MERGED = 8  # parts joined at a time
CUT_FILES = (".npy", ".safetensors", ".parquet", ".lance")  # whose rows are counted and read without reading all
OPTIONS = ("num_actors", "num_cpus", "num_gpus", "resources", "runtime_env")
Shard = tuple[str, list["Piece"], str, int]  # of an actor: op, its pieces, its device and its first row
Piece = tuple[
    Any, int, int | None
]  # a path, a function, or the reference of an array in a list, and its rows [begin, end); None = all


def _import_ray(op: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"{op}: engine 'ray' needs the package ray: pip install negmine[ray] ({error})") from error
    return ray


class ShardActor:
    """Holds the rows of some pieces. Each call says which, so that an actor that was started again opens them anew."""

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._miner: tuple[int, PartMiner] | None = None

    def _open(self, op: str, pieces: list[Piece]) -> Rows:
        if self._rows is None:
            shards = []
            for source, begin, end in pieces:
                held = _import_ray(op).get(source[0]) if isinstance(source, list) else source
                shards.append(held if end is None else open_shard(op, NAME, held)[begin:end])
            self._rows = Rows.open(op, NAME, shards)
        return self._rows

    def facts(self, op: str, pieces: list[Piece]) -> tuple[int, int, str, bool]:
        """The number of rows, D, the dtype, and whether rows are rounded to float32."""
        rows = self._open(op, pieces)
        return len(rows), rows.dim, rows.dtype, rows.is_rounded

    def is_dense(self, op: str, device: str, backend: str | None, dtypes: tuple[str, str], dim: int) -> bool:
        return is_dense(op, backend, torch.device(device), dtypes, dim)

    def mine(self, shard: Shard, number: int, plan: MiningPlan, phase: Phase, query: Tensor | None) -> Part:
        """The part of this actor's rows. number: tells one plan from another."""
        if self._miner is None or self._miner[0] != number:
            op, pieces, device, first_row = shard
            rows = self._open(op, pieces)
            self._miner = (number, PartMiner(op, plan, rows, first_row, resolve_device(op, device, rows)))
        return self._miner[1](phase, query)

    def join(self, *parts: Part) -> Part:
        return join_parts(parts)


class RayExecutor:
    """A corpus that actors hold: see executors.py."""

    row_bytes: int

    def __init__(self, op: str, corpus: Any, device: Any, options: dict[str, Any]) -> None:
        self.op, self.device = op, torch.device("cpu")
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise refuse(op, "engine_options", f"a dict with keys among {', '.join(OPTIONS)}", unknown[0])
        if options.get("num_actors") is not None:
            require_count(op, "engine_options['num_actors']", options["num_actors"])
        self._ray = _import_ray(op)
        self._started = not self._ray.is_initialized()
        if self._started:
            self._ray.init(log_to_driver=False)
        self._actors: list[Any] = []
        try:
            self._start(corpus, device, options)
        except BaseException:
            self.close()
            raise
        self.advance = NO_CALLS
        self._plan: MiningPlan | None = None
        self._plan_ref, self._plans = None, 0

    def _start(self, corpus: Any, device: Any, options: dict[str, Any]) -> None:
        given = list(corpus) if isinstance(corpus, (list, tuple)) else [corpus]
        if not given:
            raise refuse(self.op, NAME, "at least 1 shard", corpus)
        wanted = options.get("num_actors") or len(given)
        pieces = [piece for shard in given for piece in self._pieces(shard, math.ceil(wanted / len(given)))]
        count = min(wanted, len(pieces))
        asked = {name: value for name, value in options.items() if name != "num_actors" and value is not None}
        cpus = self._ray.cluster_resources().get("CPU", 1.0)
        asked = {"num_cpus": min(1.0, math.floor(1000 * cpus / count) / 1000)} | asked
        self._where = str(device or ("cuda" if asked.get("num_gpus") else "cpu"))
        actor = self._ray.remote(ShardActor).options(max_restarts=-1, max_task_retries=-1, **asked)
        shares = [pieces[len(pieces) * i // count : len(pieces) * (i + 1) // count] for i in range(count)]
        self._actors = [actor.remote() for _ in shares]
        facts = self._get([each.facts.remote(self.op, share) for each, share in zip(self._actors, shares, strict=True)])
        for i, fact in enumerate(facts):
            if fact[1:3] != facts[0][1:3]:
                wanted = f"of the D and dtype of the first shard, {facts[0][1]} and {facts[0][2]}"
                raise refuse(self.op, NAME, wanted, Phrase(f"{fact[1:3]} in the shards of actor {i}"))
        _, self.dim, self.dtype, _ = facts[0]
        self.is_rounded = any(fact[3] for fact in facts)
        self.row_bytes = self.dim * (4 if self.dtype == "float32" else 2)
        self._rows = sum(fact[0] for fact in facts)
        first_rows = itertools.accumulate([0, *(fact[0] for fact in facts)])
        self._shards: list[Shard] = [
            (self.op, share, self._where, first_row) for share, first_row in zip(shares, first_rows, strict=False)
        ]

    def _pieces(self, shard: Any, count: int) -> list[Piece]:
        """A shard, cut into `count` ranges of rows where its number of rows is known without reading it."""
        is_path = isinstance(shard, (str, os.PathLike))
        source = str(Path(shard).absolute()) if is_path and not is_url(str(shard)) else shard
        file = Path(source.partition("::")[0]) if is_path else None
        if callable(shard) or (file and (count == 1 or file.suffix not in CUT_FILES or not file.exists())):
            return [(source, 0, None)]
        held = open_shard(self.op, NAME, source)
        rows = len(held) if held.ndim else 0
        edges = [rows * i // count for i in range(count + 1)]
        ranges = list(itertools.pairwise(edges))
        if is_path:
            return [(source, begin, end) for begin, end in ranges]
        return [([self._ray.put(held[begin:end])], 0, None) for begin, end in ranges]

    def _get(self, references: Any) -> Any:
        """The values; an error of an actor is raised as the actor raised it."""
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def __len__(self) -> int:
        return self._rows

    def is_dense(self, backend: str | None, query_dtype: str) -> bool:
        dtypes = (query_dtype, self.dtype)
        return self._get(self._actors[0].is_dense.remote(self.op, self._where, backend, dtypes, self.dim))

    def steps(self, plan: MiningPlan) -> int:
        return len(self._actors)

    def execute(self, plan: MiningPlan, phase: Phase, query: Tensor | None) -> Part:
        if plan is not self._plan:
            self._plan, self._plan_ref, self._plans = plan, self._ray.put(plan), self._plans + 1
        phase_ref, query_ref = self._ray.put(phase), self._ray.put(query)
        pairs = zip(self._actors, self._shards, strict=True)
        asked = (self._plans, self._plan_ref, phase_ref, query_ref)
        parts = [each.mine.remote(shard, *asked) for each, shard in pairs]
        if phase.name in ("scan", "counts"):
            left = parts
            while left:
                done, left = self._ray.wait(left, fetch_local=False)
                self.advance(len(done))
        while len(parts) > 1:
            groups = [parts[i : i + MERGED] for i in range(0, len(parts), MERGED)]
            parts = [self._actors[i].join.remote(*group) for i, group in enumerate(groups)]
        part = self._get(parts[0])
        part = replace(
            part, arrays={name: np.array(array) for name, array in part.arrays.items()}
        )  # Ray's are read-only
        part.require_complete(self.op, phase, plan)
        return part

    def close(self) -> None:
        for each in self._actors:
            self._ray.kill(each)
        if self._started:
            self._ray.shutdown()
