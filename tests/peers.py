"""Import losses and miners of other packages without dependencies that they do not need. Skip tests of missing packages."""

import importlib
import importlib.util
import types
from pathlib import Path

import pytest

from benchmarks.stand_ins import stand_ins


def peer(module: str) -> types.ModuleType:
    """Import a module of another package, or skip the test if it is not installed."""
    pytest.importorskip(module.partition(".")[0])
    with stand_ins():
        return importlib.import_module(module)


def peer_file(package: str, file: str) -> types.ModuleType:
    """Import one file of a package, without the __init__ that would import its models."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0]) / file
    alone = importlib.util.spec_from_file_location(f"{package}_{path.stem}_alone", path)
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module
