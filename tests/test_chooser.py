"""The choice of backends: limits of kernels, and calls whose scores must come from one backend. No GPU is needed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import negmine
from negmine import Mix, Negatives, Select, Weight
from negmine.ops import backends
from negmine.ops.backends import Backend, BackendUnavailable, mining_limit, ranking_limit, scoring_limit
from tests.cases import unit

BF16, FP16, FP32 = (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32,) * 2


@pytest.mark.parametrize(
    ("dtypes", "K", "D", "N", "asked", "said"),
    [
        (BF16, 65_536, 128, 1024, False, ""),
        (FP16, 8193, 256, 4096, False, ""),
        (BF16, 2**19, 128, 4096, False, ""),
        (BF16, 2**22, 128, 2048, False, ""),
        (BF16, 100, 7, 9, True, ""),
        (FP32, 65_536, 128, 1024, True, "got float32 and float32"),
        ((torch.bfloat16, torch.float16), 65_536, 128, 1024, True, "got bfloat16 and float16"),
        (BF16, 65_536, 257, 1024, True, "D up to 256, got 257"),
        (BF16, 65_536, 128, 4097, True, "got N = 4097 of K = 65536"),
        (BF16, 2**19 + 1, 128, 2049, True, "got N = 2049 of K = 524289"),
        (BF16, 2**22 + 1, 128, 1, True, "got N = 1 of K = 4194305"),
        (BF16, 8192, 128, 1024, False, "as short as K = 8192"),
    ],
)
def test_limits_of_mining_on_cuda(dtypes, K, D, N, asked, said):
    why = mining_limit(dtypes, K, D, N, asked)
    assert said in why
    assert bool(said) == bool(why)


@pytest.mark.parametrize(
    ("dtypes", "D", "said"),
    [
        (BF16, 256, ""),
        (FP16, 1, ""),
        (FP32, 128, "got float32 and float32"),
        (BF16, 257, "D up to 256, got 257"),
    ],
)
def test_limits_of_scoring_on_cuda(dtypes, D, said):
    why = scoring_limit(dtypes, D)
    assert said in why
    assert bool(said) == bool(why)


def test_limits_of_ranking_on_cuda():
    assert ranking_limit(BF16, 2**24, 256) == ""
    assert "K up to 16777216, got 16777217" in ranking_limit(BF16, 2**24 + 1, 256)
    assert "got float32 and float32" in ranking_limit(FP32, 100, 8)
    assert "D up to 256, got 257" in ranking_limit(BF16, 100, 257)


def short(query, negative_keys, N, *_, asked):
    """A function that returns the reason why a kernel cannot run, on any device."""
    return mining_limit((query.dtype, negative_keys.dtype), *negative_keys.shape, N, asked)


def narrow(query, negative_keys, *_, asked):
    return scoring_limit((query.dtype, negative_keys.dtype), query.shape[1])


def summing(query, negative_keys, scales, pivot, want_mean, N, *_, asked):
    """A sum that also mines has the limit of mining."""
    return short(query, negative_keys, N, asked=asked) if N else narrow(query, negative_keys, asked=asked)


def losing(query, positive_key, negative_keys, *_, asked):
    return narrow(query, negative_keys, asked=asked)


HELD = (
    "mine_hardest", "mix_negatives", "logsumexp", "logsumexp_grad_keys", "rank_thresholds", "count_negatives", "mix_logsumexp",
)  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    """Return a function that installs a table of two backends. They record which one ran.

    Its argument: the ops that cuda runs only if it is asked for by name.
    """
    ran = []
    monkeypatch.setattr(backends, "_chosen", {})  # clear the cache of choices

    def install(by_name_only, held=HELD):
        cpu = next(row for row in backends.BACKENDS if row.name == "cpu").functions

        def noted(name, op):
            def launch(*args):
                ran.append((name, op))
                return cpu[op](*args)

            return launch

        own, everything = ({op: noted(name, op) for op in ops} for name, ops in (("cuda", held), ("triton", cpu)))
        limits = {"mine_hardest": short, "logsumexp": summing, "logsumexp_grad_keys": narrow, "info_nce": losing}
        rows = (
            Backend("cuda", "cpu", own, by_name_only=frozenset(by_name_only), limits=limits),
            Backend("triton", "cpu", everything),
        )
        monkeypatch.setattr(backends, "BACKENDS", rows)
        return ran

    return install


def call(K=9000, dtype=torch.bfloat16, mask=None, **options):
    keys = Negatives(unit(K, 8, dtype=dtype, seed=1), mask=mask)
    return negmine.mine_hardest(unit(2, 8, dtype=dtype), keys, 5, **options)


def test_an_op_without_gpu_timings_runs_only_by_name(table):
    ran = table({"mine_hardest"})
    call()
    call(backend="cuda")
    assert ran == [("triton", "mine_hardest"), ("cuda", "mine_hardest")]


def test_a_timed_op_comes_first_within_its_limits(table):
    ran = table(())
    for options in ({}, {"K": 300}, {"dtype": torch.float32}):
        call(**options)
    assert [name for name, _ in ran] == ["cuda", "triton", "triton"]


@pytest.mark.parametrize("backend", [None, "cuda"])
def test_scores_that_are_compared_come_from_one_backend(table, backend):
    """The ends of a window are scores that one backend computed, so the mining between them must run on the same backend."""
    ran = table(HELD)
    call(select=Select(1, 50), backend=backend)
    assert ran == [(backend or "triton", op) for op in ("rank_thresholds", "mine_hardest")]
    ran.clear()
    call(select=Select(0.01, 0.5), mask=torch.arange(9000) % 2 == 0, backend=backend)
    assert ran == [(backend or "triton", op) for op in ("count_negatives", "rank_thresholds", "mine_hardest")]


def test_ops_whose_scores_are_compared_fall_back_together(table):
    """If mining may run on the next backend, because none was asked for, this backend must not compute the ends of the window."""
    ran = table(())
    call(select=Select(1, 50))
    assert {name for name, _ in ran} == {"triton"}


def test_quantiles_and_thresholds_run_on_the_requested_backend(table):
    ran = table(HELD)
    q, keys = unit(3, 8, dtype=torch.bfloat16), unit(60, 8, dtype=torch.bfloat16, seed=1)
    masked = Negatives(keys, mask=torch.arange(60) % 3 > 0)
    for ask, ops in (
        (lambda **o: negmine.rank_thresholds(q, keys, [0, 5], **o), ["rank_thresholds"]),
        (lambda **o: negmine.quantile(q, keys, [0.1, 0.9], **o), ["rank_thresholds"]),
        (lambda **o: negmine.quantile(q, masked, 0.5, **o), ["count_negatives", "rank_thresholds"]),
    ):
        ran.clear()
        torch.testing.assert_close(ask(backend="cuda"), ask())
        assert ran == [(name, op) for name in ("cuda", "triton") for op in ops]


def test_mixing_may_run_on_another_backend_than_mining(table):
    ran = table({"mine_hardest"})
    negmine.mix_negatives(unit(2, 8), unit(30, 8, seed=1), Mix(4, 2, 2))
    assert ran == [("triton", "mine_hardest"), ("cuda", "mix_negatives")]


def test_a_requested_backend_that_cannot_run_a_call_raises_an_error(table):
    ran = table({"mine_hardest"})
    with pytest.raises(
        BackendUnavailable, match=r"mine_hardest: backend 'cuda' cannot run this mine_hardest .*float32"
    ):
        call(dtype=torch.float32, backend="cuda")
    assert not ran


def test_the_choice_for_a_kind_of_call_is_cached(table, monkeypatch):
    ran = table(())
    call()
    monkeypatch.setattr(backends, "BACKENDS", ())  # a new lookup would fail
    call()
    assert ran == [("cuda", "mine_hardest")] * 2
    with pytest.raises(ValueError, match="backend must be None"):
        call(backend=["cpu"])  # cannot be hashed, so it is not in the cache


WAITING = set(HELD) - {"mix_negatives"}


ROUNDED_ONCE = {"rtol": 2.0**-7, "atol": 1e-6}  # both ways round the gradient to bf16


def loss(dtype=torch.bfloat16, D=8, trained_keys=False, **options):
    q, pos, keys = (unit(n, D, dtype=dtype, seed=i) for i, n in enumerate((3, 3, 60)))
    q.requires_grad_()
    keys.requires_grad_(trained_keys)
    negmine.info_nce(q, pos, keys, temperature=0.2, **options).backward()
    return q.grad, keys.grad


@pytest.mark.parametrize("trained_keys", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "options", [{}, {"decoupled": True}, {"weight": Weight(1.0, 0.01)}, {"mix": Mix(4, 2, 2)}], ids=str
)
def test_a_loss_runs_on_the_requested_backend(table, options, trained_keys):
    """Computed by one op if the backend has it; otherwise by several, where the op of the sum also mines the parents of mixes."""
    ran = table(WAITING)
    gradient = {"logsumexp_grad_keys"} if trained_keys else set()
    unasked = loss(**options, trained_keys=trained_keys)
    assert set(ran) == {("triton", op) for op in {"logsumexp" if "weight" in options else "info_nce", *gradient}}
    ran.clear()
    asked = loss(**options, trained_keys=trained_keys, backend="cuda")
    assert set(ran) == {
        ("cuda", op) for op in {"logsumexp", *(["mix_logsumexp"] if "mix" in options else ()), *gradient}
    }
    assert (asked[1] is not None) == trained_keys
    for got, want in zip(asked, unasked, strict=True):
        torch.testing.assert_close(got, want, **ROUNDED_ONCE)


@pytest.mark.parametrize("select", [Select(1, 50), Select(0.1, 0.5)], ids=str)
def test_a_loss_over_a_window_runs_on_the_requested_backend(table, select):
    ran = table(WAITING)
    grads = [loss(select=select), loss(select=select, backend="cuda")]
    assert ran == [("triton", "info_nce"), ("cuda", "logsumexp")]
    torch.testing.assert_close(grads[1], grads[0], **ROUNDED_ONCE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"trained_keys": True, "D": 300},
            r"info_nce: backend 'cuda' cannot run this logsumexp .*D up to 256, got 300",
        ),
        ({"select": Select(sample=20)}, r"cannot run gathered_logsumexp.*cuda has no kernel"),
        ({"mix": Mix(4, 2, 2, detach=False)}, r"cannot run gathered_logsumexp.*cuda has no kernel"),
        ({"dtype": torch.float32}, r"info_nce: backend 'cuda' cannot run this logsumexp .*got float32 and float32"),
        ({"D": 300}, r"info_nce: backend 'cuda' cannot run this logsumexp .*D up to 256, got 300"),
    ],
    ids=str,
)
def test_a_loss_without_a_cuda_kernel_raises_an_error(table, options, said):
    ran = table(WAITING)
    with pytest.raises(BackendUnavailable, match=said):
        loss(**options, backend="cuda")
    assert not ran


@pytest.mark.parametrize(
    ("by_name_only", "backend", "expected"),
    [(WAITING | {"info_nce"}, None, "triton"), (WAITING | {"info_nce"}, "cuda", "cuda"), ((), None, "cuda")],
    ids=["by name only", "by name", "by default"],
)
def test_info_nce_runs_on_the_first_backend_that_has_it(table, by_name_only, backend, expected):
    ran = table(by_name_only, held=(*HELD, "info_nce"))
    loss(backend=backend)
    assert ran == [(expected, "info_nce")]


def test_info_nce_respects_the_limits_of_the_backend(table):
    ran = table((), held=(*HELD, "info_nce"))
    with pytest.raises(BackendUnavailable, match=r"info_nce: backend 'cuda' cannot run this info_nce .*D up to 256"):
        loss(D=300, backend="cuda")
    assert not ran
    loss(D=300)
    assert ran == [("triton", "info_nce")]


def test_logsumexp_runs_by_default_when_info_nce_runs_only_by_name(table):
    ran = table({"info_nce"}, held=(*HELD, "info_nce"))
    loss()
    assert ran == [("cuda", "logsumexp")]


def test_explain_names_an_op_that_runs_only_by_name():
    cuda = next(row for row in backends.BACKENDS if row.name == "cuda")
    rows = (
        Backend("cuda", "cuda", {"mine_hardest": min}, by_name_only=frozenset({"mine_hardest"})),
        *backends.BACKENDS[1:],
    )
    assert cuda.by_name_only == set(cuda.functions) - backends.CUDA_BY_DEFAULT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "BACKENDS", rows)
        assert "cuda runs mine_hardest only if it is requested by name" in backends.explain("mine_hardest", "cuda")


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_older_than_the_kernels_raises_an_error(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows = (
        Backend("cuda", "cuda", {"mine_hardest": min}),
        Backend("triton", "cuda", {"mine_hardest": min}),
        *backends.BACKENDS[2:],
    )
    monkeypatch.setattr(backends, "BACKENDS", rows)
    monkeypatch.setattr(backends, "_warned", set())
    for name in (None, "triton", "cuda"):
        arguments = ("mine_hardest", ("mine_hardest",), name, torch.device("cuda", 0), [torch.bfloat16] * 2, "", "")
        if runs:
            assert backends._choose(*arguments).has("mine_hardest")
        elif name is None:
            with pytest.warns(
                RuntimeWarning, match=r"triton: its kernels need compute capability 8.0, this GPU has 7.5"
            ):
                assert backends._choose(*arguments) is None
        else:
            with pytest.raises(
                BackendUnavailable, match=rf"{name}: its kernels need compute capability 8.0, this GPU has 7.5"
            ):
                backends._choose(*arguments)


@pytest.mark.parametrize(("arch", "refused"), [("gfx942:sramecc+:xnack-", ""), ("gfx1100", ""), ("gfx1030", "gfx1030")])
def test_triton_takes_the_gpus_of_amd_that_it_is_compiled_for(monkeypatch, arch, refused):
    """The device type of tensors on AMD GPUs is cuda."""
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    monkeypatch.setattr(
        backends, "BACKENDS", (Backend("triton", "cuda", {"mine_hardest": min}), *backends.BACKENDS[2:])
    )
    arguments = ("mine_hardest", ("mine_hardest",), "triton", torch.device("cuda", 0), [torch.bfloat16] * 2, "", "")
    if refused:
        with pytest.raises(BackendUnavailable, match=f"gfx942 and gfx1100 among AMD's GPUs, this one is {refused}"):
            backends._choose(*arguments)
    else:
        assert backends._choose(*arguments).has("mine_hardest")


@pytest.mark.parametrize("extra", ["bias", "guide"])
def test_a_bias_or_a_guide_of_shared_keys_goes_to_a_backend_that_takes_it(monkeypatch, extra):
    rows = (Backend("cuda", "cpu", {"count_negatives": min}), Backend("cpu", "cpu", {"count_negatives": max}))
    monkeypatch.setattr(backends, "BACKENDS", (*rows, backends.BACKENDS[-1]))
    rest = torch.device("cpu"), [torch.float32] * 2, ""
    for given, want in (("", min), (extra, max)):
        assert backends._choose("f", ("count_negatives",), None, *rest, given).count_negatives is want
    with pytest.raises(
        BackendUnavailable,
        match=rf"^f: backend 'cuda' does not support a {extra} of shared keys; 'cpu' and 'triton' do$",
    ):
        backends._choose("f", ("count_negatives",), "cuda", *rest, extra)


def test_negmine_imports_where_triton_cannot_be_imported():
    program = (
        "import sys, torch; sys.modules['triton'] = None; import negmine; from negmine.ops import backends; "
        "print(*(row.refusal for row in backends.BACKENDS if row.name == 'triton'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("its import failed: ")
