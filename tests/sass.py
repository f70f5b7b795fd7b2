"""Disassembles compiled kernels with the tools of Triton's package: their loops and the number of instructions in them."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


def show(tool: str, *arguments: object, folder: Path | None = None) -> str:
    """What cuobjdump or nvdisasm prints."""
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def functions(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel of a file, by its mangled name."""
    parts = re.split(r"^//-+ \.text\.(\w+) -+$", show("nvdisasm", "-c", cubin), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parsed(sass: str) -> tuple[list[str], dict[int, int]]:
    """The instructions of one kernel, and where those that jump lead."""
    labels, code = {}, []
    for line in sass.splitlines():
        if m := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(m[1])
    jumps = [(i, m[1]) for i, x in enumerate(code) if (m := re.search(r"(?:BRA|CALL.*NOINC).*?(\.L_x_\d+)", x))]
    return code, {i: labels[to] for i, to in jumps if to in labels}


def spans(code: list[str], jumps: dict[int, int]) -> list[tuple[int, int]]:
    """First and last instruction of every innermost loop; of those that multiply, loops that do not are part."""
    every = [(to, i) for i, to in jumps.items() if to < i]
    multiply = [(a, b) for a, b in every if with_product([code[a : b + 1]])]

    def holds(outer: tuple[int, int], some: list[tuple[int, int]]) -> bool:
        return any(outer != x and outer[0] <= x[0] and x[1] <= outer[1] for x in some)

    return [x for x in every if not holds(x, multiply if x in multiply else every)]


def innermost(sass: str) -> list[list[str]]:
    """The instructions of these loops."""
    code, jumps = parsed(sass)
    return [code[a : b + 1] for a, b in spans(code, jumps)]


def multiplied(body: list[str]) -> int:
    """How many products of two numbers a warp makes in these instructions of tensor cores."""
    shapes = [m.groups() for x in body if (m := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", x))]
    of_groups = sum(int(m) * int(n) * int(k) for m, n, k in shapes) // 4
    return of_groups + 16 * 8 * 16 * sum("HMMA.16816" in x for x in body)


def outside_of_loops(sass: str) -> int:
    """How many instructions of one kernel are in no loop."""
    code, jumps = parsed(sass)
    within = {place for place, to in jumps.items() if to < place for place in range(to, place + 1)}
    return len(code) - len(within)


def turns(sass: str) -> list[int]:
    """Of every innermost loop that multiplies: the fewest instructions of a turn, as jumps over rare work are taken."""
    code, jumps = parsed(sass)
    found = []
    for start, end in spans(code, jumps):
        if not any("MMA" in x for x in code[start : end + 1]):
            continue
        fewest, ahead = {start: 1}, [start]
        for i in ahead:
            goes_on = not re.match(r"((BRA|CALL)(?!.*P\d)|EXIT)", code[i])
            for j in [i + 1 if goes_on else len(code), jumps.get(i, len(code))]:
                if j not in fewest and j < len(code):
                    fewest[j] = fewest[i] + 1
                    ahead.append(j)
        found.append(fewest[end])
    return found


def products(sass: str) -> set[str]:
    """The matrix instructions, their tile's width aside."""
    return {re.sub(r"x\d+x", "x", x) for x in re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)[\w.]*", sass)}


def with_product(every: list[list[str]]) -> list[int]:
    """Instructions of each loop that multiplies."""
    return [len(body) for body in every if any(re.search("GMMA|HMMA|UTC.*MMA|FFMA|v_mfma|v_wmma", x) for x in body)]


# Scores that one thread takes in a turn of the innermost loop of kernels/cuda: chunks of keys, or whole tiles by warpgroups.
SCORES_OF_A_TURN = {"80": 32, "90a": 64, "100": 32}


class Scoring(NamedTuple):
    """One of the kernels of kernels/cuda that compute scores, for bf16 and D from 65 to 128."""

    kernel: str  # scan of mine_hardest, rank of rank_thresholds, sum of logsumexp with its mean, grad of logsumexp_grad_keys
    by_pair: bool  # it asks of every score whether its pool has it
    brackets: int  # of rank, else 1
    scores: int  # of a thread in one turn of its innermost loop
    instructions: int  # of such a turn


def scoring(name: str, code: str, capability: str) -> Scoring | None:
    """What the kernel of this mangled name and machine code is, and how long its innermost loop; None for any other."""
    many = SCORES_OF_A_TURN[capability]
    if m := re.search(r"scan_kernel\w*E1ELi8ELb([01])ELi([12])E", name):
        # Of a turn in which no cut moves among columns that tie.
        return Scoring("rank", m[1] == "1", int(m[2]), 32 if m[1] == "1" else many, min(turns(code)))
    if m := re.search(r"scan_kernel\w*E1ELi8ELb([01])E", name):
        # Of a turn in which no cut moves among columns that tie, and no buffer fills.
        return Scoring("scan", m[1] == "1", 1, many, min(turns(code)))
    if m := re.search(r"sum_kernel\w*E1ELi8ELb1ELb([01])E", name):
        return Scoring("sum", m[1] == "1", 1, many, min(turns(code)))
    if m := re.search(r"grad_kernel\w*E1ELi8ELb([01])E", name):
        return Scoring("grad", m[1] == "1", 1, 32 if m[1] == "1" else many, min(turns(code)))
    return None
