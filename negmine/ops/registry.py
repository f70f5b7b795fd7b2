"""One declaration for each kernel op: its name, its arguments and results, and their shapes.

Each file negmine/ops/<op>.py declares its op once, in one string:

    declare("gathered_grad_keys(query: vectors[B, D], index: int64[B, M], weight: fp32[B, M], K: int) -> grad_keys: fp32[K, D]",
    ...)

Three things are derived from the declaration: the schema that is registered with torch, the fake implementation that tells
torch.compile the shapes of the results, and the table of ops in kernels/README.md. The implementations are registered elsewhere:
csrc/torch in C++, kernels/triton in Python. Each backend has a namespace of its own (`negmine_cpu::`, `negmine_cuda::`,
`negmine_triton::`), so that no implementation can replace another.

    vectors     fp32, bf16 or fp16; the last dimension is contiguous, rows may have any stride
    fp32, int64, uint8, bool, query     the dtype of a tensor; `query` is the dtype of the argument query
    ints        a list of ints, which the host knows
    [B, D]      the shape: letters or, for results, Python expressions of the letters and the arguments
    name?       the tensor may be None
    [K | B, K]  either shape
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

NAMESPACES = ("negmine_cpu", "negmine_cuda", "negmine_triton")
DTYPES = {"fp32": torch.float32, "int64": torch.int64, "uint8": torch.uint8, "bool": torch.bool}
SCALARS = ("int", "float", "bool")

# The last arguments of every op that reads a queue: negmine/ops/pool.py.
POOL = (
    "negative_mask?: bool[K | B, K], query_ids?: int64[B], negative_ids?: int64[K], query_labels?: int64[B], "
    "negative_labels?: int64[K], lower?: int64[B], upper?: int64[B], num_rows?: int64[], bias?: fp32[K], "
    "guide_query?: vectors[B, G], guide_keys?: vectors[K, G], guide_limit?: fp32[B], same_label: bool"
)
# The arguments that determine how synthetic negatives are drawn: kernels/README.md, section "Draws".
DRAWS = (
    "pairs: int, with_query: int, pair_low: float, pair_high: float, query_low: float, query_high: float, distinct: bool, "
    "quantiles?: fp32[4097], seed: int, step?: int64[], row_offset?: int64[]"
)


@dataclass(frozen=True)
class Value:
    """One argument or one result of an op."""

    name: str
    kind: str  # of a tensor: vectors, query or a key of DTYPES; ints of a list; of a number: int, float or bool
    dims: str | None  # the shape as written in the declaration, None for a number
    optional: bool = False

    @property
    def schema(self) -> str:
        """The argument as written in a torch schema. K and N may come from a shape, and so may be symbolic ints."""
        if self.dims is None:
            return f"{'SymInt' if self.kind == 'int' and self.name in ('K', 'N') else self.kind} {self.name}"
        if self.kind == "ints":
            return f"int[] {self.name}"
        return f"Tensor{'?' if self.optional else ''} {self.name}"

    def __str__(self) -> str:
        kind = self.kind if self.dims is None else f"{self.kind}[{self.dims}]"
        return f"{self.name}{'?' if self.optional else ''}: {kind}"


@dataclass(frozen=True)
class Op:
    """A declared op: the arguments and results that it has in every backend that implements it."""

    name: str
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]
    meaning: str  # what it computes, as printed in kernels/README.md
    sizes: tuple[tuple[CodeType, ...], ...]  # of each result: expressions of letters and arguments
    takes_pool: bool
    takes_draws: bool

    @property
    def schema(self) -> str:
        """The schema of the op for torch.library."""
        results = ", ".join(f"Tensor {value.name}" for value in self.results)
        results = f"({results})" if len(self.results) > 1 else "Tensor"
        return f"{self.name}({', '.join(value.schema for value in self.arguments)}) -> {results}"

    def fake(self, *args: Any) -> Any:
        """Return empty results of the right shapes. torch.compile calls this instead of a kernel while it traces."""
        known: dict[str, Any] = {}
        for value, given in zip(self.arguments, args, strict=True):
            known[value.name] = given
            if value.dims and isinstance(given, Tensor) and "|" not in value.dims:
                known.update(zip(_split(value.dims), given.shape, strict=True))
            elif value.dims and value.kind == "ints":
                known[value.dims] = len(given)
        like = args[0]
        results = [
            like.new_empty([eval(size, {}, known) for size in sizes], dtype=DTYPES.get(value.kind, like.dtype))
            for value, sizes in zip(self.results, self.sizes, strict=True)
        ]
        return tuple(results) if len(results) > 1 else results[0]


OPS: dict[str, Op] = {}


def declare(signature: str, meaning: str) -> Op:
    """Parse a signature and register the op with torch in the namespace of every backend.

    torch keeps an op until the process ends. A module that is imported again, after a failed import or by importlib.reload,
    finds its op there and does not register it again. Raises RuntimeError if the op has another signature there.
    """
    match = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", signature)
    if match is None:
        raise ValueError(f"declare: signature must be 'name(arguments) -> results', got {signature!r}")
    name, written_arguments, written_results = match.groups()
    expanded = written_arguments.replace("*pool", POOL).replace("*draws", DRAWS)
    results = _values(written_results)
    op = Op(
        name,
        _values(expanded),
        results,
        meaning,
        tuple(tuple(compile(size, name, "eval") for size in _split(value.dims or "")) for value in results),
        "*pool" in written_arguments,
        "*draws" in written_arguments,
    )
    for namespace in NAMESPACES:
        known = getattr(getattr(torch.ops, namespace), name, None)
        if known is None:
            torch.library.define(f"{namespace}::{name}", op.schema.removeprefix(name))
            torch.library.register_fake(f"{namespace}::{name}", op.fake)
        elif known.default._schema != torch._C.parse_schema(f"{namespace}::{op.schema}"):
            raise RuntimeError(
                f"declare: this process imported another version of negmine in which {namespace}::{name} has another signature; "
                f"start Python again with one version on sys.path, got {op.schema} after {known.default._schema}"
            )
    OPS[name] = op
    return op


def implement(namespace: str, name: str, function: Callable[..., Any], device: str) -> None:
    """Register a Python implementation of a declared op for tensors of a device type, where it has none yet."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", device.upper()):
        torch.library.impl(f"{namespace}::{name}", device.upper(), function)


def overload(namespace: str, name: str) -> Callable[..., Any]:
    """The op as a function that torch dispatches."""
    return getattr(getattr(torch.ops, namespace), name).default


def _values(text: str) -> tuple[Value, ...]:
    values = []
    for part in _split(text):
        match = re.fullmatch(r"(\w+)(\??): (\w+)(?:\[(.*)\])?", part)
        if match is None or (match[4] is None) != (match[3] in SCALARS and "[" not in part):
            raise ValueError(f"declare: an argument must be 'name: kind' or 'name: kind[dims]', got {part!r}")
        values.append(Value(match[1], match[3], match[4], bool(match[2])))
    return tuple(values)


def _split(text: str) -> Sequence[str]:
    """Split at the commas that are outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
