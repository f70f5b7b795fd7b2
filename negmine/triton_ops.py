"""The Triton launchers as torch ops, negmine_triton::*: what torch.compile calls in place of tracing into a launcher.

A compiled graph holds one opaque node an op, with the schema of the C++ op of the same name and the fake of negmine/cpp_ops.py.
Eager calls go to the launchers directly, for an op of torch.library costs more than a small launch.
"""

import functools
from collections.abc import Callable

import torch

from negmine import cpp_ops

_LIBRARY = torch.library.Library("negmine_triton", "FRAGMENT")


def _opaque(op: str, launch: Callable, devices: tuple[str, ...]) -> Callable:
    """negmine_triton::<op>, defined once, that runs `launch` on the devices."""
    schema = str(getattr(cpp_ops.OPS, op).default._schema).removeprefix("negmine::")
    _LIBRARY.define(schema)
    for device in devices:
        _LIBRARY.impl(op, launch, device.upper())
    torch.library.register_fake(f"negmine_triton::{op}", cpp_ops.FAKES[op], lib=_LIBRARY)
    return getattr(torch.ops.negmine_triton, op).default


def launchers(found: dict[str, Callable], devices: tuple[str, ...]) -> dict[str, Callable]:
    """The launchers by op, which a compiled graph calls as torch ops; the schemas come with negmine._ops_cpu.

    An op without a schema there is for eager calls alone.
    """
    if cpp_ops.CPU_REFUSAL:
        return found

    def compilable(op: str, launch: Callable) -> Callable:
        opaque = _opaque(op, launch, devices)

        @functools.wraps(launch)
        def call(*args):
            return opaque(*args) if torch.compiler.is_compiling() else launch(*args)

        return call

    return {op: compilable(op, launch) if op in cpp_ops.FAKES else launch for op, launch in found.items()}
