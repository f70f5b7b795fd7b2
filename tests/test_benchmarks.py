"""The harness itself: it refuses a wrong answer, its peers agree, its rows become pictures, tables and a plan."""

import csv
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import base, libraries, plan, plot, run
from benchmarks.cases import CASES, SWEEPS, Case, make_inputs, sweep
from benchmarks.measure import Disagreement, measure, with_isa
from benchmarks.peers import OPS, disagreement
from benchmarks.rows import machine_name

TINY = Case("tiny", 4, 1500, 16, "float32", "", tuple(OPS))


def tiny_inputs(op, dtype="float32"):
    """In the batch K is B, and B is large enough that the loss is not about 0."""
    B, K, D = (64, 64, 8) if op == "in_batch" else (4, 1500, 16)
    return make_inputs(Case("tiny", B, K, D, dtype, ""), "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_variants_agree_and_are_timed(op, dtype):
    inputs = tiny_inputs(op, dtype)
    measured = measure(op, inputs, 0.0, [None, "reference"], isas=("portable",), with_peers=True)
    names = [m.variant for m in measured]
    assert names[:4] == ["negmine", "negmine[reference]", "negmine (portable)", "eager"]
    assert ("eager fp32" in names) == (dtype == "bfloat16")
    assert all(m.timing.median > 0 and m.floor_ms > 0 and m.copy_ms > 0 for m in measured)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_answer_is_not_timed(op, monkeypatch):
    right = OPS[op]

    def slightly_wrong(inputs, backend=None):
        first, *rest = right.fused(inputs, backend)
        return first * 1.01, *rest

    monkeypatch.setitem(OPS, op, replace(right, fused=slightly_wrong))
    inputs = tiny_inputs(op)
    with pytest.raises(Disagreement, match=f"negmine: {op}"):
        measure(op, inputs, 0.0, [None])


@pytest.mark.parametrize("name", sorted(name for makers in libraries.MAKERS.values() for name in makers))
def test_packages_answer_the_same(name):
    op = next(op for op, makers in libraries.MAKERS.items() if name in makers)
    inputs = make_inputs(TINY, "cpu")
    answer_of = libraries.MAKERS[op][name](inputs)
    if answer_of is None:
        pytest.skip(f"{name} is not installed")
    assert not disagreement(op, answer_of(inputs), OPS[op].eager(inputs), inputs, 2e-4)


def test_isa_is_given_back():
    from negmine import _ops_cpu

    chosen = _ops_cpu.isa()
    assert with_isa(lambda _: _ops_cpu.isa(), "portable")(None) == "portable"
    assert _ops_cpu.isa() == chosen
    with pytest.raises(ValueError, match="no sse9 here"):
        with_isa(lambda _: None, "sse9")(None)


def test_sweeps_vary_one_letter():
    for letter, values in SWEEPS.items():
        assert [getattr(case, letter) for case in sweep(letter)] == values
        others = {tuple(getattr(case, other) for other in SWEEPS if other != letter) for case in sweep(letter)}
        assert len(others) == 1


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A CSV of three cases' rows, made by the command itself on a shrunken table."""
    monkeypatch.setitem(CASES, "small", TINY)
    monkeypatch.setattr(run, "QUICK", ["small"])
    short = {"K": [plan.FORETELLS, 2 * plan.FORETELLS], "B": [1], "D": [8]}
    shape = Case("", 1, 1500, 8, "float32", "", ("info_nce", "mine_hardest"))
    monkeypatch.setattr(
        run, "sweep", lambda letter: [replace(shape, name=f"{letter}={v}", **{letter: v}) for v in short[letter]]
    )
    common = ["run", "--quick", "--no-tests", "--seconds", "1e-9", "--results", str(tmp_path), "--no-peers"]
    for extra in (["--op", "info_nce", "mine_hardest"], ["--sweep", "K", "B", "D"]):
        monkeypatch.setattr(sys, "argv", common + extra)
        assert run.main() == 0
    return tmp_path / f"{machine_name('cpu')}.csv"


def test_rows_become_pictures_a_table_and_a_plan(rows, capsys):
    with rows.open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == run.COLUMNS
    assert {row["case"] for row in read} == {"tiny", "K=65536", "K=131072", "B=1", "D=8"}
    drawn = plot.draw(rows)
    assert [path.name.removeprefix(rows.stem) for path in drawn] == ["-speed-up.png", "-cases.png", "-scaling.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    table = plot.table(rows)
    assert "4, 1,500, 16 float32 | info_nce" in table and "K=65536" not in table
    page = plan.page(rows)
    assert "| info_nce | 131,072 |" in page and "100 M texts" in page


def test_rows_of_another_header_are_refused(tmp_path):
    old = tmp_path / "old.csv"
    old.write_text("date,case,op,variant,threads\nx,a,b,c,2\n")
    with pytest.raises(SystemExit, match="header"):
        plot.newest(old)


def test_a_red_test_stops_everything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "TESTS", [str(tmp_path / "missing.py")])
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--results", str(tmp_path)])
    assert run.main() == 1
    assert "Nothing was timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_other_commit_runs_the_same_command(tmp_path):
    for spelled in (["--base", "v1"], ["--base=v1"]):
        command = base.command_of(["--quick", *spelled, "--op", "info_nce"], tmp_path)
        assert command[3:6] == ["--quick", "--op", "info_nce"]
        assert "v1" not in command and str(tmp_path) in command


def test_planning_units():
    assert [plan.span(s) for s in (0.5, 3, 600, 10_000, 1e6)] == ["500 ms", "3 s", "10 min", "2.78 h", "11.6 days"]
    assert [plan.size(b) for b in (2**19, 3 * 2**30, 2**41)] == ["0.5 MiB", "3 GiB", "2 TiB"]
    assert torch.get_num_threads() >= 1
