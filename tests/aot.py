"""Record the launches of the Triton kernels for GPUs that this machine lacks, compile them, and count their instructions.

Launches are recorded by calling the launchers on meta tensors, while PyTorch is patched to report the properties of the GPU. So
the kernels are compiled with the tile sizes and arguments that tiles.py chooses for that GPU. The reported number is the machine
instructions of the main loop, divided by the scores that one thread computes in an iteration. The name of an op contains the
fields of its pool, for example "logsumexp+ids"; "ragged" is a queue that ends within a tile. With ids or labels, the main loop is
the loop over tiles in which no ids or labels are equal, together with the loop that searches for equal ones.
"""

import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from negmine.ops.pool import Pool
from tests import amdgcn, sass

PROCESSORS = 132  # multiprocessors of the GPU
AMD = {94: "gfx942", 110: "gfx1100"}  # by the compute capability that PyTorch reports for them
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided")  # PyTorch ops that launch no kernel
B, N = 1024, 1024


def call(triton_ops, op: str, dtype: torch.dtype, D: int) -> None:
    """Call the launcher of an op with meta tensors of typical sizes."""
    op, *kinds = op.split("+")
    K = 65000 if "ragged" in kinds else 65536

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, keys, scale = empty(B, D, dtype=dtype), empty(K, D, dtype=dtype), empty()
    ranks, index, step = empty(B, 2, dtype=torch.int64), empty(B, N, dtype=torch.int64), empty(dtype=torch.int64)
    whole = torch.int64
    given = {
        "ids": {"query_ids": empty(B, dtype=whole), "negative_ids": empty(K, dtype=whole)},
        "labels": {"query_labels": empty(B, dtype=whole), "negative_labels": empty(K, dtype=whole)},
        "bounds": {"lower": empty(B, dtype=whole), "upper": empty(B, dtype=whole)},
        "mask": {"negative_mask": empty(K, dtype=torch.bool)},
        "pairs": {"negative_mask": empty(B, K, dtype=torch.bool)},
        "num_rows": {"num_rows": empty(dtype=whole)},
        "bias": {"bias": empty(K)},
        "guide": {
            "guide_query": empty(B, D, dtype=dtype),
            "guide_keys": empty(K, D, dtype=dtype),
            "guide_limit": empty(B),
        },
        "ragged": {},
    }
    pool = Pool(**{name: x for kind in kinds for name, x in given[kind].items()})
    window = Pool(**given["bounds"])
    draws = (1024, 128, 0.0, 1.0, 0.0, 0.5, True, empty(4097), 0, step, step)
    arguments = {
        "info_nce": (query, keys, scale, None, True, False, None, N, 0, *draws, *pool),
        "logsumexp": (keys, scale[None], None, True, 0, None, *pool),
        "logsumexp_grad_keys": (keys, scale, empty(B), empty(B), *pool),
        "prefix_logsumexp": (keys, (D // 8, D // 4, D // 2, D), scale, True, *pool),
        "softplus_sum": (keys, scale, scale, True, *pool),
        "softplus_sum_grad_keys": (keys, scale, scale, empty(B), *pool),
        "logsumexp_grad_bias": (keys, scale, empty(B), empty(B), *pool),
        "softplus_sum_grad_bias": (keys, scale, scale, empty(B), *pool),
        "mine_hardest": (keys, N, False, *pool),
        "rank_thresholds": (keys, ranks, *pool),
        "count_negatives": (keys, *window),
        "mix_negatives": (keys, index, *draws),
        "mix_logsumexp": (keys, index, scale, True, *draws),
        "gathered_logsumexp": (keys, index, scale, True),
        "gathered_grad_keys": (index, empty(B, N), K),
        "maxsim": (keys[: K // 128 * 128].view(-1, 128, D), None, empty(K // 128, dtype=torch.int64), True),
    }
    getattr(triton_ops, op)(query.view(-1, 32, D) if op == "maxsim" else query, *arguments[op])


class Launch(NamedTuple):
    """One launch of a kernel: its arguments and grid."""

    kernel: Any  # a triton.JITFunction
    args: tuple
    kwargs: dict
    grid: tuple

    @property
    def key(self) -> tuple:
        """Launches with different keys need different compiled kernels.

        Triton also compiles for the divisibility of arguments, but that follows from the shapes here.
        """
        constants = tuple((p.name, x) for p, x in zip(self.kernel.params, self.args, strict=True) if p.is_constexpr)
        return self.kernel.fn.__name__, constants, [x is None for x in _flat(self.args)], str(self.kwargs)


def _flat(args: tuple) -> list:
    return [x for part in args for x in (_flat(part) if isinstance(part, tuple) else [part])]


def runs_on_device(func) -> bool:
    """Whether a PyTorch op launches a kernel: it is neither a view nor a mere allocation."""
    schema = func._schema
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not views and schema.name.removeprefix("aten::") not in ALLOCATIONS


class OnDevice(TorchDispatchMode):
    """Count the PyTorch ops that launch a kernel: all except views and allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += runs_on_device(func)
        return func(*args, **(kwargs or {}))


def stand_in(capability: int, processors: int = PROCESSORS) -> list[Launch]:
    """Make PyTorch report such a GPU, and append all further launches to the returned list instead of running them."""
    from triton.runtime.jit import JITFunction

    from negmine.kernels.triton import launch, tiles

    torch.version.hip = "7.0" if capability >= tiles.AMD else None
    torch.cuda.get_device_capability = lambda device=None: divmod(capability % tiles.AMD, 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=processors)
    torch.cuda.current_device = lambda: None
    launch.capability.cache_clear()
    launch.processors.cache_clear()
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs, grid))

    JITFunction.run = run
    return launches


def record(ops: tuple[str, ...], dtype: torch.dtype, D: int, capability: int) -> list[Launch]:
    """Return every different launch of the ops on such a GPU."""
    import negmine.kernels.triton as triton_ops

    launches = stand_in(capability)
    for op in ops:
        call(triton_ops, op, dtype, D)
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(str(launch.key), launch)
    return list(first.values())


def target_of(capability: int):
    """The target of Triton's compiler. Capabilities from tiles.AMD on stand for GPUs of AMD."""
    from triton.backends.compiler import GPUTarget

    from negmine.kernels.triton import tiles

    if capability < tiles.AMD:
        return GPUTarget("cuda", capability, 32)
    arch = AMD[capability - tiles.AMD]
    return GPUTarget("hip", arch, amdgcn.WAVE[arch])


def specialise(kernel, args: tuple, kwargs: dict, capability: int) -> tuple[dict, dict, dict, dict, dict]:
    """Return the arguments by name, and the types, constants, divisibilities and options that Triton compiles a kernel with."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target_of(capability))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialisation, extra = bind(*args, debug=False, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, values, specialisation, extra)
    return values, signature, constants, attributes, options.__dict__


def compile_for(kernel, args: tuple, kwargs: dict, capability: int):
    """Compile a kernel as this launch would; return it and the arguments by name."""
    import triton
    from triton.compiler import ASTSource

    values, signature, constants, attributes, options = specialise(kernel, args, kwargs, capability)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target_of(capability), options=options), values


def inspect(built, rows: int, columns: int, terms: int, warps: int) -> dict:
    """Return what the machine code of a kernel uses.

    registers, stack, local, shared   registers, and bytes of memory
    spills_in_loops                   reads and writes of spilled registers inside innermost loops
    products                          tensor core instructions, without the width of their tile
    per_score                         instructions per score of the shortest loop over tiles, plus those of the search for
                                      equal ids and labels, which decides whether that loop can be used for a tile
    longest_loop, outside_of_loops    instructions of the longest innermost loop, and of the code outside of loops

    terms: how many products are added for each score: D for the score itself, and more if the score is a weight in a product.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        usage, code = sass.show("cuobjdump", "-res-usage", cubin), sass.show("nvdisasm", "-c", cubin)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    inner = sass.innermost(code)
    spilled = sum(bool(re.search(r"\b(STL|LDL)\b", x)) for body in inner for x in body)
    scores = [
        (len(x), sass.multiplied(x) / (32 * terms) or rows * columns / (32 * warps))
        for x in inner
        if sass.with_product([x])
    ]
    # The search for equal ids and labels handles 256 columns per iteration. Most of its instructions are comparisons.
    searches = [len(x) / (256 * rows / (32 * warps)) for x in inner if sum("ISETP" in y for y in x) > len(x) / 2]
    return {
        "registers": registers, "stack": stack, "local": local, "shared": built.metadata.shared,
        "spills_in_loops": spilled, "products": sorted(sass.products(code)),
        "per_score": min((instructions / count for instructions, count in scores), default=0) + max(searches, default=0),
        "longest_loop": max(map(len, inner), default=0), "outside_of_loops": sass.outside_of_loops(code),
    }  # fmt: skip


def inspect_launch(launch: Launch, capability: int) -> dict:
    """Compile and inspect the kernel of a launch."""
    built, values = compile_for(launch.kernel, launch.args, launch.kwargs, capability)
    name = launch.kernel.fn.__name__
    tile = values.get("BLOCK_B", 1), values.get("BLOCK_K", 1)
    terms = values.get("D", 1) + values.get("SLICE", 0)
    target = target_of(capability)
    if target.backend == "hip":
        found = amdgcn.inspect(built, terms, target.arch)
    else:
        found = inspect(built, *tile, terms, launch.kwargs["num_warps"])
    if values.get("SIGMOID"):
        name += ", sigmoid"
    if brackets := values.get("BRACKETS"):
        name += f", {brackets} bracket{'s' * (brackets > 1)}"
    return {"kernel": name, "warps": launch.kwargs["num_warps"], **found}


def report(capability: int, dtype: str, D: int, ops: tuple[str, ...]) -> None:
    """Compile one case, and print a JSON line for each kernel."""
    for op in ops:
        for launch in record((op,), getattr(torch, dtype), D, capability):
            line = inspect_launch(launch, capability)
            print(json.dumps({"pool": op.partition("+")[2], **line}), flush=True)
