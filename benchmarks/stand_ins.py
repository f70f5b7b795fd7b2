"""Import losses of other packages without the large packages that they import but do not need for these losses.

lightly imports torchvision, and pytorch-metric-learning imports scipy and scikit-learn, whatever part is used. Within
`stand_ins()`, the packages in the list below are replaced by modules whose attributes are empty classes, even if they are
installed, so that tests and timings are the same on every machine. The replacements are removed afterwards.
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

HEAVY = ("torchvision", "timm", "scipy", "sklearn", "pytorch_lightning", "hydra", "omegaconf", "lightly_utils", "av")


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    """Import hook that creates a stand-in for each of these packages and for any module in them."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # so that its submodules can be imported
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def stand_ins() -> Iterator[None]:
    finder = _Finder({name for name in HEAVY if name not in sys.modules})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]
