"""Installation: from an sdist to an environment that runs the wheel, and the messages for versions that do not match."""

import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from build_tools import check_install
from build_tools.check_wheel import faults
from build_tools.cuda_toolkit import chosen_toolkit
from build_tools.native import BuildError
from negmine.ops import compiled

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_sdist_becomes_a_wheel_that_a_fresh_environment_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NEGMINE_CUDA", "cpu")
    said = check_install.check(sys.executable, tmp_path)
    assert "+cpu" in said[0] and "ops agree with the reference" in said[-1]
    assert "this build of negmine has no CUDA ops" in said[-1]


def test_an_interpreter_without_torch_is_refused(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(
        check_install.CheckFailed, match="does not have torch, numpy, setuptools, wheel, pybind11, and this check"
    ):
        check_install.build_wheel(str(bare), tmp_path, tmp_path)
    with pytest.raises(check_install.CheckFailed, match=r"false \.\.\. failed"):
        check_install.run("false")


def test_a_wheel_that_names_the_machine_that_built_it_is_found(tmp_path):
    wheel = tmp_path / "negmine-1+cpu-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("negmine/_ops_cpu.abi3.so", b"\0/home/x/site-packages/torch/include/a.h\0")
    assert "negmine/_ops_cpu.abi3.so contain paths of the machine that built them" in faults(wheel)


@pytest.mark.parametrize(
    "built, found, said",
    [
        ("13.0", "12.8", "built for CUDA 13.0 and this torch uses CUDA 12.8: the major versions must agree"),
        ("13.0", None, "built for CUDA 13.0 and this torch .* is a CPU build"),
        (None, "13.0", "this build of negmine has no CUDA ops"),
    ],
)
def test_a_torch_for_another_cuda_version_gives_a_reason(monkeypatch, built, found, said):
    info = pytest.importorskip("negmine._build_info")
    monkeypatch.setattr(info, "CUDA_VERSION", built)
    monkeypatch.setattr(torch.version, "cuda", found)
    assert re.search(said, compiled._load_cuda())


def test_a_torch_for_amd_gives_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    assert "do not run on AMD's GPUs, for which this torch" in compiled._load_cuda()


def test_nvcc_of_another_cuda_version_raises_an_error(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    for name in ("bin", "include", "lib64"):
        (tmp_path / name).mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    (tmp_path / "lib64/libcudart_static.a").touch()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.1'\necho '#$ TOP={tmp_path}' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NEGMINE_NVCC", str(nvcc))
    monkeypatch.setenv("NEGMINE_CUDA", "cu130")
    with pytest.raises(BuildError, match=r"NEGMINE_CUDA=cu130 was asked for, but .*nvcc is cu129"):
        chosen_toolkit()
    monkeypatch.setenv("NEGMINE_CUDA", "cu129")
    assert chosen_toolkit().tag == "cu129"
    monkeypatch.delenv("NEGMINE_NVCC")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    with pytest.raises(
        BuildError, match="NEGMINE_CUDA=cu129 needs nvcc, found by NEGMINE_NVCC, CUDA_HOME or PATH, but there is"
    ):
        chosen_toolkit()
