"""kernels/cuda with and without a GPU: what each file compiles to, and mix_negatives.

nvcc compiles every file for every target without a warning or a spill, and mix_negatives runs on the CPU under
tests/emulator, which executes the same source with one fiber per CUDA thread. The same cases run on a GPU, where there
is one, and are small enough for compute-sanitizer.
"""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from build_tools.cuda_toolkit import find_nvcc, inspect
from build_tools.extensions import NVCC_FLAGS, PTXAS_FLAGS
from build_tools.native import SPILL
from negmine import Mix, cpp_ops, philox, reference
from negmine.mixing import draws_of
from tests import emulate, sass
from tests.cases import unit
from tests.compare import exact, rounded
from tests.emulate import STORAGE, on_gpu

ROOT = Path(__file__).parents[1]

SOURCES = sorted(path.name for path in ROOT.glob("kernels/cuda/*.cu"))
# Instructions per score in the innermost loop of the scan of mine_hardest, over chunks of keys, for D = 128; 2 of them are
# products by warps, or a quarter by warpgroups, whose loop is over tiles: without its fetch, of which a turn takes one of
# three ways. Where the pool goes by pairs (True) a buffer that fills is cleared in the same loop, which few turns run.
SCORES_OF_A_TURN = {"80": 32, "90a": 64, "100": 32}  # of one thread
INSTRUCTIONS_PER_SCORE = {
    ("80", False): 9.9, ("90a", False): 7.9, ("100", False): 9.7,
    ("80", True): 21.9, ("90a", True): 23.4, ("100", True): 67.6,
}  # fmt: skip
PRODUCTS = {"80": "HMMA.16816.F32.BF16", "90a": "HGMMA.64x16.F32.BF16", "100": "HMMA.16816.F32.BF16"}
# The same of the sums of logsumexp with their mean, 4 of them products: those of a turn that meets no mask, bound, pivot or new
# maximum; True: with what asks every score whether it is in the pool.
INSTRUCTIONS_PER_SUMMED_SCORE = {
    ("80", False): 15.4, ("90a", False): 15.4, ("100", False): 14.3,
    ("80", True): 21.3, ("90a", True): 21.1, ("100", True): 17.9,
}  # fmt: skip
# The same of the scan of rank_thresholds, by its brackets, for a turn in which no cut moves among columns that tie;
# by pairs a turn is 32 scores, whatever multiplies.
INSTRUCTIONS_PER_RANKED_SCORE = {
    ("80", False, 1): 12.6, ("90a", False, 1): 10.6, ("100", False, 1): 12.3,
    ("80", False, 2): 15.3, ("90a", False, 2): 13.9, ("100", False, 2): 15.7,
    ("80", True, 1): 17.2, ("90a", True, 1): 15.5, ("100", True, 1): 14.8,
    ("80", True, 2): 20.3, ("90a", True, 2): 18.7, ("100", True, 2): 17.7,
}  # fmt: skip
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
    if source not in ("mine_hardest.cu", "logsumexp.cu", "rank_thresholds.cu"):
        pytest.skip("computes no score, or only to count")
    sass.show("cuobjdump", "-xelf", "all", target, folder=target.parent)
    seen = set()
    for cubin in target.parent.glob("*.cubin"):
        capability = re.search(r"sm_(\d+a?)", cubin.name)[1]
        for name, code in sass.functions(cubin).items():
            used = sass.products(code)
            used = {
                x for x in used if "HGMMA" in x
            } or used  # where scores are by warpgroups, sums of keys are still by warps
            assert len(used) <= 1, f"{name}: passes compare scores, so all their products must be of one kind: {used}"
            if m := re.search(r"scan_kernel\w*E1ELi8ELb([01])ELi([12])E", name):  # bf16, D up to 128
                by_pair, brackets = m[1] == "1", int(m[2])
                per_score = min(sass.turns(code)) / (32 if by_pair else SCORES_OF_A_TURN[capability])
                print(
                    f"sm_{capability}, by pairs {by_pair}: {per_score:.1f} instructions per score, {brackets} brackets"
                )
                assert 0 < per_score <= HEADROOM * INSTRUCTIONS_PER_RANKED_SCORE[capability, by_pair, brackets]
                seen.add((capability, by_pair, brackets))
            elif m := re.search(r"scan_kernel\w*E1ELi8ELb([01])E", name):  # bf16, D up to 128
                by_pair = m[1] == "1"
                count = sass.from_products_on if capability == "90a" else sass.with_product
                per_score = min(count(sass.loops(code))) / SCORES_OF_A_TURN[capability]
                print(f"sm_{capability}, by pairs {by_pair}: {per_score:.1f} instructions per score")
                assert 0 < per_score <= HEADROOM * INSTRUCTIONS_PER_SCORE[capability, by_pair], (capability, by_pair)
                assert used == {PRODUCTS[capability]}
                seen.add((capability, by_pair))
            if m := re.search(r"sum_kernel\w*E1ELi8ELb1ELb([01])E", name):  # bf16, D up to 128, with the mean
                by_pair = m[1] == "1"
                per_score = min(sass.turns(code)) / 32  # a turn is a chunk, whatever multiplies
                print(f"sm_{capability}, by pairs {by_pair}: {per_score:.1f} instructions per summed score")
                assert 0 < per_score <= HEADROOM * INSTRUCTIONS_PER_SUMMED_SCORE[capability, by_pair]
                seen.add((capability, by_pair))
    kernels = 4 if source == "rank_thresholds.cu" else 2
    assert len(seen) == kernels * len(list(target.parent.glob("*.cubin"))), f"found {seen}"


@pytest.fixture(scope="module")
def emulated_kernel(tmp_path_factory):
    """kernels/cuda/mix_negatives.cu as a C function; undefined behaviour aborts."""
    function = emulate.build("mix_negatives", tmp_path_factory.mktemp("emulator")).emulated_mix_negatives
    i64, i32, u32, f32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p
    function.argtypes = [*[i64] * 3, *[pointer] * 3, *[i64] * 3, *[i32] * 2, *[i64] * 2, *[f32] * 4]
    function.argtypes += [ctypes.c_bool, pointer, u32, u32, i64, pointer, pointer, pointer]

    def mix_negatives(query, negative_keys, hard_index, mix, seed, step, row_offset):
        (B, D), S = query.shape, mix.total
        vectors = torch.full((B, S, D), torch.nan, dtype=query.dtype)
        parents = torch.full((B, S, 2), -9)
        coefficients = torch.full((B, S), torch.nan)
        quantiles = philox.beta_quantiles(mix.concentration)
        error = function(
            *(B, hard_index.shape[1], D, query.data_ptr(), negative_keys.data_ptr(), hard_index.data_ptr()),
            *(query.stride(0), negative_keys.stride(0), hard_index.stride(0)),
            *(STORAGE[query.dtype], STORAGE[negative_keys.dtype], mix.pairs, mix.with_query),
            *(*mix.pair_range, *mix.query_range, mix.distinct, None if quantiles is None else quantiles.data_ptr()),
            *(seed, step, row_offset, vectors.data_ptr(), parents.data_ptr(), coefficients.data_ptr()),
        )
        assert error == 0
        return vectors, parents, coefficients

    return mix_negatives


def gpu_op(query, negative_keys, hard_index, mix, seed, step, row_offset):
    tensors = [on_gpu(tensor) for tensor in (query, negative_keys, hard_index)]
    draws = draws_of(mix, torch.device("cuda"), seed, step, row_offset)
    return tuple(out.cpu() for out in torch.ops.negmine.mix_negatives(*tensors, *draws))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=(pytest.mark.gpu, pytest.mark.sanitized))])
def kernel(request):
    """mix_negatives on CPU tensors, by the emulator or by the GPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated_kernel")
    if cpp_ops.CUDA_REFUSAL:
        pytest.skip(cpp_ops.CUDA_REFUSAL)
    return gpu_op


def check(kernel, query, keys, mix, usable=None, seed=0, step=0, row_offset=0):
    """The kernel against the reference: draws exact, vectors within rounding."""
    _, index = reference.mine_hardest(query.double(), keys.double(), mix.skip + mix.hard, usable)
    got = kernel(query, keys, index[:, mix.skip :], mix, seed, step, row_offset)
    draw = {"seed": seed, "step": step, "row_offset": row_offset}
    truth = reference.mix_negatives(query.double(), keys.double(), mix, usable, **draw)
    plain = reference.mix_negatives(query.float(), keys.float(), mix, usable, **draw)
    exact("parents", got[1], truth[1])
    exact("coefficients", got[2], plain[2])
    rounded("vectors", got[0], truth[0], plain[0].to(query.dtype))
    return got


@pytest.mark.parametrize("query_dtype", STORAGE)
@pytest.mark.parametrize("keys_dtype", STORAGE)
@pytest.mark.parametrize("D", [4, 130])  # in quads, and one element at a time
def test_storage(kernel, query_dtype, keys_dtype, D):
    check(kernel, unit(2, D, dtype=query_dtype), unit(12, D, dtype=keys_dtype, seed=1), Mix(6, 3, 2))


@pytest.mark.parametrize(
    ("shape", "mix"),
    [  # B, K, D
        ((1, 1, 1), Mix(1, 1, 1)),
        ((0, 3, 4), Mix(2, 1, 1)),
        ((2, 5, 7), Mix(9, 3, 2)),  # fewer negatives than Mix.hard: -1 at the end
        ((3, 70, 3), Mix(64, 5, 0, skip=3)),
        ((2, 40, 128), Mix(33, 0, 5, query_range=(0.1, 0.9))),
        ((1, 1100, 8), Mix(1100, 16, 16, concentration=0.4)),
        ((1, 2, 1000), Mix(2, 16, 1, distinct=True)),
        ((1, 3, 2), Mix(3, 16, 1, distinct=False, pair_range=(0.25, 0.5))),
    ],
    ids=str,
)
def test_shapes_and_draws(kernel, shape, mix):
    B, K, D = shape
    check(kernel, unit(B, D), unit(K, D, seed=1), mix, seed=2**32 - 1, step=77, row_offset=2**33 + 5)


def test_row_without_negatives_is_zero(kernel):
    usable = torch.ones(3, 9, dtype=torch.bool)
    usable[1] = False
    vectors, parents, coefficients = check(kernel, unit(3, 5), unit(9, 5, seed=1), Mix(4, 2, 2), usable)
    assert (parents[1] == -1).all()
    assert (vectors[1] == 0).all()
    assert (coefficients[1] == 0).all()


def test_a_mix_of_nothing_is_zero(kernel):
    vectors, _, _ = check(kernel, torch.zeros(1, 6), torch.zeros(4, 6), Mix(4, 2, 2))
    assert (vectors == 0).all()


def test_layout_changes_no_bit(kernel):
    query, keys, mix = unit(2, 12), unit(30, 12, seed=1), Mix(8, 6, 6)
    padded = torch.full((30, 13), torch.nan)
    padded[:, :12] = keys
    plain, strided = (check(kernel, query, each, mix) for each in (keys, padded[:, :12]))
    exact("vectors", strided[0], plain[0])


def test_nan_stays_in_its_row(kernel):
    query = unit(2, 6)
    _, index = reference.mine_hardest(query, unit(9, 6, seed=1), 4)
    query[1] = torch.nan
    vectors, _, _ = kernel(query, unit(9, 6, seed=1), index, Mix(4, 2, 3), 0, 0, 0)
    assert vectors[0].isfinite().all()
    assert vectors[1, :2].isfinite().all()
    assert vectors[1, 2:].isnan().all()
