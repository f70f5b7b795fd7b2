"""Public docstrings: NumPy sections that name the arguments of the signature, in its order, and examples that run."""

import doctest
import importlib
import inspect
import re
from operator import attrgetter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import negmine
import negmine.adapters.lightly
import negmine.adapters.open_clip
import negmine.adapters.pytorch_metric_learning
import negmine.adapters.sentence_transformers

PACKAGES = (
    "losses", "mining", "selection", "queues", "recipes", "report", "adapters.lightly", "adapters.open_clip",
    "adapters.sentence_transformers",
)  # fmt: skip
OPTIONS = ("FalseNegatives", "Guide", "Mix", "Negatives", "Select", "Weight")


def public(package):
    """Return the public names of a package: __all__, or the classes and functions that it defines."""
    module = importlib.import_module(f"negmine.{package}")
    own = [
        n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__ and n[0] != "_"
    ]
    return [f"{package}.{name}" for name in getattr(module, "__all__", own)]


METHODS = [
    f"{name}.{method}"
    for name in ("mining.MiningResult", "mining.NegativeIndex", "report.HardnessReport")
    for method, value in vars(attrgetter(name)(negmine)).items()
    if method[0] != "_" and callable(getattr(value, "__func__", value))
]
METRIC_LEARNING = ("CrossBatchMemory", "DistributedLossWrapper", "NegmineMiner")
FUNCTIONS = ("info_nce", "siglip", "sup_con")  # functions of negmine that are not also names of its packages
NAMES = sorted(
    {
        *OPTIONS,
        *FUNCTIONS,
        *(f"adapters.pytorch_metric_learning.{name}" for name in METRIC_LEARNING),
        *(name for package in PACKAGES for name in public(package)),
    }
    - {"mining.NegativeIndex"}  # created by class methods, which are in METHODS
)


def sections(text):
    """Return the text under each heading of a NumPy docstring."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(section):
    """Return the names that a section documents, in order."""
    return [name for names in re.findall(r"^(\w+(?:, \w+)*) : ", section, re.M) for name in names.split(", ")]


@pytest.mark.parametrize("name", NAMES + METHODS)
def test_a_docstring_names_the_arguments_and_its_examples_run(name):
    item = attrgetter(name)(negmine)
    text = inspect.cleandoc(item.__doc__)
    found = sections(text)
    parameters = [n for n, each in inspect.signature(item).parameters.items() if each.kind is not each.VAR_KEYWORD]
    parameters = [n for n in parameters if n != "self"]
    explained = documented(found.get("Attributes") or found.get("Parameters", ""))
    assert explained == parameters, f"{name} explains {explained}"
    test = doctest.DocTestParser().get_doctest(
        text, {"torch": torch, "np": np, "F": F, "negmine": negmine}, name, None, 0
    )
    assert test.examples or name in METHODS, f"{name} has no example"
    report: list[str] = []
    torch.manual_seed(0)
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append).failed
    assert not failed, "".join(report)
