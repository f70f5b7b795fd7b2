"""How the CUDA backend computes scores with tensor cores, under tests/emulator: fragments, descriptors, copies."""

import ctypes
import itertools
import subprocess
import sys

import pytest
import torch

from tests.cases import masks, unit, whole
from tests.compare import exact, rounded, selected
from tests.emulate import STORAGE, pointer, pool_of
from tests.emulated_mining import emulated, mining_library


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_product_of_fragments(dtype):
    """The emulation of each product and the layout that its header states, against a plain product."""
    library = mining_library("emulated")
    for function, rows, columns in [
        (library.emulated_product, 16, 8),
        (library.emulated_warpgroup_product, 64, 64),
    ]:
        left, right = whole(rows, 16, dtype=dtype), whole(columns, 16, dtype=dtype, seed=1)
        product = torch.full((rows, columns), torch.nan)
        assert function(STORAGE[dtype], *map(pointer, (left, right, product))) == 0
        exact("product", product, left.float() @ right.float().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "first"), [(64, 0), (64, 48), (128, 16), (256, 32)])
def test_one_product_that_sums_rows(width, first, dtype):
    """Rows that the tensor cores transpose: their descriptor's offsets, and a lane's share of the result."""
    left, right = whole(64, 16, dtype=dtype), whole(16, width, dtype=dtype, seed=1)
    product = torch.full((64, width), torch.nan)
    places = map(ctypes.c_int32, (width, first, 64 * 128))
    function = mining_library("emulated").emulated_sum_of_rows
    assert function(STORAGE[dtype], pointer(left), pointer(right), *places, pointer(product)) == 0
    exact("sum", product, left.float() @ right.float())


SUM_OF_ROWS = """
import ctypes, sys
library, first, apart = sys.argv[1:]
left, right = (ctypes.c_uint16 * 64 * 16)(), (ctypes.c_uint16 * 64 * 16)()
product = (ctypes.c_float * 64 * 64)()
ctypes.CDLL(library).emulated_sum_of_rows(1, left, right, 64, int(first), int(apart), product)
"""


@pytest.mark.parametrize(
    ("first", "apart", "said"),
    [
        (8, 64 * 128, ""),
        (4, 64 * 128, "begins within the pattern of its swizzle"),
        (0, 64 * 128 + 512, "is not one of whole patterns of its swizzle"),
        (0, 0, "is not one of whole patterns of its swizzle"),
        (56, 64 * 128, "leads out of shared memory"),
    ],
)
def test_rows_that_no_descriptor_names(first, apart, said):
    """What is no canonical layout of the PTX ISA dies in words."""
    call = [sys.executable, "-c", SUM_OF_ROWS, mining_library("emulated")._name, str(first), str(apart)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert (done.returncode == 0) == (said == ""), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("name", ["emulated", "emulated_sm90a"])
def test_a_score_does_not_depend_on_how_a_pass_holds_its_queries(name):
    """32 or 16 queries a warp, in registers or in shared memory, the scores of one chunk or of two at once."""
    q, keys = unit(50, 104, dtype=torch.bfloat16), unit(150, 104, dtype=torch.bfloat16, seed=1)
    sizes = [ctypes.c_int64(size) for size in (50, 150, 104)]
    every = []
    for sixteens, shared, at_once in itertools.product((2, 1), (False, True), (2, 1)):
        scores = torch.full((50, 150), torch.nan)
        held = ctypes.c_int32(sixteens), ctypes.c_bool(shared), ctypes.c_int32(at_once)
        assert mining_library(name).emulated_scores(*held, *sizes, *map(pointer, (q, keys, scores))) == 0
        every.append(scores)
    rounded("scores", every[0], q.double() @ keys.double().T, q.float() @ keys.float().T)
    for scores in every[1:]:
        exact("scores", scores, every[0])


@pytest.mark.parametrize(
    ("D", "start", "masked", "tiles"),
    [(72, 0, False, 4), (72, 8, False, 4), (72, 1, False, 0), (71, 0, False, 0), (72, 0, True, 0)],
    ids=["plain", "aligned", "not aligned", "odd D", "masked"],
)
def test_sm90a_copies_whole_tiles_where_rows_allow(D, start, masked, tiles):
    kernel = emulated("emulated_sm90a")
    q, wide = unit(3, D, dtype=torch.bfloat16), torch.empty(300, 88, dtype=torch.bfloat16)
    keys = wide[:, start : start + D].copy_(unit(300, D, seed=1))
    given = masks("columns", 3, 300) if masked else {}
    before = kernel.boxes()
    scores, index = kernel(q, keys, 9, pool_of(q, keys, **given))
    allowed = given["negative_mask"].expand(3, 300) if masked else None
    selected("scores", scores, index, q.double() @ keys.double().T, allowed)
    assert kernel.boxes() - before == 2 * tiles  # slabs
