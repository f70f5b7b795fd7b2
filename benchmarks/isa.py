"""Time every op on every instruction set of this processor, and check the automatic choice: `make bench-isa`.

    python -m benchmarks.isa                              B = 256, K = 65,536, D = 128; about five minutes on two cores
    python -m benchmarks.isa --storage bf16 --op mine_hardest --seconds 5

For each pair of storage types (queries x queue) and each op, all instruction sets and the automatic choice are timed in turns.
The exit code is 1 if the automatic choice is more than 10 % slower than the best instruction set for all ops of a pair together.
A pair has one instruction set for all ops, because ops compare scores bit for bit (kernels/cpu/dispatch.cpp). Rows are appended
to benchmarks/results/isa/<machine>.csv, with the columns of benchmarks.run.
"""

import argparse
import datetime
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import negmine
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.measure import OURS, with_isa
from benchmarks.peers import OPS, Answer
from benchmarks.rows import RESULTS, append, commit, machine_name
from benchmarks.run import COLUMNS
from benchmarks.timing import Timing, interleave

STORAGE = {  # of queries and of the queue
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32 x bf16": (torch.float32, torch.bfloat16),
    "fp32 x fp16": (torch.float32, torch.float16),
}
AUTOMATIC, ISAS = "", ("amxbf16", "avx512bf16", "avx512", "avx2")
BEHIND = 1.1  # how much slower than the best set the automatic choice may be


@torch.no_grad()
def loss_alone(inputs: Inputs, backend: str | None = None) -> Answer:
    options = {"temperature": inputs.temperature, "query_ids": inputs.query_ids, "backend": backend}
    return (negmine.info_nce(inputs.query, inputs.positive_key, inputs.negatives, **options),)


def trained_keys(inputs: Inputs, backend: str | None = None) -> Answer:
    """InfoNCE with a gradient of the keys."""
    query, keys = (part.detach().requires_grad_() for part in (inputs.query, inputs.keys))
    loss = negmine.info_nce(query, inputs.positive_key, keys, temperature=inputs.temperature, backend=backend)
    assert isinstance(loss, torch.Tensor)
    return torch.autograd.grad(loss, (query, keys))


def sigmoid_loss(inputs: Inputs, backend: str | None = None) -> Answer:
    query = inputs.query.detach().requires_grad_()
    return torch.autograd.grad(negmine.siglip(query, inputs.positive_key, inputs.keys, backend=backend), query)


MEASURED = {"loss_alone": loss_alone} | {
    name: OPS[name].fused for name in ("info_nce", "window", "mine_hardest", "rank_thresholds", "mochi")
}
MEASURED |= {"trained_keys": trained_keys, "sigmoid_loss": sigmoid_loss}


def isas_here() -> list[str]:
    from negmine import _ops_cpu

    before = _ops_cpu.isa()
    here = [isa for isa in ISAS if _ops_cpu.set_isa(isa)]
    _ops_cpu.set_isa(before)
    return here


def chosen(storage: str) -> str:
    from negmine import _ops_cpu

    return _ops_cpu.isa_for(*(str(dtype).removeprefix("torch.") for dtype in STORAGE[storage]))


def inputs_of(storage: str, case: Case) -> Inputs:
    query, keys = STORAGE[storage]
    inputs = make_inputs(case, "cpu")
    return replace(
        inputs,
        query=inputs.query.to(query),
        positive_key=inputs.positive_key.to(keys),
        keys=inputs.keys.to(keys),
    )


def measure(op: str, inputs: Inputs, isas: list[str], seconds: float) -> dict[str, Timing]:
    """The timing of each instruction set and of AUTOMATIC, measured in turns.

    Each runs twice in a turn, and only the second run counts, because a processor takes milliseconds to change its clock and to
    power up its units when it changes between AVX2, AVX-512 and AMX.
    """
    run = partial(MEASURED[op], backend="cpu")
    variants: dict[str, Callable[[], object]] = {}
    for isa in (AUTOMATIC, *isas):
        variants[f"{isa}, not counted"] = variants[isa] = partial(with_isa(run, isa), inputs)
    timings = interleave(variants, "cpu", seconds)
    return {isa: timings[isa] for isa in (AUTOMATIC, *isas)}


def ratio_to_best(measured: dict[str, dict[str, Timing]], isas: list[str], choice: str) -> float:
    """The time of the chosen instruction set divided by that of the best one for all ops, as geometric means over the ops."""

    def mean(isa: str) -> float:
        return math.exp(sum(math.log(timings[isa].median) for timings in measured.values()) / len(measured))

    return mean(choice) / min(mean(isa) for isa in isas)


def rows_of(storage: str, case: Case, measured: dict[str, dict[str, Timing]]) -> list[dict[str, object]]:
    shape = {"threads": torch.get_num_threads(), "B": case.B, "K": case.K, "D": case.D}
    return [
        {
            **shape,
            "case": f"isa {storage}",
            "dtype": storage,
            "op": op,
            "variant": f"{OURS} ({isa})" if isa else OURS,
            "median_ms": f"{timing.median:.4g}",
            "q20_ms": f"{timing.q20:.4g}",
            "q80_ms": f"{timing.q80:.4g}",
            "rounds": timing.rounds,
            "timed": timing.timed,
            "call_ms": f"{timing.call:.4g}",
        }
        for op, timings in measured.items()
        for isa, timing in timings.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=list(STORAGE))
    parser.add_argument("--op", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--shape", nargs=3, type=int, metavar=("B", "K", "D"), default=(256, 65536, 128))
    parser.add_argument("--seconds", type=float, default=5.0, help="of one op and storage")
    parser.add_argument("--results", type=Path, default=RESULTS / "isa")
    args = parser.parse_args()
    isas = isas_here()
    if not isas:
        print("this processor has no instruction set to choose from")
        return 0
    machine = machine_name("cpu")
    date = datetime.datetime.now().isoformat(timespec="seconds")
    stamp = {"date": date, "commit": commit(), "machine": machine, "device": "cpu", "torch": torch.__version__}
    B, K, D = args.shape
    case = Case("isa", B, K, D, "float32", "")
    print(f"{'queries x queue':<16}{'op':<17}" + "".join(f"{isa:>11}" for isa in isas) + f"{'automatic':>11}  ms")
    wrong = []
    for storage in args.storage:
        inputs, measured = inputs_of(storage, case), {}
        for op in args.op:
            timings = measured[op] = measure(op, inputs, isas, args.seconds)
            cells = "".join(f"{timings[isa].median:>11.2f}" for isa in (*isas, AUTOMATIC))
            print(f"{storage:<16}{op:<17}{cells}", flush=True)
        append(args.results / f"{machine}.csv", COLUMNS, [stamp | row for row in rows_of(storage, case, measured)])
        choice = chosen(storage)
        ratio = ratio_to_best(measured, isas, choice)
        print(f"{storage:<16}automatic: {choice}, {ratio:.2f} times the best")
        if ratio > BEHIND:
            wrong.append(storage)
    if wrong:
        print(f"more than 10 % behind the best: {', '.join(wrong)}; the choice is in kernels/cpu/dispatch.cpp")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
