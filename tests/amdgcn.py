"""Read the assembly of kernels that Triton compiles for AMD GPUs: resources, loops and matrix instructions."""

import re

from tests import sass

WAVE = {"gfx942": 64, "gfx1100": 32}  # lanes of a wavefront


def resources(assembly: str) -> dict[str, int]:
    """Return registers and scratch bytes per lane, shared bytes per program, and the number of spilled registers."""
    fields = {
        "registers": "vgpr_count",
        "scratch": "private_segment_fixed_size",
        "shared": "group_segment_fixed_size",
        "spilled": "vgpr_spill_count",
    }
    return {name: int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1]) for name, field in fields.items()}


def parsed(assembly: str) -> tuple[list[str], dict[int, int]]:
    """Return the instructions of one kernel, and {index of a jump: index of its target}."""
    labels, code = {}, []
    for line in assembly.splitlines():
        if m := re.match(r"(\.LBB\w+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"\t([a-z]\w+(?:\s+[^;]*)?)", line):
            code.append(m[1].strip())
    jumps = [(i, m[1]) for i, x in enumerate(code) if (m := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", x))]
    return code, {i: labels[to] for i, to in jumps if to in labels}


def innermost(assembly: str) -> list[list[str]]:
    """Return the instructions of the innermost loops. See sass.spans."""
    code, jumps = parsed(assembly)
    return [code[a : b + 1] for a, b in sass.spans(code, jumps)]


def products(code: list[str]) -> set[str]:
    """The matrix instructions."""
    return {m[1] for x in code if (m := re.match(r"(v_(?:mfma|wmma)\w+)", x))}


def multiplied(body: list[str]) -> int:
    """How many products of two numbers a wavefront computes with the matrix instructions among these."""
    shapes = [m.groups() for x in body if (m := re.match(r"v_(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)", x))]
    return sum(int(m) * int(n) * int(k) for m, n, k in shapes)


def inspect(built, terms: int, arch: str) -> dict:
    """The same numbers that tests/aot.py reports for kernels of NVIDIA GPUs, as far as they apply."""
    assembly = built.asm["amdgcn"]
    code, _ = parsed(assembly)
    inner = innermost(assembly)
    scores = [(len(x), multiplied(x) / (WAVE[arch] * terms)) for x in inner if multiplied(x)]
    found = resources(assembly) | {"shared": built.metadata.shared}
    return found | {
        "products": sorted(products(code)),
        "per_score": min((instructions / count for instructions, count in scores), default=0),
    }
