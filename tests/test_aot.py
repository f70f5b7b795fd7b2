"""Triton kernels compiled ahead of time for several GPUs: they compile, do not spill, and have few instructions in their loops.

Each case compiles in its own process with a time limit, because the assembler may need minutes for a tile that is too large.
`python tests/test_aot.py 90 bfloat16 128 logsumexp` prints one case, with whichever Triton is first in PYTHONPATH.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import aot

pytest.importorskip("triton")

from negmine.kernels.triton import tiles

TIME_LIMIT = 120  # seconds for one case
# Registers that are saved on the stack outside of innermost loops, or once in several tiles, do not cost measurable time. Spills
# inside an innermost loop do.
STACK_BYTES = 32
HEADROOM = 1.25
INSTRUCTIONS_PER_SCORE = {  # bf16, D = 128; the loop of scan_kernel over selected columns is counted once
    (80, "logsumexp_kernel"): 17.3,
    (90, "logsumexp_kernel"): 10.4,
    (90, "logsumexp_grad_keys_kernel"): 6.9,
    (90, "logsumexp_grad_keys_kernel, sigmoid"): 13.0,
    (90, "softplus_sum_kernel"): 24.3,
    (90, "scan_kernel, 1 bracket"): 10.6,
    (90, "scan_kernel, 2 brackets"): 20.3,
}
# Limits for masks, and for a queue that ends within a tile, as a multiple of the instructions for a pool without them. For ids
# and labels, the limit is for tiles without equal ones. Bounds and pair masks are checked for every score.
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
    "guide": 5.0,  # a second matrix product, with smaller tiles
}
# Limit per block; code for sm_80 also runs on sm_86 and sm_89.
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes of shared memory; each program needs 1 KiB more.
PROCESSOR_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
# Scores of different passes are compared bit for bit, so all passes must use the same matrix instruction, which adds products in
# a fixed order. Other matrix products in the same kernel use it too.
PRODUCT = {80: "HMMA.16816.F32.BF16", 90: "HGMMA.64x16.F32.BF16", 100: "UTCHMMA"}
AMD_PRODUCT = {"gfx942": "v_mfma_f32_32x32x8_bf16", "gfx1100": "v_wmma_f32_16x16x16_bf16"}
AMD_SHARED_BYTES = 64 << 10
AMD_INSTRUCTIONS_PER_SCORE = {  # the same for AMD GPUs, per lane
    ("gfx942", "logsumexp_kernel"): 25.7,
    ("gfx942", "scan_kernel, 1 bracket"): 13.3,
    ("gfx1100", "logsumexp_kernel"): 33.4,
    ("gfx1100", "scan_kernel, 1 bracket"): 21.0,
}
# Kernels whose launchers split the queue into as many parts as the GPU runs programs at the same time.
SPLIT = ("logsumexp_kernel", "scan_kernel", "softplus_sum_kernel", "count_negatives_kernel", "maxsim_kernel")
MINING = ("logsumexp", "mine_hardest")
CASES = [
    (90, "bfloat16", 128, ("info_nce", "logsumexp", "logsumexp_grad_keys", "count_negatives")),
    (90, "bfloat16", 128, ("mine_hardest", "rank_thresholds")),
    (90, "bfloat16", 128, ("mix_negatives", "mix_logsumexp")),
    (90, "bfloat16", 128, ("softplus_sum", "softplus_sum_grad_keys")),
    (80, "bfloat16", 128, ("softplus_sum", "softplus_sum_grad_keys")),
    (90, "bfloat16", 128, ("logsumexp_grad_bias+bias", "softplus_sum_grad_bias+bias+ids")),
    (80, "bfloat16", 128, ("logsumexp_grad_bias+bias", "logsumexp_grad_bias+bias+guide")),
    (90, "bfloat16", 128, ("gathered_logsumexp", "gathered_grad_keys", "maxsim")),
    (80, "bfloat16", 128, ("maxsim",)),
    (90, "bfloat16", 256, ("prefix_logsumexp", "prefix_logsumexp+guide")),
    (80, "bfloat16", 256, ("prefix_logsumexp", "prefix_logsumexp+ids", "prefix_logsumexp+ragged")),
    (90, "float32", 128, ("prefix_logsumexp", "prefix_logsumexp+ids")),
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


def compiled(capability: int, dtype: str, D: int, ops: tuple[str, ...]) -> list[dict]:
    """Run tests/aot.py for one case in a separate process, and return its report."""
    root = Path(__file__).parents[1]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(root)]))
    command = [sys.executable, __file__, str(capability), dtype, str(D), *ops]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert lines
    return lines


def fitting(line: dict, capability: int) -> int:
    """How many programs of a kernel run on a multiprocessor at once: the limit by registers, shared memory and threads."""
    registers = 256 * -(-line["registers"] // 8) * line["warps"]
    return min(65536 // registers, PROCESSOR_BYTES[capability] // (line["shared"] + 1024), 64 // line["warps"])


@pytest.mark.parametrize(
    ("capability", "dtype", "D", "ops"), CASES, ids=lambda x: "+".join(x) if isinstance(x, tuple) else str(x)
)
def test_compiles_without_spills(capability, dtype, D, ops):
    lines = compiled(capability, dtype, D, ops)
    for line in lines:
        assert line["local"] == 0, line
        assert line["stack"] <= STACK_BYTES, line
        assert line["spills_in_loops"] == 0, line
        assert line["shared"] <= SHARED_BYTES[capability], line
        if dtype == "bfloat16":
            assert line["products"] in ([], [PRODUCT[capability]]), line
        if line["kernel"].partition(",")[0] in SPLIT:
            itemsize = 4 if dtype == "float32" else 2
            tile = tiles.score_tile(D, itemsize, capability, "guide" in line["pool"])
            fits, at_once = fitting(line, capability), tiles.resident(tile, capability)
            assert at_once == fits if line["kernel"] == "logsumexp_kernel" else at_once <= fits, line
        measured = INSTRUCTIONS_PER_SCORE.get((capability, line["kernel"]))
        if measured and (dtype, D) == ("bfloat16", 128):
            assert line["per_score"] <= MOST.get(line["pool"], HEADROOM) * measured, line


@pytest.mark.parametrize("ops", [("logsumexp", "logsumexp+ids"), ("mine_hardest",)], ids="+".join)
@pytest.mark.parametrize("arch", AMD_PRODUCT)
def test_compiles_for_amd(arch, ops):
    (capability,) = (tiles.AMD + number for number, name in aot.AMD.items() if name == arch)
    for line in compiled(capability, "bfloat16", 128, ops):
        assert line["scratch"] == line["spilled"] == 0, line
        assert line["shared"] <= AMD_SHARED_BYTES, line
        assert line["products"] in ([], [AMD_PRODUCT[arch]]), line
        measured = AMD_INSTRUCTIONS_PER_SCORE.get((arch, line["kernel"]))
        assert measured is None or 0 < line["per_score"] <= HEADROOM * measured, line


if __name__ == "__main__":
    aot.report(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), tuple(sys.argv[4:]))
