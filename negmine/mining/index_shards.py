"""Several saved indexes searched as one, which together may be larger than memory.

Shards are in row order: the rows of the second are numbered from the length of the first on. As many shards stay in memory as
fit; each other one is loaded, searched and dropped. Every shard answers for min(k, its rows), and the k best of all answers are
kept by (score descending, row ascending), so merging loses nothing that a shard found.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.engines import GPU_MAX_K
from negmine.mining.sources import Rows
from negmine.ops import sort_key
from negmine.ops.checks import describe, refuse

FREE_BYTES = 1 << 30  # of shards in memory by default


@dataclass(frozen=True)
class IndexShard:
    """A saved index."""

    path: str | os.PathLike
    kind: str
    dim: int
    rows: int
    size: int  # bytes, in the file and about as many in memory
    content: str  # the hash of these bytes
    open: Callable[[], Any]  # loads the engine
    stat: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stat", self._stat())

    def _stat(self) -> tuple[int, ...]:
        found = os.stat(self.path)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def load(self) -> Any:
        """The engine, read again; raises ValueError if another file has taken its place since it was checked."""
        if self._stat() != self.stat:
            raise ValueError(f"NegativeIndex.search: {describe(str(self.path))} has changed since it was loaded")
        return self.open()


class ShardedEngine:
    """An engine of NegativeIndex that consists of several saved indexes."""

    def __init__(self, op: str, shards: Sequence[IndexShard], device: torch.device, max_bytes: int | None) -> None:
        self.shards = list(shards)
        self.kind, self.dim = " + ".join(dict.fromkeys(shard.kind for shard in shards)), shards[0].dim
        self.max_k = GPU_MAX_K if device.type == "cuda" and any(shard.kind != "cagra" for shard in shards) else None
        self.first_rows = np.r_[0, np.cumsum([shard.rows for shard in shards])]
        largest = max(shard.size for shard in shards)
        if max_bytes is not None and max_bytes < largest:
            raise refuse(op, "max_memory_bytes", f"at least {largest}, the size of the largest shard", max_bytes)
        max_bytes = max(FREE_BYTES, largest) if max_bytes is None else max_bytes
        total = sum(shard.size for shard in shards)
        self._kept: dict[int, Any] = {}  # shard -> its engine
        left = max_bytes if total <= max_bytes else max_bytes - largest  # beside the one that is loaded and dropped
        for i, shard in enumerate(shards):
            if shard.size <= left:
                self._kept[i], left = shard.load(), left - shard.size

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def add(self, rows: Rows) -> None:
        raise ValueError(
            "NegativeIndex.add: rows cannot be added to an index of several files; build and load another file"
        )

    def serialize(self, write: Callable) -> None:
        raise ValueError(
            "NegativeIndex.save: an index of several files is already saved in these files, in these files"
        )

    def content_hash(self) -> str:
        """A hash of the contents of all files."""
        return hashlib.blake2b("".join(shard.content for shard in self.shards).encode(), digest_size=16).hexdigest()

    def search(self, query: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.search_batches([query], k)

    def search_batches(self, queries: Sequence[Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and row numbers (Q, k) of all batches of queries together; each shard is loaded once."""
        found = [torch.full((len(query), k), sort_key.NOWHERE, device="cpu") for query in queries]
        for i, shard in enumerate(self.shards):
            engine = self._kept[i] if i in self._kept else shard.load()
            for at, query in enumerate(queries):
                scores, ids = (torch.from_numpy(part) for part in engine.search(query, min(k, shard.rows)))
                keys = sort_key.pack(scores, ids.clamp_min(0) + int(self.first_rows[i]))
                keys = keys.masked_fill((ids < 0) | scores.isnan(), sort_key.NOWHERE)
                found[at] = torch.cat([found[at], keys], 1).topk(k, 1).values
            del engine
        merged = sort_key.unpack(torch.cat(found))
        return merged[0].numpy(), merged[1].numpy()
