"""Triton kernels compiled ahead of time for GPUs that are not here: they compile, they do not spill, their loops stay short.

Launches are recorded by calling the launchers on meta tensors, with torch answering for the card: so what is compiled is what
tiles.py would choose there, arguments and all. Each case compiles in a process of its own with a time limit, for a tile that
is too large can keep the assembler busy for minutes. `python tests/test_aot.py 90 bfloat16 128 logsumexp` prints one case; with
another Triton first in PYTHONPATH it checks that one.

The gates count machine instructions in the main loop, divided by the scores a thread handles in one turn. An op is named with
what its pool holds, as "logsumexp+ids"; "ragged" is a queue that ends within a tile. Where ids or labels hide few pairs, the main
loop is that over tiles without such a pair, together with the search for them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from negmine.ops.pool import Pool
from tests import sass

pytest.importorskip("triton")

TIME_LIMIT = 120  # seconds for one case
# Registers kept on the stack around a loop, or once in several tiles, cost nothing that can be measured. One that is spilled in
# an innermost loop does.
STACK_BYTES = 32
HEADROOM = 1.25
INSTRUCTIONS_PER_SCORE = {  # measured for bf16, D = 128; scan_kernel takes one wanted column out of each word
    (80, "logsumexp_kernel"): 17.3,
    (90, "logsumexp_kernel"): 10.4,
    (90, "logsumexp_grad_keys_kernel"): 6.9,
    (90, "logsumexp_grad_keys_kernel, sigmoid"): 13.0,
    (90, "softplus_sum_kernel"): 24.3,
    (90, "scan_kernel, 1 bracket"): 10.6,
    (90, "scan_kernel, 2 brackets"): 22.0,
}
# What masks may cost, and a queue whose end falls inside a tile: times the instructions of a plain pool. Of ids and labels this
# is a tile without an equal pair. Bounds and masks of pairs are asked of every score.
MOST = {
    "": HEADROOM,
    "ids": 1.4,
    "labels": 1.4,
    "ids+labels": 1.6,
    "ragged": 1.1,
    "num_rows": 1.1,
    "mask": 2.0,
    "pairs": 4.0,
    "bounds": 4.0,
    "guide": 5.0,  # a second product, in smaller tiles
}
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # of a block; code for sm_80 also runs on sm_86 and sm_89
# Scores are compared between passes bit for bit, so all passes must take products by one instruction, which adds up one way.
# What follows a sum of products in the same kernel takes it too.
PRODUCT = {80: "HMMA.16816.F32.BF16", 90: "HGMMA.64x16.F32.BF16", 100: "UTCHMMA"}
MINING = ("logsumexp", "mine_hardest")
CASES = [
    (90, "bfloat16", 128, ("info_nce", "logsumexp", "logsumexp_grad_keys", "count_negatives")),
    (90, "bfloat16", 128, ("mine_hardest", "rank_thresholds")),
    (90, "bfloat16", 128, ("mix_negatives", "mix_logsumexp")),
    (90, "bfloat16", 128, ("softplus_sum", "softplus_sum_grad_keys")),
    (80, "bfloat16", 128, ("softplus_sum", "softplus_sum_grad_keys")),
    (90, "bfloat16", 128, ("gathered_logsumexp", "gathered_grad_keys", "maxsim")),
    (80, "bfloat16", 128, ("maxsim",)),
    (90, "bfloat16", 128, ("logsumexp+ids", "logsumexp+labels", "logsumexp+ragged", "logsumexp+num_rows")),
    (80, "bfloat16", 128, ("logsumexp+ids", "logsumexp+labels", "logsumexp+ragged", "logsumexp+num_rows")),
    (
        90,
        "bfloat16",
        128,
        ("logsumexp+ids+labels", "logsumexp+bounds", "logsumexp+mask", "logsumexp+pairs", "logsumexp+bias"),
    ),
    (90, "bfloat16", 256, ("logsumexp+ids", "logsumexp+bounds")),
    (90, "float32", 128, ("logsumexp",)),
    (90, "bfloat16", 1024, ("logsumexp",)),
    (90, "bfloat16", 4096, ("info_nce",)),
    (80, "bfloat16", 128, MINING),
    (100, "bfloat16", 128, MINING),
    (80, "bfloat16", 256, ("logsumexp", "logsumexp_grad_keys")),
    (90, "bfloat16", 256, ("logsumexp", "logsumexp_grad_keys", "mine_hardest")),
    (100, "bfloat16", 256, ("logsumexp", "logsumexp_grad_keys")),
    (80, "bfloat16", 128, ("logsumexp+guide", "softplus_sum+guide")),
    (
        90,
        "bfloat16",
        128,
        ("logsumexp+guide", "logsumexp_grad_keys+guide", "mine_hardest+guide", "rank_thresholds+guide"),
    ),
    (90, "bfloat16", 256, ("info_nce+guide",)),
]
B, N = 1024, 1024


def call(triton_ops, op: str, dtype: torch.dtype, D: int) -> None:
    """One launcher on meta tensors of the usual sizes."""
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
        "softplus_sum": (keys, scale, scale, True, *pool),
        "softplus_sum_grad_keys": (keys, scale, scale, empty(B), *pool),
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


def record(ops: tuple[str, ...], dtype: torch.dtype, D: int, capability: int) -> list:
    """(kernel, arguments by position, arguments by name) of every different launch the ops would make on such a card."""
    from triton.runtime.jit import JITFunction

    import negmine.kernels.triton as triton_ops

    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    torch.cuda.current_device = lambda: None
    launches = {}

    def run(self, *args, grid, warmup, **kwargs):
        constants = tuple((p.name, x) for p, x in zip(self.params, args, strict=True) if p.is_constexpr)
        launches.setdefault((self.fn.__name__, constants), (self, args, kwargs))

    JITFunction.run = run
    for op in ops:
        call(triton_ops, op, dtype, D)
    return list(launches.values())


def specialise(kernel, args: tuple, kwargs: dict, capability: int) -> tuple[dict, dict, dict, dict, dict]:
    """Arguments by name, and the types, constants, divisibilities and options by which Triton compiles a kernel for them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialisation, extra = bind(*args, debug=False, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, values, specialisation, extra)
    return values, signature, constants, attributes, options.__dict__


def compile_for(kernel, args: tuple, kwargs: dict, capability: int):
    """The compiled kernel, its arguments specialised as the launch would have them; and its arguments by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values, signature, constants, attributes, options = specialise(kernel, args, kwargs, capability)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), values


def inspect(built, rows: int, columns: int, terms: int, warps: int) -> dict:
    """Registers, stack, spills inside loops, products by instruction (the width that a tile gives them aside), and instructions
    per score of the shortest loop over tiles, and of the search that decides for it.

    terms: of the products that a score takes part in, its own and that of its weight.
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
    # Of 256 columns, without products: that for equal ids and labels.
    searches = [len(x) / (256 * rows / (32 * warps)) for x in inner if sum("ISETP" in y for y in x) > len(x) / 2]
    return {
        "registers": registers, "stack": stack, "local": local, "shared": built.metadata.shared,
        "spills_in_loops": spilled, "products": sorted(sass.products(code)),
        "per_score": min((n / of for n, of in scores), default=0) + max(searches, default=0),
    }  # fmt: skip


def report(capability: int, dtype: str, D: int, ops: tuple[str, ...]) -> None:
    """Compiles one case and prints a JSON line per kernel."""
    for op in ops:
        for kernel, args, kwargs in record((op,), getattr(torch, dtype), D, capability):
            built, values = compile_for(kernel, args, kwargs, capability)
            name = kernel.fn.__name__
            terms = D + values.get("SLICE", 0)
            tile = values.get("BLOCK_B", 1), values.get("BLOCK_K", 1)
            line = inspect(built, *tile, terms, kwargs["num_warps"])
            if values.get("SIGMOID"):
                name += ", sigmoid"
            if brackets := values.get("BRACKETS"):
                name += f", {brackets} bracket{'s' * (brackets > 1)}"
            print(json.dumps({"kernel": name, "pool": op.partition("+")[2], **line}), flush=True)


@pytest.mark.parametrize(
    ("capability", "dtype", "D", "ops"), CASES, ids=lambda x: "+".join(x) if isinstance(x, tuple) else str(x)
)
def test_compiles_without_spills(capability, dtype, D, ops):
    root = Path(__file__).parents[1]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(root)]))
    command = [sys.executable, __file__, str(capability), dtype, str(D), *ops]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert lines
    for line in lines:
        assert line["local"] == 0, line
        assert line["stack"] <= STACK_BYTES, line
        assert line["spills_in_loops"] == 0, line
        assert line["shared"] <= SHARED_BYTES[capability], line
        if dtype == "bfloat16":
            assert line["products"] in ([], [PRODUCT[capability]]), line
        measured = INSTRUCTIONS_PER_SCORE.get((capability, line["kernel"]))
        if measured and (dtype, D) == ("bfloat16", 128):
            assert line["per_score"] <= MOST.get(line["pool"], HEADROOM) * measured, line


if __name__ == "__main__":
    report(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), tuple(sys.argv[4:]))
