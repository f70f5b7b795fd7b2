"""The parser of `negmine` and its exit codes.

0    done
1    failed, for example because of a full disk, a missing package or a bug; stderr has the reason
2    invalid option, file or value; stderr has the reason
130  interrupted by the keyboard
141  the reader of the output has closed the pipe
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from negmine import doctor
from negmine.cli import analyze, checkout, flagembedding, index, merge, mine
from negmine.cli.options import Parser, spelled
from negmine.version import __version__

CODES = "0 done, 1 failed, 2 invalid input, 130 interrupted, 141 output pipe closed"
PYTHONS_FORMAT = warnings.formatwarning
DONE, FAILED, USAGE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of negmine and its subcommands. words: the command line, which decides what `mine` requires."""
    made = Parser(prog="negmine", description="Hard negatives for contrastive learning.", epilog="exit codes: " + CODES)
    made.add_argument("--version", action="version", version=f"negmine {__version__}")
    made.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
    mine.add(commands, words)
    merge.add(commands)
    index.add(commands)
    analyze.add(commands)
    doctor_parser = commands.add_parser(
        "doctor", help="show what works on this machine, why the rest does not, and what to install"
    )
    doctor_parser.set_defaults(run=_doctor)
    checkout.add(commands)
    return made


def _doctor(args: argparse.Namespace) -> int:
    print(doctor.report())
    return DONE


def _report_error(error: BaseException, code: int, traceback: bool) -> int:
    if traceback:
        raise error
    # In an OSError of negmine, strerror is the whole message; in others, it is the reason, and filename is the file.
    own = isinstance(error, OSError) and error.filename is None and error.strerror
    message = own or str(error) or type(error).__name__
    print(message if message.startswith("negmine ") else f"negmine: {message}", file=sys.stderr)
    return code


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of negmine as one line, like an error; the warnings of other packages as Python shows them."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"negmine: {message}\n"
    return PYTHONS_FORMAT(message, category, filename, lineno, line)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    warnings.formatwarning = _format_warning
    try:
        return _run(words)
    finally:
        warnings.formatwarning = PYTHONS_FORMAT


def _run(words: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    traceback = given[:1] == ["--traceback"]
    rest = spelled(given[traceback:])
    try:
        if mine.compat_asked(rest):
            code = flagembedding.run(rest[1:])
        else:
            # All words after bench and demo are passed on unchanged.
            args = parser(rest).parse_args(given[traceback:] if rest[:1] in (["bench"], ["demo"]) else rest)
            code = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as asked:  # argparse has printed the reason
        return asked.code if isinstance(asked.code, int) else DONE
    except KeyboardInterrupt:
        print("negmine: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Otherwise Python prints an error again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (ValueError, TypeError) as error:
        return _report_error(error, USAGE, traceback)
    except Exception as error:  # any other exception is reported in one line
        return _report_error(error, FAILED, traceback)
