"""The benchmark cases for pytest-benchmark, with its statistics, JSON files and comparisons:

    python -m pytest benchmarks/bench_ops.py --benchmark-only -k "moco and mine_hardest"
    python -m pytest benchmarks/bench_ops.py --benchmark-only --benchmark-autosave --benchmark-compare

Each (op, case) is a group of variants. A variant is timed only if its results agree with PyTorch in float64.
"""

from functools import cache

import pytest
import torch

from benchmarks.cases import CASES, ON_CPU, ON_GPU, Inputs, make_inputs
from benchmarks.measure import OURS, Variants, check, variants_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ON_GPU if DEVICE == "cuda" else ON_CPU


@cache
def inputs_of(case: str) -> Inputs:
    return make_inputs(CASES[case], DEVICE)


@cache
def variants(op: str, case: str) -> Variants:
    return variants_of(op, inputs_of(case), [None], with_peers=True)


@pytest.mark.parametrize("variant", [OURS, "eager", "FAISS IndexFlatIP", "usearch exact"])
@pytest.mark.parametrize("op, case", [(op, name) for name in NAMES for op in CASES[name].ops])
def test_op(benchmark, op, case, variant):
    run = variants(op, case).get(variant)
    if run is None:
        pytest.skip(f"{variant} does not do {op}, or is not installed")
    assert not check(op, {variant: run}, inputs_of(case))
    benchmark.group = f"{op}: {case}"

    def call() -> None:
        run(inputs_of(case))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
