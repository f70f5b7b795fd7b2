"""A run that was killed goes on: finished queries lie in a folder, each batch in a file that is whole or absent.

    run.json                    what the run is: arguments, hashes of all inputs, kernels; another run is refused in words
    queries-BEGIN-END.negmine   indices and scores of queries [BEGIN, END), and what their filters dropped
    index                       the approximate index, where the run was given one by its kind
    lock                        held by the one process that writes here; the system frees it however that process ends

What a query's negatives are does not depend on the batch it is in, so that a run may go on with other batches and chunks.
"""

import fcntl
import json
import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from negmine.checks import refuse
from negmine.search import files
from negmine.search.index import NegativeIndex
from negmine.search.ranks import Ranks
from negmine.search.rows import Rows

FILE_KIND = "mined queries"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for inner, part in value.items() for key, leaf in _flat(part, f"{name}.{inner}").items()}
    return {name.removeprefix("."): value}


class Journal:
    """The folder of one run, locked until `close`."""

    def __init__(self, op: str, folder: str | os.PathLike, identity: dict, n: int, corpus_rows: int) -> None:
        self.op, self.folder, self._n, self._rows = op, Path(folder), n, corpus_rows
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._same_run(identity)
        except BlockingIOError as error:
            self.close()
            raise refuse(op, "resume_dir", "a folder that no other running process writes to", str(folder)) from error
        except BaseException:
            self.close()
            raise
        for left in self.folder.glob("*.partial"):  # of a process that was killed while writing
            left.unlink()

    def close(self) -> None:
        self._lock.close()

    def _same_run(self, identity: dict) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            with files.atomic(self.op, path) as file:
                file.write(json.dumps(identity, indent=1).encode())
            return
        try:
            before = _flat(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(
                f"{self.op}: resume_dir's {str(path)!r} is damaged ({error}): give a new folder"
            ) from error
        now = _flat(json.loads(json.dumps(identity)))
        other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if other:
            what = ", ".join(f"{name} (was {before.get(name)!r}, is {now.get(name)!r})" for name in other[:4])
            wanted = "a folder of the same run, or a new one"
            raise ValueError(
                f"{self.op}: resume_dir must be {wanted}, got {str(self.folder)!r}, which differs in {what}"
            )

    def finished(self, Q: int) -> list[tuple[int, np.ndarray, np.ndarray, dict]]:
        """begin, indices, scores and dropped of each whole file, none overlapping; a damaged file warns and is mined anew."""
        found, reached = [], 0
        for path in sorted(self.folder.glob("queries-*.negmine")):
            try:
                facts, parts = files.read(self.op, path, FILE_KIND)
                indices, scores = (np.array(files.array_of(path, parts[name])) for name in ("indices", "scores"))
                begin, dropped = facts["begin"], facts["dropped"]
                shape = (indices.shape[0], self._n)
                if indices.shape != shape or scores.shape != shape or begin < 0 or begin + len(indices) > Q:
                    raise ValueError(f"its indices have shape {indices.shape} from query {begin}")
                if ((indices < -1) | (indices >= self._rows)).any():
                    raise ValueError("it names rows outside the corpus")
            except (ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{self.op}: {error}: its queries are mined anew", RuntimeWarning, stacklevel=3)
                path.unlink()
                continue
            if begin >= reached:
                found.append((begin, indices, scores, dropped))
                reached = begin + len(indices)
        return found

    def write(self, begin: int, indices: np.ndarray, scores: np.ndarray, dropped: dict) -> None:
        path = self.folder / f"queries-{begin:012d}-{begin + len(indices):012d}.negmine"
        parts = {"indices": files.array_part(indices), "scores": files.array_part(scores)}
        files.write(self.op, path, FILE_KIND, {"begin": begin, "dropped": dropped}, parts)


class Run:
    """What a run has so far: arrays for all queries, counters, and the folder it is written to, if any. On every rank alike."""

    def __init__(self, op: str, ranks: Ranks, Q: int, n: int, corpus_rows: int, counters: list[str]) -> None:
        self.op, self.ranks, self._corpus_rows = op, ranks, corpus_rows
        self.indices, self.scores = np.full((Q, n), -1), np.full((Q, n), -np.inf, np.float32)  # (Q, n) each
        self.done = np.zeros(Q, bool)  # (Q,)
        self.skipped = dict.fromkeys(counters, 0)
        self.journal: Journal | None = None

    def open(self, folder: str | os.PathLike, identity: dict) -> Journal:
        """Take over what `folder` holds of this run."""
        self.journal = Journal(self.op, folder, identity, self.indices.shape[1], self._corpus_rows)
        for begin, indices, scores, dropped in self.journal.finished(len(self.done)):
            self._take(begin, indices, scores, dropped)
        return self.journal

    def share(self) -> None:
        """Every rank takes over what rank 0 found."""
        counts = np.array(list(self.skipped.values()), np.int64)
        parts = (self.indices, self.scores, self.done, counts)
        shared = [self.ranks.from_first(torch.from_numpy(part)).numpy() for part in parts]
        self.indices, self.scores, self.done = shared[:3]
        self.skipped = dict(zip(self.skipped, shared[3].tolist(), strict=True))

    def missing(self, batch: int) -> list[tuple[int, int]]:
        """Spans of at most `batch` queries that are not done."""
        edges = np.flatnonzero(np.diff(np.r_[True, self.done, True])).reshape(-1, 2)  # begin, end of each gap
        return [(low, min(low + batch, end)) for begin, end in edges.tolist() for low in range(begin, end, batch)]

    def keep(self, begin: int, scores: Tensor, indices: Tensor, dropped: dict[str, int]) -> None:
        """A batch is done: scores, indices (B, n) of queries from `begin`."""
        self._take(begin, indices.numpy(), scores.numpy(), dropped)
        if self.journal is None and self.ranks.size == 1:
            return
        with self.ranks.together(self.op, "could not write to resume_dir"):
            if self.journal is not None:
                self.journal.write(begin, indices.numpy(), scores.numpy(), dropped)

    def _take(self, begin: int, indices: np.ndarray, scores: np.ndarray, dropped: dict[str, int]) -> None:
        at = slice(begin, begin + len(indices))
        self.indices[at], self.scores[at], self.done[at] = indices, scores, True
        for name, count in dropped.items():
            self.skipped[name] += count

    def index(self, rows: Rows, kind: str, seed: int, device: torch.device) -> NegativeIndex:
        """The index of a run that names one by its kind. Kept in the folder: a second one might answer otherwise."""
        path = None if self.journal is None else self.journal.folder / "index"
        if path is not None and path.exists():
            return NegativeIndex.load(path, device=device)
        index = NegativeIndex.build(rows.shards, kind, seed=seed, device=device)
        if path is not None:
            index.save(path)
        return index
