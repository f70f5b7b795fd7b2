"""Read queries and documents with relevance judgements from the files of other tools.

    read_beir(folder, split)              corpus.jsonl, queries.jsonl, qrels/<split>.tsv
    read_msmarco(collection, queries, qrels)    collection.tsv, queries.tsv, qrels.tsv
    read_training_lines(path)             training data of FlagEmbedding, Tevatron or ms-swift, as JSONL

Each file may be plain or compressed by gzip or zstd. Ids are strings, as in the files. Errors name the file and the line.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from negmine.mining import remote
from negmine.mining.remote import is_url
from negmine.mining.text_files import read_jsonl, read_lines, read_tsv
from negmine.ops.checks import describe, refuse

ENDINGS = ("", ".gz", ".zst")
ID_NAMES = ("id", "_id", "pid", "qid", "docid", "doc_id", "query_id", "passage_id")  # in the header of a table
TEXT_NAMES = ("text", "passage", "query", "body", "contents")
PREFERRED_SPLITS = ("train", "test", "dev")


@dataclass
class TextSet:
    """Queries, documents, and the relevant documents of each query."""

    query_ids: list[str]
    query_texts: list[str]
    corpus_ids: list[str]
    corpus_titles: list[str] | None  # None if no document has a title
    corpus_bodies: list[str]
    positives: list[list[str]]  # ids of the relevant documents of each query
    files: list[str] = field(default_factory=list)  # paths or URLs of the files that were read
    query_rows: list[int] | None = None  # rows of these queries in the file; None if the file has no other queries
    queries_in_file: int = 0  # with those that no judgement names, which are left out

    @property
    def corpus_texts(self) -> list[str]:
        """Title and body of each document in one text, as retrievers usually embed them."""
        if self.corpus_titles is None:
            return self.corpus_bodies
        pairs = zip(self.corpus_titles, self.corpus_bodies, strict=True)
        return [f"{title} {body}".strip() if title else body for title, body in pairs]


def _existing(path: str) -> str:
    """The path or URL of a file, or that of the same file compressed: with .gz or .zst appended."""
    for candidate in (path + ending for ending in ENDINGS):
        if remote.exists(candidate) if is_url(candidate) else os.path.exists(candidate):
            return candidate
    raise ValueError(f"{describe(path)} does not exist")


def _names_in(folder: str) -> list[str]:
    """The sorted names of the files in a folder, which may be a URL; empty if there is no such folder."""
    if is_url(folder):
        return remote.names_in_folder(folder)
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _text(record: Any, name: str, where: str, default: str | None = None) -> str:
    """The string in a field of a JSON object. Ids may be ints."""
    found = record.get(name, default) if isinstance(record, dict) else None
    if isinstance(found, int) and not isinstance(found, bool) and name in ("_id", "docid", "query_id"):
        found = str(found)
    if found is None and default is not None:
        found = default
    if not isinstance(found, str):
        raise ValueError(f'{where} must be an object with a string "{name}", got {describe(found)}')
    return _encodable(found, where)


def _encodable(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} has an unpaired surrogate, which UTF-8 cannot encode")
    return text


class _Documents:
    """Documents by id, in order of appearance."""

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self.titles: list[str] = []
        self.bodies: list[str] = []

    def add(self, name: str, title: str, body: str, where: str) -> None:
        row = self.row_of.setdefault(name, len(self.bodies))
        if row == len(self.bodies):
            self.titles.append(title)
            self.bodies.append(body)
        elif (self.titles[row], self.bodies[row]) != (title, body):
            raise ValueError(f"{where} has the id {describe(name)} of an earlier document, but another text")

    def text_set(
        self, query_ids: list[str], query_texts: list[str], positives: list[list[str]], **rest: Any
    ) -> TextSet:
        titles = self.titles if any(self.titles) else None
        return TextSet(query_ids, query_texts, list(self.row_of), titles, self.bodies, positives, **rest)


def _judged(
    documents: _Documents,
    queries: dict[str, str],
    judgements: Iterator[tuple[str, str, str]],
    files: list[str],
) -> TextSet:
    """queries: id -> text; judgements: (where, query id, document id) of relevant pairs."""
    positives: dict[str, dict[str, None]] = {}
    for where, query, document in judgements:
        if query not in queries:
            raise ValueError(f"{where} names the query {describe(query)}, which is not in {describe(files[1])}")
        if document not in documents.row_of:
            came = f"the document {describe(document)}, which is not in {describe(files[0])}"
            raise ValueError(f"{where} names {came}")
        positives.setdefault(query, {})[document] = None
    if not positives:
        raise ValueError(f"{describe(files[2])} has no relevant pair")
    kept = [name for name in queries if name in positives]
    texts, lists = [queries[name] for name in kept], [list(positives[name]) for name in kept]
    rows = [row for row, name in enumerate(queries) if name in positives] if len(kept) < len(queries) else None
    return documents.text_set(kept, texts, lists, files=files, query_rows=rows, queries_in_file=len(queries))


def _score(word: str, where: str) -> bool:
    """Whether a pair is relevant: its score is above 0."""
    try:
        score = float(word)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise ValueError(f"{where} must end with a score, got {describe(word)}")
    return score > 0


def _new(table: dict[str, str], name: str, text: str, where: str) -> None:
    if name in table and table[name] != text:
        raise ValueError(f"{where} has the id {describe(name)} of an earlier query, but another text")
    table[name] = text


def beir_files(folder: str | os.PathLike, split: str | None = None) -> list[str]:
    """The paths, or URLs, of the corpus, the queries and the judgements of a BEIR folder.

    split: default train, test or dev, whichever comes first.
    """
    root = os.fspath(folder).rstrip("/")
    if not _names_in(root):
        raise ValueError(f"{describe(os.fspath(folder))} must be a folder with files in it, got none")
    found = [_existing(f"{root}/{name}.jsonl") for name in ("corpus", "queries")]
    splits: dict[str, str] = {}
    for name in _names_in(f"{root}/qrels"):
        title, extension, ending = name.partition(".tsv")
        if extension and ending in ENDINGS:
            splits[title] = f"{root}/qrels/{name}"
    if split is None:
        split = next((name for name in PREFERRED_SPLITS if name in splits), next(iter(splits), None))
    if split not in splits:
        wanted = f"with qrels/{split or 'train'}.tsv"
        came = f"one with the splits {', '.join(splits)}" if splits else "no qrels"
        raise ValueError(f"{describe(os.fspath(folder))} must be a BEIR folder {wanted}, got {came}")
    return [*found, splits[split]]


def read_beir(folder: str | os.PathLike, split: str | None = None) -> TextSet:
    """A BEIR folder: corpus.jsonl of {"_id", "title", "text"}, queries.jsonl of {"_id", "text"}, qrels/<split>.tsv.

    Queries without a relevant document in the split are left out; `query_rows` has the row numbers of the others.
    """
    files = beir_files(folder, split)
    documents, queries = _Documents(), dict[str, str]()
    for number, record in read_jsonl(files[0]):
        where = f"line {number} of {describe(files[0])}"
        title, body = _text(record, "title", where, ""), _text(record, "text", where)
        documents.add(_text(record, "_id", where), title, body, where)
    for number, record in read_jsonl(files[1]):
        where = f"line {number} of {describe(files[1])}"
        _new(queries, _text(record, "_id", where), _text(record, "text", where), where)

    return _judged(documents, queries, read_qrels(files[2]), files)


def read_qrels(path: str | os.PathLike) -> Iterator[tuple[str, str, str]]:
    """(where, query id, document id) of each relevant pair of a qrels file.

    A BEIR file has a header and the columns query id, document id, score. TREC and MS MARCO files have the columns query id,
    iteration, document id, score.
    """
    columns = 0
    for number, line in read_lines(path):
        where = f"line {number} of {describe(str(path))}"
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            continue
        is_header = not columns and fields[-1].strip().lower() in ("score", "relevance")
        columns = columns or len(fields)
        if is_header:
            continue
        if columns not in (3, 4) or len(fields) != columns:
            raise ValueError(
                f"{where} must have query id, document id and score, or these with an iteration, got {describe(line)}"
            )
        if _score(fields[-1], where):
            yield where, fields[0], fields[-2]


def read_msmarco(collection: str | os.PathLike, queries: str | os.PathLike, qrels: str | os.PathLike) -> TextSet:
    """MS MARCO: collection.tsv of id and passage, queries.tsv of id and text, and judgements.

    Each line of a collection of whole documents has id, URL, title and text.
    """
    files = [_existing(os.fspath(path)) for path in (collection, queries, qrels)]
    documents, texts = _Documents(), dict[str, str]()
    for at, (number, fields) in enumerate(_table(files[0], (2, 4))):
        where = f"line {number} of {describe(files[0])}"
        if at or not _is_header(fields):
            documents.add(fields[0], fields[2] if len(fields) == 4 else "", fields[-1], where)
    for at, (number, fields) in enumerate(read_tsv(files[1], 2)):
        if not at and _is_header(fields):
            continue
        _new(texts, fields[0], fields[1], f"line {number} of {describe(files[1])}")
    return _judged(documents, texts, read_qrels(files[2]), files)


def _is_header(fields: list[str]) -> bool:
    """Whether the fields are the names of columns, such as "pid" and "passage"."""
    words = [field.strip().lower() for field in (fields[0], fields[-1])]
    return words[0] in ID_NAMES and words[1] in TEXT_NAMES


def _table(path: str, columns: tuple[int, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields). All lines must have as many fields as the first, and that number must be in `columns`."""
    first = 0
    for number, line in read_lines(path):
        if line.strip():
            fields = line.split("\t")
            first = first or len(fields)
            if first not in columns or len(fields) != first:
                wanted = " or ".join(map(str, columns))
                where = f"line {number} of {describe(str(path))}"
                raise ValueError(f"{where} must have {wanted} fields separated by tabs, got {len(fields)}")
            yield number, fields


def _texts(record: dict, name: str, where: str) -> list[str]:
    found = record.get(name) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f'{where} must have "{name}", a list of strings, got {describe(found)}')
    return [_encodable(text, where) for text in found]


def _messages(value: Any, where: str) -> str:
    """The text of a list of messages of ms-swift."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must have lists of messages, got {describe(value)}")
    return "\n".join(_text(message, "content", where) for message in value)


def _passages(
    record: dict, form: str, where: str
) -> tuple[str, list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """The query, and (id, title, body) of its positives and of its negatives; the id is "" if there is none."""
    if form == "tevatron":
        sides = []
        for name in ("positive_passages", "negative_passages"):
            found = record.get(name) or []
            if not isinstance(found, list):
                raise ValueError(f'{where} must have "{name}", a list of passages, got {describe(found)}')
            sides.append(
                [(_text(p, "docid", where), _text(p, "title", where, ""), _text(p, "text", where)) for p in found]
            )
        return _text(record, "query", where), sides[0], sides[1]
    if form == "ms-swift":
        if "messages" in record:
            query = _messages(record["messages"], where)
            lists = [record.get(f"{side}_messages") or [] for side in ("positive", "negative")]
            if not all(isinstance(entry, list) for entry in lists):
                raise ValueError(f"{where} must have lists of messages, got {describe(lists)}")
            positive, negative = ([_messages(entry, where) for entry in entries] for entries in lists)
        else:
            query = _text(record, "query", where)
            positive, negative = [_text(record, "response", where)], _texts(record, "rejected_response", where)
    else:
        query, positive, negative = (
            _text(record, "query", where),
            _texts(record, "pos", where),
            _texts(record, "neg", where),
        )
    return query, [("", "", text) for text in positive], [("", "", text) for text in negative]


def form_of(record: Any) -> str | None:
    """The format of a line of training data, recognised by its field names; None if unknown."""
    if not isinstance(record, dict):
        return None
    if "positive_passages" in record:
        return "tevatron"
    if "positive_messages" in record or ("query" in record and "response" in record):
        return "ms-swift"
    return "flagembedding" if "query" in record and "pos" in record else None


def read_training_lines(path: str | os.PathLike) -> TextSet:
    """Read training data of FlagEmbedding, Tevatron or ms-swift: JSONL with one query per line. The corpus is all passages.

    Ids of queries are those of Tevatron, else line numbers from 0. Ids of documents are those of Tevatron, else "d0", "d1", ...
    for the distinct texts in order of appearance.
    """
    documents, query_ids, query_texts, positives = _Documents(), list[str](), list[str](), list[list[str]]()
    id_of, queries = dict[str, str](), dict[str, str]()
    form = None
    for number, record in read_jsonl(path):
        where = f"line {number} of {describe(str(path))}"
        form = form or form_of(record)
        if form is None or form_of(record) != form:
            wanted = (
                f"in the format of the first line, {form}"
                if form
                else "in the format of FlagEmbedding, Tevatron or ms-swift"
            )
            raise ValueError(f"{where} must be {wanted}, got {describe(record)}")
        query, *sides = _passages(record, form, where)
        names: list[list[str]] = [[], []]
        for side, passages in zip(names, sides, strict=True):
            for name, title, body in passages:
                name = name or id_of.setdefault(body, f"d{len(id_of)}")
                documents.add(name, title, body, where)
                side.append(name)
        if not names[0]:
            raise ValueError(f"{where} must have a positive")
        query_ids.append(_text(record, "query_id", where) if "query_id" in record else str(len(query_ids)))
        _new(queries, query_ids[-1], query, where)
        query_texts.append(query)
        positives.append(list(dict.fromkeys(names[0])))
    if not query_ids:
        raise refuse("read_training_lines", "path", "a file with at least one line", str(path))
    return documents.text_set(
        query_ids, query_texts, positives, files=[os.fspath(path)], queries_in_file=len(query_ids)
    )
