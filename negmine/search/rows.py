"""Embeddings as one sequence of rows, whatever holds them: arrays, tensors, files (shards.py), or a list of those as shards.

    rows = Rows.open("mine_hard_negatives", "corpus_embeddings", ["a.npy", "b.npy"])
    rows.block(begin, end, device)   (C, D): a view where the holder allows it; never more than asked is read
    rows.gather(numbers, device)     (M, D)

The global row number is the place in the concatenation of the shards. Files are memory-mapped. Content hashes and the search
for equal rows see the rows only, so neither depends on where the shards are cut.
"""

import bisect
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.checks import refuse
from negmine.search.shards import FORMS, opened
from negmine.selection import for_kernels

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
HASHED_ROWS = 2048  # rows in memory at a time while hashing


def _dtype_of(shard: Tensor | np.ndarray) -> str:
    return DTYPES.get(shard.dtype, str(shard.dtype)) if isinstance(shard, Tensor) else str(shard.dtype)


def as_tensor(part: Tensor | np.ndarray) -> Tensor:
    """Rows of a shard as a tensor that kernels take: no copy where the memory is writable and each row is dense."""
    if isinstance(part, Tensor):
        return for_kernels(part)
    return torch.from_numpy(part if part.flags.writeable and part.flags.c_contiguous else np.array(part, order="C"))


class Rows:
    """(rows, D) in one of the kernels' dtypes, held by one or more shards."""

    def __init__(self, shards: list[Tensor | np.ndarray], dim: int, dtype: str) -> None:
        self.shards, self.dim, self.dtype = shards, dim, dtype
        self.starts = [0]  # of each shard, and the end of the last
        for shard in shards:
            self.starts.append(self.starts[-1] + len(shard))

    @classmethod
    def open(cls, op: str, name: str, value: Any) -> "Rows":
        """Refuses, in a sentence, what is not (rows, D) in one dtype."""
        if isinstance(value, (list, tuple)) and not value:
            raise refuse(op, name, FORMS, value)
        if isinstance(value, (list, tuple)):
            labels = [f"{name}[{i}]" for i in range(len(value))]
            shards = [opened(op, label, shard) for label, shard in zip(labels, value, strict=True)]
        else:
            labels, shards = [name], [opened(op, name, value)]
        for label, shard in zip(labels, shards, strict=True):
            if _dtype_of(shard) not in DTYPES.values():
                raise refuse(
                    op, label, "float32, float16 or bfloat16 in native byte order", _dtype_of(shard), TypeError
                )
            if shard.ndim != 2 or shard.shape[1] == 0:
                raise refuse(op, label, "of shape (rows, D) with D of 1 or more", tuple(shard.shape))
            if shard.shape[1] != shards[0].shape[1] or _dtype_of(shard) != _dtype_of(shards[0]):
                wanted = f"of the D and dtype of the first shard, {shards[0].shape[1]} and {_dtype_of(shards[0])}"
                raise refuse(op, label, wanted, (shard.shape[1], _dtype_of(shard)))
        return cls(shards, shards[0].shape[1], _dtype_of(shards[0]))

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def row_bytes(self) -> int:
        return self.dim * (4 if self.dtype == "float32" else 2)

    @property
    def device(self) -> torch.device | None:
        """Where the first tensor lives; None where no shard is a tensor."""
        return next((shard.device for shard in self.shards if isinstance(shard, Tensor)), None)

    def spans(self, size: int) -> Iterator[tuple[int, int]]:
        """Consecutive (begin, end) of at most `size` rows that cover all rows; none crosses a shard, so none is a copy."""
        for start, stop in zip(self.starts, self.starts[1:], strict=False):
            for begin in range(start, stop, size):
                yield begin, min(begin + size, stop)

    def block(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Rows [begin, end): (end - begin, D); a copy only where they cross shards."""
        shard = bisect.bisect_right(self.starts, begin) - 1
        if end > self.starts[shard + 1]:
            return self.gather(np.arange(begin, end), device)
        start = self.starts[shard]
        return as_tensor(self.shards[shard][begin - start : end - start]).to(device)

    def gather(self, numbers: np.ndarray, device: torch.device) -> Tensor:
        """numbers (M,) int64 -> (M, D), wherever the rows lie."""
        shard_of = np.searchsorted(self.starts, numbers, side="right") - 1  # (M,)
        shards = np.unique(shard_of)
        if len(shards) == 1:
            return self._taken(shards[0], numbers, device)
        dtype = next(dtype for dtype, name in DTYPES.items() if name == self.dtype)
        out = torch.empty(len(numbers), self.dim, dtype=dtype, device=device)  # (M, D)
        for shard in shards:
            at = np.flatnonzero(shard_of == shard)
            out.index_copy_(0, torch.from_numpy(at).to(device), self._taken(shard, numbers[at], device))
        return out

    def _taken(self, shard: int, numbers: np.ndarray, device: torch.device) -> Tensor:
        """numbers (M,) of rows that one shard holds -> (M, D). Torch's own indexing wakes its threads for each few rows."""
        local, held = numbers - self.starts[shard], self.shards[shard]
        if isinstance(held, Tensor):
            return as_tensor(held.index_select(0, torch.from_numpy(local).to(held.device))).to(device)
        return as_tensor(held[local]).to(device)

    def content_hash(self) -> str:
        """One hash of dtype, D and all rows in order."""
        digest = hashlib.blake2b(f"{self.dtype} {self.dim}\n".encode(), digest_size=16)
        for begin, end in self.spans(HASHED_ROWS):
            block = self.block(begin, end, torch.device("cpu")).contiguous()  # (C, D)
            digest.update(block.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def row_digests(self) -> np.ndarray:
        """(rows, 2) uint64: a 128-bit hash of each row; 0.0 hashes as -0.0 does, and NaN as itself."""
        digests = np.empty((len(self), 2), np.uint64)  # (rows, 2)
        for begin, end in self.spans(HASHED_ROWS):
            block = (self.block(begin, end, torch.device("cpu")).float() + 0.0).numpy()  # (C, D)
            joined = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in block)
            digests[begin:end] = np.frombuffer(joined, np.uint64).reshape(-1, 2)
        return digests


def first_equal(digests: np.ndarray) -> np.ndarray:
    """digests (rows, 2) -> (rows,) int64: the lowest row of equal values for each row. About 48 bytes a row while it runs."""
    order = np.lexsort((digests[:, 0], digests[:, 1]))  # (rows,), stable: equal rows stay in ascending order
    ranked = digests[order]
    is_first = np.ones(len(digests), dtype=bool)  # (rows,) in sorted order
    is_first[1:] = (ranked[1:] != ranked[:-1]).any(1)
    first = np.empty(len(digests), np.int64)
    first[order] = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    return first
