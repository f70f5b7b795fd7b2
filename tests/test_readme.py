"""The code in README.md and docs: Python blocks run, the diff of MoCo code fits the API, names and link targets exist.

The blocks of one page run in order in one namespace. The code after a diff must parse, its `negmine.` names must exist, and its
calls must fit the signatures.
"""

import ast
import inspect
import re
from operator import attrgetter
from pathlib import Path

import pytest

import negmine
from negmine import MoCoQueue
from negmine.ops import backends

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def side(diff: str, dropped: str) -> ast.Module:
    """Return the code before a diff (`dropped` is '+') or after it ('-')."""
    return ast.parse("\n".join(line[1:] for line in diff.splitlines() if not line.startswith(dropped)))


def check_names(tree: ast.Module) -> set[str]:
    """Check that negmine.<name> exist, calls fit their signatures, and self.queue.<name> are of MoCoQueue. Return the names."""
    seen = set()
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else node
        if not isinstance(called, ast.Attribute):
            continue
        place = ast.unparse(called)
        if "(" in place:  # an attribute of the result of a call
            continue
        if place.startswith("negmine."):
            found = negmine
            for name in place.split(".")[1:]:
                found = getattr(found, name)
            seen.add(place)
        elif place.startswith("self.queue."):
            found = getattr(MoCoQueue, place.split(".")[2])
            seen.add(place)
        else:
            continue
        if isinstance(node, ast.Call):
            method = [None] * place.startswith("self.queue.")
            keywords = {word.arg: word.value for word in node.keywords if word.arg}
            signature = inspect.signature(found)
            whole = len(keywords) == len(node.keywords)  # no **masks, which may add more
            (signature.bind if whole else signature.bind_partial)(*method, *node.args, **keywords)
    return seen


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(page, "python"):
        check_names(ast.parse(block))
        exec(compile(block, page, "exec"), namespace)
    if page == "README.md":
        assert namespace["query"].grad.isfinite().all()


def test_the_diff_names_what_exists():
    (diff,) = blocks("README.md", "diff")
    assert "negmine" not in ast.unparse(side(diff, "+"))
    assert check_names(side(diff, "-")) >= {"negmine.MoCoQueue", "negmine.info_nce", "self.queue.enqueue"}


def test_tables_name_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(
        r"`((?:\w+\.)*\w+)\(", text.split("| I want to | call or example | page |")[1].split("\n\n")[0]
    ):
        assert callable(attrgetter(name)(negmine)), name
    for page in ("README.md", "docs/methods.md"):
        for example in re.findall(r"`((?:Select|Mix|Weight|FalseNegatives)\([^`]*\))`", (ROOT / page).read_text()):
            eval(example, {**vars(negmine)})
    table = (ROOT / "docs/backends.md").read_text().split("# Backends")[1].split("\n\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == ["cpu", "triton", "cuda", "reference"]
    assert {"cpu", "triton", "cuda", "reference"} == {row.name for row in backends.BACKENDS}


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_files_exist(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    # Make targets are in backticks or at the start of an indented line.
    for target in re.findall(r"(?:`|^ {4})make ([\w-]+)", text, re.M):
        assert target in targets, f"{page}: make {target}"
    for path in re.findall(r"`((?:negmine|kernels|csrc|tests|benchmarks|examples|build_tools|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"
