"""python -m negmine.doctor: one line a backend with the truth about it, the build, the versions; it never fails."""

import os
import subprocess
import sys

import pytest
import torch

from negmine import backends, doctor


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


def broken(*_):
    raise RuntimeError("the driver is asleep\nand more")


@pytest.mark.parametrize(
    "kernel, words",
    [
        (broken, "no: a small call raised RuntimeError: the driver is asleep"),
        (lambda q, keys, N, *pool: (q, torch.zeros(2, 2, dtype=torch.int64)), "no: a small call gave [[0, 0], [0, 0]]"),
    ],
    ids=["raises", "wrong"],
)
def test_a_backend_that_loads_and_fails_is_told(monkeypatch, kernel, words):
    row = next(row for row in backends.BACKENDS if row.name == "cpu")
    if row.refusal:
        pytest.skip(row.refusal)
    monkeypatch.setitem(row.launchers, "mine_hardest", kernel)
    assert words in doctor.report()


def test_a_copy_that_is_not_built_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "negmine._C", None)
    ((name, verdict),) = doctor.build_rows()
    assert name == "compiled" and verdict.startswith("no: ") and "make venv" in verdict
