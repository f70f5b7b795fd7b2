"""The contents of the packages, and the boundaries between the parts of the repository.

The contents of the wheel and of the sdist, the link negmine/kernels, what each folder may include, what a
build refuses, and negmine._C.
"""

import os
import re
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from build_tools.check_wheel import faults
from build_tools.cuda_toolkit import chosen_toolkit, inspect
from build_tools.extensions import X86_FLAGS
from build_tools.native import BuildError, Unit, compile_all

ROOT = Path(__file__).parents[1]
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "*.md", "Makefile")


def own_files(*rooms: str, patterns: tuple[str, ...] = SOURCES) -> list[Path]:
    files = [path for room in rooms for pattern in patterns for path in (ROOT / room).rglob(pattern)]
    return [path for path in files if path.name != "_build_info.py" and "kernels/kernels" not in str(path)]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    flags = ["--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    environment = {**os.environ, "NEGMINE_CUDA": "cpu"}
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, "."], cwd=ROOT, env=environment, check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_negmine_and_nothing_else(wheel):
    """As built from a checkout. tests/test_install.py installs and runs one that is built from an sdist."""
    assert re.fullmatch(r"negmine-[\d.]+\+cpu-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name)
    assert faults(wheel) == []


def test_sdist_holds_what_a_build_reads(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([*command, "sdist", "--dist-dir", str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    wanted = {str(path.relative_to(ROOT)) for path in own_files("kernels", "csrc", "build_tools", "tests")}
    assert wanted <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.py"))]
    assert not [name for name in names if name.startswith("negmine/kernels")], "kernels/ is in the sdist twice"


def test_negmine_kernels_is_a_link_and_kernels_is_not_a_package():
    assert os.readlink(ROOT / "negmine" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels is the name of another package"


def test_kernels_do_not_include_torch_or_python():
    torch_or_python = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
    for path in own_files("kernels/cuda", "kernels/cpu"):
        assert not torch_or_python.search(path.read_text()), f"{path} must know neither torch nor Python"
    for path in own_files("csrc/python"):
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)', path.read_text()), f"{path} must not know torch"
    for path in own_files("csrc"):
        assert "__global__" not in path.read_text(), f"{path} must launch nothing"


def test_a_missing_cuda_version_raises_an_error(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NEGMINE_NVCC", str(nvcc))
    monkeypatch.setenv("NEGMINE_CUDA", "latest")
    with pytest.raises(BuildError, match="NEGMINE_CUDA must be auto, cpu or a version such as cu130, but is 'latest'"):
        chosen_toolkit()
    monkeypatch.setenv("NEGMINE_ARCHES", "90a;hopper")
    with pytest.raises(BuildError, match=r"NEGMINE_ARCHES must be .* but contains 'hopper'"):
        inspect(str(nvcc))
    monkeypatch.setenv("NEGMINE_CUDA", "cpu")
    assert chosen_toolkit() is None
    monkeypatch.setenv("NEGMINE_NVCC", str(tmp_path / "none"))
    monkeypatch.setenv("NEGMINE_CUDA", "cu130")
    with pytest.raises(BuildError, match="NEGMINE_NVCC must name the CUDA compiler"):
        chosen_toolkit()


def test_an_object_is_rebuilt_when_a_header_changes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("answer.h").write_text("#define ANSWER 1\n")
    Path("answer.cpp").write_text('#include "answer.h"\nint answer() { return ANSWER; }\n')
    unit = Unit("answer.cpp", ("g++", "-I."))
    compile_all([unit, unit])
    assert unit.is_current()
    assert not Unit("answer.cpp", ("g++", "-I.", "-O1")).is_current()
    later = unit.object.stat().st_mtime + 1
    os.utime("answer.h", (later, later))
    assert not unit.is_current()


class TestModuleC:
    """negmine._C: kernels on NumPy arrays."""

    def test_mine_hardest(self):
        from negmine import _C

        generator = np.random.default_rng(0)
        query = generator.integers(-3, 4, (65, 7)).astype(np.float32)  # exact, with many ties
        keys = generator.integers(-3, 4, (300, 7)).astype(np.float16)
        scores = query @ keys.T.astype(np.float32)  # (B, K)
        want = np.argsort(-scores, axis=1, kind="stable")[:, :20]  # (B, N)
        for given in (keys, np.repeat(keys, 2, axis=0)[::2], np.asfortranarray(keys), keys.astype(ml_dtypes.bfloat16)):
            for threads in (0, 1, 3):
                got, index = _C.mine_hardest(query, given, 20, threads=threads)
                np.testing.assert_array_equal(index, want)
                np.testing.assert_array_equal(got, np.take_along_axis(scores, want, 1))
        got, index = _C.mine_hardest(query, keys[:2], 3)
        assert (index[:, 2] == -1).all()
        assert np.isneginf(got[:, 2]).all()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"query": np.zeros((2, 3))}, TypeError, "query must be float32, float16 or bfloat16, got float64"),
            ({"query": np.zeros(3, np.float32)}, ValueError, "query must have 2 dimensions, got 1"),
            ({"query": np.zeros((2, 4), np.float32)}, ValueError, "the same number of columns, got 4 and 3"),
            ({"N": -1}, ValueError, "N must be at least 0, got -1"),
        ],
    )
    def test_bad_input_raises_an_error(self, change, error, message):
        from negmine import _C

        good = {"query": np.zeros((2, 3), np.float32), "negative_keys": np.zeros((5, 3), np.float32), "N": 1}
        with pytest.raises(error, match=message):
            _C.mine_hardest(**{**good, **change})

    def test_it_works_where_there_is_no_torch(self):
        program = """
            import sys
            sys.modules["torch"] = None  # as where it is not installed
            import numpy as np
            from negmine import _C
            print(_C.mine_hardest(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 1)[1].ravel())
            """
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
        assert run.stdout.strip() == "[0 1]", run.stderr

    def test_facts(self):
        from negmine import _C, _build_info

        info = _C.build_info()
        assert info["cuda_version"] == _build_info.CUDA_VERSION
        assert info["cuda_arches"] == _build_info.CUDA_ARCHES
        assert info["cxx_standard"] >= 202002
        assert _C.isa_for("float32", "float32") == "portable" or _C.cpu_features()["avx2"]


def test_every_instruction_set_that_the_compiler_uses_is_checked_at_run_time():
    """If a feature is not checked, a virtual machine that hides it runs into an illegal instruction."""
    source = (ROOT / "kernels/cpu/dispatch.cpp").read_text()
    flags = {flag.removeprefix("-m") for flags in X86_FLAGS.values() for flag in flags if "=" not in flag}
    asked = {"f16c": "bit_F16C", "amx-tile": "kTiles", "amx-bf16": "kBFloat16"}  # by number
    for feature in flags:
        assert asked.get(feature, f'__builtin_cpu_supports("{feature}")') in source, feature
