"""A discrete-event simulation of mining jobs over several processes, and its validation on this machine.

    python -m benchmarks.simulate            measure and predict (some minutes on two idle cores), append rows to
                                             results/simulation/<machine>.csv, and write docs/planning.md from them
    python -m benchmarks.simulate --quick    small jobs, to check that it works; nothing is written

The rates are measured with one process, with two such processes at the same time, and with two ranks that only exchange bytes.
The simulation is validated with other runs: ranks that share a job, with even and uneven shards, and one process with other
sizes. Measurements are repeated in turn, and their medians are used. Predictions are unreliable if the machine is busy, so the
spread of the measurements is shown too.
"""

import argparse
import contextlib
import os
import queue
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.rows import RESULTS, append, commit, machine_name

D, DEPTH, BATCH = 128, 5, 1024  # of the measured jobs: dimension, negatives per query, queries per batch
SMALL, LARGE = 60_000, 240_000  # rows of the runs that give the rates
QUERIES = 8192
PAYLOADS = (64, 1 << 20)  # bytes per exchange: small to measure latency, large to measure bandwidth
COLUMNS = ["date", "commit", "torch", "load", "kind", "name", "predicted", "measured", "spread"]


# --- simulation ---


@dataclass
class Node:
    """A machine.

    busy[n - 1]: how many times longer each of n processes needs that compute at the same time, compared with one alone. With
    more processes than entries, the last entry is scaled by their number.
    """

    busy: tuple[float, ...] = (1.0,)
    work: dict[int, float] = field(default_factory=dict)  # process -> seconds that it would still need alone

    def speed(self) -> float:
        count = len(self.work)
        slowdown = self.busy[min(count, len(self.busy)) - 1] * max(1.0, count / len(self.busy))
        return 1 / slowdown


# ("work", node, seconds if alone), ("sleep", None, seconds) or ("meet", name, number of processes): wait until so many processes
# have reached the meeting of this name.
Event = tuple[str, Any, float]
Process = Generator[Event, None, None]


def simulate(processes: list[Process]) -> float:
    """Run the processes in simulated time, and return the seconds until the last one ends."""
    now, nodes, sleeping, meetings = 0.0, {}, {}, defaultdict(list)
    ready = list(range(len(processes)))
    while True:
        while ready:
            number = ready.pop()
            try:
                what, where, amount = next(processes[number])
            except StopIteration:
                continue
            if what == "work":
                nodes[id(where)] = where
                where.work[number] = amount
            elif what == "sleep":
                sleeping[number] = now + amount
            else:
                meetings[where].append(number)
                if len(meetings[where]) == amount:
                    ready += meetings.pop(where)
        ends = [(now + left / node.speed(), number) for node in nodes.values() for number, left in node.work.items()]
        ends += [(end, number) for number, end in sleeping.items()]
        if not ends:
            if meetings:
                raise RuntimeError(f"processes wait for others that have ended: {dict(meetings)}")
            return now
        then, _ = min(ends)
        for node in nodes.values():
            done = (then - now) * node.speed() if node.work else 0.0
            for number in list(node.work):
                node.work[number] -= done
                if node.work[number] <= 1e-12 + 1e-9 * then:
                    del node.work[number]
                    ready.append(number)
        for number, end in list(sleeping.items()):
            if end <= then:
                del sleeping[number]
                ready.append(number)
        now = then


# --- a mining job ---


@dataclass(frozen=True)
class Rates:
    """Seconds that a single process needs for one unit of each kind of work; `busy` is a ratio."""

    scan: float  # per multiply-add of a scan
    scan_batch: float  # per batch of queries, for any number of rows
    hash: float  # per byte of the corpus
    pair: float  # per score of a positive
    query: float  # per query, for everything else: hashes, lists, windows
    join: float  # per candidate of a part that is merged
    join_part: float  # per part that is merged, for any number of candidates
    latency: float  # per exchange between two ranks
    byte: float  # per byte that a rank receives
    busy: float  # how many times longer each of two processes needs than one alone


@dataclass(frozen=True)
class Job:
    queries: int
    shards: tuple[int, ...]  # rows of each rank
    dim: int = D
    depth: int = DEPTH
    batch: int = BATCH
    row_bytes: int = 4 * D


def rank_process(rates: Rates, job: Job, rank: int, node: Node, seconds_a_byte: float, slow: float = 1.0) -> Process:
    """One rank of a job. slow: how many times longer its scan takes than that of other ranks."""
    ranks, rows = len(job.shards), job.shards[rank]

    def exchange(name: Any, bytes_each: float) -> Process:
        if ranks > 1:
            yield "meet", name, ranks
            yield "sleep", None, rates.latency + (ranks - 1) * bytes_each * seconds_a_byte

    yield "work", node, rates.query * job.queries / 2
    yield "work", node, rates.hash * rows * job.row_bytes
    yield from exchange("documents", 1000)
    yield "work", node, rates.pair * job.queries * rows / sum(job.shards)
    yield from exchange("positives", 12 * job.queries / ranks)
    for begin in range(0, job.queries, job.batch):
        count = min(job.batch, job.queries - begin)
        yield "work", node, slow * (rates.scan_batch * count / job.batch + rates.scan * count * rows * job.dim)
        yield from exchange(begin, count * 8 * (job.depth + 2))
        joined = ranks * (rates.join_part + rates.join * count * job.depth) if ranks > 1 else 0.0
        yield "work", node, joined + rates.query * count / 2


def on_one_machine(rates: Rates, job: Job) -> float:
    """Return the seconds of a job whose ranks share one machine with two cores."""
    node = Node((1.0, rates.busy))
    return simulate([rank_process(rates, job, rank, node, rates.byte) for rank in range(len(job.shards))])


def on_nodes(rates: Rates, job: Job, seconds_a_byte: float, slowest: float) -> float:
    """Return the seconds of a job with one machine per rank; the scan of the first rank takes `slowest` times as long."""
    slow = [slowest, *[1.0] * (len(job.shards) - 1)]
    return simulate([rank_process(rates, job, r, Node(), seconds_a_byte, slow[r]) for r in range(len(job.shards))])


# --- measurements ---


def _inputs(job: Job, rank: int) -> tuple[Any, Any, list[int]]:
    rows = torch.nn.functional.normalize(
        torch.randn(sum(job.shards), D, generator=torch.Generator().manual_seed(0)), dim=1
    )
    first = sum(job.shards[:rank])
    positives = torch.arange(job.queries) * len(rows) // job.queries
    queries = torch.nn.functional.normalize(rows[positives] + 0.05 * torch.randn(job.queries, D), dim=1)
    return queries, rows[first : first + job.shards[rank]].clone(), positives.tolist()


def _mine(job: Job, rank: int, group: Any, barrier: Any) -> dict[str, float]:
    """Run this process's share of a job, and return the seconds of the whole job and of its phases."""
    import negmine
    from negmine.mining.parts import PartMiner

    torch.manual_seed(1)
    queries, rows, positives = _inputs(job, rank)
    options = {"num_negatives": DEPTH, "select": negmine.Select(relative_margin=0.05), "batch_size": job.batch}
    negmine.mine_hard_negatives(
        queries[:64], torch.randn(2000, D), [0] * 64, **options
    )  # the first call chooses the kernels
    seconds: dict[str, float] = defaultdict(float)
    compute = PartMiner.__call__

    def timed(self: Any, phase: Any, *rest: Any) -> Any:
        begin = time.perf_counter()
        part = compute(self, phase, *rest)
        seconds[phase.name] += time.perf_counter() - begin
        return part

    PartMiner.__call__ = timed  # type: ignore[method-assign]
    barrier.wait()
    begin = time.perf_counter()
    negmine.mine_hard_negatives(queries, rows, positives, process_group=group, **options)
    seconds["total"] = time.perf_counter() - begin
    PartMiner.__call__ = compute  # type: ignore[method-assign]
    return dict(seconds)


def _exchange(group: Any, barrier: Any) -> dict[str, float]:
    """Return the seconds of an exchange for each of PAYLOADS, and of merging two small and two large parts."""
    import numpy as np

    from negmine.mining.merging import join_parts
    from negmine.mining.parts import Part
    from negmine.mining.process_ranks import ProcessRanks

    ranks, seconds = ProcessRanks("simulate", group), {}
    for size in PAYLOADS:
        ranks.gather_bytes(bytes(size), "nothing")
        barrier.wait()
        begin = time.perf_counter()
        for _ in range(20):
            ranks.gather_bytes(bytes(size), "nothing")
        seconds[str(size)] = (time.perf_counter() - begin) / 20
    for count in (BATCH, 8 * BATCH):
        keys = np.sort(np.random.default_rng(0).integers(0, 1 << 40, (count, DEPTH)), axis=1)[:, ::-1]
        arrays = {"numbers": np.arange(count), "sort_keys": keys.copy(), "num_dropped": np.zeros((count, 1), np.int64)}
        parts = [Part("scan", "", "", "", DEPTH, np.array([[0, count, i, i + 1]]), arrays, {}) for i in range(2)]
        begin = time.perf_counter()
        for _ in range(20):
            join_parts([Part.from_bytes(part.to_bytes()) for part in parts])
        seconds[f"join {count}"] = (time.perf_counter() - begin) / 20
    return seconds


def _child(kind: str, job: Job, rank: int, world: int, store: str, barrier: Any, out: Any) -> None:
    torch.set_num_threads(1)
    group = None
    if kind != "alone":
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        group = dist.group.WORLD
    out.put(
        _exchange(group, barrier) if kind == "exchange" else _mine(job, rank if kind == "ranks" else 0, group, barrier)
    )
    barrier.wait()


def measured(kind: str, job: Job, world: int) -> list[dict[str, float]]:
    """Measure in `world` processes at the same time.

    kind: "alone" (each process runs the job itself), "ranks" (the processes share the job) or "exchange".
    """
    context = mp.get_context("spawn")
    barrier, out = context.Barrier(world), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        asked = [(kind, job, rank, world, f"{folder}/store", barrier, out) for rank in range(world)]
        children = [context.Process(target=_child, args=arguments) for arguments in asked]
        for child in children:
            child.start()
        answers: list[dict[str, float]] = []
        while len(answers) < world:
            with contextlib.suppress(queue.Empty):
                answers.append(out.get(timeout=2))
            if any(child.exitcode for child in children):  # the others wait for it at the barrier
                for child in children:
                    child.kill()
                raise SystemExit("a measured process failed: see its message above")
        for child in children:
            child.join()
    return answers


def rates_of(small: list[dict], large: list[dict], pair: list[dict], exchange: list[dict]) -> Rates:
    """Derive the rates from the medians of repeated measurements."""

    def median(rows: list[dict], name: str) -> float:
        return statistics.median(row[name] for row in rows)

    batches = QUERIES // BATCH
    scans = [median(rows, "scan") / batches for rows in (small, large)]
    unit = (scans[1] - scans[0]) / (BATCH * (LARGE - SMALL) * D)
    other = median(large, "total") - sum(median(large, name) for name in ("scan", "documents", "positives"))
    latency = median(exchange, str(PAYLOADS[0]))
    joins = [median(exchange, f"join {count}") / 2 for count in (BATCH, 8 * BATCH)]  # per part
    join = max(0.0, joins[1] - joins[0]) / (7 * BATCH * DEPTH)
    return Rates(
        scan=unit,
        scan_batch=max(0.0, scans[0] - unit * BATCH * SMALL * D),
        hash=median(large, "documents") / (LARGE * 4 * D),
        pair=median(large, "positives") / QUERIES,
        query=other / QUERIES,
        join=join,
        join_part=max(0.0, joins[0] - join * BATCH * DEPTH),
        latency=latency,
        byte=max(0.0, median(exchange, str(PAYLOADS[1])) - latency) / PAYLOADS[1],
        busy=max(1.0, median(pair, "total") / median(large, "total")),
    )


def predicted_jobs(scale: int = 1) -> dict[str, Job]:
    """Runs that are predicted and measured, but not used to derive rates. scale: divides the number of rows."""
    jobs = {
        "one process, other sizes": Job(4096, (450_000,)),
        "two ranks, even shards": Job(QUERIES, (180_000, 180_000)),
        "two ranks, shards 1 to 3": Job(QUERIES, (90_000, 270_000)),
        "two ranks, shards 1 to 9, more queries": Job(2 * QUERIES, (30_000, 270_000)),
        "two ranks, one without rows": Job(4096, (0, 360_000)),
    }
    return {name: replace(job, shards=tuple(rows // scale for rows in job.shards)) for name, job in jobs.items()}


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    repeat, scale = (1, 10) if args.quick else (args.repeat, 1)
    sides = [Job(QUERIES, (rows,)) for rows in (SMALL, LARGE)]  # not scaled down, because rates need long runs
    jobs = predicted_jobs(scale)
    calibration: dict[str, list[dict]] = defaultdict(list)
    totals: dict[str, list[float]] = defaultdict(list)
    load = os.getloadavg()[0]  # of other processes, before the first run
    for _ in range(repeat):  # all in turn, so that a slow minute affects all of them
        calibration["small"] += measured("alone", sides[0], 1)
        calibration["large"] += measured("alone", sides[1], 1)
        calibration["pair"] += measured("alone", sides[1], 2)
        calibration["exchange"] += measured("exchange", sides[0], 2)
        for name, job in jobs.items():
            ranks = len(job.shards)
            answers = measured("ranks" if ranks > 1 else "alone", job, ranks)
            totals[name].append(max(answer["total"] for answer in answers))
    rates = rates_of(*(calibration[name] for name in ("small", "large", "pair", "exchange")))
    about = {"date": datetime.now().isoformat(timespec="seconds"), "commit": commit(), "torch": torch.__version__}
    about["load"] = f"{load:.1f}"
    rows = [about | {"kind": "rate", "name": name, "measured": f"{value:.4g}"} for name, value in asdict(rates).items()]
    for name, values in totals.items():
        seconds = (on_one_machine(rates, jobs[name]), statistics.median(values))
        cells = {"predicted": f"{seconds[0]:.3f}", "measured": f"{seconds[1]:.3f}", "spread": f"{spread(values):.2f}"}
        rows.append(about | {"kind": "run", "name": name} | cells)
        print(f"{name:<42} predicted {seconds[0]:7.2f} s, measured {seconds[1]:7.2f} s, {seconds[1] / seconds[0]:.2f}")
    print(
        f"load {about['load']} before the runs (about 0 on an idle machine), slowdown of two processes {rates.busy:.2f}"
    )
    if args.quick:
        return
    path = RESULTS / "simulation" / f"{machine_name('cpu')}.csv"
    append(path, COLUMNS, rows)
    print(path)
    from benchmarks import plan

    plan.main([])


def newest_rates(path: Path) -> tuple[Rates, list[dict[str, str]]]:
    """Read the rates and the predicted runs of the newest measurement in a file."""
    from benchmarks.rows import read

    rows = read(path)
    last = [row for row in rows if row["date"] == rows[-1]["date"]]
    rates = {row["name"]: float(row["measured"]) for row in last if row["kind"] == "rate"}
    return Rates(**rates), [row for row in last if row["kind"] == "run"]


if __name__ == "__main__":
    main()
