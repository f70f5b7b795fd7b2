"""The predicted times of docs/gpu.md: the arithmetic, the committed rows, the page, and that the rows match today's kernels."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import CARDS, FOLDER, SHAPES, Launch, Time
from benchmarks.rows import END, RESULTS, read
from tests import sass

H100 = CARDS["H100, H200"]
BLANK = Launch("H100, H200", "triton", "info_nce", "", 256, "a kernel")
TRACE = """
import json
from benchmarks.gpu_trace import trace
for launch in trace("H100, H200", "triton", ("info_nce",)):
    print(json.dumps(launch))
"""


def times(launch):
    return gpu_model.time_of(launch, H100)


def test_one_launch_by_hand():
    launch = gpu_model.LAUNCH_US
    assert times(BLANK) == Time(launch, launch)
    # 8 warps with 1,000 instructions on each multiprocessor, which issues four instructions per clock.
    busy = BLANK._replace(programs=132, warps=8, turns=9, per_turn=100, outside=100)
    assert times(busy).low == pytest.approx(launch + 2000 / 1755)
    # With one more program, one multiprocessor runs two of them.
    assert times(busy._replace(programs=133)).low == pytest.approx(launch + 4000 / 1755, rel=1e-6)
    # 2,048 multiply-adds per clock, at the same time (low) or afterwards (high).
    both = busy._replace(multiply_adds=132 * 2048 * 3000)
    assert times(both) == pytest.approx((launch + 3000 / 1755, launch + 5000 / 1755))
    assert times(busy._replace(exponentials=132 * 16 * 3000)).low == pytest.approx(launch + 3000 / 1755)
    assert times(busy._replace(bytes=30_000_000)).low == pytest.approx(launch + 10)


def test_floors_and_goals_are_those_of_the_products():
    scores = 4096 * 65536 * 128 / (132 * 2048 * 1755)  # microseconds
    large = SHAPES[-1]
    assert (large.B, large.K, large.D) == (4096, 65536, 128)
    assert gpu_model.floor_us("mine_hardest", large, H100) == pytest.approx(scores)
    assert gpu_model.floor_us("info_nce", large, H100) == pytest.approx(2 * scores)
    assert gpu_model.goal_us("window", large, H100) == pytest.approx(3.5 * scores / H100.reached)
    assert gpu_model.goal_us("info_nce", large, H100) == pytest.approx(1.3 * 2 * scores / H100.reached)


def test_the_times_follow_from_the_launches():
    made = gpu_model.times([Launch.of(row) for row in read(FOLDER / "launches.csv")])
    assert [{name: str(value) for name, value in row.items()} for row in made] == read(FOLDER / "times.csv")
    assert len(made) == len(CARDS) * 2 * len(gpu_model.OPS) * 2 * len(SHAPES)
    for row in made:
        assert 0 < float(row["floor_us"]) < float(row["low_us"]) <= float(row["high_us"]), row


def test_no_launch_multiplies_less_than_the_floor():
    calls = {}
    for launch in (Launch.of(row) for row in read(FOLDER / "launches.csv")):
        calls[launch[:5]] = calls.get(launch[:5], 0) + launch.multiply_adds
    for (_, _, op, _, B), multiply_adds in calls.items():
        assert multiply_adds >= gpu_model.PRODUCTS[op] * B * 65536 * 128, op


def test_the_page_has_the_table():
    text = gpu_model.PAGE.read_text().split(gpu_model.BEGIN)[1].split(END)[0]
    assert text.strip() == gpu_model.table(read(FOLDER / "times.csv"))


def test_a_measured_row_has_its_prediction_beside_it():
    row = {"op": "info_nce", "variant": "negmine[triton]", "B": 256, "K": 65536, "D": 128, "dtype": "bfloat16"}
    known = {"card": "H100, H200", "backend": "triton", "op": "info_nce", "B": "256", "K": "65536", "D": "128"}
    known |= {"dtype": "bfloat16", "low_us": "20", "high_us": "1500"}
    rows = [known | {"ids": "ids"}, known | {"ids": "", "low_us": "10"}]
    assert gpu_model.predicted("nvidia-h200", row, rows) == "0.02 to 1.5"
    assert gpu_model.predicted("nvidia-h200", row | {"variant": "negmine"}, rows) == "0.02 to 1.5"
    assert gpu_model.predicted("nvidia-h200", row | {"op": "whole_queue"}, rows) == "0.01 to 1.5"  # no ids
    for other in ({"variant": "eager"}, {"variant": "negmine[cuda]"}, {"K": 1024}, {"op": "mochi"}):
        assert gpu_model.predicted("nvidia-h200", row | other, rows) == ""
    assert gpu_model.predicted("nvidia-l4", row, rows) == ""


def test_a_backward_jump_that_runs_once_is_not_a_loop():
    """Code for diverged lanes is at the end of a kernel and jumps back."""
    lines = [
        "MOV R1, R2", ".L_x_0:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "BRA.DIV UR4, `(.L_x_2)", ".L_x_1:", "STG [R2], R1",
        "EXIT", ".L_x_2:", "SHFL.IDX PT, R1, R1, R4", "BRA `(.L_x_1)",
    ]  # fmt: skip
    code = "\n".join(line if line.endswith(":") else f"/*0000*/ {line};" for line in lines)
    assert sass.innermost(code) == [["FADD R1, R1, R1", "@P0 BRA `(.L_x_0)"]]
    assert sass.outside_of_loops(code) == 6


@pytest.mark.gpu_sim
def test_the_launches_are_those_of_the_kernels_as_they_are():
    """Trace and compile one op again, and compare with its committed rows."""
    pytest.importorskip("triton")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", TRACE]
    done = subprocess.run(command, cwd=RESULTS.parents[1], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    made = [Launch(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    rows = [Launch.of(row) for row in read(FOLDER / "launches.csv")]
    kept = [x for x in rows if (x.card, x.backend, x.op) == ("H100, H200", "triton", "info_nce")]
    advice = "run `python -m benchmarks.gpu_trace` and `python -m benchmarks.gpu_model`"
    counted = ("per_turn", "outside")  # these differ slightly between versions of Triton
    assert [x._replace(per_turn=0, outside=0) for x in made] == [x._replace(per_turn=0, outside=0) for x in kept], (
        advice
    )
    for ours, row in zip(made, kept, strict=True):
        for name in counted:
            assert getattr(ours, name) == pytest.approx(getattr(row, name), rel=0.25, abs=50), (ours.kernel, advice)
