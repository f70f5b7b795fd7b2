"""python -m negmine.doctor prints correct lines about the backends, the build and the versions, and never fails."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from negmine import doctor
from negmine.ops import backends


def doctor_output(**environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "NEGMINE_BACKEND")}
    command = [sys.executable, "-m", "negmine.doctor"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_report_contains_every_section():
    output = doctor_output(NEGMINE_BACKEND="reference")
    for row in backends.BACKENDS:
        assert f"\n  {row.name} " in output
    for word in (
        "build",
        "CUDA",
        "architectures",
        "CPU kernels",
        "python",
        torch.__version__,
        "triton",
        "faiss",
        "GPUs",
    ):
        assert word in output
    assert "NEGMINE_BACKEND=reference is set: only this backend is used" in output
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1 was not set" in output


def test_the_status_is_the_refusal_or_the_result_of_a_call():
    for (name, _, verdict), row in zip(doctor.backend_rows(), backends.BACKENDS, strict=True):
        assert name == row.name
        want = f"not available: {row.refusal}"
        assert verdict == want if row.refusal else verdict.startswith(("works", "loaded")), verdict


def test_a_backend_that_is_used_only_by_name_has_a_remark(monkeypatch):
    functions = dict.fromkeys(backends.OPS, min)
    rows = (
        backends.Backend("cuda", "cuda", functions, by_name_only=frozenset(functions)),
        backends.Backend("cpu", "cpu", functions),
    )
    monkeypatch.setattr(backends, "BACKENDS", rows)
    monkeypatch.setattr(doctor, "_trial", lambda name, device: "works")
    assert doctor.backend_rows() == [("cuda", "cuda", "works; used only with backend='cuda'"), ("cpu", "cpu", "works")]


def test_on_rocm_the_status_says_that_no_amd_gpu_was_tested(monkeypatch):
    row = backends.Backend("triton", "cuda", dict.fromkeys(backends.OPS, min))
    monkeypatch.setattr(backends, "BACKENDS", (row,))
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "_trial", lambda name, device: "works")
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    assert doctor.backend_rows() == [
        ("triton", "cuda", "works; its kernels are compiled for AMD GPUs, but have not been tested on one")
    ]


def test_missing_packages_have_an_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    rows = doctor.feature_rows()
    assert all(verdict.startswith("not installed; pip install ") for *_, verdict in rows)
    extras = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for extra in re.findall(r"negmine\[([\w-]+)\]", " ".join(verdict for *_, verdict in rows)):
        assert f"\n{extra} = [" in extras


def test_features_are_tried():
    rows = {name: verdict for name, _, verdict in doctor.feature_rows()}
    assert rows["matplotlib"].startswith(("installed, ", "not installed"))
    has_faiss = importlib.util.find_spec("faiss") is not None
    assert rows["FAISS, CPU"] == "works" if has_faiss else rows["FAISS, CPU"].startswith("not installed")
    if not torch.cuda.is_available():
        assert rows["FAISS, GPU"].startswith("not ")
        assert doctor._on_gpu("Flat")() == "not available: torch sees no CUDA device"


def test_a_feature_that_fails_is_reported(monkeypatch):
    assert doctor._index_trial("exact", "cpu") == "works"
    assert doctor._index_trial("exact", "cuda:77").startswith(
        "failed: a small index raised ValueError: NegativeIndex.build: device"
    )
    found = type("Found", (), {"indices": torch.zeros(4, 1).numpy()})
    monkeypatch.setattr(doctor.NegativeIndex, "search", lambda *_: found)
    assert doctor._index_trial("exact", "cpu").startswith("failed: a small index found [0.0, 0.0")


def test_old_versions_have_a_remark():
    assert doctor._too_old("torch", "2.9.1+cpu") == "; too old: 2.10 or later is needed"
    for name, version in (("triton", "3.6.0"), ("torch", "2.10.0"), ("triton", "not installed")):
        assert doctor._too_old(name, version) == ""
    assert doctor._version_without_import("no-such-package") == "version unknown"
    needs = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, least in doctor.LEAST.items():
        assert f'"{name}>={least[0]}.{least[1]}"' in needs


def broken(*_):
    raise RuntimeError("the driver is asleep\nand more")


@pytest.mark.parametrize(
    "kernel, words",
    [
        (broken, "failed: a small call raised RuntimeError: the driver is asleep"),
        (
            lambda q, *rest: (q, torch.zeros(2, 2, dtype=torch.int64), None),
            "failed: a small call gave [[0, 0], [0, 0]]",
        ),
    ],
    ids=["raises", "wrong"],
)
def test_a_backend_whose_call_fails_is_reported(monkeypatch, kernel, words):
    row = next(row for row in backends.BACKENDS if row.name == "cpu")
    if row.refusal:
        pytest.skip(row.refusal)
    monkeypatch.setitem(row.functions, "mine_hardest", kernel)
    assert words in doctor.report()


def test_a_missing_build_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "negmine._C", None)
    ((name, verdict),) = doctor.build_rows()
    assert name == "compiled" and verdict.startswith("not available: ") and "make venv" in verdict
