"""build_tools/gpu_smoke.py on the CPU: a kernel that hangs, crashes, is wrong or cannot run affects only its own line."""

import csv
import sys

import pytest

from build_tools import gpu_smoke
from build_tools.gpu_smoke import Check

FAULTS = {
    "hangs": "import time; time.sleep(600)",
    "crashes": "import os; print('about to', flush=True); os.abort()",
    "raises": "raise AssertionError('output 0: 3 elements differ')",
    "dies silently": "import sys; sys.exit(3)",
}


@pytest.fixture
def faulty(monkeypatch):
    """Checks of the backends in FAULTS run the given code instead of a kernel. A check that hangs has 1 of its 30 seconds."""
    real, outcome = gpu_smoke.child, gpu_smoke.outcome

    def child(check, device):
        return [sys.executable, "-c", FAULTS[check.backend]] if check.backend in FAULTS else real(check, device)

    def within(check, device, limit):
        assert 0 < limit <= 30
        return outcome(check, device, 1.0 if check.backend == "hangs" else limit)

    monkeypatch.setattr(gpu_smoke, "child", child)
    monkeypatch.setattr(gpu_smoke, "outcome", within)


def test_a_failed_check_prints_one_line_and_keeps_earlier_results(faulty, monkeypatch, tmp_path, capsys):
    sound = [Check("cpu", "bfloat16", "info_nce, ids"), Check("cuda", "bfloat16", "logsumexp")]
    monkeypatch.setattr(gpu_smoke, "checks", lambda names: [*(Check(name, "-", "case") for name in FAULTS), *sound])
    assert gpu_smoke.main(["--out", str(tmp_path), "--device", "cpu", "--limit", "30", "--jobs", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PASS  launch") and lines[-1] == "4 checks failed"
    with (tmp_path / "smoke.csv").open() as file:
        rows = {row["backend"]: row for row in csv.DictReader(file)}
    assert len(rows) == 7
    assert rows["hangs"]["detail"] == "ran for more than 1 s and was killed"
    assert rows["crashes"]["detail"] == "its process died of SIGABRT: about to"
    assert rows["raises"]["detail"] == "AssertionError: output 0: 3 elements differ"
    assert rows["dies silently"]["status"] == "FAIL"
    assert rows["cpu"]["status"] == "PASS" and float(rows["cpu"]["us"]) > 0
    assert rows["cuda"]["status"] == "SKIP" and "backend 'cuda'" in rows["cuda"]["detail"]


@pytest.mark.parametrize("case", gpu_smoke.cases())
def test_every_case_can_pass(case):
    gpu_smoke.compare_with_truth(Check("cpu", "float32", case), "cpu")


def test_a_wrong_kernel_fails(monkeypatch):
    from negmine.ops import backends

    cpu = next(row for row in backends.BACKENDS if row.name == "cpu").functions
    right = cpu["mine_hardest"]
    monkeypatch.setitem(cpu, "mine_hardest", lambda *args: (right(*args)[0], right(*args)[1].flip(1), right(*args)[2]))
    with pytest.raises(AssertionError, match="output 1"):
        gpu_smoke.compare_with_truth(Check("cpu", "bfloat16", "mine_hardest"), "cpu")
