"""negmine bench and negmine demo: run programs of the repository, which are not part of a wheel."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"bench": "benchmarks.run", "demo": "benchmarks.demo"}


def add(commands: Any) -> None:
    """Add both subcommands. All further options are passed to the program."""
    for name, description in (
        ("bench", "time negmine against plain PyTorch"),
        ("demo", "train on WordNet and write pages to out/"),
    ):
        parser = commands.add_parser(
            name, help=f"{description} (needs a clone of the repository)", add_help=False, prefix_chars="\0"
        )
        parser.add_argument("rest", nargs="*")
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    module = PROGRAMS[args.command]
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        print(
            f"negmine {args.command}: the benchmarks and their data are not part of an installed wheel. Clone the repository and "
            f"run `make {args.command}`, or `pip install .` and `python -m {module}`.",
            file=sys.stderr,
        )
        return 1
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-m", module, *args.rest], env={**os.environ, "PYTHONPATH": path}).returncode
