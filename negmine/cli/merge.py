"""negmine merge: merge the parts that `negmine mine --part` wrote into one MiningResult."""

import argparse
from dataclasses import replace
from typing import Any

from negmine.cli import files, mine
from negmine.cli.outputs import add_overwrite
from negmine.mining import Part, merge_parts
from negmine.mining.merging import SHARES, join_parts, share_names

OP = "negmine merge"
TEXTS = ("query_texts", "corpus_texts")


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "merge",
        help="merge the parts of one mining job",
        description="Write the same file, byte for byte, that `negmine mine` without --part would write. If a part is missing, "
        "is given twice, or was made with other inputs or arguments, an error names it, and nothing is written.",
    )
    parser.add_argument("parts", nargs="+", metavar="PART", help="what `negmine mine --part i/n --output PART` wrote")
    mine.add_data_sets(parser.add_argument_group("texts for training data, from a data set"))
    texts = parser.add_argument_group("texts for training data, from files")
    for name in TEXTS:
        texts.add_argument(
            f"--{name.replace('_', '-')}", metavar="FILE", help=f"{name.partition('_')[0]} texts, one per row"
        )
    mine.add_outputs(parser.add_argument_group("output"))
    add_overwrite(parser)
    parser.set_defaults(run=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    mine.check_files(OP, parser, args)
    joined: list[Part] = []
    for name in args.parts:  # one at a time in memory
        part = Part.load(name)
        if part.phase not in SHARES:
            raise ValueError(
                f"{OP}: {name!r} has phase {part.phase}, but must be a part that `negmine mine --part` wrote"
            )
        joined = [join_parts([*joined, part])]
    merged = merge_parts(joined)
    if isinstance(merged, Part):
        count, held = merged.facts["num_shares"], merged.facts["shares"]
        missing = sorted(set(range(1, count + 1)) - set(held))
        raise ValueError(f"{OP}: parts {share_names(missing, merged.facts)} are missing")
    texts = mine.read_data_set(args)
    given: dict[str, Any] = {name: files.TEXTS.read(getattr(args, name)) for name in TEXTS if getattr(args, name)}
    if texts is not None:
        given = {"query_texts": texts.query_texts, "corpus_texts": texts.corpus_texts}
    mine.write(replace(merged, **given), args, texts)
    return 0
