"""Other packages' losses and miners, imported without the heavy packages that they import and these parts never call.

lightly imports torchvision, and pytorch-metric-learning scipy and scikit-learn, whatever part is used. While a peer is being
imported, a package of the list below is a stand-in whose every attribute is an empty class, installed or not, so that every
machine tests the same; it is forgotten afterwards. A peer that is not installed skips its tests.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

HEAVY = ("torchvision", "timm", "scipy", "sklearn", "pytorch_lightning", "hydra", "omegaconf", "lightly_utils", "av")


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    """Makes a stand-in of any module below these packages."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # so that it has modules below it
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def stand_ins():
    finder = _Finder({name for name in HEAVY if name not in sys.modules})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


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
