"""The list of ops in kernels/README.md, which is generated from the declarations in negmine/ops.

    python -m build_tools.op_table          write the list
    python -m build_tools.op_table --check  exit with 1 if the file has a different list

The names, arguments, results and meanings of ops come only from the declarations.
"""

import importlib
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

README = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN = "<!-- ops: written by python -m build_tools.op_table from negmine/ops -->"
END = "<!-- end of ops -->"
WIDTH = 126
GLUE = "\x00"  # a space at which no line is broken


def op_table() -> str:
    """The text between the two markers: the ops sorted by name."""
    import negmine.ops
    from negmine.ops.registry import OPS

    for module in pkgutil.iter_modules(negmine.ops.__path__):  # an op is declared in the module of the same name
        if (Path(negmine.ops.__path__[0]) / f"{module.name}.py").read_text().find("= declare(") >= 0:
            importlib.import_module(f"negmine.ops.{module.name}")
    return "\n\n".join(_entry(OPS[name]) for name in sorted(OPS))


def _entry(op) -> str:
    from negmine.ops.registry import DRAWS, POOL

    arguments = ", ".join(str(value) for value in op.arguments)
    arguments = arguments.replace(POOL, "*pool").replace(DRAWS, "*draws")
    results = ", ".join(str(value) for value in op.results)
    meaning = "\n".join(line.strip() for line in op.meaning.strip().splitlines())
    return "\n".join(
        (_wrapped(f"{op.name}({arguments})", 4), _wrapped(f"-> {results}", 8), textwrap.indent(meaning, " " * 12))
    )


def _wrapped(values: str, indent: int) -> str:
    """Break text into lines, only after commas between values."""
    glued = re.sub(r"(?<!,) |,(?= [^\[\]]*\])[ ]", lambda found: found[0].replace(" ", GLUE), values)
    lines = textwrap.wrap(
        glued, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines).replace(GLUE, " ")


def with_table(readme: str, table: str) -> str:
    """The text of kernels/README.md with `table` between the markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> int:
    found = README.read_text()
    wanted = with_table(found, op_table())
    if "--check" in arguments:
        return int(found != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
