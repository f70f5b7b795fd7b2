"""Resuming interrupted runs: each finished batch of queries is written to a folder, atomically.

    run.json                    the identity of the run: arguments, hashes of all inputs, kernels; a different run is refused
    queries-BEGIN-END.negmine   indices and scores of queries [BEGIN, END), and the number of pairs each filter dropped
    index                       the approximate index, where the run was given the kind of an index
    lock                        held by the one process that writes here; the operating system releases it when the process ends

The negatives of a query do not depend on its batch, so a run can be resumed with other sizes of batches and chunks.
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

from negmine.mining import array_file
from negmine.mining.atomic_file import atomic_write
from negmine.mining.index import NegativeIndex
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.sources import Rows
from negmine.ops.checks import refuse

FILE_KIND = "mined queries"


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for inner, part in value.items() for key, leaf in _flatten(part, f"{name}.{inner}").items()}
    return {name.removeprefix("."): value}


class ResumeFolder:
    """The folder of one run, locked until `close`."""

    def __init__(self, op: str, folder: str | os.PathLike, identity: dict, n: int, corpus_rows: int) -> None:
        self.op, self.folder, self._n, self._rows = op, Path(folder), n, corpus_rows
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._require_same_run(identity)
        except BlockingIOError as error:
            self.close()
            raise refuse(op, "resume_dir", "a folder that no other running process writes to", str(folder)) from error
        except BaseException:
            self.close()
            raise
        for leftover in self.folder.glob("*.partial"):  # of a process that was killed while writing
            leftover.unlink()

    def close(self) -> None:
        self._lock.close()

    def _require_same_run(self, identity: dict) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            with atomic_write(self.op, path) as file:
                file.write(json.dumps(identity, indent=1).encode())
            return
        try:
            before = _flatten(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(
                f"{self.op}: resume_dir's {str(path)!r} is damaged ({error}): give a new folder"
            ) from error
        now = _flatten(json.loads(json.dumps(identity)))
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            what = ", ".join(f"{name} (was {before.get(name)!r}, is {now.get(name)!r})" for name in changed[:4])
            wanted = "a folder of the same run, or a new one"
            raise ValueError(
                f"{self.op}: resume_dir must be {wanted}, got {str(self.folder)!r}, which differs in {what}"
            )

    def finished_batches(self, Q: int) -> list[tuple[int, np.ndarray, np.ndarray, dict]]:
        """begin, indices, scores and dropped of each batch, none overlapping; warns of a damaged file and removes it."""
        found, reached = [], 0
        for path in sorted(self.folder.glob("queries-*.negmine")):
            try:
                facts, parts = array_file.read(self.op, path, FILE_KIND)
                indices, scores = (np.array(array_file.map_array(path, parts[name])) for name in ("indices", "scores"))
                begin, dropped = facts["begin"], facts["dropped"]
                shape = (indices.shape[0], self._n)
                if indices.shape != shape or scores.shape != shape or begin < 0 or begin + len(indices) > Q:
                    raise ValueError(f"its indices have shape {indices.shape} from query {begin}")
                if ((indices < -1) | (indices >= self._rows)).any():
                    raise ValueError("it names rows outside the corpus")
            except (ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{self.op}: {error}: its queries are mined anew", RuntimeWarning, stacklevel=5)
                path.unlink()
                continue
            if begin >= reached:
                found.append((begin, indices, scores, dropped))
                reached = begin + len(indices)
        return found

    def write(self, begin: int, indices: np.ndarray, scores: np.ndarray, dropped: dict) -> None:
        path = self.folder / f"queries-{begin:012d}-{begin + len(indices):012d}.negmine"
        parts = {"indices": array_file.array_part(indices), "scores": array_file.array_part(scores)}
        array_file.write(self.op, path, FILE_KIND, {"begin": begin, "dropped": dropped}, parts)


class RunState:
    """The results of a run so far, the same on every rank: arrays for all queries, counters, and the resume folder, if any."""

    def __init__(self, op: str, ranks: ProcessRanks, Q: int, n: int, corpus_rows: int, counters: list[str]) -> None:
        self.op, self.ranks, self._corpus_rows = op, ranks, corpus_rows
        self.indices, self.scores = np.full((Q, n), -1), np.full((Q, n), -np.inf, np.float32)  # (Q, n) each
        self.is_finished = np.zeros(Q, bool)  # (Q,)
        self.skipped = dict.fromkeys(counters, 0)
        self.resume_folder: ResumeFolder | None = None

    def open(self, folder: str | os.PathLike, identity: dict) -> ResumeFolder:
        """Open `folder` and take over the batches of this run that it holds."""
        self.resume_folder = ResumeFolder(self.op, folder, identity, self.indices.shape[1], self._corpus_rows)
        for begin, indices, scores, dropped in self.resume_folder.finished_batches(len(self.is_finished)):
            self._store(begin, indices, scores, dropped)
        return self.resume_folder

    def broadcast(self) -> None:
        """Copy the state of rank 0 to every rank."""
        counts = np.array(list(self.skipped.values()), np.int64)
        parts = (self.indices, self.scores, self.is_finished, counts)
        shared = [self.ranks.broadcast(torch.from_numpy(part)).numpy() for part in parts]
        self.indices, self.scores, self.is_finished = shared[:3]
        self.skipped = dict(zip(self.skipped, shared[3].tolist(), strict=True))

    def unfinished(self, batch: int) -> list[tuple[int, int]]:
        """Spans of at most `batch` queries that are not finished."""
        edges = np.flatnonzero(np.diff(np.r_[True, self.is_finished, True])).reshape(-1, 2)  # begin, end of each gap
        return [(low, min(low + batch, end)) for begin, end in edges.tolist() for low in range(begin, end, batch)]

    def record(self, begin: int, scores: Tensor, indices: Tensor, dropped: dict[str, int]) -> None:
        """Store a finished batch, and write it to the resume folder: scores, indices (B, n) of queries from `begin`."""
        self._store(begin, indices.numpy(), scores.numpy(), dropped)
        if self.resume_folder is not None:
            self.resume_folder.write(begin, indices.numpy(), scores.numpy(), dropped)

    def _store(self, begin: int, indices: np.ndarray, scores: np.ndarray, dropped: dict[str, int]) -> None:
        at = slice(begin, begin + len(indices))
        self.indices[at], self.scores[at], self.is_finished[at] = indices, scores, True
        for name, count in dropped.items():
            self.skipped[name] += count

    def build_index(self, rows: Rows, kind: str, seed: int, device: torch.device) -> NegativeIndex:
        """The index of a run that names its kind, saved in the resume folder because a second build may answer differently."""
        path = None if self.resume_folder is None else self.resume_folder.folder / "index"
        if path is not None and path.exists():
            return NegativeIndex.load(path, device=device)
        index = NegativeIndex.build(rows.shards, kind, seed=seed, device=device)
        if path is not None:
            index.save(path)
        return index
