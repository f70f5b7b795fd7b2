"""negmine analyze: run hardness_report on files and write a page."""

import argparse
import sys
from typing import Any

from negmine.cli import files
from negmine.cli.options import add_options, given
from negmine.cli.outputs import add_overwrite, check_outputs
from negmine.report import hardness_report
from negmine.report.result import require_kind

READERS = {
    "query_embeddings": files.EMBEDDINGS,
    "corpus_embeddings": files.EMBEDDINGS,
    "positives": files.LISTS,
    "exclude": files.LISTS,
    "query_labels": files.LABELS,
    "corpus_labels": files.LABELS,
    "class_similarity": files.SIMILARITIES,
    "query_ids": files.LABELS,
    "corpus_ids": files.LABELS,
    "query_texts": files.TEXTS,
    "corpus_texts": files.TEXTS,
    "previous": files.PAIR,
    "edges": files.NUMBERS,
}


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "analyze",
        help="show how hard the negatives of a dataset are, and which are probably false negatives",
        description="Run hardness_report on files and write a page. The options are the arguments of hardness_report.",
    )
    names = add_options(parser, hardness_report, READERS)
    parser.add_argument("--output", metavar="FILE", help="also write the figures, as .json or .npz")
    add_overwrite(parser)
    parser.set_defaults(run=lambda args: run(args, names))


def run(args: argparse.Namespace, names: list[str]) -> int:
    command = "negmine analyze"
    if args.output:
        require_kind(command, args.output, "--output")
    outputs = {"--output": args.output, "--page": getattr(args, "page", None)}
    check_outputs(command, args, outputs, overwrite=args.overwrite)
    report = hardness_report(**{"show_progress_bar": sys.stderr.isatty(), **given(args, names, READERS)})
    if args.output:
        report.save(args.output)
    print(report.summary())
    return 0
