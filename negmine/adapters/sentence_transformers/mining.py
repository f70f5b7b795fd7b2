"""mine_hard_negatives of sentence-transformers 6.2 with the same arguments and output columns, computed by negmine.

    from negmine.adapters.sentence_transformers import mine_hard_negatives

The differences from sentence-transformers are:

range_max          In sentence-transformers it limits the retrieval, before the filters, so a query with a weak positive may get
                   no negatives. Here it counts only rows that pass the filters, and by default there is no limit. The negatives
                   that sentence-transformers finds for a query are the first of those found here.
cross_encoder      sentence-transformers does not use it if no score filter is given. Here it always rescores the candidates. Both
                   limit the number of candidates before rescoring.
sampling_strategy  For "random", sentence-transformers uses Python's global random state; here `seed` is used. Without range_max,
                   negatives are drawn from the first 10 * num_negatives candidates. Unknown values raise an error.
cache_folder       The key of sentence-transformers contains the model's name. Here it depends on the model's outputs, so
                   embeddings of an earlier state of the model are never used.
equal texts        sentence-transformers may return the query itself if the corpus contains it. Here a negative is never equal to
                   the query, and no two negatives of a query have the same text.
similarity         Always the cosine, as in sentence-transformers with use_faiss=True. Without it, sentence-transformers uses the
                   model's own similarity function.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from negmine import reference
from negmine.mining import MiningResult
from negmine.mining import mine_hard_negatives as mine
from negmine.mining.atomic_file import atomic_write
from negmine.mining.memory_budget import DEFAULT_MEMORY
from negmine.mining.rescoring import choose
from negmine.mining.row_lists import RowLists
from negmine.mining.sources import open_shard
from negmine.ops import checks
from negmine.options import Select

OP = "mine_hard_negatives"
FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
PROBED = 8  # how many texts are embedded to tell the weights of different models apart


def mine_hard_negatives(
    dataset: Any,
    model: Any,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: list[str] | None = None,
    cross_encoder: Any = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: str = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    include_positives: bool = False,
    output_format: str = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    faiss_batch_size: int = 16384,
    use_faiss: bool = False,
    use_multi_process: list[str] | bool = False,
    verbose: bool = True,
    cache_folder: str | None = None,
    as_triplets: bool | None = None,
    margin: float | None = None,
    *,
    seed: int = 0,
    max_memory_bytes: int = DEFAULT_MEMORY,
    resume_dir: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> Any:
    """Add hard negatives to a dataset of pairs, with the arguments and the columns of sentence-transformers.

    Parameters
    ----------
    dataset : datasets.Dataset
        Pairs of an anchor and a positive. Several rows with the same anchor are its several positives.
    model : SentenceTransformer
        Or any object with encode, or with encode_query and encode_document.
    anchor_column_name, positive_column_name : str, optional
        The default is the first and the second column.
    corpus : list of str, optional
        The documents to search. All positives are added to it. The default is the positives.
    cross_encoder : CrossEncoder, optional
        Rescores the positives and the candidates before the filters are applied.
    range_min : int
        How many of the hardest documents that pass the filters are skipped.
    range_max : int, optional
        The rank, among the documents that pass the filters, before which negatives are taken.
    max_score, min_score, absolute_margin, relative_margin : float, optional
        As in `negmine.Select`. Margins are measured from the lowest score of the query's positives.
    num_negatives : int
        How many negatives each query gets.
    sampling_strategy : str
        "top" takes the hardest documents, "random" draws them.
    query_prompt_name, query_prompt, corpus_prompt_name, corpus_prompt : str, optional
        Passed to the model's encode functions.
    include_positives : bool
        Rank positives together with the negatives. The output format is then "n-tuple".
    output_format : str
        "triplet", "n-tuple", "labeled-pair" or "labeled-list".
    output_scores : bool
        Add the scores as a column.
    batch_size : int
        How many texts the models encode at a time.
    faiss_batch_size : int
        How many queries are searched at a time if use_faiss is True.
    use_faiss : bool
        Search by FAISS's "Flat" index instead of the kernels. The negatives are the same.
    use_multi_process : bool or list of str
        Encode in several processes, on all devices or on the listed ones.
    verbose : bool
        Show a progress bar and print a summary.
    cache_folder : str, optional
        A folder in which embeddings are stored, and from which they are read by a later call.
    as_triplets, margin : optional
        Deprecated names of output_format and absolute_margin.
    seed, max_memory_bytes, resume_dir, device, backend : optional
        As in `negmine.mine_hard_negatives`.

    Returns
    -------
    datasets.Dataset
        The anchors and positives with their negatives, in the columns of sentence-transformers.

    Raises
    ------
    ImportError
        If the package datasets is not installed.
    ValueError, TypeError
        If an argument is not valid.

    Examples
    --------
    >>> from negmine.adapters.sentence_transformers import mine_hard_negatives
    >>> mined = mine_hard_negatives(dataset, model, num_negatives=5, relative_margin=0.05)  # doctest: +SKIP
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(f"{OP}: the result is a datasets.Dataset: pip install datasets") from error
    if as_triplets is not None:
        warnings.warn(f"{OP}: as_triplets is now output_format", DeprecationWarning, stacklevel=2)
        output_format = "triplet" if as_triplets else "n-tuple"
    if margin is not None:
        warnings.warn(f"{OP}: margin is now absolute_margin", DeprecationWarning, stacklevel=2)
        absolute_margin = margin
    if output_format == "n-tuple-scores":
        warnings.warn(f"{OP}: 'n-tuple-scores' is now output_scores=True", DeprecationWarning, stacklevel=2)
        output_format, output_scores = "n-tuple", True
    checks.require_choice(OP, "output_format", output_format, FORMATS)
    checks.require_choice(OP, "sampling_strategy", sampling_strategy, ("top", "random"))
    checks.require_count(OP, "num_negatives", num_negatives)
    checks.require_count(OP, "faiss_batch_size", faiss_batch_size)
    if include_positives:
        output_format = "n-tuple"  # as in sentence-transformers, since the ranks are the result
    filters = {"min_score": min_score, "max_score": max_score}
    filters |= {"absolute_margin": absolute_margin, "relative_margin": relative_margin}
    select = Select(range_min, range_max, **filters)  # type: ignore[arg-type]
    anchors, answers, names = _columns(dataset, anchor_column_name, positive_column_name)
    documents = list(dict.fromkeys([*(answers if corpus is None else corpus), *answers]))
    queries = list(dict.fromkeys(anchors))
    lists = _positives(anchors, answers, queries, documents)
    if range_max is not None and num_negatives > range_max - range_min:
        raise checks.refuse(
            OP, "range_max", f"at least range_min + num_negatives = {range_min + num_negatives}", range_max
        )

    encode = _Encoder(model, batch_size, use_multi_process, cache_folder)
    corpus_rows = encode("document", documents, corpus_prompt_name, corpus_prompt)  # (K, D)
    query_rows = encode("query", queries, query_prompt_name, query_prompt)  # (Q, D)
    at = lists.queries  # (P,)
    positive_scores = (query_rows[at] * corpus_rows[lists.rows]).sum(1)  # (P,)
    options: dict[str, Any] = {
        "seed": seed,
        "max_memory_bytes": max_memory_bytes,
        "resume_dir": resume_dir,
        "device": device,
    }
    options |= {"backend": backend, "index": "Flat" if use_faiss else "exact"}
    options |= {"batch_size": faiss_batch_size} if use_faiss else {}
    options |= {"count_skipped": verbose}  # the counts are printed
    options |= {"query_texts": queries, "corpus_texts": documents}
    found = (query_rows, corpus_rows)
    if cross_encoder is None and not include_positives:
        result = mine(
            *found,
            lists[:2],
            select=select,
            num_negatives=num_negatives,
            sampling_strategy=sampling_strategy,
            show_progress_bar=verbose,
            **options,
        )
    else:
        spread = max(Counter(anchors).values())
        derived = range_min + num_negatives * (10 if select.has_filter or cross_encoder is not None else 1) + spread
        deep = min((derived if range_max is None else range_max) + spread, max(1, len(documents)))
        hidden = RowLists.empty(len(queries)) if include_positives else lists
        result = mine(*found, hidden[:2], select=Select(0, deep), range_mode="raw", num_negatives=deep, **options)
        if cross_encoder is not None:
            result, positive_scores = _rescored(cross_encoder, result, lists, queries, documents, batch_size)
        lowest = lists.reduce(positive_scores.astype(np.float32), "min")  # (Q,)
        known = lists if include_positives else RowLists.empty(len(queries))
        result = _chosen(result, select, lowest, known, num_negatives, sampling_strategy, seed)
    result = replace(result, positives=lists, positive_pair_scores=positive_scores.astype(np.float32))
    if verbose:
        print(result.summary())
    return Dataset.from_dict(_table(result, positive_scores, queries, documents, names, output_format, output_scores))


def _columns(dataset: Any, anchor: str | None, positive: str | None) -> tuple[list[str], list[str], tuple[str, str]]:
    columns = list(getattr(dataset, "column_names", ()))
    if len(columns) < 2 or not len(dataset):
        raise checks.refuse(
            OP, "dataset", "a datasets.Dataset of 1 row or more and two columns or more", checks.kind_of(dataset)
        )
    for name, asked in {"anchor_column_name": anchor, "positive_column_name": positive}.items():
        if asked is not None and asked not in columns:
            raise checks.refuse(OP, name, f"a column of dataset: {', '.join(columns)}", asked)
    names = (anchor or columns[0], positive or columns[1])
    return list(dataset[names[0]]), list(dataset[names[1]]), names


def _positives(anchors: list, answers: list, queries: list, documents: list) -> RowLists:
    """The positives of each query without repetitions, in the order of the dataset."""
    query_of, row_of = ({text: i for i, text in enumerate(texts)} for texts in (queries, documents))
    rows: list[dict[int, None]] = [{} for _ in queries]
    for anchor, answer in zip(anchors, answers, strict=True):
        rows[query_of[anchor]][row_of[answer]] = None
    indptr = np.r_[0, np.cumsum([len(part) for part in rows])]
    return RowLists(indptr, np.array([row for part in rows for row in part], np.int64))


class _Encoder:
    """Computes normalized embeddings (rows, D) fp32, or reads them from the cache folder."""

    def __init__(self, model: Any, batch_size: int, processes: list[str] | bool, folder: str | None) -> None:
        self.model, self.batch_size, self.processes = model, batch_size, processes
        self.folder = None if folder is None else Path(folder)

    def __call__(self, kind: str, texts: list[str], prompt_name: str | None, prompt: str | None) -> np.ndarray:
        options = {"prompt_name": prompt_name, "prompt": prompt}
        if self.folder is None:
            return self._encoded(kind, texts, options, pooled=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self._encoded(kind, texts[:PROBED], options, pooled=False).tobytes()
        key = hashlib.sha256(json.dumps([prompt_name, prompt, texts]).encode() + probe).hexdigest()
        path = self.folder / f"negmine_{kind}_{key}.npy"
        if not path.exists():
            with atomic_write(OP, path) as file:
                np.save(file, self._encoded(kind, texts, options, pooled=True))
        kept = np.asanyarray(open_shard(OP, "cache_folder", path))
        if len(kept) != len(texts):
            raise checks.refuse(OP, "cache_folder", f"without {str(path)!r} or with {len(texts)} rows in it", len(kept))
        return kept

    def _encoded(self, kind: str, texts: list[str], options: dict, pooled: bool) -> np.ndarray:
        encode = getattr(self.model, f"encode_{kind}", None) or self.model.encode
        pool = None
        if pooled and self.processes:
            targets = None if isinstance(self.processes, bool) else self.processes
            pool = self.model.start_multi_process_pool(target_devices=targets)
        try:
            rows = encode(
                texts,
                batch_size=self.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=pooled,
                **({"pool": pool} if pool is not None else {}),
                **{name: value for name, value in options.items() if value is not None},
            )
        finally:
            if pool is not None:
                self.model.stop_multi_process_pool(pool)
        rows = np.ascontiguousarray(rows, np.float32)
        bad = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(bad):
            came = checks.Phrase(f"NaN or infinity for {checks.describe(texts[bad[0]], 80)}")
            raise checks.refuse(OP, "model", "one that returns finite embeddings", came)
        return rows


def _rescored(
    cross_encoder: Any, result: MiningResult, lists: RowLists, queries: list, documents: list, batch_size: int
) -> tuple[MiningResult, np.ndarray]:
    """The candidates with the cross-encoder's scores, and its scores (P,) of the positives."""

    def predicted(at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        pairs = [(queries[q], documents[k]) for q, k in zip(at.tolist(), rows.tolist(), strict=True)]
        scores = cross_encoder.predict(pairs, batch_size=batch_size, convert_to_tensor=True)
        return torch.as_tensor(scores).float().cpu().numpy().reshape(-1)

    some = result.indices >= 0  # (Q, n)
    scores = np.full(some.shape, -np.inf, np.float32)
    scores[some] = predicted(np.nonzero(some)[0], result.indices[some])
    return replace(result, scores=scores), predicted(lists.queries, lists.rows)


def _chosen(
    result: MiningResult, select: Select, lowest: np.ndarray, known: RowLists, n: int, strategy: str, seed: int
) -> MiningResult:
    """Filter each query's candidates, rank them by score, and choose n of the window of ranks.

    lowest (Q,) is the lowest score of each query's positives. known are the positives, to which the filters do not apply.
    """
    scores, indices = torch.from_numpy(result.scores), torch.from_numpy(result.indices)
    kept = reference.filtered(
        scores, torch.from_numpy(lowest), replace(select, range_min=0, range_max=None), indices >= 0
    )
    K = result.config["corpus_rows"]
    pairs = np.arange(len(result.indices))[:, None] * K + result.indices
    kept |= torch.from_numpy(np.isin(pairs, known.queries * K + known.rows) & (result.indices >= 0))
    drawing = (n, strategy, seed, 1.0)
    some, rows = choose(result.scores, result.indices, kept.numpy(), select, *drawing)
    return replace(result, indices=rows, scores=some, num_valid=(rows >= 0).sum(1))


def _table(
    result: MiningResult,
    positive_scores: np.ndarray,
    queries: list,
    documents: list,
    names: tuple[str, str],
    output_format: str,
    with_scores: bool,
) -> dict[str, list]:
    """The output columns by name."""
    at, rows = result.positives.queries, result.positives.rows  # (P,) each
    negatives, scores = result.indices[at], result.scores[at]  # (P, n) each
    some = negatives >= 0
    anchor, positive = names

    def texts(source: list, numbers: np.ndarray) -> list:
        return [source[number] for number in numbers.tolist()]

    if output_format == "triplet":
        pair, slot = np.nonzero(some)
        table = {anchor: texts(queries, at[pair]), positive: texts(documents, rows[pair])}
        table["negative"] = texts(documents, negatives[pair, slot])
        both = np.stack([positive_scores[pair], scores[pair, slot]], 1).tolist()
        return table | ({"scores": both} if with_scores else {})
    if output_format == "n-tuple":
        full = some.all(1)
        table = {anchor: texts(queries, at[full]), positive: texts(documents, rows[full])}
        table |= {f"negative_{i}": texts(documents, column) for i, column in enumerate(negatives[full].T, 1)}
        joined = np.concatenate([positive_scores[full, None], scores[full]], 1).tolist()
        return table | ({"scores": joined} if with_scores else {})
    if output_format == "labeled-pair":
        each, slot = np.nonzero(result.indices >= 0)
        ranked = np.argsort(np.r_[at, each], kind="stable")
        table = {anchor: texts(queries, np.r_[at, each][ranked])}
        table[positive] = texts(documents, np.r_[rows, result.indices[each, slot]][ranked])
        labels = np.r_[np.ones_like(at), np.zeros_like(each)][ranked].tolist()
        graded = np.r_[positive_scores, result.scores[each, slot]][ranked].tolist()
        return table | ({"score": graded} if with_scores else {"label": labels})
    has = some.any(1)
    lists = [(int(p), negatives[p][some[p]], scores[p][some[p]]) for p in np.flatnonzero(has)]
    table = {anchor: texts(queries, at[has])}
    table[positive] = [[documents[rows[p]], *texts(documents, kept)] for p, kept, _ in lists]
    if with_scores:
        return table | {"scores": [[float(positive_scores[p]), *graded.tolist()] for p, _, graded in lists]}
    return table | {"labels": [[1] + [0] * len(kept) for _, kept, _ in lists]}
