"""Compare random calls of every public op on the CPU backend with the reference: python -m tests.fuzz --seconds 60 --seed 0

A call must raise ValueError, TypeError or BackendUnavailable with a sentence as message, or agree with the reference. For vectors
of small integers (times a power of two), selections must agree bit for bit, also with NaN and inf; for real vectors, within the
rounding error of the scores. For vectors whose scores may overflow fp32, it is enough that the call returns.

The calls run in a separate process, so that a crash is reported like other faults. A fault is printed with the options that
repeat it: --seed S --case N.
"""

import argparse
import multiprocessing
import sys
import time
import warnings

import torch
from torch import Tensor

from negmine import Negatives
from negmine.ops import backends
from tests import fuzz_calls
from tests.fuzz_calls import CALLED, KINDS_OF_CALL
from tests.fuzz_case import Case
from tests.fuzz_judge import require

REFUSED = (ValueError, TypeError, backends.BackendUnavailable)


def run_case(seed: int, number: int) -> str:
    """Return 'agrees' or 'refused'. Raise Fault if the result is wrong, or the exception of the call if it is unexpected."""
    case = Case(seed, number)
    make, judge = case.draw.choice(KINDS_OF_CALL)
    call, op = make(case)
    whole_call = dict(call)
    call = case.spoiled(call) | {"backend": "cpu"}
    spoiled = any(call[name] is not value for name, value in whole_call.items())
    try:
        result = CALLED[op](**call) if op in CALLED else fuzz_calls.run(op, call)
    except REFUSED as refusal:
        require(len(str(refusal).split()) > 3, f"{op}: the message of an error is too short: {refusal!r}")
        require(spoiled, f"{op} refuses a valid call: {refusal}")
        return "refused"
    if not spoiled:
        judge(case, op, call, result)
    return "agrees"


def described(seed: int, number: int) -> str:
    """Describe the call of a case."""
    case = Case(seed, number)
    make, _ = case.draw.choice(KINDS_OF_CALL)
    call, op = make(case)
    words = [f"{name}={summarized(value)}" for name, value in case.spoiled(call).items()]
    return f"{op} on {case.kind} vectors: {', '.join(words)}"


def summarized(value) -> str:
    if isinstance(value, Negatives):
        return f"Negatives of {summarized(value.keys)}"
    return f"{value.dtype} {tuple(value.shape)} strides {value.stride()}" if isinstance(value, Tensor) else f"{value}"


def run(seed: int, first: int, seconds: float, only: bool, at, faults) -> None:
    """Run cases from `first` on until the time is up. `at` is shared with the parent and holds the number of the case."""
    warnings.simplefilter("ignore")
    end, counts = time.monotonic() + seconds, {"agrees": 0, "refused": 0}
    while time.monotonic() < end:
        number = first + sum(counts.values())
        at.value = number
        torch.set_num_threads(1 if number % 8 else 2)  # two threads on busy cores wait for each other most of the time
        try:
            counts[run_case(seed, number)] += 1
        except Exception as error:
            counts["refused"] += 1
            faults.put(f"--seed {seed} --case {number}: {type(error).__name__}: {error}\n    {described(seed, number)}")
        if only:
            break
    faults.put(counts)


def fuzz(seconds: float, seed: int, case: int | None = None, worker_run=None) -> tuple[list[str], dict[str, int]]:
    """Return the faults, a sentence for each, and how many calls agreed or were refused. worker_run: replaces `run` in tests."""
    context = multiprocessing.get_context("spawn")
    at, faults = context.Value("q", -1), context.Queue()
    found: list[str] = []
    worker = context.Process(target=worker_run or run, args=(seed, case or 0, seconds, case is not None, at, faults))
    worker.start()
    while True:
        try:
            item = faults.get(timeout=0.5)
        except multiprocessing.queues.Empty:  # type: ignore[attr-defined]
            if not worker.is_alive() and faults.empty():
                found.append(f"--seed {seed} --case {at.value}: crashed with exit code {worker.exitcode}")
                return found, {}
            continue
        if isinstance(item, dict):
            worker.join()
            return found, item
        found.append(item)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat one case")
    asked = parser.parse_args()
    faults_found, totals = fuzz(asked.seconds, asked.seed, asked.case)
    print(*faults_found, f"{len(faults_found)} faults; calls: {totals}", sep="\n")
    sys.exit(bool(faults_found))
