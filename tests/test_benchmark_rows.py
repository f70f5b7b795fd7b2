"""The result rows of the benchmarks: all columns, older rows are kept, failures do not affect other rows; and the GPU profile."""

import csv
import sys

import pytest
import torch

from benchmarks import cases, measure, peers, profile, run, timing
from benchmarks.cases import Case, make_inputs
from benchmarks.rows import append, machine_name, newest, read
from negmine.ops import backends

TINY = Case("tiny", 8, 2000, 16, "float32", "a test")


@pytest.fixture
def tiny(monkeypatch):
    if next(row for row in backends.BACKENDS if row.name == "cpu").refusal:
        pytest.skip("the compiled CPU ops are not here")
    monkeypatch.setitem(cases.CASES, "tiny", TINY)
    monkeypatch.setattr(peers, "N", 20)
    monkeypatch.setattr(peers, "CHUNK", 2 * TINY.K)  # several chunks
    monkeypatch.setattr(timing, "GRAPH_MS", 0.01)


def benchmark(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "--case", "tiny", "--seconds", "0.01", "--no-tests",
                                      "--no-peers", "--results", str(folder), *arguments])  # fmt: skip
    return run.main()


def rows_in(folder):
    path = next(folder.glob("*.csv"))
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), path


@pytest.mark.parametrize("name", [name for name, op in peers.OPS.items() if op.peers])
def test_other_pytorch_implementations_agree(tiny, name):
    others = dict(peers.OPS[name].peers)
    assert measure.check(name, others, make_inputs(TINY, "cpu")) == []
    assert set(others) == set(peers.OPS[name].peers), "a peer was left out"


def test_a_peer_that_cannot_run_is_left_out_with_a_message(tiny, capsys):
    def hungry(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    variants = {"hungry": hungry, "eager": peers.OPS["rank_thresholds"].eager}
    assert measure.check("rank_thresholds", variants, make_inputs(TINY, "cpu")) == []
    assert list(variants) == ["eager"]
    assert "left out: hungry cannot run rank_thresholds here: CUDA out of memory." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vendor", "family", "model", "says", "name"),
    [
        ("GenuineIntel", "6", "106", "Intel(R) Xeon(R) Processor @ 2.80GHz", "intel-xeon-ice-lake"),
        ("GenuineIntel", "6", "143", "Intel(R) Xeon(R) Platinum 8488C", "intel-xeon-platinum-8488c-sapphire-rapids"),
        ("GenuineIntel", "6", "999", "Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon"),
        ("AuthenticAMD", "25", "1", "AMD EPYC", "amd-epyc-zen-3"),
        ("AuthenticAMD", "25", "17", "AMD EPYC", "amd-epyc"),
    ],
)
def test_a_file_of_rows_is_named_after_the_processor(vendor, family, model, says, name, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    lines = {"vendor_id": vendor, "cpu family": family, "model": model, "model name": says}
    cpuinfo.write_text("".join(f"{key}\t: {value}\n" for key, value in lines.items()))
    assert machine_name("cpu", cpuinfo) == name


def test_rows_carry_every_column_and_old_rows_stay(tiny, monkeypatch, tmp_path, capsys):
    name = machine_name("cpu")
    older = run.COLUMNS[: run.COLUMNS.index("driver")]
    (tmp_path / f"{name}.csv").write_text(",".join(older) + "\n" + ",".join("old" for _ in older) + "\n")
    assert benchmark(monkeypatch, tmp_path, "--op", "mine_hardest", "info_nce") == 0
    rows, path = rows_in(tmp_path)
    assert rows[0] == {**dict.fromkeys(older, "old"), **dict.fromkeys(run.COLUMNS[len(older) :], "")}
    assert [(row["op"], row["variant"]) for row in rows[1:]] == [
        ("mine_hardest", "negmine"), ("mine_hardest", "eager"), ("info_nce", "negmine"), ("info_nce", "eager"),
    ]  # fmt: skip
    for row in rows[1:]:
        assert row["timed"] == "clock" and float(row["call_ms"]) > 0 and row["commit"] and row["torch"]
        assert float(row["peak_share"]) == pytest.approx(float(row["peak_extra_mib"]) * 2**20 / (2 * 8 * 2000), abs=3.3)
    said = capsys.readouterr().out
    assert str(path) in said and "next best" in said


def test_removed_columns_stay_in_older_rows(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    append(path, ["a", "old"], [{"a": 1, "old": 2}])
    append(path, ["a", "new"], [{"a": 1, "new": 3}])
    append(path, ["a", "new", "old"], [{"a": 4}])
    assert read(path) == [
        {"a": "1", "new": "", "old": "2"},
        {"a": "1", "new": "3", "old": ""},
        {"a": "4", "new": "", "old": ""},
    ]
    assert newest(path, "a") == read(path)[1:]
    assert read(tmp_path / "none.csv") == []


def test_other_ops_have_rows_if_one_op_fails(tiny, monkeypatch, tmp_path, capsys):
    def broken(inputs, backend=None):
        raise RuntimeError("device-side assert")

    monkeypatch.setitem(peers.OPS, "mine_hardest", peers.replace(peers.OPS["mine_hardest"], fused=broken))
    assert benchmark(monkeypatch, tmp_path, "--op", "mine_hardest", "info_nce") == 1
    assert {row["op"] for row in rows_in(tmp_path)[0]} == {"info_nce"}
    assert "FAILED     tiny: mine_hardest" in capsys.readouterr().out


def test_the_summary_takes_the_best_of_each_side():
    def row(variant, ms, floor):
        return {"case": "c", "op": "o", "variant": variant, "median_ms": ms, "floor_ms": "9", "rate_floor_ms": floor,
                "peak_share": "0.0312"}  # fmt: skip

    rows = [
        row("negmine[cuda]", "4", "2"),
        row("negmine[triton]", "3", "2"),
        row("eager", "9", "2"),
        row("p", "6", "2"),
    ]
    words = run.summary(rows)[1].split()
    assert words == ["c", "o", "3", "1.50", "p", "6", "2.0", "3.1%"]
    assert run.summary([row("negmine", "3", "")])[1].split() == ["c", "o", "3", "0.33", "none", "ran", "3.1%"]


def test_the_profile_takes_the_furthest_from_its_floor_and_reads_ncu():
    def row(case, op, ms, variant="negmine", floor="1"):
        return {"case": case, "op": op, "variant": variant, "median_ms": ms, "rate_floor_ms": floor}

    rows = [
        row("a", "x", "9"),
        row("a", "x", "2"),
        row("b", "x", "3"),
        row("b", "x", "99", "eager"),
        row("c", "x", "8", floor=""),
    ]
    assert profile.worst(rows) == ("b", "x")  # of equal (case, op) the newest row counts
    with pytest.raises(SystemExit, match="no rows of this GPU"):
        profile.worst([row("c", "x", "8", floor="")])
    printed = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum"
"","","","ns"
"0","7","scan_kernel","1,500"
"1","7","void at::native::reduce<a, b>(c)","500"
"2","7","scan_kernel","2,000"
"""
    found = profile.launches(printed)
    assert found == [("scan_kernel", 1.5), ("void at::native::reduce<a, b>(c)", 0.5), ("scan_kernel", 2.0)]
    assert [line.split()[0] for line in profile.table(found)] == ["4.0", "3.5", "0.5"]
