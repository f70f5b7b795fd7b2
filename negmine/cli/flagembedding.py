"""negmine mine --compat flagembedding: the options and the output format of FlagEmbedding's scripts/hn_mine.py.

    corpus    the distinct texts of candidate_pool if it is given, else of all "pos" and "neg", in order of appearance
    window    raw ranks [from, to) of range_for_sampling in the corpus, from which the query and its positives are removed
    neg       negative_number random texts of the window; if there are too few, random texts of the corpus are added

Intended differences from the script: the order of the corpus and the random numbers depend only on the input and the seed; a text
is never a negative twice; negatives are sorted by score; search_batch_size has an effect. Source: FlagOpen/FlagEmbedding,
scripts/hn_mine.py.
"""

import argparse
import json
import re
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from negmine.cli import files
from negmine.cli.options import Parser
from negmine.cli.outputs import check_outputs
from negmine.mining import mine_hard_negatives
from negmine.mining.atomic_file import atomic_write
from negmine.options import Select

NAME = "flagembedding"
STALE = {"pos_scores", "neg_scores", "neg_id", "neg_ids"}  # fields of a line that describe its old negatives


def _yes(word: str) -> bool:
    if word.lower() in ("true", "yes", "1"):
        return True
    if word.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"True or False, not {word!r}")


def _range(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)-(\d+)", word)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"two ranks such as 10-210, the lower first, not {word!r}")
    return int(found[1]), int(found[2])


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="negmine mine --compat flagembedding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--compat", choices=[NAME], help=argparse.SUPPRESS)
    made.add_argument(
        "--input-file", required=True, metavar="JSONL", help='lines with "query", "pos" and perhaps "neg"'
    )
    made.add_argument("--output-file", required=True, metavar="JSONL", help="the same lines with new negatives")
    made.add_argument("--candidate-pool", metavar="JSONL", help='lines with "text": the corpus')
    made.add_argument("--range-for-sampling", type=_range, default=(10, 210), metavar="FROM-TO", help="default 10-210")
    made.add_argument("--negative-number", type=int, default=15, metavar="N", help="default 15")
    made.add_argument("--use-gpu-for-searching", nargs="?", const=True, default=False, type=_yes, metavar="BOOL")
    made.add_argument(
        "--search-batch-size",
        type=int,
        default=64,
        metavar="N",
        help="how many queries to search at a time; default 64",
    )
    made.add_argument(
        "--embedder-name-or-path",
        "--embedder",
        metavar="MODULE:NAME",
        help="folder of a model of sentence-transformers or model2vec; or module:name of a callable from texts to rows (n, D) "
        "of numbers, or of an object with encode and perhaps encode_queries",
    )
    made.add_argument("--query-instruction-for-retrieval", default="", metavar="TEXT", help="added before each query")
    made.add_argument(
        "--query-embeddings", nargs="+", metavar="FILE", help="instead of a model: one row per line of the input"
    )
    made.add_argument(
        "--corpus-embeddings",
        nargs="+",
        metavar="FILE",
        help="instead of a model: one row per text of the corpus, in the same order",
    )
    made.add_argument(
        "--normalize-embeddings", nargs="?", const=True, default=True, type=_yes, metavar="BOOL", help="default True"
    )
    made.add_argument("--seed", type=int, default=0, help="of the random numbers; default 0")
    return made


def _texts_of(record: Any, name: str, number: int, required: bool) -> list[str]:
    found = record.get(name, None if required else [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f'record {number} of input_file must have "{name}", a list of texts, got {found!r}')
    return found


def _read(input_file: str, candidate_pool: str | None) -> tuple[list[dict], list[str]]:
    """The records, and the distinct texts of the corpus in order of appearance."""
    data, seen = files.records(input_file), []
    for number, record in enumerate(data, 1):
        if not isinstance(record, dict) or not isinstance(record.get("query"), str):
            raise ValueError(f'record {number} of input_file must be an object with a text "query"')
        seen += _texts_of(record, "pos", number, True) + _texts_of(record, "neg", number, False)
    texts = seen if candidate_pool is None else files.json_texts(candidate_pool)
    if not data or not texts:
        raise ValueError(f"{'the corpus' if data else 'input_file'} is empty")
    return data, list(dict.fromkeys(texts))


def _vectors(made: Any, rows: int, what: str, normalize: bool) -> Any:
    """Rows (rows, D) from the output of an embedder, or from files."""
    if isinstance(made, list) and made and isinstance(made[0], str):
        made = made[0] if len(made) == 1 else made
        if not normalize:
            return made
        parts = [files.array(name) for name in ([made] if isinstance(made, str) else made)]
        made = np.concatenate(parts)
    if isinstance(made, dict):  # M3 embedders
        made = made["dense_vecs"]
    tensor = torch.as_tensor(made)
    if tensor.dim() != 2 or len(tensor) != rows:
        raise ValueError(f"the embeddings of {what} must be ({rows}, D), got {tuple(tensor.shape)}")
    return F.normalize(tensor.float(), dim=1) if normalize else tensor


def _embedded(args: argparse.Namespace, queries: list[str], corpus: list[str]) -> tuple[Any, Any]:
    by_files = (args.query_embeddings, args.corpus_embeddings)
    if args.embedder_name_or_path:
        if any(by_files):
            raise ValueError("give an embedder or files with embeddings, not both")
        model = files.model(args.embedder_name_or_path)
        queries = [args.query_instruction_for_retrieval + query for query in queries]
        encode = getattr(model, "encode", model)
        made = (getattr(model, "encode_queries", encode)(queries), encode(corpus))
    elif all(by_files):
        made = by_files
    else:
        raise ValueError("give --embedder_name_or_path, or both --query_embeddings and --corpus_embeddings")
    sides = ((queries, "the queries"), (corpus, "the corpus"))
    query, rows = (
        _vectors(part, len(texts), what, args.normalize_embeddings)
        for part, (texts, what) in zip(made, sides, strict=True)
    )
    return query, rows


def run(words: list[str]) -> int:
    made = parser()
    args = made.parse_args(words)
    if args.negative_number < 1 or args.search_batch_size < 1:
        made.error("--negative_number and --search_batch_size must be 1 or more")
    # An existing output is replaced, as by the script; an input is never replaced.
    check_outputs(f"negmine mine --compat {NAME}", args, {"--output-file": args.output_file}, overwrite=True)
    data, corpus = _read(args.input_file, args.candidate_pool)
    row_of = {text: row for row, text in enumerate(corpus)}
    known = [sorted({row_of[text] for text in record["pos"] if text in row_of}) for record in data]
    itself = [[row_of[record["query"]]] if record["query"] in row_of else [] for record in data]
    query, rows = _embedded(args, [record["query"] for record in data], corpus)
    result = mine_hard_negatives(
        query,
        rows,
        known,
        exclude=itself,
        select=Select(*args.range_for_sampling),
        range_mode="raw",
        num_negatives=args.negative_number,
        sampling_strategy="random",
        seed=args.seed,
        batch_size=args.search_batch_size,
        device="cuda" if args.use_gpu_for_searching else None,
        show_progress_bar=sys.stderr.isatty(),
    )
    filled = 0
    stale = sorted({name for record in data for name in STALE & record.keys()})
    if stale:
        warnings.warn(
            f"{', '.join(stale)} of {args.input_file} describe the old negatives and are left out", stacklevel=2
        )
    with atomic_write(f"negmine mine --compat {NAME}", args.output_file) as out:
        for number, record in enumerate(data):
            found = [row for row in result.indices[number].tolist() if row >= 0]
            taken = {*found, *known[number], *itself[number]}
            lacking = args.negative_number - len(found)
            if lacking:
                left = np.setdiff1d(np.arange(len(corpus)), list(taken))
                drawn = np.random.default_rng([args.seed, number]).permutation(left)[:lacking].tolist()
                found += drawn
                filled += len(drawn)
            kept = {name: value for name, value in record.items() if name not in STALE}
            line = json.dumps({**kept, "neg": [corpus[row] for row in found]}, ensure_ascii=False)
            out.write(f"{line}\n".encode())
    print(
        f"{len(data):,} lines in {args.output_file}; {filled:,} negatives are random texts because a window had too few"
    )
    return 0
