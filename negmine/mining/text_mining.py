"""from_texts: mine negatives from texts with a model. The texts are embedded in blocks; rows are arrays or memory-mapped files.

A block has BLOCK_ROWS texts. With cache_dir, each finished block is written atomically to a .npy file. Its name is a hash of
the texts, the prompt and the model's embeddings of a few texts. An interrupted run therefore resumes at the unfinished block,
embeddings of an earlier state of the model are never used, and only the new blocks of a larger corpus are embedded.
"""

import hashlib
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negmine.mining.atomic_file import atomic_write
from negmine.mining.columns import Column
from negmine.mining.hard_negatives import check_options, mine_hard_negatives
from negmine.mining.identity import Side, resolve, shown_rows
from negmine.mining.progress import progress
from negmine.mining.result import MiningResult
from negmine.mining.resume import require_folder
from negmine.ops import checks

OP = "from_texts"
BLOCK_ROWS = 4096
PROBED = 8  # texts whose embeddings identify the model
METHODS = {
    "queries": ("encode_query", "encode_queries", "encode", "embed"),
    "corpus": ("encode_document", "encode_corpus", "encode", "embed"),
}
GIVEN = ("query_embeddings", "corpus_embeddings", "positives", "query_texts", "corpus_texts", "query_ids", "corpus_ids")


@checks.refuses_unknown_names(OP)
def from_texts(
    model: Any,
    queries: Any,
    corpus: Any,
    positives: Any,
    *,
    query_ids: Any = None,
    corpus_ids: Any = None,
    query_prompt: str = "",
    corpus_prompt: str = "",
    encode_batch_size: int = 256,
    normalize: bool = True,
    cache_dir: str | os.PathLike | None = None,
    show_progress_bar: bool = False,
    **mining: Any,
) -> MiningResult:
    """Embed queries and corpus with a model, and mine hard negatives.

    Parameters
    ----------
    model : callable or object
        A callable that maps a list of n texts to their embeddings (n, D), or an object with a method `encode` or `embed`, such
        as a SentenceTransformer. The method `encode_query` or `encode_queries`, if there is one, embeds the queries, and
        `encode_document` or `encode_corpus` embeds the corpus. The model gets only the list of texts and, in the case
        described under `query_prompt`, a prompt.
    queries, corpus : sequence of str or mapping
        The texts, or a mapping from ids to texts.
    positives : sequence
        As in mine_hard_negatives.
    query_ids, corpus_ids : sequence of int or str, optional
        As in mine_hard_negatives.
    query_prompt, corpus_prompt : str
        The text that the model reads before each query or document. A model with an attribute `prompts`, such as a
        SentenceTransformer, gets it as the argument `prompt`, which replaces the model's own prompt. For other models it is
        prepended to the text. Texts are compared with each other without it.
    encode_batch_size : int
        The number of texts that the model embeds at a time.
    normalize : bool
        Whether to divide each row by its norm, so that scores are cosines.
    cache_dir : path, optional
        A folder for embeddings. Texts whose embeddings are in the folder are not embedded again, so an interrupted run
        resumes.
    show_progress_bar : bool
        Show a line on stderr with the time left.
    **mining
        Further arguments of mine_hard_negatives, except process_group.

    Returns
    -------
    MiningResult
        The result of mine_hard_negatives, with the texts and the ids.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid, which is checked before any text is embedded, or if the model does not return one finite
        row for each text.

    Examples
    --------
    >>> def model(texts):  # stands for SentenceTransformer("...")
    ...     return np.stack([np.random.default_rng(len(text)).standard_normal(16) for text in texts])
    >>> documents = {"d1": "tea is a drink", "d2": "milk is white", "d3": "water"}
    >>> result = negmine.mining.from_texts(model, ["what is tea"], documents, ["d1"], num_negatives=2)
    >>> result.to_triplets().shape
    (2, 3)
    """
    known = [name for name in inspect.signature(mine_hard_negatives).parameters if name not in GIVEN]
    checks.require_known(OP, mining, [*inspect.signature(from_texts).parameters, *known])
    if mining.get("process_group") is not None:
        raise checks.refuse(
            OP, "process_group", "left out, because one process embeds the texts", mining["process_group"]
        )
    checks.require_count(OP, "encode_batch_size", encode_batch_size)
    checks.require_bool(OP, "normalize", normalize)
    for name, prompt in {"query_prompt": query_prompt, "corpus_prompt": corpus_prompt}.items():
        if not isinstance(prompt, str):
            raise checks.refuse(OP, name, "a string", prompt, TypeError)
    folder = None if cache_dir is None else require_folder(OP, "cache_dir", cache_dir)
    check_options(mining | {"show_progress_bar": show_progress_bar})
    encoders = [encoder(model, *each) for each in zip(METHODS, (query_prompt, corpus_prompt), strict=True)]
    query_names = Side.of_texts(OP, ("query_ids", "queries"), query_ids, queries, 0)
    corpus_names = Side.of_texts(OP, ("corpus_ids", "corpus"), corpus_ids, corpus, 1)
    Q, K = len(query_names), len(corpus_names)
    resolve(
        OP,
        query_names,
        corpus_names,
        positives,
        mining.get("exclude"),
        Q,
        K,
        lambda: np.empty((0, 2), np.uint64),
        warn=False,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    sides = zip(METHODS, encoders, (query_names, corpus_names), (query_prompt, corpus_prompt), strict=True)
    for side, encode, names, prompt in sides:
        assert names.texts is not None
        rows.append(
            Embedder(side, encode, prompt, encode_batch_size, normalize, folder).rows(names.texts, show_progress_bar)
        )
    return mine_hard_negatives(
        *(rows[0], rows[1], positives),
        query_ids=None if query_names.ids is None else query_names.ids.given,
        corpus_ids=None if corpus_names.ids is None else corpus_names.ids.given,
        query_texts=query_names.texts.given if query_names.texts else None,
        corpus_texts=corpus_names.texts.given if corpus_names.texts else None,
        show_progress_bar=show_progress_bar,
        **mining,
    )


def encoder(model: Any, side: str, prompt: str) -> Callable[[list[str]], Any]:
    """The function of a model that embeds the texts of a side, "queries" or "corpus", each with a prompt."""
    methods = [getattr(model, name, None) for name in METHODS[side] if not isinstance(model, str)]  # str has encode
    method = next(filter(callable, methods), model)
    if not callable(method):
        raise checks.refuse(
            OP, "model", "a callable, or an object with encode or embed", checks.kind_of(model), TypeError
        )
    if prompt and isinstance(getattr(model, "prompts", None), dict):
        return lambda texts: method(texts, prompt=prompt)  # in place of the prompt of the model itself
    return lambda texts: method([prompt + text for text in texts])


@dataclass(frozen=True)
class Embedder:
    """Embeds the texts of the queries or of the corpus."""

    side: str
    encode: Callable[[list[str]], Any]
    prompt: str
    batch_size: int
    normalize: bool
    folder: Path | None

    def rows(self, texts: Column, show: bool) -> Any:
        """(rows, D) fp32: an array, or a list of memory-mapped files if there is a cache folder."""
        if not len(texts):
            raise checks.refuse(OP, self.side, "at least one text", checks.Phrase("none"))
        blocks = []
        probe = self._encoded(texts.block(0, PROBED), 0).tobytes() if self.folder is not None else b""
        with progress(len(texts), show, f"embedding {self.side}", "texts") as advance:
            for begin in range(0, len(texts), BLOCK_ROWS):
                block = texts.block(begin, min(begin + BLOCK_ROWS, len(texts)))
                blocks.append(self._block(block, begin, probe, advance))
                if blocks[-1].shape[1] != blocks[0].shape[1]:
                    came = checks.Phrase(f"rows of D = {blocks[0].shape[1]} and of D = {blocks[-1].shape[1]}")
                    raise checks.refuse(OP, "model", "one that returns rows of one D for all texts", came)
        return blocks if self.folder is not None else np.concatenate(blocks)

    def _block(self, texts: list[str], begin: int, probe: bytes, advance: Callable[[int], None]) -> np.ndarray:
        path = None
        if self.folder is not None:
            digest = hashlib.blake2b(probe, digest_size=20)
            for text in (str(self.normalize), self.prompt, *texts):
                part = text.encode("utf-8", "surrogatepass")
                digest.update(len(part).to_bytes(8, "little") + part)
            path = self.folder / f"negmine-{digest.hexdigest()}.npy"
            kept = _kept(path, len(texts))
            if kept is not None:
                advance(len(texts))
                return kept
        parts = []
        for at in range(0, len(texts), self.batch_size):
            parts.append(self._encoded(texts[at : at + self.batch_size], begin + at))
            if parts[-1].shape[1] != parts[0].shape[1]:
                came = checks.Phrase(f"rows of D = {parts[0].shape[1]} and of D = {parts[-1].shape[1]}")
                raise checks.refuse(OP, "model", "one that returns rows of one D for all texts", came)
            advance(len(parts[-1]))
        rows = np.concatenate(parts)
        if path is None:
            return rows
        with atomic_write(OP, path) as file:
            np.save(file, rows)
        return np.load(path, mmap_mode="c", allow_pickle=False)

    def _encoded(self, texts: list[str], begin: int) -> np.ndarray:
        """Embed texts: (n, D) fp32. begin: the row number of the first text, for error messages."""
        with torch.no_grad():
            made = self.encode(texts)
        rows = _as_rows(made, len(texts))
        require_finite(OP, self.side, rows, begin)
        if self.normalize:
            norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
            rows = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
        return rows


def require_finite(op: str, side: str, rows: np.ndarray, begin: int = 0) -> None:
    """Raise ValueError if a model returned NaN or infinity in its rows (n, D) for the texts of a side from number `begin` on."""
    bad = begin + np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        wanted = f"one that returns finite rows for all texts of {side}"
        raise checks.refuse(op, "model", wanted, checks.Phrase(f"NaN or infinity in rows {shown_rows(bad)}"))


def _as_rows(made: Any, count: int) -> np.ndarray:
    """The output of a model for `count` texts, as (count, D) fp32."""
    wanted = f"one that returns {count} rows (n, D) of numbers for {count} texts"
    if isinstance(made, dict) or hasattr(made, "keys"):
        keys = ", ".join(map(str, list(made.keys())[:5]))
        raise checks.refuse(
            OP,
            "model",
            f"{wanted}; wrap it in a function that selects one entry",
            checks.Phrase(f"a dict of {keys}"),
            TypeError,
        )
    if not isinstance(made, (np.ndarray, Tensor)):
        try:
            made = list(made)  # a generator, or a list of arrays
        except TypeError:
            raise checks.refuse(OP, "model", wanted, checks.kind_of(made), TypeError) from None
        made = [row.detach().float().cpu().numpy() if isinstance(row, Tensor) else row for row in made]
    checks.require_unmasked(OP, "model", made)
    is_complex = made.is_complex() if isinstance(made, Tensor) else any(map(np.iscomplexobj, made))
    if is_complex:  # NumPy would drop the imaginary parts
        raise checks.refuse(OP, "model", wanted, checks.Phrase("complex numbers"), TypeError)
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused by the caller
            rows = made.detach().float().cpu().numpy() if isinstance(made, Tensor) else np.asarray(made, np.float32)
    except (TypeError, ValueError):
        raise checks.refuse(
            OP, "model", wanted, checks.Phrase(f"{checks.kind_of(made)} that is not numeric"), TypeError
        ) from None
    if rows.ndim != 2 or len(rows) != count or not rows.shape[1]:
        raise checks.refuse(OP, "model", wanted, checks.Phrase(f"shape {rows.shape}"))
    return np.ascontiguousarray(rows, np.float32)


def _kept(path: Path, rows: int) -> np.ndarray | None:
    """The embeddings in a cache file; None if it does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        kept = np.load(path, mmap_mode="c", allow_pickle=False)
        if kept.dtype == np.float32 and kept.ndim == 2 and len(kept) == rows:
            return kept
    except Exception:  # NumPy's parser raises many types for a damaged header
        pass
    warnings.warn(f"{OP}: {str(path)!r} is damaged, so its texts are embedded again", RuntimeWarning, stacklevel=6)
    return None
