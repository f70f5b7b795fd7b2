"""The Triton launchers by op name.

While torch.compile traces a call, the torch ops negmine_triton::* are called, so that a compiled graph has one opaque node for
each op, with the schema and the fake of its declaration. Otherwise the launchers are called directly, because a torch op that is
registered in Python costs more than a small launch. This module does not need the compiled libraries.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from negmine.ops import registry

NAMESPACE = "negmine_triton"


def launchers(devices: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Register every Triton launcher for the device types, and return the functions to call, by op name.

    Raises ImportError if Triton is not installed.
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
