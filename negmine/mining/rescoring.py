"""Rescoring: a slower and better model, such as a cross-encoder, scores the candidates that the embeddings have found.

    candidates      the documents in select's window of ranks, by embedding scores
    scores          the model's scores of (query text, document text) pairs, for candidates and for the query's positives
    promoted        candidates with s >= s_pos - promote, which become positives
    negatives       the other candidates that pass the filters of select against s_pos, drawn by the sampling strategy

Pairs are scored in blocks. If there is a folder, the scores of each block are written atomically to a file, whose name is a hash
of the texts and of the model's scores of the first pairs.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine import reference
from negmine.mining.atomic_file import atomic_write
from negmine.mining.batch_miner import nested_filters
from negmine.mining.columns import Column
from negmine.mining.identity import Hidden
from negmine.mining.numpy_file import read_npy
from negmine.mining.progress import progress
from negmine.mining.result import MiningResult
from negmine.mining.row_lists import RowLists
from negmine.mining.sampling import candidates_needed, sample, slice_window
from negmine.ops import sort_key
from negmine.ops.checks import Phrase, kind_of, refuse
from negmine.options import Select

BLOCK_PAIRS = 4096
PROBED = 8  # pairs whose scores identify the model
DEPTH = 10  # default number of candidates per negative


def choose(
    scores: np.ndarray,
    indices: np.ndarray,
    kept: np.ndarray,
    select: Select,
    n: int,
    strategy: str,
    seed: int,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the kept candidates by score, take the window of select, and draw n negatives from it.

    scores, indices, kept (Q, W) -> scores and indices (Q, n).
    """
    keys = sort_key.pack(torch.from_numpy(scores), torch.from_numpy(indices).clamp_min(0))
    keys = keys.masked_fill(~torch.from_numpy(kept), sort_key.NOWHERE).sort(1, descending=True).values
    first, end = select.window(torch.from_numpy(kept.sum(1)))
    limit = candidates_needed(select, n, strategy)
    window = slice_window(keys, first, end if limit is None else end.minimum(first + limit))
    drawn = sample(window, n, strategy, torch.arange(len(window), device="cpu"), seed, temperature)
    found, rows = sort_key.unpack(drawn)
    return found.numpy(), rows.numpy()


@dataclass(frozen=True)
class Rescoring:
    """Scores candidates with a model and chooses negatives by these scores."""

    op: str
    judge: Callable[[list[tuple[str, str]]], Any]
    candidates: int
    batch_size: int
    promote: float | None
    folder: Path | None
    show: bool

    @classmethod
    def open(cls, op: str, options: dict[str, Any]) -> "Rescoring":
        """Make a Rescoring from the options of mine_hard_negatives."""
        judge, select, wanted = options["rescore"], options["select"], options["rescore_candidates"]
        predict = getattr(judge, "predict", judge)
        if not callable(predict):
            what = "a callable that scores (query, document) pairs of texts, or an object with predict"
            raise refuse(op, "rescore", what, kind_of(judge), TypeError)
        if options["process_group"] is not None:
            raise refuse(op, "rescore", "None if process_group is given", kind_of(judge))
        ranks = wanted or DEPTH * options["num_negatives"]
        if isinstance(select.range_max, int) and isinstance(select.range_min, int):
            ranks = min(ranks, select.range_max - select.range_min)
        folder = None if options["resume_dir"] is None else Path(os.fspath(options["resume_dir"])) / "rescored"
        return cls(
            op, predict, ranks, options["rescore_batch_size"], options["promote"], folder, options["show_progress_bar"]
        )

    def first_stage(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the run that finds the candidates."""
        select = options["select"]
        window = Select(select.range_min, select.range_max)
        return options | {"select": window, "num_negatives": self.candidates, "sampling_strategy": "top"}

    def run(self, result: MiningResult, hidden: Hidden, options: dict[str, Any]) -> MiningResult:
        """Score the candidates in the result of the first stage, and choose the negatives."""
        Q, indices = len(result.indices), result.indices
        texts = (
            Column(self.op, "query_texts", result.query_texts),
            Column(self.op, "corpus_texts", result.corpus_texts),
        )
        known = hidden.positives.take(np.arange(Q))
        is_candidate = indices >= 0  # (Q, W)
        at, slot = np.nonzero(is_candidate)
        pairs = (np.r_[known.queries, at], np.r_[known.rows, indices[at, slot]])  # (P + C,) each
        judged = self._judged(texts, *pairs)
        anchor = known.reduce(judged[: len(known.rows)], options["positive_aggregation"])  # (Q,)
        scores = np.full(indices.shape, -np.inf, np.float32)
        scores[is_candidate] = judged[len(known.rows) :]
        positives, skipped, pool = result.positives, dict(result.skipped), is_candidate
        if self.promote is not None:
            promoted = is_candidate & (scores >= anchor[:, None] - np.float32(self.promote))
            K = result.config["corpus_rows"]
            places = (
                hidden.positives.list_of[:, None] * K + indices
            )  # (Q, W): rows of the same query share their positives
            pool = is_candidate & ~np.isin(places, places[promoted])
            skipped["promoted"] = int((is_candidate & ~pool).sum())
            rows = np.nonzero(promoted)
            positives = positives.union(RowLists.of_pairs(rows[0], indices[rows], Q))
        select = options["select"]
        tensors = (torch.from_numpy(scores), torch.from_numpy(anchor))
        kept = pool
        for name, filters in nested_filters(select).items():
            left = reference.filtered(*tensors, filters, torch.from_numpy(pool)).numpy()
            skipped[name], kept = int((kept & ~left).sum()), left
        drawing = (
            options["num_negatives"],
            options["sampling_strategy"],
            options["seed"],
            options["sampling_temperature"],
        )
        found, chosen = choose(scores, indices, kept, Select(), *drawing)
        keys, wanted = (
            q * result.config["corpus_rows"] + rows for q, rows in (pairs, (positives.queries, positives.rows))
        )
        order = np.argsort(keys, kind="stable")
        place = order[np.searchsorted(keys[order], wanted).clip(max=max(0, len(keys) - 1))] if len(keys) else keys
        is_judged = keys[place] == wanted
        return replace(
            result,
            positive_pair_scores=np.where(is_judged, judged[place], np.nan).astype(np.float32),
            indices=chosen,
            scores=found,
            positive_scores=anchor,
            num_valid=(chosen >= 0).sum(1),
            positives=positives,
            skipped=skipped,
        )

    def _judged(self, texts: tuple[Column, Column], queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The scores (P,) fp32 of the pairs queries, rows (P,)."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        out = np.empty(len(rows), np.float32)
        probe = self._scores(texts, queries[:PROBED], rows[:PROBED]).tobytes() if self.folder is not None else b""
        with progress(len(rows), self.show, "rescoring", "pairs") as advance:
            for begin in range(0, len(rows), BLOCK_PAIRS):
                part = slice(begin, begin + BLOCK_PAIRS)
                out[part] = self._block(texts, queries[part], rows[part], probe, advance)
        return out

    def _block(
        self,
        texts: tuple[Column, Column],
        queries: np.ndarray,
        rows: np.ndarray,
        probe: bytes,
        advance: Callable[[int], None],
    ) -> np.ndarray:
        path = None
        if self.folder is not None:
            digest = hashlib.blake2b(probe, digest_size=20)
            for text in (*texts[0].strings(queries), *texts[1].strings(rows)):
                part = text.encode("utf-8", "surrogatepass")
                digest.update(len(part).to_bytes(8, "little") + part)
            path = self.folder / f"negmine-{digest.hexdigest()}.npy"
            if path.is_file():
                try:
                    kept = read_npy(path)
                    if kept.dtype == np.float32 and kept.shape == rows.shape:
                        advance(len(rows))
                        return kept
                except ValueError:
                    pass
                warnings.warn(
                    f"{self.op}: {str(path)!r} is damaged, so its pairs are scored again", RuntimeWarning, stacklevel=7
                )
        parts = []
        for at in range(0, len(rows), self.batch_size):
            batch = slice(at, at + self.batch_size)
            parts.append(self._scores(texts, queries[batch], rows[batch]))
            advance(len(parts[-1]))
        scores = np.concatenate(parts)
        if path is not None:
            with atomic_write(self.op, path) as file:
                np.save(file, scores)
        return scores

    def _scores(self, texts: tuple[Column, Column], queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        pairs = list(zip(texts[0].strings(queries), texts[1].strings(rows), strict=True))
        if not pairs:
            return np.empty(0, np.float32)
        with torch.no_grad():
            made = self.judge(pairs)
        wanted = f"one that returns a number for each of {len(pairs)} pairs"
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
                is_tensor = isinstance(made, Tensor)
                scores = made.detach().float().cpu().numpy() if is_tensor else np.asarray(made, np.float32)
        except (TypeError, ValueError):
            raise refuse(self.op, "rescore", wanted, kind_of(made), TypeError) from None
        if scores.shape not in ((len(pairs),), (len(pairs), 1)):
            raise refuse(self.op, "rescore", wanted, Phrase(f"shape {scores.shape}"))
        bad = np.flatnonzero(~np.isfinite(scores.reshape(-1)))
        if len(bad):
            came = Phrase(f"{scores.reshape(-1)[bad[0]]} for query {queries[bad[0]]} and row {rows[bad[0]]}")
            raise refuse(self.op, "rescore", "one that returns finite numbers", came)
        return scores.reshape(-1)
