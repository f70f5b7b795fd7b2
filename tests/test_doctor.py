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


def doctor_says(**environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "NEGMINE_BACKEND")}
    command = [sys.executable, "-m", "negmine.doctor"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_says_everything():
    said = doctor_says(NEGMINE_BACKEND="reference")
    for row in backends.BACKENDS:
        assert f"\n  {row.name} " in said
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
        assert word in said
    assert "NEGMINE_BACKEND=reference insists" in said
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1 was not set" in said


def test_a_verdict_is_what_the_backend_does():
    for (name, _, verdict), row in zip(doctor.backend_rows(), backends.BACKENDS, strict=True):
        assert name == row.name
        assert verdict == f"no: {row.refusal}" if row.refusal else verdict.startswith(("works", "loads")), verdict


def test_the_kernels_for_amd_are_said_to_be_compiled_alone(monkeypatch):
    row = backends.Backend("triton", "cuda", dict.fromkeys(backends.OPS, min))
    monkeypatch.setattr(backends, "BACKENDS", (row,))
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "_trial", lambda name, device: "works")
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    assert doctor.backend_rows() == [
        ("triton", "cuda", "works; on AMD's GPUs its kernels have been compiled, never run by us")
    ]


def test_features_tell_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    rows = doctor.feature_rows()
    assert all(verdict.startswith("no: not installed; pip install ") for *_, verdict in rows)
    extras = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for extra in re.findall(r"negmine\[([\w-]+)\]", " ".join(verdict for *_, verdict in rows)):
        assert f"\n{extra} = [" in extras


def test_features_are_tried():
    rows = {name: verdict for name, _, verdict in doctor.feature_rows()}
    assert rows["matplotlib"].startswith(("installed, ", "no: not installed"))
    has_faiss = importlib.util.find_spec("faiss") is not None
    assert rows["FAISS, CPU"] == "works" if has_faiss else rows["FAISS, CPU"].startswith("no: not installed")
    if not torch.cuda.is_available():
        assert rows["FAISS, GPU"].startswith("no: ") and doctor._on_gpu("Flat")() == "no: torch sees no CUDA device"


def test_a_feature_that_fails_is_told(monkeypatch):
    assert doctor._index_trial("exact", "cpu") == "works"
    assert doctor._index_trial("exact", "cuda:77").startswith(
        "no: a small index raised ValueError: NegativeIndex.build: device"
    )
    found = type("Found", (), {"indices": torch.zeros(4, 1).numpy()})
    monkeypatch.setattr(doctor.NegativeIndex, "search", lambda *_: found)
    assert doctor._index_trial("exact", "cpu").startswith("no: a small index found [0.0, 0.0")


def test_old_versions_are_told():
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
        (broken, "no: a small call raised RuntimeError: the driver is asleep"),
        (lambda q, *rest: (q, torch.zeros(2, 2, dtype=torch.int64), None), "no: a small call gave [[0, 0], [0, 0]]"),
    ],
    ids=["raises", "wrong"],
)
def test_a_backend_that_loads_and_fails_is_told(monkeypatch, kernel, words):
    row = next(row for row in backends.BACKENDS if row.name == "cpu")
    if row.refusal:
        pytest.skip(row.refusal)
    monkeypatch.setitem(row.functions, "mine_hardest", kernel)
    assert words in doctor.report()


def test_a_copy_that_is_not_built_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "negmine._C", None)
    ((name, verdict),) = doctor.build_rows()
    assert name == "compiled" and verdict.startswith("no: ") and "make venv" in verdict
