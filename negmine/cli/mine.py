"""negmine mine: run mine_hard_negatives on files and write files."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from negmine.cli import files, flagembedding
from negmine.cli.options import Reader, add_options, given, named
from negmine.cli.outputs import add_overwrite, check_outputs
from negmine.mining import MiningResult, NegativeIndex, from_texts, mine_hard_negatives
from negmine.mining.atomic_file import is_stream
from negmine.mining.columns import Column
from negmine.mining.hard_negatives import check_arguments, mine_share
from negmine.mining.memory_budget import DEFAULT_MEMORY
from negmine.mining.progress import clock
from negmine.mining.remote import is_url
from negmine.mining.sources import Rows
from negmine.mining.text_mining import Embedder, encoder
from negmine.mining.text_sets import TextSet, beir_files, read_beir, read_msmarco, read_training_lines
from negmine.mining.training_rows import FORMS
from negmine.ops.checks import Phrase, refuse, require_choice
from negmine.options import Select

OP = "negmine mine"
READERS = {
    "query_embeddings": files.EMBEDDINGS,
    "corpus_embeddings": files.EMBEDDINGS,
    "positives": files.LISTS,
    "exclude": files.LISTS,
    "query_ids": files.LABELS,
    "corpus_ids": files.LABELS,
    "query_texts": files.TEXTS,
    "corpus_texts": files.TEXTS,
    "rescore": Reader(files.imported, "MODULE:NAME"),
    "engine_options": files.OPTIONS,
    "index": Reader(lambda words: _index(words), "KIND|FILE", "+"),
}
NO_OPTION = ("select", "process_group")  # the fields of select are options; a process group needs a program
NO_FIELD = ("sample", "replace")  # not allowed in mine_hard_negatives, which has its own arguments for sampling
DATA_SET = ("beir", "data", "collection")  # options that name a data set with texts, ids and positives
EMBEDDED = ("query_embeddings", "corpus_embeddings")
EMBEDDING = ("query_prompt", "corpus_prompt", "encode_batch_size", "normalize", "cache_dir")  # arguments of from_texts
IN_DATA_SET = ("positives", "query_ids", "corpus_ids", "query_texts", "corpus_texts")
GROUPS = {
    "inputs as arrays": (*EMBEDDED, *IN_DATA_SET, "exclude"),
    "which negatives": (
        "range_mode", "positive_aggregation", "num_negatives", "sampling_strategy", "sampling_temperature", "seed",
        "deduplicate", "near_duplicate_score", "count_skipped",
    ),
}  # fmt: skip
SAMPLED_QUERIES, SAMPLED_ROWS, SAMPLED_TEXTS = 256, 1 << 14, 64  # used by a dry run to measure the speed
OTHER_FORMS = (".gz", ".zst", ".json", ".csv", ".tsv", ".txt")  # file formats that cannot be written
USAGE = """\
negmine mine --beir FOLDER --model MODEL --output FILE [options]
       negmine mine --collection FILE --queries FILE --qrels FILE --model MODEL --output FILE [options]
       negmine mine --data JSONL --model MODEL --output FILE [options]
       negmine mine --query-embeddings FILE --corpus-embeddings FILE --positives FILE --output FILE [options]
"""
EXAMPLES = """
examples, one for each format:
  make training data for sentence-transformers from a BEIR folder and a model
    negmine mine --beir scifact --model all-MiniLM-L6-v2 --output train.jsonl --form sentence-transformers
  the same from embeddings, in the order of the lines of the folder's files
    negmine mine --beir scifact --query-embeddings q.npy --corpus-embeddings c.npy \\
      --relative-margin 0.05 --num-negatives 5 --output train.jsonl --form sentence-transformers
  MS MARCO
    negmine mine --collection collection.tsv --queries queries.train.tsv --qrels qrels.train.tsv \\
      --query-embeddings q.npy --corpus-embeddings c.safetensors --output train.jsonl --form tevatron
  new negatives for training data of FlagEmbedding, Tevatron or ms-swift; one embedding per line, and per distinct passage
    negmine mine --data old.jsonl --query-embeddings q.npy --corpus-embeddings c.npy --output new.jsonl
  from arrays; several files are shards
    negmine mine --query-embeddings q.npy --corpus-embeddings c0.npy c1.npy --positives p.npy --output mined.npz
  mine part 2 of 8, on any machine; merge all parts
    negmine mine ... --part 2/8 --output parts/2
    negmine merge parts/* --output mined.npz
  show what a command would read, and how much memory and time it would take; nothing is written
    negmine mine ... --dry-run
  with the options of FlagEmbedding's hn_mine.py
    negmine mine --compat flagembedding --help
"""


def add_data_sets(data: Any) -> None:
    """Add the options that name a data set with texts."""
    data.add_argument(
        "--beir",
        metavar="FOLDER",
        help="corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, plain, .gz or .zst; may be a URL",
    )
    data.add_argument(
        "--split", metavar="SPLIT", help="the split of --beir; default: train, test or dev, the first that exists"
    )
    data.add_argument(
        "--collection", metavar="FILE", help="MS MARCO's passages: id and text; needs --queries and --qrels"
    )
    data.add_argument("--queries", metavar="FILE", help="MS MARCO's queries: id and text")
    data.add_argument("--qrels", metavar="FILE", help="judgements: query id, iteration, document id, score")
    data.add_argument(
        "--data", metavar="JSONL", help="lines of FlagEmbedding, Tevatron or ms-swift, each with a positive"
    )


def add_outputs(out: Any) -> None:
    """Add the options that name output files."""
    out.add_argument(
        "--output",
        metavar="FILE",
        help="training data if the name ends in .jsonl or .parquet, else the MiningResult, as .npz",
    )
    out.add_argument("--jsonl", metavar="FILE", help="training data, if --output is for the MiningResult")
    out.add_argument(
        "--form", default="flagembedding", help=f"format of training data: {', '.join(FORMS)} (default: flagembedding)"
    )


def _index(words: list[str]) -> str | NegativeIndex:
    """The index in one or more files, or the word for a kind of index."""
    return words[0] if len(words) == 1 and not Path(words[0]).is_file() else NegativeIndex.load(words)


def _part(word: str) -> tuple[int, int]:
    """Parse I/N: the number of a share, and how many shares there are."""
    share, slash, count = word.partition("/")
    if share.isdecimal() and int(share) == 0:
        wanted = "parts are counted from 1, so an array of jobs begins at 1 (Slurm: --array=1-N)"
        raise argparse.ArgumentTypeError(f"{word!r} must be I/N with I from 1 to N: {wanted}")
    if not (slash and share.isdecimal() and count.isdecimal() and 1 <= int(share) <= int(count)):
        raise argparse.ArgumentTypeError(f"{word!r} must be I/N, such as 1/3, with I from 1 to N")
    return int(share), int(count)


def add(commands: Any, words: Sequence[str] = ()) -> None:
    """Add the subcommand. words: the command line; with a data set, the arguments that it contains are optional."""
    parser = commands.add_parser(
        "mine",
        help="find the hardest negatives of each query of a dataset",
        description="Run mine_hard_negatives on files and write files. The options are its arguments and the fields of Select.",
        usage=USAGE,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_sets(parser.add_argument_group("inputs as data sets"))
    embedding = parser.add_argument_group("embeddings of texts by a model")
    embedding.add_argument(
        "--model",
        metavar="FOLDER|MODULE:NAME",
        help="a model of sentence-transformers or model2vec, or a callable to import",
    )
    made = add_options(embedding, from_texts, only=EMBEDDING)
    names: list[str] = []
    grouped = {name for group in GROUPS.values() for name in group}
    for title, members in GROUPS.items():
        group = parser.add_argument_group(title)
        names += add_options(group, mine_hard_negatives, READERS, only=members)
        if title == "which negatives":
            fields = add_options(group, Select, skip=NO_FIELD)
    group = parser.add_argument_group("search")
    names += add_options(group, mine_hard_negatives, READERS, skip=(*NO_OPTION, *grouped))

    out = parser.add_argument_group("output")
    add_outputs(out)
    out.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="mine only part I of N equal parts of the corpus, and read little else; --output is an input of negmine merge",
    )
    add_overwrite(out)
    out.add_argument(
        "--dry-run", action="store_true", help="show what would be read and how long it would take; write nothing"
    )
    parser.add_argument(
        "--compat",
        choices=["flagembedding"],
        help="use the options and the output format of another miner; see --compat flagembedding --help",
    )
    options = {word.partition("=")[0] for word in words}
    has_data_set = bool(options & {f"--{name}" for name in DATA_SET})
    others = [] if has_data_set else ["--beir, --collection or --data gives the positives"]
    others += [] if "--model" in options else ["--model gives the embeddings"]
    parser.instead = f"; {', and '.join(others)}"
    unneeded = (*(IN_DATA_SET if has_data_set else ()), *(EMBEDDED if "--model" in options else ()))
    for action in parser._actions:
        action.required = action.required and action.dest not in unneeded
    parser.set_defaults(run=lambda args: run(parser, args, names, fields, made))


def is_training_data(name: str | None) -> bool:
    """Whether a file name is one for training data."""
    return name is not None and Path(name).suffix.lower() in (".jsonl", ".parquet")


def check_files(command: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """Check the options that name data sets and outputs, for mine and merge. Returns the option for training data, if any."""
    if not (args.output or args.jsonl or getattr(args, "dry_run", False)):
        parser.error("give --output or --jsonl, a file for the result")
    if args.output and Path(args.output).suffix.lower() in OTHER_FORMS:
        forms = ".jsonl or .parquet, for training data, or in .npz, for the MiningResult"
        parser.error(f"--output must end in {forms}, got {args.output!r}")
    sets = [f"--{name}" for name in DATA_SET if getattr(args, name)]
    if len(sets) > 1:
        parser.error(f"give one data set, not {' and '.join(sets)}")
    for name in IN_DATA_SET if sets else ():
        if getattr(args, name, None) is not None:
            parser.error(f"{sets[0]} contains --{name.replace('_', '-')}: leave it out")
    if any((args.collection, args.queries, args.qrels)) and not all((args.collection, args.queries, args.qrels)):
        parser.error("give --collection, --queries and --qrels together")
    if args.split and not args.beir:
        parser.error("--split needs --beir")
    require_choice(command, "form", args.form, FORMS)
    wanted = "--jsonl" if args.jsonl else "--output" if is_training_data(args.output) else None
    has_texts = sets or all(getattr(args, name, None) is not None for name in ("query_texts", "corpus_texts"))
    if wanted and not has_texts and args.form != "pylate":
        parser.error(f"{wanted} needs --query-texts and --corpus-texts, or a data set")
    inputs: Iterable[Any] = beir_files(args.beir, args.split) if args.beir else ()
    outputs = {"--output": args.output, "--jsonl": args.jsonl}
    check_outputs(command, args, outputs, overwrite=args.overwrite, inputs=inputs)
    return wanted


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check all options that can be checked before a data set is read."""
    for name in EMBEDDED if args.model else EMBEDDING:
        if hasattr(args, name):
            when = "cannot be used with" if args.model else "needs"
            parser.error(f"--{name.replace('_', '-')} {when} --model")
    has_set = any(getattr(args, name) for name in DATA_SET)
    if args.model and not has_set and not (hasattr(args, "query_texts") and hasattr(args, "corpus_texts")):
        parser.error("--model needs --query-texts and --corpus-texts, or a data set")
    wanted = check_files(OP, parser, args)
    if args.part:
        for name in ("model", "jsonl", "dry_run", "rescore"):
            if getattr(args, name, None):
                parser.error(f"--part cannot be used with --{name.replace('_', '-')}")
        if wanted or not args.output:
            parser.error("--part needs --output, a file for the part, whose name does not end in .jsonl or .parquet")


def read_data_set(args: argparse.Namespace) -> TextSet | None:
    """Read the data set that the options name; None if there is none."""
    if args.beir:
        return read_beir(args.beir, args.split)
    if args.collection:
        return read_msmarco(args.collection, args.queries, args.qrels)
    return read_training_lines(args.data) if args.data else None


def _arguments(args: argparse.Namespace, names: list[str], texts: TextSet | None) -> dict[str, Any]:
    """The arguments of mine_hard_negatives."""
    arguments = {"show_progress_bar": sys.stderr.isatty(), **given(args, names, READERS)}
    if texts is None:
        return arguments
    arguments |= {"query_ids": texts.query_ids, "corpus_ids": texts.corpus_ids, "positives": texts.positives}
    arguments |= {"query_texts": texts.query_texts, "corpus_texts": texts.corpus_texts}
    if args.model:
        return arguments
    rows = Rows.open(OP, "--query-embeddings", arguments["query_embeddings"])
    if texts.query_rows is not None and len(rows) == texts.queries_in_file:
        kept = np.array(texts.query_rows, np.int64)
        arguments["query_embeddings"] = rows.gather(kept, torch.device("cpu"))
    elif len(rows) != len(texts.query_ids):
        some = f", or {len(texts.query_ids)} for those with a positive" if texts.query_rows is not None else ""
        wanted = f"of {texts.queries_in_file} rows, one for each query of the data set{some}"
        raise refuse(OP, "--query-embeddings", wanted, Phrase(f"{len(rows)} rows"))
    corpus = Rows.open(OP, "--corpus-embeddings", arguments["corpus_embeddings"])
    if len(corpus) != len(texts.corpus_ids):
        wanted = f"of {len(texts.corpus_ids)} rows, one for each document of the data set"
        raise refuse(OP, "--corpus-embeddings", wanted, Phrase(f"{len(corpus)} rows"))
    return arguments


def run(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str], fields: list[str], made: list[str]
) -> int:
    """Run the command. names, fields and made: the options of mine_hard_negatives, Select and from_texts."""
    _check(parser, args)
    select = Select(**given(args, fields))
    with named("model"):
        model = files.model(args.model) if args.model else None
    texts = read_data_set(args)
    arguments = _arguments(args, names, texts)
    if args.dry_run:
        print(_plan(args, arguments, select, texts, model, given(args, made)))
        return 0
    if args.part:
        number, count = args.part
        part = mine_share(number, count, arguments | {"select": select})
        part.save(args.output)
        of_rows = part.phase == "candidates"
        begin, end = part.tiles[0, 2:] if of_rows else part.tiles[0, :2]
        print(f"part {number}/{count}, {end - begin:,} {'rows' if of_rows else 'queries'}, in {args.output}")
        return 0
    if model is None:
        result = mine_hard_negatives(**arguments, select=select)
    else:
        sides = {side: arguments.pop(f"{name}_texts") for side, name in (("queries", "query"), ("corpus", "corpus"))}
        result = from_texts(model, **sides, **arguments, **given(args, made), select=select)
    write(result, args, texts)
    return 0


def write(result: MiningResult, args: argparse.Namespace, texts: TextSet | None) -> None:
    """Write what --output and --jsonl name, and print the summary: on stderr if an output is a stream, such as /dev/stdout."""
    outputs = [name for name in (args.output, args.jsonl) if name]
    file = sys.stderr if any(is_stream(Path(name)) for name in outputs) else sys.stdout
    for name in outputs:
        if name == args.jsonl or is_training_data(name):
            _write(result, name, args.form, texts, file)
        else:
            result.save(name)
    print(result.summary(), file=file)


def _write(result: MiningResult, name: str, form: str, texts: TextSet | None, file: IO[str]) -> None:
    """Write training data, and print to `file` how many lines were written and how many queries were left out."""
    columns = {} if texts is None else {"corpus_texts": texts.corpus_bodies, "corpus_titles": texts.corpus_titles}
    write = result.to_parquet if Path(name).suffix.lower() == ".parquet" else result.to_jsonl
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        lines = write(name, form=form, **columns)
    print(f"{lines:,} lines in {name}", file=file)
    for warning in caught:
        print(f"negmine: {warning.message}", file=sys.stderr)


def _plan(
    args: argparse.Namespace,
    arguments: dict[str, Any],
    select: Select,
    texts: TextSet | None,
    model: Any,
    embedding: dict[str, Any],
) -> str:
    """What a run would read and write, and how much memory and time it would take, estimated by a small run."""
    said = []
    for path in [] if texts is None else texts.files:
        said.append(f"reads {path}" + ("" if is_url(path) else f", {os.path.getsize(path):,} bytes"))
    if texts is not None and texts.query_rows is not None:
        said.append(
            f"{len(texts.query_ids):,} of {texts.queries_in_file:,} queries have a positive; the others are left out"
        )
    if model is None:
        queries, corpus = (Rows.open(OP, name, arguments[name]) for name in EMBEDDED)
        sizes = (len(queries), len(corpus))
        most = zip((queries, corpus), (SAMPLED_QUERIES, SAMPLED_ROWS), strict=True)
        sample = [rows.block(0, min(len(rows), count), torch.device("cpu")) for rows, count in most]
    else:
        columns = {"queries": arguments["query_texts"], "corpus": arguments["corpus_texts"]}
        sizes = (len(columns["queries"]), len(columns["corpus"]))
        begin = time.monotonic()
        sample = [_embedded(model, side, texts[:SAMPLED_TEXTS], embedding) for side, texts in columns.items()]
        seconds = (time.monotonic() - begin) * sum(sizes) / sum(map(len, sample))
        rate = f"measured on {sum(map(len, sample)):,} texts"
        said.append(f"embedding {sum(sizes):,} texts: about {clock(seconds)}, {rate}")
        shapes = zip(EMBEDDED, sizes, sample, strict=True)  # rows without memory instead of those of the model
        arguments |= {name: np.broadcast_to(rows[:1].numpy(), (count, rows.shape[1])) for name, count, rows in shapes}
    check_arguments(arguments | {"select": select})
    for name, count, rows in zip(EMBEDDED, sizes, sample, strict=True):
        said.append(f"{name}: {count:,} rows of D = {rows.shape[1]}, {str(rows.dtype).removeprefix('torch.')}")
    memory = (arguments.get("max_memory_bytes") or DEFAULT_MEMORY) + 12 * sizes[0] * arguments.get("num_negatives", 3)
    memory += 0 if model is None else 4 * sum(sizes) * sample[0].shape[1]
    said.append(f"memory: at most {memory / 2**20:,.0f} MiB in addition to the {'texts' if model else 'inputs'}")

    left_out = ("exclude", "resume_dir", "show_progress_bar", "index", "promote", *IN_DATA_SET, *EMBEDDED)
    options = {
        name: value for name, value in arguments.items() if name not in left_out and not name.startswith("rescore")
    }
    if all(map(len, sample)):
        begin = time.monotonic()
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the sample only
            mine_hard_negatives(sample[0], sample[1], [0] * len(sample[0]), **options, select=select)
        seconds = (time.monotonic() - begin) * sizes[0] * sizes[1] / (len(sample[0]) * len(sample[1]))
        rate = f"measured on {len(sample[0]):,} queries and {len(sample[1]):,} rows"
        said.append(f"time: about {clock(seconds)} for an exact search, {rate}")
    said += [f"would write {name}" for name in (args.output, args.jsonl) if name]
    return "\n".join([*said, "nothing was written"])


def _embedded(model: Any, side: str, texts: list[str], options: dict[str, Any]) -> torch.Tensor:
    """The rows of some texts. options: the arguments of from_texts about embedding."""
    prompt = options.get("query_prompt" if side == "queries" else "corpus_prompt", "")
    size, normalize = options.get("encode_batch_size", SAMPLED_TEXTS), options.get("normalize", True)
    embedder = Embedder(side, encoder(model, side, prompt), prompt, size, normalize, None)
    return torch.from_numpy(embedder.rows(Column(OP, side, texts), False))


def compat_asked(words: list[str]) -> bool:
    """Whether the words are `mine --compat flagembedding`, which has its own parser."""
    found, _ = _COMPAT.parse_known_args(words[1:])
    return words[:1] == ["mine"] and found.compat == flagembedding.NAME


_COMPAT = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_COMPAT.add_argument("--compat", nargs="?")
