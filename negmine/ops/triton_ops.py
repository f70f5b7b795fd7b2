"""The Triton launchers by op: called directly, or as the torch ops negmine_triton::* where torch.compile traces the call.

A compiled graph holds one opaque node an op, with the schema and the fake of its declaration. Eager calls go to the launchers
directly, for a torch op that is registered in Python costs more than a small launch. Nothing here needs the compiled library.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from negmine.ops import registry

NAMESPACE = "negmine_triton"


def launchers(devices: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Every op that Triton has a launcher of, registered for the device types: what to call, by name.

    Raises ImportError where Triton is not installed.
    """
    module = importlib.import_module("negmine.kernels.triton")
    for name in module.__all__:
        for device in devices:
            registry.implement(NAMESPACE, name, getattr(module, name), device)
    return {name: _compilable(name, getattr(module, name)) for name in module.__all__}


def _compilable(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def call(*args: Any) -> Any:
        return registry.overload(NAMESPACE, name)(*args) if torch.compiler.is_compiling() else launch(*args)

    return call
