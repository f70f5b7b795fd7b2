"""Rows of training data from a MiningResult, in the formats that training programs read.

flagembedding          {"query", "pos": [texts], "neg": [texts], "pos_scores": [...], "neg_scores": [...]}
tevatron               {"query_id", "query", "positive_passages": [{"docid", "title", "text"}], "negative_passages": [...]}
ms-swift               {"messages": [...], "positive_messages": [[...]], "negative_messages": [[...], ...]}
sentence-transformers  {"anchor", "positive", "negative_1", ..., "negative_n"}: one row for each positive
distillation           the same with "label", the scores of the positive and the negatives, for losses that distil a teacher
pylate                 {"query_id", "document_ids", "scores"}: the positives, then the negatives, for PyLate's KDProcessing

Ids and titles of documents are kept. Tevatron's format has a field for titles; in the other formats the title precedes the text.
A query without a positive or without a negative has no row. In formats with one column per negative, a query with fewer than n
negatives has no row either. Such queries are counted.
"""

import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from negmine.mining.columns import Column
from negmine.ops.checks import Phrase, refuse, require_choice

FORMS = ("flagembedding", "tevatron", "ms-swift", "sentence-transformers", "distillation", "pylate")
FIXED_WIDTH = ("sentence-transformers", "distillation")  # formats with one column per negative


class TrainingRows:
    """The rows of a MiningResult in one format. Texts and titles are read by position."""

    def __init__(
        self, op: str, result: Any, form: str, query_texts: Any, corpus_texts: Any, corpus_titles: Any
    ) -> None:
        require_choice(op, "form", form, FORMS)
        self.op, self.result, self.form = op, result, form
        sizes = (len(result.indices), result.config["corpus_rows"])
        self._queries, self._bodies, self._titles = None, None, None
        if form != "pylate":
            self._queries = _column(op, "query_texts", query_texts, result.query_texts, sizes[0])
            self._bodies = _column(op, "corpus_texts", corpus_texts, result.corpus_texts, sizes[1])
            if corpus_titles is not None:
                self._titles = _column(op, "corpus_titles", corpus_titles, None, sizes[1])
        has_positive = result.positives.sizes > 0
        has_negative = result.num_valid > 0
        is_full = result.num_valid == result.indices.shape[1] if form in FIXED_WIDTH else has_negative
        self.used = np.flatnonzero(has_positive & has_negative & is_full)  # queries
        self.left_out = {
            "have no positive": int((~has_positive).sum()),
            "have no negative": int((has_positive & ~has_negative).sum()),
            f"have fewer than {result.indices.shape[1]} negatives": int((has_positive & has_negative & ~is_full).sum()),
        }
        self._pair_scores = self._scores_of_positives()  # (P,), or None where one is unknown
        if self._pair_scores is None and form in ("distillation", "pylate"):
            raise refuse(op, "form", "one without scores, because the scores of some positives are unknown", form)
        short = int(((result.num_valid < result.indices.shape[1])[self.used]).sum())
        self.short = short  # queries with a row that has fewer negatives than requested

    def _scores_of_positives(self) -> np.ndarray | None:
        """(P,) fp32, the score of each positive; None if one of them is needed and unknown."""
        result, scores = self.result, self.result.positive_pair_scores
        if scores is None and (result.positives.sizes <= 1).all():
            scores = result.positive_scores[result.positives.queries]
        used = np.isin(result.positives.queries, self.used)
        return scores if scores is not None and np.isfinite(scores[used]).all() else None

    def message(self) -> str:
        """Says how many queries are left out, and how many have fewer negatives than requested; empty if there are none."""
        parts = [f"{count:,} queries {why} and are left out" for why, count in self.left_out.items() if count]
        if self.short:
            parts.append(f"{self.short:,} queries have fewer than {self.result.indices.shape[1]} negatives")
        if self._pair_scores is None and self.form == "flagembedding":
            parts.append("the scores of some positives are unknown, so pos_scores and neg_scores are left out")
        return "; ".join(parts)

    def warn(self) -> None:
        """Warn if queries or scores are left out."""
        if any(self.left_out.values()) or (self._pair_scores is None and self.form == "flagembedding"):
            warnings.warn(f"{self.op}: {self.message()}", UserWarning, stacklevel=3)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for query in self.used.tolist():
            yield from self._rows(query)

    def lines(self) -> Iterator[bytes]:
        """Each row as a line of JSON in UTF-8."""
        for query in self.used.tolist():
            for row in self._rows(query):
                try:
                    yield json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
                except UnicodeEncodeError as error:
                    came = Phrase(f"an unpaired surrogate in row {query} of query_texts or in a document of that row")
                    raise refuse(self.op, "texts", "texts that UTF-8 can encode", came) from error
                except ValueError as error:
                    raise refuse(self.op, "scores", "finite", Phrase(f"one that is not for query {query}")) from error

    def _texts(self, rows: np.ndarray) -> list[str]:
        assert self._bodies is not None
        bodies = self._bodies.strings(rows)
        if self._titles is None:
            return bodies
        titles = self._titles.strings(rows)
        return [f"{title} {body}".strip() if title else body for title, body in zip(titles, bodies, strict=True)]

    def _passages(self, rows: np.ndarray) -> list[dict[str, str]]:
        assert self._bodies is not None
        names, bodies = self.result.document_names(rows).tolist(), self._bodies.strings(rows)
        titles = self._titles.strings(rows) if self._titles is not None else [""] * len(rows)
        fields = zip(names, titles, bodies, strict=True)
        return [{"docid": str(name), "title": title, "text": body} for name, title, body in fields]

    def _rows(self, query: int) -> Iterator[dict[str, Any]]:
        result, form = self.result, self.form
        begin, end = result.positives.indptr[query : query + 2]
        positives = result.positives.rows[begin:end]
        some = result.indices[query] >= 0
        negatives, scores = result.indices[query][some], _plain(result.scores[query][some])
        own_scores = [] if self._pair_scores is None else _plain(self._pair_scores[begin:end])
        at = np.array([query])
        if form == "pylate":
            documents = result.document_names(np.r_[positives, negatives]).tolist()
            yield {
                "query_id": _native(result.query_names(at)[0]),
                "document_ids": documents,
                "scores": own_scores + scores,
            }
            return
        assert self._queries is not None
        (text,) = self._queries.strings(at)
        if form == "flagembedding":
            texts = {"pos": self._texts(positives), "neg": self._texts(negatives)}
            known = {} if self._pair_scores is None else {"pos_scores": own_scores, "neg_scores": scores}
            yield {"query": text, **texts, **known}
        elif form == "tevatron":
            line: dict[str, Any] = {"query_id": str(result.query_names(at)[0]), "query": text}
            yield line | {
                f"{side}_passages": self._passages(rows)
                for side, rows in (("positive", positives), ("negative", negatives))
            }
        elif form == "ms-swift":
            yield {"messages": _message(text)} | {
                f"{side}_messages": [_message(document) for document in self._texts(rows)]
                for side, rows in (("positive", positives), ("negative", negatives))
            }
        else:
            columns = {f"negative_{i}": document for i, document in enumerate(self._texts(negatives), 1)}
            for i, document in enumerate(self._texts(positives)):
                row: dict[str, Any] = {"anchor": text, "positive": document, **columns}
                yield row | ({"label": [own_scores[i], *scores]} if form == "distillation" else {})


def _column(op: str, name: str, given: Any, own: Any, rows: int) -> Column:
    held = own if given is None else given
    if held is None:
        raise refuse(op, name, "given, here or when the negatives are mined", None, TypeError)
    column = Column(op, name, held)
    column.require_length(rows, f"{rows} texts, one per row")
    return column


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _plain(scores: np.ndarray) -> list[float]:
    """fp32 scores as the shortest decimals that represent them."""
    return [float(str(score)) for score in scores.astype(np.float32)]


def _native(name: Any) -> Any:
    return name.item() if isinstance(name, np.generic) else name
