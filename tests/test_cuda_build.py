"""Compilation of kernels/cuda: every file and target, without warnings or spills, and the number of instructions per score."""

import re
import subprocess
from pathlib import Path

import pytest

from build_tools.cuda_toolkit import find_nvcc, inspect
from build_tools.extensions import NVCC_FLAGS, PTXAS_FLAGS
from build_tools.native import SPILL
from tests import sass

ROOT = Path(__file__).parents[1]

SOURCES = sorted(path.name for path in ROOT.glob("kernels/cuda/*.cu"))
# Instructions per score in the innermost loop of the scan of mine_hardest, for D = 128; 2 of them are products by warps, or a
# quarter by warpgroups: those of a turn in which no cut moves among columns that tie and no buffer fills. True: by pairs.
INSTRUCTIONS_PER_SCORE = {
    ("80", False): 10.4, ("90a", False): 8.5, ("100", False): 10.1,
    ("80", True): 10.2, ("90a", True): 9.4, ("100", True): 11.1,
}  # fmt: skip
PRODUCTS = {"80": "HMMA.16816.F32.BF16", "90a": "HGMMA.64x16.F32.BF16", "100": "HMMA.16816.F32.BF16"}
# The same of the sums of logsumexp with their mean, 4 of them products by warps or 3 / 8 by warpgroups: those of a turn that
# meets no mask, bound, pivot or shift that moves; True: with what asks every score whether it is in the pool.
INSTRUCTIONS_PER_SUMMED_SCORE = {
    ("80", False): 13.8, ("90a", False): 8.2, ("100", False): 13.2,
    ("80", True): 20.6, ("90a", True): 14.7, ("100", True): 17.7,
}  # fmt: skip
# The same of logsumexp_grad_keys, which by pairs takes 32 scores a turn on every card.
INSTRUCTIONS_PER_GRADED_SCORE = {
    ("80", False): 11.1, ("90a", False): 6.1, ("100", False): 10.3,
    ("80", True): 15.8, ("90a", True): 14.1, ("100", True): 12.6,
}  # fmt: skip
# The same of the scan of rank_thresholds, by its brackets, for a turn in which no cut moves among columns that tie;
# by pairs a turn is 32 scores, whatever multiplies.
INSTRUCTIONS_PER_RANKED_SCORE = {
    ("80", False, 1): 12.6, ("90a", False, 1): 10.6, ("100", False, 1): 12.3,
    ("80", False, 2): 15.3, ("90a", False, 2): 13.9, ("100", False, 2): 15.7,
    ("80", True, 1): 17.2, ("90a", True, 1): 15.5, ("100", True, 1): 14.8,
    ("80", True, 2): 20.3, ("90a", True, 2): 18.7, ("100", True, 2): 17.7,
}  # fmt: skip
INSTRUCTIONS = {
    "scan": INSTRUCTIONS_PER_SCORE,
    "sum": INSTRUCTIONS_PER_SUMMED_SCORE,
    "grad": INSTRUCTIONS_PER_GRADED_SCORE,
    "rank": INSTRUCTIONS_PER_RANKED_SCORE,
}
HEADROOM = 1.1


@pytest.fixture(scope="module", params=SOURCES)
def compiled(request, tmp_path_factory):
    """(source, object, what nvcc and ptxas said) for every target."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc (NEGMINE_NVCC, CUDA_HOME, PATH)")
    strict = ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command = [nvcc, *NVCC_FLAGS, *PTXAS_FLAGS, *inspect(nvcc).gencode, *strict, "-c", f"kernels/cuda/{request.param}"]
    target = tmp_path_factory.mktemp("nvcc") / "kernel.o"
    done = subprocess.run([*command, "-o", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, target, done.stderr


def test_compiles_clean(compiled):
    _, _, said = compiled
    assert "Used" in said, "ptxas reported nothing, so the spill gate saw nothing"
    assert not SPILL.search(said), said
    assert not re.search(r"[1-9]\d* bytes smem", said), (
        "shared memory is asked for at the launch, where a limit is checked"
    )


def test_scores_cost_few_instructions(compiled):
    pytest.importorskip("triton")
    source, target, _ = compiled
    if source not in ("mine_hardest.cu", "logsumexp.cu", "logsumexp_grad_keys.cu", "rank_thresholds.cu"):
        pytest.skip("computes no score, or only to count")
    sass.show("cuobjdump", "-xelf", "all", target, folder=target.parent)
    seen = set()
    for cubin in target.parent.glob("*.cubin"):
        capability = re.search(r"sm_(\d+a?)", cubin.name)[1]
        for name, code in sass.functions(cubin).items():
            used = sass.products(code)
            assert len(used) <= 1, f"{name}: passes compare scores, so all their products must be of one kind: {used}"
            found = sass.scoring(name, code, capability)
            if found is None:
                continue
            kind = (
                (capability, found.by_pair, found.brackets) if found.kernel == "rank" else (capability, found.by_pair)
            )
            per_score = found.instructions / found.scores
            print(f"sm_{capability}, {found.kernel}, by pairs {found.by_pair}: {per_score:.1f} instructions per score")
            assert 0 < per_score <= HEADROOM * INSTRUCTIONS[found.kernel][kind], (name, kind)
            assert used == {PRODUCTS[capability]}, "scores and sums of rows are by the same products"
            if found.kernel in ("sum", "grad"):
                assert ("tnspB" in code) == (capability == "90a"), "who transposes the rows that are summed"
                halves = code.count("DEPBAR.LE gsb0, 0x1")  # waits that leave the other half's products under way
                one = found.by_pair and found.kernel == "grad"
                assert halves == (0 if capability != "90a" else 1 if one else 2)
            seen.add(kind)
    kernels = 4 if source == "rank_thresholds.cu" else 2
    assert len(seen) == kernels * len(list(target.parent.glob("*.cubin"))), f"found {seen}"
