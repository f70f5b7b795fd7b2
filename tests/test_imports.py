"""Parts of negmine import only lower parts, and no modules import each other in a circle.

Imports are read from the source of every module, including those inside functions and under TYPE_CHECKING. The import of the
parent packages of a module, which Python does automatically, does not count.
"""

import ast
import os
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "negmine"
# The parts, lowest first. Each imports only itself and parts of lines before it. Parts in one line are at the same level, and may
# import each other as long as there is no circle. "negmine" is __init__.py.
ORDER = [
    {"version"},
    {"options"},
    {"ops", "kernels"},
    {"collectives"},
    {"reference"},
    {"selection"},
    {"losses"},
    {"queues"},
    {"recipes"},
    {"pages"},
    {"mining"},
    {"report"},
    {"adapters"},
    {"doctor"},
    {"cli"},
    {"negmine", "__main__"},
]
COMPILED = {"_C", "_build_info", "_ops_cpu", "_ops_cuda"}  # compiled modules, which import no Python module of negmine


def modules_of(package: Path) -> dict[str, Path]:
    """Return {name: file} of all modules of a package; a package itself is its __init__.py."""
    found = {}
    for folder, _, files in os.walk(package, followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and path.stem not in COMPILED:
                parts = path.relative_to(package.parent).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, source: str, modules: dict[str, Path], is_package: bool = False) -> set[str]:
    """Return those of `modules` that the source of module `name` imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".") + [""] * is_package
                base = ".".join([*parents[: -node.level], *filter(None, [base])])
            for alias in node.names:  # a module of a package, or a name in a module
                full = f"{base}.{alias.name}"
                names.add(full if full in modules or alias.name in COMPILED else base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                names.add(node.args[0].value)
    return names & modules.keys() - {name}


def graph_of(package: Path) -> dict[str, set[str]]:
    modules = modules_of(package)
    return {
        name: imports_of(name, path.read_text(), modules, path.name == "__init__.py") for name, path in modules.items()
    }


def part_of(name: str) -> str:
    """Return the part that a module belongs to: the first name below the package, or the package itself."""
    return name.split(".")[min(1, name.count("."))]


def against_order(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports of a higher part by a lower one."""
    rank = {part: i for i, level in enumerate(ORDER) for part in level}
    return [
        f"{name} imports {other}"
        for name, others in sorted(graph.items())
        for other in sorted(others)
        if rank[part_of(name)] < rank[part_of(other)]
    ]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle in order, or an empty list."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in finished:
            for other in sorted(graph[name]):
                if circle := visit(other, [*path, name]):
                    return circle
            finished.add(name)
        return []

    for name in sorted(graph):
        if circle := visit(name, []):
            return circle
    return []


def test_every_module_has_a_part():
    assert {part_of(name) for name in modules_of(PACKAGE)} <= set.union(*ORDER)


def test_imports_run_one_way():
    assert against_order(graph_of(PACKAGE)) == []


def test_no_modules_import_each_other_in_a_circle():
    assert " -> ".join(circle_in(graph_of(PACKAGE))) == ""


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("import negmine.mining.index as x", {"negmine.mining.index"}),
        ("from negmine import mining, Select", {"negmine.mining", "negmine"}),
        ("from negmine.mining import index", {"negmine.mining.index"}),
        ("from negmine.mining import NegativeIndex", {"negmine.mining"}),
        ("def late():\n    from .index import NegativeIndex", {"negmine.mining.index"}),
        ("from .. import report", {"negmine.report"}),
        ("from . import index, Round", {"negmine.mining.index", "negmine.mining"}),
        ("import importlib\nimportlib.import_module('negmine.report')", {"negmine.report"}),
        ("import numpy, negmine.mining.rounds", set()),
        ("from negmine import _C", set()),
    ],
)
def test_imports_of_every_form_are_found(source, wanted):
    names = ("negmine", "negmine.mining", "negmine.mining.index", "negmine.mining.rounds", "negmine.report")
    assert imports_of("negmine.mining.rounds", source, dict.fromkeys(names, Path())) == wanted


def test_wrong_imports_are_found():
    graph = {"negmine.mining.result": {"negmine.report.page"}, "negmine.report.page": {"negmine.report.charts"}}
    graph["negmine.report.charts"] = {"negmine.mining.result"}
    assert against_order(graph) == ["negmine.mining.result imports negmine.report.page"]
    assert circle_in(graph)[0] == circle_in(graph)[-1] and len(circle_in(graph)) == 4
