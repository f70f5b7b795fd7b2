"""Check the arguments of hardness_report other than embeddings: bins, classes, similarity measures, texts."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from negmine.ops.checks import Phrase, describe, kind_of, refuse
from negmine.options import is_real

OP = "hardness_report"
# query numbers (M,), corpus rows (M,) -> (M,) similarities, NaN = unknown
Measure = Callable[[np.ndarray, np.ndarray], Any]


def checked_edges(edges: Any) -> tuple[float, ...]:
    good = isinstance(edges, (tuple, list)) and len(edges) >= 2 and all(is_real(edge) for edge in edges)
    if not good or edges[0] != 0 or edges[-1] != 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise refuse(OP, "edges", "fractions ascending from 0 to 1", edges)
    return tuple(map(float, edges))


def checked_fraction(name: str, value: Any) -> float:
    if not is_real(value) or not 0 < value < 1:
        raise refuse(OP, name, "a fraction above 0 and below 1", value)
    return float(value)


@dataclass(frozen=True)
class Classes:
    """Classes of queries and corpus rows, as given (ints or strings) and as codes 0, 1, ... common to both."""

    given: tuple[np.ndarray, np.ndarray]  # (Q,), (K,)
    queries: np.ndarray  # (Q,) int64
    corpus: np.ndarray  # (K,) int64

    @property
    def sizes(self) -> np.ndarray:
        """How many corpus rows have each code."""
        return np.bincount(self.corpus, minlength=int(self.queries.max(initial=0)) + 1)


def checked_classes(query_labels: Any, corpus_labels: Any, Q: int, K: int) -> Classes | None:
    if query_labels is None and corpus_labels is None:
        return None
    given = []
    for name, labels, rows in (("query_labels", query_labels, Q), ("corpus_labels", corpus_labels, K)):
        if labels is None:
            raise refuse(OP, name, "given together with the other labels", None)
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if array.shape != (rows,) or array.dtype.kind not in "iuU":
            raise refuse(OP, name, f"{rows} ints or strings, one per row", array)
        given.append(array)
    if (given[0].dtype.kind == "U") != (given[1].dtype.kind == "U"):
        raise refuse(
            OP, "corpus_labels", f"of the same type as query_labels ({given[0].dtype})", Phrase(given[1].dtype)
        )
    _, codes = np.unique(np.concatenate(given), return_inverse=True)
    return Classes((given[0], given[1]), codes[:Q].astype(np.int64), codes[Q:].astype(np.int64))


def _by_matrix(name: str, matrix: np.ndarray, classes: Classes | None) -> Measure:
    """A measure that looks up similarities in a (C, C) matrix by class."""
    if classes is None or classes.given[0].dtype.kind == "U":
        raise refuse(OP, name, "a callable unless query_labels and corpus_labels are given as ints", matrix.shape)
    of_query, of_row = classes.given
    ends = [int(labels.max(initial=0)) for labels in classes.given] + [
        -int(labels.min(initial=0)) for labels in classes.given
    ]
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or max(ends[:2]) >= len(matrix) or max(ends[2:]) > 0:
        wanted = "a (C, C) matrix with one row per label, and labels in [0, C)"
        raise refuse(OP, name, wanted, Phrase(f"shape {matrix.shape} and a largest label of {max(ends[:2])}"))
    return lambda queries, rows: matrix[of_query[queries], of_row[rows]]


def checked_measures(value: Any, classes: Classes | None) -> dict[str, Measure]:
    """The measures of class_similarity, in any of its forms, by name."""
    if value is None:
        return {}
    measures: dict[str, Measure] = {}
    for name, measure in (value if isinstance(value, Mapping) else {"class similarity": value}).items():
        label = f"class_similarity[{name!r}]" if isinstance(value, Mapping) else "class_similarity"
        if callable(measure):
            measures[str(name)] = measure
        elif isinstance(measure, (np.ndarray, Tensor, list)):
            matrix = measure.detach().cpu().numpy() if isinstance(measure, Tensor) else np.asarray(measure)
            if matrix.dtype.kind not in "fiub":
                raise refuse(OP, label, "a matrix of numbers", matrix, TypeError)
            measures[str(name)] = _by_matrix(label, matrix.astype(np.float64), classes)
        else:
            raise refuse(OP, label, "a (C, C) matrix or a callable", kind_of(measure), TypeError)
    return measures


def measured(name: str, measure: Measure, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """queries, rows (B, R), row -1 = none -> (B, R) float64 similarities; NaN if there is no row or the value is unknown."""
    out = np.full(rows.shape, np.nan)
    some = rows >= 0
    values = measure(queries[some], rows[some])
    values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    if values.shape != (int(some.sum()),):
        raise refuse(
            OP, f"class_similarity {describe(name)}", f"one number for each of {some.sum()} pairs", values.shape
        )
    out[some] = values
    return out
