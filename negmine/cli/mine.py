"""negmine mine: mine_hard_negatives from files to files."""

import argparse
import sys
from pathlib import Path
from typing import Any

from negmine.cli import files, flagembedding
from negmine.cli.options import Reader, add_options, given
from negmine.cli.outputs import add_overwrite, check_outputs
from negmine.mining import NegativeIndex, mine_hard_negatives
from negmine.mining.result import FORMS
from negmine.ops.checks import require_choice
from negmine.options import Select

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
    "index": Reader(lambda word: NegativeIndex.load(word) if Path(word).is_file() else word, "KIND|FILE"),
}
NO_OPTION = ("select", "process_group")  # select is given by its own fields; a process group is made by a program
NO_FIELD = ("sample", "replace")  # mine_hard_negatives refuses them: num_negatives and sampling_strategy draw


def add(commands: Any) -> None:
    """The subcommand."""
    parser = commands.add_parser(
        "mine",
        help="the hardest negatives of every query of a dataset",
        description="mine_hard_negatives, from files to files. Options are its arguments; select is spelled by its fields.",
    )
    names = add_options(parser, mine_hard_negatives, READERS, NO_OPTION)
    fields = add_options(parser.add_argument_group("select"), Select, skip=NO_FIELD)
    out = parser.add_argument_group("output")
    out.add_argument("--output", metavar="FILE", help="the MiningResult, as .npz")
    out.add_argument("--jsonl", metavar="FILE", help="training data; needs the texts")
    out.add_argument("--form", default="flagembedding", help="of --jsonl: flagembedding or tevatron")
    add_overwrite(out)
    parser.add_argument(
        "--compat",
        choices=["flagembedding"],
        help="options and output of another miner; see --compat flagembedding --help",
    )
    parser.set_defaults(run=lambda args: run(parser, args, names, fields))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str], fields: list[str]) -> int:
    if not (args.output or args.jsonl):
        parser.error("give --output, --jsonl or both: else nothing would be kept")
    if args.jsonl and not (hasattr(args, "query_texts") and hasattr(args, "corpus_texts")):
        parser.error("--jsonl needs --query-texts and --corpus-texts")
    require_choice("negmine mine", "form", args.form, FORMS)
    outputs = {"--output": args.output, "--jsonl": args.jsonl}
    check_outputs("negmine mine", args, outputs, overwrite=args.overwrite)
    arguments = {"show_progress_bar": sys.stderr.isatty(), **given(args, names, READERS)}
    result = mine_hard_negatives(**arguments, select=Select(**given(args, fields)))
    if args.output:
        result.save(args.output)
    if args.jsonl:
        lines = result.to_jsonl(args.jsonl, form=args.form)
        print(f"{lines:,} lines in {args.jsonl}")
    print(result.summary())
    return 0


def compat_asked(words: list[str]) -> bool:
    """True for `mine --compat flagembedding`, whose options are another program's."""
    found, _ = _COMPAT.parse_known_args(words[1:])
    return words[:1] == ["mine"] and found.compat == flagembedding.NAME


_COMPAT = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_COMPAT.add_argument("--compat", nargs="?")
