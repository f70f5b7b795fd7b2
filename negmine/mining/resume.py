"""Resuming interrupted runs: each finished batch of queries is written atomically to a file in a folder.

    run.json                    the identity of the run: arguments, hashes of all inputs, kernels; another run raises an error
    queries-BEGIN-END.negmine   indices and scores of queries [BEGIN, END), and how many pairs each filter removed
    index                       the approximate index, if the run builds one
    lock                        locked by the process that writes here; the operating system unlocks it when the process ends

The negatives of a query do not depend on its batch, so a run can be resumed with other batch and chunk sizes.
"""

import errno
import fcntl
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining import array_file
from negmine.mining.atomic_file import PARTIAL, atomic_write
from negmine.mining.index import NegativeIndex, require_same_rows
from negmine.mining.process_ranks import ProcessRanks
from negmine.mining.regular_file import cause, read_json
from negmine.mining.remote import is_url
from negmine.mining.sources import Rows
from negmine.ops.checks import Phrase, describe, refuse

FILE_KIND = "mined queries"
MAX_RUN_BYTES = 1 << 20  # limit for run.json, which takes a few thousand bytes
PART_NAME = re.compile(r"queries-\d{12}-\d{12}\.negmine")
OWN_NAME = re.compile(rf"{PART_NAME.pattern}|run\.json|index")  # what a run writes


def _part_name(begin: int, queries: int) -> str:
    return f"queries-{begin:012d}-{begin + queries:012d}.negmine"


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted name: {"a": {"b": 1}} becomes {"a.b": 1}."""
    if isinstance(value, dict):
        return {key: leaf for inner, part in value.items() for key, leaf in flatten(part, f"{name}.{inner}").items()}
    return {name.removeprefix("."): value}


def require_folder(op: str, name: str, folder: Any) -> Path:
    """The path of a folder that exists or can be created."""
    if not isinstance(folder, (str, os.PathLike)):
        raise refuse(op, name, "the path of a folder", folder, TypeError)
    text = os.fspath(folder)
    if not isinstance(text, str) or not text or "\0" in text or is_url(text):
        raise refuse(op, name, "the path of a folder on this machine" if is_url(text) else "the path of a folder", text)
    path = Path(text)
    above = next((part for part in (path, *path.absolute().parents) if os.path.lexists(part)), path)
    if not above.is_dir():
        raise refuse(op, name, "the path of a folder", Phrase(f"{text!r}, because {str(above)!r} is not a folder"))
    return path


def _open_lock(path: Path) -> IO[bytes]:
    """Open the lock file, which is created if it is missing. Links are not followed, and an existing file is not emptied."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(number, "r+b")


class ResumeFolder:
    """The folder of one run, locked until `close`."""

    def __init__(
        self, op: str, folder: str | os.PathLike, identity: dict, n: int, corpus_rows: int, counters: Iterable[str]
    ) -> None:
        self.op, self.folder, self._n, self._rows = op, require_folder(op, "resume_dir", folder), n, corpus_rows
        self._counters = set(counters)
        self._run = array_file.digest_of(iter([json.dumps(identity, sort_keys=True).encode()]))
        lock = self.folder / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _open_lock(lock)
        except OSError as error:
            what = f"{op}: resume_dir's {describe(str(lock))} cannot be opened for writing ({error.strerror})"
            raise OSError(error.errno, what) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._require_same_run(identity)
            self._remove_unfinished()
        except BlockingIOError as error:
            self.close()
            raise refuse(op, "resume_dir", "a folder that no other running process writes to", str(folder)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def _remove_unfinished(self) -> None:
        """Remove unfinished files, which a process of this run leaves if it is killed while writing. No other file is removed."""
        for path in self.folder.glob(".*.partial"):
            name = PARTIAL.fullmatch(path.name)
            if name and OWN_NAME.fullmatch(name[1]) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink()

    def _require_same_run(self, identity: dict) -> None:
        path = self.folder / "run.json"
        if not os.path.lexists(path):
            with atomic_write(self.op, path) as file:
                file.write(json.dumps(identity, indent=1).encode())
            return
        try:
            content = read_json(path, MAX_RUN_BYTES)
            if not isinstance(content, dict):
                raise ValueError("it does not contain a JSON object")
            before = flatten(content)
        except (ValueError, RecursionError) as error:
            where = f"{self.op}: resume_dir's {describe(str(path))} is damaged"
            raise ValueError(f"{where} ({cause(error)}): use a new folder") from error
        now = flatten(json.loads(json.dumps(identity)))
        missing = object()
        changed = sorted(
            name for name in before.keys() | now.keys() if before.get(name, missing) != now.get(name, missing)
        )
        if changed:
            what = ", ".join(
                f"{name if len(name) <= 80 else name[:77] + '...'} "
                f"(was {describe(before.get(name))}, is {describe(now.get(name))})"
                for name in changed[:4]
            )
            wanted = "a folder of the same run, or a new one"
            raise ValueError(
                f"{self.op}: resume_dir must be {wanted}, got {str(self.folder)!r}, which differs in {what}"
            )

    def finished_batches(self, Q: int) -> list[tuple[int, np.ndarray, np.ndarray, dict]]:
        """begin, indices, scores and dropped of each finished batch. Damaged files are removed with a warning."""
        found, reached = [], 0
        for path in sorted(self.folder.glob("queries-*.negmine")):
            if not PART_NAME.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
                continue
            try:
                begin, indices, scores, dropped = self._read_part(path, Q)
            except (ValueError, KeyError, TypeError) as error:
                warnings.warn(
                    f"{self.op}: {describe(str(path))}: {cause(error)}: its queries are mined again",
                    RuntimeWarning,
                    stacklevel=7,
                )
                path.unlink()
                continue
            if begin >= reached:
                found.append((begin, indices, scores, dropped))
                reached = begin + len(indices)
        return found

    def _read_part(self, path: Path, Q: int) -> tuple[int, np.ndarray, np.ndarray, dict]:
        """Read a finished batch. Raises an error if this run cannot have written it."""
        facts, parts = array_file.read(self.op, path, FILE_KIND)
        if parts.keys() != {"indices", "scores"} or any(len(part.shape) != 2 for part in parts.values()):
            raise ValueError("it does not contain the indices and scores of queries")
        indices, scores = (np.array(array_file.map_array(path, parts[name])) for name in ("indices", "scores"))
        begin, dropped = facts["begin"], facts["dropped"]
        shape = (indices.shape[0], self._n)
        is_inside = type(begin) is int and 0 <= begin <= Q - len(indices)
        if indices.shape != shape or scores.shape != shape or not is_inside:
            raise ValueError(f"its indices have shape {indices.shape} from query {describe(begin)}")
        if ((indices < -1) | (indices >= self._rows)).any():
            raise ValueError("its indices are rows outside the corpus")
        if (indices.dtype, scores.dtype) != (np.int64, np.float32):
            raise ValueError(f"its indices are {indices.dtype} and its scores {scores.dtype}")
        if (scores[indices < 0] != -np.inf).any():
            raise ValueError("it has scores without rows")
        ascending = np.sort(indices, axis=1)
        if ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any():
            raise ValueError("it has a row twice for one query")
        if not isinstance(dropped, dict) or dropped.keys() != self._counters:
            raise ValueError(f"its counters are {describe(dropped)}")
        if not all(type(count) is int and 0 <= count <= len(indices) * self._rows for count in dropped.values()):
            raise ValueError(f"its counters count {describe(dropped)}")
        if facts.get("run") != self._run or path.name != _part_name(begin, len(indices)):
            raise ValueError("it was written by another run")
        return begin, indices, scores, dropped

    def write(self, begin: int, indices: np.ndarray, scores: np.ndarray, dropped: dict) -> None:
        path = self.folder / _part_name(begin, len(indices))
        parts = {"indices": array_file.array_part(indices), "scores": array_file.array_part(scores)}
        facts = {"begin": begin, "dropped": dropped, "run": self._run}
        array_file.write(self.op, path, FILE_KIND, facts, parts)


class RunState:
    """The results of a run so far, equal on all ranks: arrays for all queries, counters, and the resume folder, if any."""

    def __init__(self, op: str, ranks: ProcessRanks, Q: int, n: int, corpus_rows: int, counters: list[str]) -> None:
        self.op, self.ranks, self._corpus_rows = op, ranks, corpus_rows
        self.indices, self.scores = np.full((Q, n), -1), np.full((Q, n), -np.inf, np.float32)  # (Q, n) each
        self.is_finished = np.zeros(Q, bool)  # (Q,)
        self.skipped = dict.fromkeys(counters, 0)
        self.resume_folder: ResumeFolder | None = None

    def open(self, folder: str | os.PathLike, identity: dict) -> ResumeFolder:
        """Open `folder` and read the finished batches of this run from it."""
        n = self.indices.shape[1]
        self.resume_folder = ResumeFolder(self.op, folder, identity, n, self._corpus_rows, self.skipped)
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

    def unfinished(self, batch: int, first: int, last: int) -> list[tuple[int, int]]:
        """The unfinished queries in [first, last), as spans of at most `batch` queries."""
        is_finished = np.r_[True, self.is_finished[first:last], True]
        edges = first + np.flatnonzero(np.diff(is_finished)).reshape(-1, 2)  # begin, end of each gap
        return [(low, min(low + batch, end)) for begin, end in edges.tolist() for low in range(begin, end, batch)]

    def record(self, begin: int, scores: Tensor, indices: Tensor, dropped: dict[str, int]) -> None:
        """Store a finished batch and write it to the resume folder. scores, indices (B, n): of the queries from `begin` on."""
        self._store(begin, indices.numpy(), scores.numpy(), dropped)
        if self.resume_folder is not None:
            self.resume_folder.write(begin, indices.numpy(), scores.numpy(), dropped)

    def _store(self, begin: int, indices: np.ndarray, scores: np.ndarray, dropped: dict[str, int]) -> None:
        at = slice(begin, begin + len(indices))
        self.indices[at], self.scores[at], self.is_finished[at] = indices, scores, True
        for name, count in dropped.items():
            self.skipped[name] += count

    def build_index(self, rows: Rows, kind: str, seed: int, device: torch.device) -> NegativeIndex:
        """Build the index of a run, or load it from the resume folder: a second build might find other rows."""
        path = None if self.resume_folder is None else self.resume_folder.folder / "index"
        if path is not None and os.path.lexists(path):
            index = NegativeIndex.load(path, device=device)
            require_same_rows(self.op, f"resume_dir's {describe(str(path))}", index, rows)
            return index
        index = NegativeIndex.build(rows.shards, kind, seed=seed, device=device)
        if path is not None:
            index.save(path)
        return index
