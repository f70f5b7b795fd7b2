"""Assembly of kernels that Triton compiles for AMD GPUs: what they take, and their loops."""

import re

from tests import sass

WAVE = {"gfx942": 64, "gfx1100": 32}  # lanes that run together


def resources(assembly: str) -> dict[str, int]:
    """Registers of a lane, bytes of scratch memory of a lane, bytes of shared memory of a program, and spilled registers."""
    fields = {
        "registers": "vgpr_count",
        "scratch": "private_segment_fixed_size",
        "shared": "group_segment_fixed_size",
        "spilled": "vgpr_spill_count",
    }
    return {name: int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1]) for name, field in fields.items()}


def parsed(assembly: str) -> tuple[list[str], dict[int, int]]:
    """The instructions of one kernel, and where those that jump lead."""
    labels, code = {}, []
    for line in assembly.splitlines():
        if m := re.match(r"(\.LBB\w+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"\t([a-z]\w+(?:\s+[^;]*)?)", line):
            code.append(m[1].strip())
    jumps = [(i, m[1]) for i, x in enumerate(code) if (m := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", x))]
    return code, {i: labels[to] for i, to in jumps if to in labels}


def innermost(assembly: str) -> list[list[str]]:
    """The instructions of the innermost loops; of those that multiply, loops that do not are part."""
    code, jumps = parsed(assembly)
    return [code[a : b + 1] for a, b in sass.spans(code, jumps)]


def products(code: list[str]) -> set[str]:
    """The matrix instructions."""
    return {m[1] for x in code if (m := re.match(r"(v_(?:mfma|wmma)\w+)", x))}


def multiplied(body: list[str]) -> int:
    """How many products of two numbers a wave makes in these instructions of its matrix cores."""
    shapes = [m.groups() for x in body if (m := re.match(r"v_(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)", x))]
    return sum(int(m) * int(n) * int(k) for m, n, k in shapes)


def inspect(built, terms: int, arch: str) -> dict:
    """What tests/aot.py says of a kernel for a GPU of NVIDIA."""
    assembly = built.asm["amdgcn"]
    code, _ = parsed(assembly)
    inner = innermost(assembly)
    scores = [(len(x), multiplied(x) / (WAVE[arch] * terms)) for x in inner if multiplied(x)]
    found = resources(assembly) | {"shared": built.metadata.shared}
    return found | {
        "products": sorted(products(code)),
        "per_score": min((n / of for n, of in scores), default=0),
    }
