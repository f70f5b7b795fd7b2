"""make gpu PHASE=smoke: for each kernel of each backend, does it run, is it correct, and roughly how fast is it?

    python -m build_tools.gpu_smoke [--out FOLDER] [--seconds 60] [--limit 20] [--device cuda] [--backend cuda triton]

Each check runs in a separate process, several at a time, so that a kernel that hangs, crashes or breaks its CUDA context does
not affect the other checks. As soon as a check ends, a line is printed and a row is added to FOLDER/smoke.csv:

    PASS  cuda    bfloat16  info_nce, ids              31.2 us graph    2.9 products

Inputs are small integers, whose scores are exact in every dtype, so selections must be equal to those of the reference in
float64. The errors of losses and gradients may be at most twice those of the reference in the same dtype. The time is that of
one forward and backward call, and is also given as a multiple of the time of the matrix product query @ keys.T. The processes
share the GPU, so times may be off by a factor of two.
"""

import argparse
import contextlib
import csv
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SHAPES = {
    "cuda": (256, 16_384, 128),
    "cpu": (8, 512, 16),
}  # B, K, D by type of device; "cpu" is for tests of this program
COLUMNS = ("status", "backend", "dtype", "case", "us", "timed", "products", "detail")
RATES = "rates"  # the check that measures the GPU itself
Call = Callable[..., list]  # (query, positive_key, keys, ids, backend) -> tensors to compare


class Check(NamedTuple):
    """One line of the table."""

    backend: str
    dtype: str
    case: str


class Line(NamedTuple):
    """The result of a check."""

    status: str  # PASS, FAIL, or SKIP if the backend does not support the call
    us: float | None = None
    timed: str = ""
    products: float | None = None
    detail: str = ""


def cases() -> dict[str, Call]:
    """Public calls, in the order in which they run, which together launch every kernel."""
    import torch

    import negmine
    from negmine import Mix, MoCoQueue, Negatives, Select, Weight

    temperature = 40.0  # scores of whole numbers are large

    def loss(ids: bool = False, trained: bool = False, half: bool = False, **options: object) -> Call:
        def call(query, positive_key, keys, tags, backend):
            leaves = [t.detach().requires_grad_() for t in (query, positive_key, keys)][: 3 if trained else 2]
            pool, given = (leaves[2] if trained else keys), options
            if ids:
                pool, given = Negatives(pool, ids=tags[1]), {**options, "query_ids": tags[0]}
            if half:  # the kernels read how many rows are valid from the device
                filled = MoCoQueue(keys.shape[1], len(keys), dtype=keys.dtype, random_init=False).to(keys.device)
                filled.enqueue(keys[: len(keys) // 2])
                pool = filled
            rows = negmine.info_nce(
                *leaves[:2], pool, temperature=temperature, reduction="none", backend=backend, **given
            )
            return [rows, *torch.autograd.grad(rows.sum(), leaves)]

        return call

    def sigmoid(trained: bool) -> Call:
        def call(query, positive_key, keys, tags, backend):
            leaves = [t.detach().requires_grad_() for t in (query, positive_key, keys)][: 3 if trained else 2]
            pool = leaves[2] if trained else keys
            rows = negmine.siglip(
                *leaves[:2], pool, scale=1 / temperature, bias=-2.0, reduction="none", backend=backend
            )
            return [rows, *torch.autograd.grad(rows.sum(), leaves)]

        return call

    def logsumexp(query, positive_key, keys, tags, backend):
        leaf = query.detach().requires_grad_()
        rows = negmine.logsumexp(leaf, keys, temperature=temperature, backend=backend)
        return [rows, *torch.autograd.grad(rows.sum(), leaf)]

    def mine(query, positive_key, keys, tags, backend):
        return list(negmine.mine_hardest(query, keys, min(1024, len(keys) // 4), backend=backend))

    def ranks(query, positive_key, keys, tags, backend):
        K = len(keys)
        return [negmine.rank_thresholds(query, keys, [0, K // 100, K // 20, K // 2], backend=backend)]

    def mixed(query, positive_key, keys, tags, backend):
        return [negmine.mix_negatives(query, keys, mix, seed=1, backend=backend).parents]

    mix = Mix(512, 512, 64)
    return {
        "logsumexp": logsumexp,
        "info_nce": loss(),
        "info_nce, ids": loss(ids=True),
        "mine_hardest": mine,
        "rank_thresholds": ranks,
        "trained keys": loss(trained=True),
        "trained keys, ids": loss(trained=True, ids=True),
        "half-filled queue": loss(half=True),
        "window": loss(select=Select(0.001, 0.05)),
        "window, ids": loss(ids=True, select=Select(0.001, 0.05)),
        "mix_negatives": mixed,
        "mochi": loss(mix=mix, seed=1),
        "weight": loss(weight=Weight(1.0)),
        "sample": loss(select=Select(0, 0.5, sample=64), seed=1),
        "siglip": sigmoid(trained=False),
        "siglip, trained keys": sigmoid(trained=True),
    }


def checks(names: list[str]) -> list[Check]:
    """All checks in the order in which they start. The kernels in CUDA C++ are the most likely to hang, so they come first."""
    found = [Check(name, "bfloat16", case) for name in names for case in cases()]
    return found + [Check(name, "float32", case) for name in names if name != "cuda" for case in cases()]


def compare_with_truth(check: Check, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Compare a call with the float64 reference. Returns the call, and the matrix product of its scores, to be timed."""
    import torch

    from tests import compare
    from tests.cases import whole

    B, K, D = SHAPES[device]
    dtype = getattr(torch, check.dtype)
    vectors = [whole(n, D, dtype=dtype, device=device, seed=seed) for seed, n in enumerate((B, B, K))]
    tags = torch.arange(B, device=device), torch.arange(K, device=device) % (4 * B)
    call = cases()[check.case]
    got = call(*vectors, tags, check.backend)
    truth = call(*(v.double() for v in vectors), tags, "reference")
    plain = call(*vectors, tags, "reference")
    for place, (kernel, wanted, dense) in enumerate(zip(got, truth, plain, strict=True)):
        name = f"output {place}"
        if check.case in ("mine_hardest", "rank_thresholds", "mix_negatives"):
            compare.exact(name, kernel, wanted.to(kernel.dtype))
        else:
            compare.rounded(name, kernel, wanted, dense, terms=truth[min(2, len(truth) - 1)])
    return lambda: call(*vectors, tags, check.backend), lambda: vectors[0] @ vectors[2].T


def measure_gpu(device: str) -> str:
    """The speed of the GPU for an empty launch, a copy and matrix products."""
    import torch

    from benchmarks import timing

    size = {"cuda": 1 << 28, "cpu": 1 << 20}[device]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)
    times = timing.interleave({"launch": one.zero_, "copy": lambda: target.copy_(source)}, device, 0.5)
    products = {
        str(dtype).removeprefix("torch."): timing.product_rate(dtype, device, 4096 if device == "cuda" else 256) / 1e9
        for dtype in (torch.bfloat16, torch.float32)
    }
    rates = ", ".join(f"{rate:.1f} TFLOP/s {name}" for name, rate in products.items())
    return f"launch {1e3 * times['launch'].median:.2f} us, copy {2e-6 * size / times['copy'].median:.0f} GB/s, {rates}"


def run_check(check: Check, device: str) -> Line:
    """Run a check, in the process of its own."""
    from benchmarks import timing
    from negmine.ops.backends import BackendUnavailable

    if check.case == RATES:
        return Line("PASS", detail=measure_gpu(device))
    try:
        call, product = compare_with_truth(check, device)
    except BackendUnavailable as error:
        return Line("SKIP", detail=str(error))
    times = timing.interleave({"call": call, "product": product}, device, 0.3)
    taken = times["call"]
    return Line("PASS", 1e3 * taken.median, taken.timed, taken.median / times["product"].median)


def child(check: Check, device: str) -> list[str]:
    """The command of a process that runs one check and prints its result as a last line of JSON."""
    return [sys.executable, "-m", "build_tools.gpu_smoke", "--device", device, "--one", *check]


def outcome(check: Check, device: str, limit: float) -> Line:
    """Run a check in a separate process, which is killed after `limit` seconds."""
    process = subprocess.Popen(
        child(check, device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=max(limit, 0.1))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Line("FAIL", detail=f"ran for more than {limit:.0f} s and was killed")
    lines = printed.strip().splitlines() or ["it printed nothing"]
    if process.returncode < 0:
        return Line("FAIL", detail=f"its process died of {signal.Signals(-process.returncode).name}: {lines[-1]}")
    if process.returncode:
        return Line("FAIL", detail=lines[-1])
    return Line(*json.loads(lines[-1]))


def results(todo: list[Check], device: str, limit: float, seconds: float, jobs: int) -> Iterator[tuple[Check, Line]]:
    """Run all checks, and yield each with its line when it ends."""
    waiting: queue.SimpleQueue[Check] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[Check, Line]] = queue.SimpleQueue()
    for check in todo:
        waiting.put(check)
    deadline = time.monotonic() + seconds

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                check = waiting.get_nowait()
                left = deadline - time.monotonic()
                late = Line("FAIL", detail="not run: the time for all checks was over")
                ended.put((check, outcome(check, device, min(limit, left)) if left > 0 else late))

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    for _ in todo:
        yield ended.get()


def text(check: Check, line: Line) -> str:
    if check.case == RATES:
        return f"{line.status}  {line.detail}"
    start = f"{line.status}  {check.backend:<8}{check.dtype:<10}{check.case:<22}"
    if line.us is None or line.products is None:
        return f"{start}{line.detail}"
    return f"{start}{line.us:>10.1f} us {line.timed:<7}{line.products:>6.1f} products"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of smoke.csv")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all checks together")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one check")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) - 2)), help="checks at a time")
    parser.add_argument("--device", default="cuda", choices=SHAPES)
    parser.add_argument("--backend", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--one", nargs=3, metavar=Check._fields, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(run_check(Check(*args.one), args.device)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (args.out / "smoke.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rates = Check("", "", RATES)
        alone = [(rates, outcome(rates, args.device, args.limit))]  # before the others share the GPU
        for check, line in (*alone, *results(checks(args.backend), args.device, args.limit, args.seconds, args.jobs)):
            failed += line.status == "FAIL"
            print(text(check, line), flush=True)
            rows.writerow([line.status, *check, line.us, line.timed, line.products, line.detail])
            file.flush()
    print(f"{failed} checks failed" if failed else "every check passed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
