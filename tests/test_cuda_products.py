"""How the CUDA backend asks tensor cores for scores, on the CPU under tests/emulator: fragments, descriptors, copies."""

import ctypes
import itertools

import pytest
import torch

from tests.cases import masks, unit, whole
from tests.compare import exact, rounded, selected
from tests.emulate import STORAGE, pointer, pool_of
from tests.emulated_mining import PRODUCTS, emulated, mining_library


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


@pytest.mark.parametrize("name", PRODUCTS)
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
