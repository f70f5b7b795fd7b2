"""negmine index build, search, recall: make and use a NegativeIndex in a file."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from negmine.cli import files
from negmine.cli.options import add_options, given
from negmine.cli.outputs import add_overwrite, check_outputs
from negmine.mining import NegativeIndex
from negmine.mining.atomic_file import atomic_write

READERS = {
    "embeddings": files.EMBEDDINGS,
    "query_embeddings": files.EMBEDDINGS,
    "corpus_embeddings": files.EMBEDDINGS,
    "search_options": files.OPTIONS,
}


def add(commands: Any) -> None:
    """Add the subcommand with its three steps."""
    parser = commands.add_parser("index", help="build, search and evaluate an index of a corpus")
    steps = parser.add_subparsers(dest="step", required=True, metavar="build|search|recall")

    built = steps.add_parser(
        "build", help="index the rows of a corpus", description="Run NegativeIndex.build and write the index to a file."
    )
    names = add_options(built, NegativeIndex.build, READERS)
    built.add_argument("--output", metavar="FILE", required=True, help="the index")
    add_overwrite(built)
    built.set_defaults(run=lambda args: _build(args, names))

    for name, function, end, description in (
        ("search", NegativeIndex.search, _search, "find the k rows with the largest inner product for each query"),
        ("recall", NegativeIndex.recall, _recall, "measure the fraction of the exact result that the index finds"),
    ):
        step = steps.add_parser(name, help=description, description=f"Run NegativeIndex.{name} on an index in a file.")
        files_help = "what `negmine index build` wrote; several files are the shards of one index, in row order"
        step.add_argument("--index", metavar="FILE", nargs="+", required=True, help=files_help)
        loaded = add_options(step.add_argument_group("loading"), NegativeIndex.load, READERS, ("path",))
        asked = add_options(step, function, READERS)
        if name == "search":
            step.add_argument(
                "--output", metavar="FILE", required=True, help=".npz with scores and indices, (Q, k) each"
            )
            add_overwrite(step)
        step.set_defaults(run=_with_index(end, loaded, asked))


def _with_index(end: Callable, loaded: list[str], asked: list[str]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        if hasattr(args, "output"):
            check_outputs("negmine index search", args, {"--output": args.output}, overwrite=args.overwrite)
        return end(args, NegativeIndex.load(args.index, **given(args, loaded, READERS)), given(args, asked, READERS))

    return run


def _build(args: argparse.Namespace, names: list[str]) -> int:
    check_outputs("negmine index build", args, {"--output": args.output}, overwrite=args.overwrite)
    made = NegativeIndex.build(**given(args, names, READERS))
    made.save(args.output)
    print(f"{made} in {args.output}, {Path(args.output).stat().st_size:,} bytes")
    return 0


def _search(args: argparse.Namespace, index: NegativeIndex, arguments: dict[str, Any]) -> int:
    found = index.search(**arguments)
    with atomic_write("negmine index search", args.output) as file:
        np.savez(file, scores=found.scores, indices=found.indices)
    print(f"{found.indices.shape[1]} rows for each of {len(found.indices):,} queries in {args.output}")
    return 0


def _recall(args: argparse.Namespace, index: NegativeIndex, arguments: dict[str, Any]) -> int:
    print(f"recall {index.recall(**arguments):.4f}")
    return 0
