"""The AMX kernels with emulated tiles, on every processor with AVX512-BF16."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from negmine.ops import backends

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A copy of the package whose CPU kernels were built with NEGMINE_EMULATED_TILES (kernels/cpu/simd/tiles.h)."""
    if not (ROOT / "setup.py").exists() or shutil.which("g++") is None:
        pytest.skip("needs the sources and g++")
    if next(row for row in backends.BACKENDS if row.name == "cpu").refusal:
        pytest.skip("this build has no CPU ops")
    from negmine import _ops_cpu

    before = _ops_cpu.isa()
    if not _ops_cpu.set_isa("avx512bf16"):
        pytest.skip("this processor has no AVX512-BF16")
    _ops_cpu.set_isa(before)
    folder = tmp_path_factory.mktemp("tiles")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", folder, "build_ext", "--build-lib", folder]
    env = {**os.environ, "NEGMINE_EMULATED_TILES": "1", "NEGMINE_CUDA": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    for package in ("tests", "build_tools"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *command: str) -> str:
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tiles_are_the_best_instruction_set(emulated):
    assert (
        run(
            emulated, "-c", "import negmine, negmine._ops_cpu as ops; print(ops.isa_for('bfloat16', 'bfloat16'))"
        ).strip()
        == "amxbf16"
    )


@pytest.mark.parametrize(
    "tests",
    [
        ["tests/test_isa.py", "tests/test_isa_shapes.py", "tests/test_guide.py", "-k", "amxbf16"],
        ["tests/test_parts.py"],
    ],
    ids=" ".join,
)
def test_every_promise_to_an_instruction_set_holds_in_tiles(emulated, tests):
    out = run(emulated, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-r", "s", *tests)
    passed = re.search(r"(\d+) passed", out) or re.search(r"^(\.+)", out, re.M)
    assert passed, out
    assert "skipped" not in out.lower(), out


def test_random_calls_agree_in_tiles(emulated):
    assert run(emulated, "-m", "tests.fuzz", "--seconds", "5", "--seed", "1").startswith("0 faults")
