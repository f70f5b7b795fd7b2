"""The lists of files in CONTRIBUTING.md: the files exist, and no other file has to be changed."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def listed(kind: str) -> list[str]:
    """Return the paths of one list, with <placeholders>."""
    text = re.search(rf"<!-- files: {kind} -->\n(.*?)<!-- end -->", PAGE, re.S)
    assert text, f"CONTRIBUTING.md has no list of files for: {kind}"
    return re.findall(r"^- `([^`]+)`", text[1], re.M)


def matching(pattern: str) -> list[str]:
    """Return the tracked files that match a path with <placeholders>."""
    glob = re.sub(r"<\w+>", "*", pattern)
    found = subprocess.run(
        ["git", "ls-files", glob], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [path for path in found if path.count("/") == glob.count("/")]


def naming(word: str, *folders: str) -> set[str]:
    """Return the tracked files that contain a word."""
    command = ["git", "grep", "-lw", word, "--", *folders]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(("kind", "most"), [("recipe", 6), ("option", 6), ("op", 12), ("backend", 2)])
def test_every_listed_file_is_there(kind, most):
    assert 0 < len(listed(kind)) <= most
    assert [pattern for pattern in listed(kind) if not matching(pattern)] == []


def test_an_option_that_no_kernel_sees_is_in_the_listed_files():
    named = naming("positive_bias", "negmine", "kernels", "csrc", "tests", "docs") - {"tests/test_contributing.py"}
    assert named == set(listed("option"))


def test_a_recipe_is_in_the_listed_files():
    expected = {pattern.replace("<kind>", "queue") for pattern in listed("recipe")}
    touched = naming("moco_v1", "negmine", "kernels", "csrc", "docs/methods.md", "tests/test_recipes.py")
    assert touched <= expected
    assert "negmine/recipes/queue.py" in touched


@pytest.mark.parametrize("op", ["mine_gathered", "gathered_logsumexp", "count_negatives"])
def test_an_op_is_declared_and_implemented_in_the_listed_files(op):
    """An op is declared and implemented only in these files and the folder of its kernel. Other files may only call it."""
    places = {pattern.replace("<op>", op) for pattern in listed("op") + listed("backend")}
    wiring = naming(
        op, "negmine/ops/backends.py", "negmine/ops/registry.py", "csrc/torch", "kernels/README.md", "setup.py"
    )
    wiring |= naming(op, "build_tools/extensions.py", "build_tools/native.py", "MANIFEST.in")
    assert wiring <= places | {"csrc/torch/ops_cpu_rows.cpp", "csrc/torch/ops_cuda.cpp", "csrc/torch/ops_cuda_rows.cpp"}
