"""The benchmarks: wrong results are rejected, the variants agree, and rows become plots, tables and estimates."""

import csv
import dataclasses
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from benchmarks import base, libraries, plan, plot, run, simulate
from benchmarks.cases import CASES, SWEEPS, Case, make_inputs, sweep
from benchmarks.measure import Disagreement, measure, with_isa
from benchmarks.peers import OPS, disagreement
from benchmarks.rows import RESULTS, machine_name, write

TINY = Case("tiny", 4, 1500, 16, "float32", "", tuple(OPS))


def tiny_inputs(op, dtype="float32"):
    """For ops on a batch, K = B, and B is large enough that the loss is not close to 0."""
    B, K, D = (64, 64, 8) if op in ("in_batch", "locked") else (4, 1500, 16)
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
def test_packages_agree(name):
    op = next(op for op, makers in libraries.MAKERS.items() if name in makers)
    inputs = make_inputs(TINY, "cpu")
    answer_of = libraries.MAKERS[op][name](inputs)
    if answer_of is None:
        pytest.skip(f"{name} is not installed")
    assert not disagreement(op, answer_of(inputs), OPS[op].eager(inputs), inputs, 2e-4)


class Index:
    """An exact index with the interface of faiss.GpuIndexFlatIP."""

    def __init__(self, resources, dim):
        assert dim == 16

    def add(self, keys):
        self.keys = keys

    def search(self, query, k):
        return (query @ self.keys.T).topk(k, dim=1)


class LiT:
    def __init__(self, temperature, normalized_inputs, stable):
        assert normalized_inputs and not stable
        self.temperature = temperature

    def __call__(self, query, keys):
        return F.cross_entropy(query @ keys.T / self.temperature, torch.arange(len(query)))


def attend(query, keys, values, scale):
    """(1, rows, 1, D) each -> mean, and lse (1, 1, rows and padding)."""
    logits = scale * query[0, :, 0] @ keys[0, :, 0].T  # (B, K)
    return (logits.softmax(1) @ values[0, :, 0])[None, :, None], F.pad(logits.logsumexp(1), (0, 5))[None, None]


def flash_attn_func(log_sum_exp, *of_version):
    """Return flash_attn_func as a version of FlashAttention has it: `log_sum_exp` is the argument that asks for the log-sum-exp.

    The function takes queries, keys and values (1, rows, 1, D), and returns the mean and lse (1, 1, rows)."""

    def attention(query, keys, values, softmax_scale=None, **options):
        assert options.pop(log_sum_exp) and set(options) <= set(of_version)
        mean, lse = attend(query, keys, values, softmax_scale)
        return mean, lse[..., : query.shape[1]], *[None] * (not of_version)

    return {"flash_attn_func": attention}


def squared_distances(query, keys, k):
    found = torch.cdist(query.double(), keys.double()).square().topk(k, dim=1, largest=False)
    order = torch.randperm(k)  # the order of the results is not specified
    return found.values[:, order].float(), found.indices[:, order].int()


STANDINS = {
    "faiss": {"GpuIndexFlatIP": Index, "StandardGpuResources": object},
    "faiss.contrib.torch_utils": {},
    "cuvs.neighbors.brute_force": {
        "build": lambda keys, metric: {"inner_product": keys}[metric],
        "search": lambda index, query, k: [x.numpy() for x in (query @ index.T).topk(k, dim=1)],
    },
    "xformers.ops.fmha": {"memory_efficient_attention_forward_requires_grad": attend},
    "flash_attn": flash_attn_func("return_attn_probs"),
    "flash_attn_interface": flash_attn_func("return_attn_probs", "num_splits"),
    "flash_attn.cute": flash_attn_func("return_lse", "num_splits"),
    "flashlib.primitives.knn": {"flash_knn": squared_distances},
    "inf_cl.flash": {
        "cal_flash_loss": lambda q, k, labels, scale, head: F.cross_entropy(scale * q @ k.T, labels, reduction="none")
    },
    "memeff": {"MemoryEfficientLiTLoss": LiT},
}
ON_CARDS = {
    "mine_hardest": ["FAISS GpuIndexFlatIP", "cuVS brute force", "FlashLib"],
    "whole_queue": ["xformers attention", "FlashAttention-2", "FlashAttention-3", "FlashAttention-4"],
    "in_batch": ["Inf-CL"],
    "locked": ["Inf-CL", "memeff LiT"],
}


@pytest.mark.parametrize("op", ON_CARDS)
def test_gpu_packages_are_called_with_their_signatures(op, monkeypatch):
    """Fakes with the signatures of the packages check that calls and results are correct."""
    monkeypatch.setattr(libraries, "on_gpu", lambda inputs: True)
    for name, content in STANDINS.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.split(".")[0], sys.modules.get(name.split(".")[0]) or module)
    inputs = tiny_inputs(op)
    found = libraries.variants(op, inputs)
    assert [name for name in found if name in ON_CARDS[op]] == ON_CARDS[op]
    for name in ON_CARDS[op]:
        assert not disagreement(op, found[name](inputs), OPS[op].eager(inputs), inputs, 2e-4), name


@pytest.mark.parametrize("op", ON_CARDS)
def test_packages_that_are_not_here_are_named(op, monkeypatch):
    monkeypatch.setattr(libraries, "on_gpu", lambda inputs: True)
    monkeypatch.setattr(libraries, "ABSENT", {})
    for name in STANDINS:
        monkeypatch.setitem(sys.modules, name, None)
    assert not set(libraries.variants(op, tiny_inputs(op))) & set(ON_CARDS[op])
    reasons = [reason for name, reason in libraries.ABSENT.items() if name in STANDINS]
    assert len(reasons) == len(ON_CARDS[op])
    assert all(reason.startswith("not installed: ") for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "compiled"),
    [(["--device", "cuda"], True), (["--device", "cuda", "--no-peers"], False), (["--device", "cpu"], False),
     (["--device", "cuda", "--compile", "clip"], False), (["--device", "cpu", "--compile"], True)],
)  # fmt: skip
def test_torch_compile_is_a_peer_on_a_gpu(arguments, compiled, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    asked = []
    monkeypatch.setattr(run, "measure", lambda *args, with_compile, **more: asked.append(with_compile) or [])
    run.rows_of("whole_queue", CASES["moco-bf16"], None, run.arguments())
    assert asked == [compiled]


def test_a_package_that_fails_is_reported_and_skipped(monkeypatch):
    def failing(inputs):
        raise AssertionError("no such shape")

    makers = {"info_nce": {"unready": failing, "failing": lambda inputs: failing}}
    monkeypatch.setattr(libraries, "MAKERS", makers)
    monkeypatch.setattr(libraries, "ABSENT", {})
    names = [m.variant for m in measure("info_nce", tiny_inputs("info_nce"), 0.0, [None], with_peers=True)]
    assert names == ["negmine", "eager"]
    assert libraries.ABSENT == {"unready": "no such shape"}


def test_with_isa_restores_the_instruction_set():
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
    """A CSV file with rows of three cases, written by the command with a shortened list of cases."""
    monkeypatch.setitem(CASES, "small", TINY)
    monkeypatch.setattr(run, "QUICK", ["small"])
    short = {"K": [plan.PREDICTS, 2 * plan.PREDICTS], "B": [1], "D": [8]}
    shape = Case("", 1, 1500, 8, "float32", "", ("info_nce", "mine_hardest"))
    monkeypatch.setattr(
        run, "sweep", lambda letter: [replace(shape, name=f"{letter}={v}", **{letter: v}) for v in short[letter]]
    )
    common = ["run", "--quick", "--no-tests", "--seconds", "1e-9", "--results", str(tmp_path), "--no-peers"]
    for extra in (["--op", "info_nce", "mine_hardest"], ["--sweep", "K", "B", "D"]):
        monkeypatch.setattr(sys, "argv", common + extra)
        assert run.main() == 0
    return tmp_path / f"{machine_name('cpu')}.csv"


def test_rows_become_pictures_tables_and_a_plan(rows, monkeypatch):
    with rows.open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == run.COLUMNS
    assert {row["case"] for row in read} == {"tiny", "K=65536", "K=131072", "B=1", "D=8"}
    drawn = plot.draw(rows)
    assert [path.name.removeprefix(rows.stem) for path in drawn] == ["-speed-up.png", "-cases.png", "-scaling.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    table = plot.table(rows)
    assert "4, 1,500, 16 float32 | info_nce" in table and "K=65536" not in table
    monkeypatch.setattr(plot, "SHOWN", (("tiny", "info_nce", "the loss"), ("never-measured", "info_nce", "nothing")))
    lines = [line for line in plot.summary([rows]).splitlines() if line.startswith("| ") and "float32" in line]
    assert [line.split(" | ")[1] for line in lines] == ["the loss"]
    page = plan.page(rows)
    assert "| info_nce | 131,072 |" in page and "100 M texts" in page


def test_a_file_with_other_columns_is_refused(tmp_path):
    old = tmp_path / "old.csv"
    old.write_text("date,case,op,variant,threads\nx,a,b,c,2\n")
    with pytest.raises(SystemExit, match="the columns are not those"):
        plot.newest(old)


def test_nothing_is_timed_if_a_kernel_test_fails(monkeypatch, tmp_path, capsys):
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


def events(*of):
    yield from of


def test_a_simulation_shares_processors_and_waits_for_the_slowest():
    node = simulate.Node((1.0, 1.5))  # two processes at once need 1.5 times as long as one
    work = lambda seconds: ("work", node, seconds)  # noqa: E731
    assert simulate.simulate([events(work(3.0))]) == pytest.approx(3)
    assert simulate.simulate([events(work(3.0)), events(work(1.0))]) == pytest.approx(1.5 + 2)
    assert simulate.simulate([events(work(1.0)) for _ in range(4)]) == pytest.approx(2 * 1.5)
    meeting = [events(work(2.0), ("meet", 0, 2), ("sleep", None, 1.0)), events(("meet", 0, 2), work(4.0))]
    assert simulate.simulate(meeting) == pytest.approx(2 + 4)
    with pytest.raises(RuntimeError, match="processes wait for others that have ended"):
        simulate.simulate([events(("meet", 0, 2))])


RATES = simulate.Rates(1e-11, 0.01, 1e-9, 1e-6, 5e-5, 1e-8, 1e-4, 1e-3, 1e-9, 1.0)


def test_a_simulated_job_takes_as_long_as_its_largest_shard():
    seconds = [
        simulate.on_one_machine(RATES, simulate.Job(8192, shards)) for shards in ((120_000, 0), (90_000, 30_000))
    ]
    even = simulate.on_one_machine(RATES, simulate.Job(8192, (60_000, 60_000)))
    scanned = 8192 * 60_000 * 128 * RATES.scan + 60_000 * 512 * RATES.hash
    assert seconds[0] - even == pytest.approx(scanned, rel=0.02) and seconds[1] - even == pytest.approx(
        scanned / 2, rel=0.02
    )
    slow = simulate.on_nodes(RATES, simulate.Job(8192, (60_000, 60_000)), RATES.byte, 2.0)
    assert slow - even == pytest.approx(8 * RATES.scan_batch + 8192 * 60_000 * 128 * RATES.scan, rel=0.02)


def test_the_planning_page_holds_what_the_simulation_predicts(tmp_path):
    runs = [{"kind": "run", "name": "two ranks", "predicted": "2.0", "measured": "2.2", "spread": "0.01"}]
    rates = [{"kind": "rate", "name": name, "measured": value} for name, value in dataclasses.asdict(RATES).items()]
    about = {"date": "2026-01-01", "load": "0.1"}
    write(tmp_path / "a.csv", simulate.COLUMNS, [about | row for row in rates + runs])
    lines = plan.mining(RESULTS / "mining" / "amd-epyc.csv", tmp_path / "a.csv")
    assert "| two ranks | 2 s | 2.2 s | 1.10 | 1% |" in lines
    assert any("took up to 10% more or less than it predicts" in line for line in lines)
    without = plan.mining(RESULTS / "mining" / "amd-epyc.csv", tmp_path / "none.csv")
    assert len(without) < len(lines) and without[-1] != lines[-1]


def test_planning_units():
    assert [plan.duration(s) for s in (0.5, 3, 600, 10_000, 1e6)] == ["500 ms", "3 s", "10 min", "2.78 h", "11.6 days"]
    assert [plan.size(b) for b in (2**19, 3 * 2**30, 2**41)] == ["0.5 MiB", "3 GiB", "2 TiB"]
    assert torch.get_num_threads() >= 1
