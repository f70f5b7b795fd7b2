"""A short run of the fuzzer finds no fault, and the fuzzer detects the faults that it is made for."""

import os

import pytest
import torch

from negmine.ops import backends
from tests import fuzz, fuzz_calls
from tests.fuzz_case import Case
from tests.fuzz_judge import Fault

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)


def test_five_seconds_without_a_fault():
    faults, calls = fuzz.fuzz(5, seed=0)
    assert not faults, "\n".join(faults)
    assert calls["agrees"] > 20


def nudged(kernel, place):
    """Return the kernel with a small error in one of its results."""

    def run(*arguments):
        results = list(kernel(*arguments))
        results[place] = results[place] + (1e-2 if results[place].is_floating_point() else 1)
        return tuple(results)

    return run


WRONG = [
    ("info_nce", 0),
    ("info_nce", 1),
    ("logsumexp", 0),
    ("logsumexp", 1),
    ("mine_hardest", 0),
    ("mix_negatives", 0),
    ("softplus_sum", 0),
]


@pytest.mark.parametrize("op, place", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_kernel_is_detected(monkeypatch, op, place):
    monkeypatch.setitem(cpu.functions, op, nudged(cpu.functions[op], place))
    faults = 0
    for number in range(250):
        try:
            fuzz.run_case(0, number)
        except Fault:
            faults += 1
    assert faults


def test_every_public_function_is_fuzzed_or_listed_as_an_exception():
    assert not fuzz_calls.FUZZED & set(fuzz_calls.EXCUSED)
    public = {name for part in fuzz_calls.PARTS for name in part.__all__}
    assert fuzz_calls.FUZZED | set(fuzz_calls.EXCUSED) == public
    made = set()
    for number in range(4000):
        case = Case(1, number)
        call, op = case.draw.choice(fuzz_calls.KINDS_OF_CALL)[0](case)
        made |= {op, call.get("name"), getattr(call.get("kind"), "__name__", None)}
        made |= {"Negatives"} if "negative_mask" in call else set()
    other = {"MoCoQueue": "enqueue", "ShardedMoCoQueue": "sharded", "NegativeIndex": "index", "mining_rounds": "rounds"}
    assert {other.get(name, name) for name in fuzz_calls.FUZZED} - {"recipes"} | set(fuzz_calls.NAMES) <= made


def test_a_case_depends_only_on_its_number():
    assert [fuzz.described(3, n) for n in range(20)] == [fuzz.described(3, n) for n in range(20)]
    call = fuzz_calls.loss(Case(3, 4))[0]
    again = fuzz_calls.loss(Case(3, 4))[0]
    assert torch.equal(call["query"].nan_to_num(), again["query"].nan_to_num())


def test_a_crash_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzz, "run", crashing)
    faults, _ = fuzz.fuzz(1, seed=5)
    assert faults == ["--seed 5 --case 17: crashed with exit code -6"]


def crashing(seed, first, seconds, only, at, faults):
    at.value = 17
    os.abort()
