"""Fixtures and settings for all tests: one seed, uninitialised memory filled with NaN, and the backends that can run here."""

import os
import platform

# NumPy's matrix product, with which Triton's interpreter computes tl.dot, reads this when it is loaded. The OpenBLAS kernels for
# processors with AVX2 sum a dot product in an order that depends on its place in the tile, so that two passes with other tiles
# disagree about which keys are in a window. The older kernels have one order, and GPUs have one too.
if platform.machine() == "x86_64":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Sandybridge")

# OpenMP reads this when torch is loaded. Test workers together have more threads than there are cores, and waiting OpenMP threads
# would spin, which needs five times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

os.environ.setdefault("NEGMINE_POISON_OUTPUTS", "1")  # outputs of the C++ ops start as NaN, see _poisoned_memory
if not torch.cuda.is_available():
    # Triton reads this at import; its kernels then run on CPU tensors, slowly.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from build_tools.onednn import avoid_amx_where_it_dies
from negmine.ops import backends

avoid_amx_where_it_dies()  # must come before the first matrix product

# Small tests that together launch every kernel. They run under a sanitizer on a GPU, which is fifty times slower.
SANITIZED = ("test_all_equal", "test_strided", "test_info_nce_mixes", "test_masked_rows", "test_hcl")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PTX = os.environ.get(
    "NEGMINE_PTX"
)  # the compute capability for which `python -m tests.ptx` has Triton's kernels compiled


def _reason_not_here(name: str) -> str:
    row = next(row for row in backends.BACKENDS if row.name == name)
    if name == "reference" or (not row.refusal and DEVICE in (row.device, row.second_device)):
        return ""
    return row.refusal or f"backend {name} takes {row.device} tensors"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Make torch.empty return NaN (or the largest integer), to find kernels that leave part of an output unwritten."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    backends._chosen.clear()  # tests replace kernels in the table of backends
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "triton", "cuda"])
def backend(request):
    """Every backend except the reference. A backend that cannot run here is skipped with the reason that users see."""
    reason = _reason_not_here(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def any_backend(request):
    """Every backend, including the reference."""
    reason = _reason_not_here(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def interpreted(backend: str) -> bool:
    """True if the kernels of this backend run in Triton's interpreter, which is a thousand times slower than compiled code."""
    return backend == "triton" and DEVICE == "cpu" and not PTX


def skip_what_the_interpreter_repeats(backend: str, dtype: torch.dtype, kind: str = "none") -> None:
    """Skip 16-bit cases that show nothing new in Triton's interpreter.

    It converts bf16 and fp16 to fp32 in the same way for every kind of mask, so bf16 without a mask is enough. kind: "none", or
    the mask or option that makes the case differ from another one in bf16.
    """
    if interpreted(backend) and (dtype == torch.float16 or (dtype == torch.bfloat16 and kind != "none")):
        pytest.skip("triton: the interpreter converts 16-bit storage to fp32, so this case shows nothing new")


def pytest_addoption(parser):
    parser.addoption(
        "--shard",
        default="0/1",
        help="i/n: run every n-th test from the i-th, so that n processes compile kernels at once",
    )


# Test files that simulate a GPU or compile for one.
GPU_SIM = ("test_aot", "test_cuda_", "test_launches", "test_ptx")
# Tests for which `make test` runs Triton's interpreter: each kernel is compared with the reference. Other tests need minutes in
# the interpreter, so they are run by `make test-gpu-sim`.
INTERPRETED = (
    "test_kernels",
    "test_ops",
    "test_triton",
    "test_bias::test_sums_and_gradients[triton-columns-torch.float32",
    "test_bias::test_sums_and_gradients[triton-everything-torch.bfloat16",
    "test_guide::test_every_op_is_that_of_the_dense_mask[triton-alone",
    "test_late_interaction::test_maxsim",
    "test_late_interaction::test_a_nan_token",
    "test_rules::test_strided",
)
# Tests of `make smoke`: every CPU kernel, every definition and every error.
SMOKE = (
    "test_contributing", "test_imports", "test_kernels", "test_moco", "test_op_table", "test_ops", "test_queue",
    "test_reference", "test_refusals",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Set markers by file and by backend, and skip tests that need a GPU if there is none."""
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        backend = params.get("backend", params.get("any_backend"))
        if backend == "triton":
            item.add_marker("triton")
            if interpreted(backend) and not f"{item.path.stem}::{item.name}".startswith(INTERPRETED):
                item.add_marker("gpu_sim")
        elif item.path.stem in SMOKE:
            item.add_marker("smoke")
        if item.path.stem.startswith(GPU_SIM) and DEVICE != "cuda":
            item.add_marker("gpu_sim")
        if backend in ("triton", "cuda") and DEVICE == "cuda":
            item.add_marker("gpu")
            if item.name.startswith(SANITIZED):
                item.add_marker("sanitized")
        if item.get_closest_marker("gpu") and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip tests of ops that the cuda backend does not have: it raises BackendUnavailable with the reason."""
    try:
        return (yield)
    except backends.BackendUnavailable as refusal:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "cuda" not in (params.get("backend"), params.get("any_backend")):
            raise
        pytest.skip(str(refusal))


def device_of(backend: str) -> str:
    """The device of the tensors in a test of this backend."""
    return "cpu" if backend == "cpu" else DEVICE


def pytest_terminal_summary(terminalreporter):
    """Print which backends did not run here, and why."""
    for name in ("cuda", "triton", "cpu"):
        reason = _reason_not_here(name)
        if reason:
            terminalreporter.write_line(f"not run here: backend {name}: {reason}")
    if PTX:
        terminalreporter.write_line(
            f"triton: as compiled for compute capability {int(PTX) / 10}, run as PTX on the CPU"
        )
    elif DEVICE == "cpu" and not _reason_not_here("triton"):
        terminalreporter.write_line("triton: interpreted on small shapes and compiled ahead of time, not run on a GPU")
