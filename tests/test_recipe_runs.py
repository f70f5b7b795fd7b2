"""Every recipe trains on a small task like that of the demo; benchmarks.recipes resumes, sorts and writes tables."""

import csv
import inspect

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import recipes as runner
from benchmarks import train
from benchmarks.wordnet import Task
from negmine import recipes

DIM, ENTRIES, QUERIES = 16, 400, 300


@pytest.fixture
def task(monkeypatch):
    """Entries are random. A query is its entry times a matrix that is the same for all, plus noise, so it can be learned."""
    monkeypatch.setattr(train, "K", 256)
    monkeypatch.setattr(train, "B", 32)
    generator = torch.Generator().manual_seed(0)
    corpus = F.normalize(torch.randn(ENTRIES, DIM, generator=generator), dim=1)
    positives = torch.randint(ENTRIES, (QUERIES,), generator=generator)
    turned = corpus[positives] @ torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    queries = F.normalize(turned + 0.1 * torch.randn(QUERIES, DIM, generator=generator), dim=1)
    rows = torch.arange(QUERIES)
    return Task(corpus, queries, positives, rows[:250], rows[250:], [], torch.zeros(ENTRIES), torch.zeros(0, 2))


def test_every_recipe_is_there_by_its_name():
    functions = {n for n, made in vars(recipes).items() if inspect.isfunction(made) and n in recipes.__all__}
    assert functions - {"mixed_inputs"} <= set(train.RECIPES)


@pytest.mark.parametrize("name", train.RECIPES)
def test_every_recipe_learns(task, name):
    before = train.evaluate(*train.new_heads(DIM, 0, torch.device("cpu")), task)
    steps = {"rince": 200, "siglip": 200}.get(name, 60)  # these start far from the minimum
    run = train.train(name, task, steps, 0, [steps], before)
    assert run.curve[-1][1].mrr > before.mrr + 0.02, (name, before, run.curve[-1])


def test_the_runner_resumes_and_tabulates(task, tmp_path, monkeypatch):
    path, trained = tmp_path / "recipes.csv", []
    train_one = runner.train

    def counted(name, *args):
        trained.append(name)
        return train_one(name, *args)

    monkeypatch.setattr(runner, "train", counted)
    runner.run_missing(task, ["all"], [0, 1], 3, path)
    runner.run_missing(task, ["all", "ring"], [0, 1], 3, path)  # started again after an interruption
    assert trained == ["all", "all", "ring", "ring"]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == runner.COLUMNS
    assert sorted({(row["recipe"], row["steps"]) for row in rows}) == [
        ("all", "3"),
        ("before training", "0"),
        ("ring", "3"),
    ]
    rows = [row | {"mrr": "0.5" if row["recipe"] == "ring" else "0.25"} for row in rows]
    text = runner.table(rows, 3)
    assert text.index("`ring`") < text.index("`all`") and "0.500 ± 0.000" in text
    runner.draw(rows, 3, tmp_path / "recipes.png")
    assert (tmp_path / "recipes.png").stat().st_size > 5000
    assert runner.summary(rows, 500) == []
