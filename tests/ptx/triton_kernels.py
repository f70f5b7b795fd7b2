"""Run Triton's kernels, compiled for a GPU, on CPU tensors: every launch executes the PTX code for that GPU.

Call `install` before negmine is imported. Launchers then behave as on a GPU of that compute capability.
"""

import functools
import os
import struct
import tempfile
from types import SimpleNamespace

import torch

from tests import ptx

PROCESSORS = 3
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}
SEED = int(os.environ.get("NEGMINE_PTX_SEED", "0"))  # random order in which warps run


def install(capability: int) -> None:
    """Make `kernel[grid](...)` run on the CPU, compiled for this compute capability."""
    os.environ["TRITON_INTERPRET"] = "0"  # Triton decorates its own functions at import
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"  # negmine reads this and passes CPU tensors to Triton
    CUDABackend.make_cubin = lambda *_: b""  # machine code is not needed, and the assembler is slow
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=PROCESSORS)
    torch.cuda.current_device = lambda: None
    JITFunction.run = functools.partialmethod(_run, capability)


_programs: dict[tuple, tuple[ptx.Program, int, int]] = {}


def _passed(types: tuple, values: tuple) -> list:
    """Return the arguments that are parameters of the compiled kernel: those that are not constants, with tuples flattened."""
    found = []
    for kind, x in zip(types, values, strict=True):
        found += _passed(kind, x) if isinstance(kind, tuple) else [] if kind == "constexpr" else [x]
    return found


def _run(kernel, capability: int, *args, grid, warmup=False, **kwargs) -> None:
    from tests.aot import compile_for, specialise

    values, signature, constants, attributes, options = specialise(kernel, args, kwargs, capability)
    key = (kernel.fn.__name__, capability, str(signature), str(constants), str(attributes), str(options))
    if key not in _programs:
        built, _ = compile_for(kernel, args, kwargs, capability)
        (text,) = ptx.entries(built.asm["ptx"]).values()
        if built.metadata.global_scratch_size:
            raise ptx.Failure(f"{kernel.fn.__name__} asks for scratch memory")
        _programs[key] = ptx.Program(text), built.metadata.num_warps, built.metadata.shared
    program, warps, shared = _programs[key]
    if shared > SHARED_BYTES[capability]:
        raise ptx.Failure(f"{program.name}: {shared} bytes of shared memory are more than a block has")
    given = _passed(tuple(signature.values()), tuple(values.values()))
    given += [0] * (len(program.parameters) - len(given))  # scratch memory parameters, which are not used
    parameters, ranges = b"", set()
    for x, (offset, size, kind) in zip(given, program.parameters.values(), strict=True):
        if isinstance(x, torch.Tensor):
            memory = x.untyped_storage()
            ranges.add((memory.data_ptr(), memory.data_ptr() + memory.nbytes()))
            x = x.data_ptr()
        code = {"f32": "f", "u64": "Q", "u32": "I", "s32": "i", "s64": "q", "b64": "Q", "b32": "I"}[kind]
        value = struct.pack(code, x if kind == "f32" else int(x) & (1 << 8 * size) - 1)
        parameters = parameters.ljust(offset, b"\0") + value
    blocks = [*(grid(values) if callable(grid) else grid), 1, 1][:3]
    if blocks[0] > 2**31 - 1 or max(blocks[1:]) > 65535:
        raise ptx.Failure(f"{program.name}: a grid of {blocks} is more than a GPU takes")
    program.run(tuple(blocks), 32 * warps, shared, parameters.ljust(program.bytes, b"\0"), sorted(ranges), SEED)
