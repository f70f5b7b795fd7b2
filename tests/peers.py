"""Losses and miners of other packages, imported without the dependencies that they do not need. Missing ones skip their tests."""

import importlib
import importlib.util
import types
from pathlib import Path

import pytest

from benchmarks.stand_ins import stand_ins


def peer(module: str) -> types.ModuleType:
    """A module of a peer; skips where the peer is not installed."""
    pytest.importorskip(module.partition(".")[0])
    with stand_ins():
        return importlib.import_module(module)


def peer_file(package: str, file: str) -> types.ModuleType:
    """One file of a package whose __init__ would import its models."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0]) / file
    alone = importlib.util.spec_from_file_location(f"{package}_{path.stem}_alone", path)
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module
