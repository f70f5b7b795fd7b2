"""negmine bench and negmine demo: programs of the checkout, which a wheel does not carry."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"bench": "benchmarks.run", "demo": "benchmarks.demo"}


def add(commands: Any) -> None:
    """Both subcommands; what follows them is the program's own."""
    for name, description in (
        ("bench", "time negmine against plain PyTorch"),
        ("demo", "train on WordNet, leave pages in out/"),
    ):
        parser = commands.add_parser(name, help=f"{description} (from a checkout)", add_help=False, prefix_chars="\0")
        parser.add_argument("rest", nargs="*")
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    module = PROGRAMS[args.command]
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        print(
            f"negmine {args.command}: the benchmarks and their data are no part of an installed wheel. Clone the repository, and "
            f"there run `make {args.command}`, or `pip install .` and `python -m {module}`.",
            file=sys.stderr,
        )
        return 1
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-m", module, *args.rest], env={**os.environ, "PYTHONPATH": path}).returncode
