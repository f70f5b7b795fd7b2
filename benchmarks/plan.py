"""Estimates the time of larger jobs from measured rates: writes docs/planning.md from benchmarks/results/<machine>.csv.

The rate is that of the longest queue of the K sweep. The page first shows how well the rate of a short queue predicts the time of
long ones, so that a reader can judge the estimates. The symmetric loss of a very large batch, distributed over GPUs as a ring, is
estimated by arithmetic. Mining on several machines is estimated in the same way from benchmarks/results/mining/<machine>.csv and,
if results/simulation/<machine>.csv has rates, by the simulation of simulate.py. Rates and prices that were not measured are
marked as assumptions.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import rows as files
from benchmarks import simulate
from benchmarks.cases import SWEEP
from benchmarks.measure import OURS
from benchmarks.plot import newest
from benchmarks.rows import RESULTS, Row

PAGE = RESULTS.parents[1] / "docs" / "planning.md"
MINED_D = 384  # the D whose rate of mining is used
DIMENSION, ROW_BYTES, BATCH, DEPTH = 768, 2 * 768, 8192, 5  # of the mining jobs: bf16 rows, 5 negatives a query
FORETELLS = 65536  # the K whose rate is tried on the longer queues


@dataclass(frozen=True)
class Job:
    what: str
    op: str
    B: int
    K: int
    D: int
    bytes_each: int  # of one stored number


JOBS = [
    Job("MoCo step, queue of 65,536", "info_nce", 256, 65_536, 128, 4),
    Job("MoCo step, queue of 1 M", "info_nce", 256, 1 << 20, 128, 4),
    Job("MoCo step, queue of 16 M", "info_nce", 256, 1 << 24, 128, 4),
    Job("hardest 1,024 of 1 M texts, 1,000 queries", "mine_hardest", 1000, 1_000_000, 384, 4),
    Job("hardest 1,024 of 10 M texts, 100,000 queries", "mine_hardest", 100_000, 10_000_000, 384, 4),
    Job("hardest 1,024 of 100 M texts, 1 M queries", "mine_hardest", 1_000_000, 100_000_000, 768, 4),
]


@dataclass(frozen=True)
class Fleet:
    """Machines that share a corpus by rows. Memory, rates and prices are assumptions."""

    what: str
    nodes: int
    cores: int  # of a node; 0: its rate is that of a GPU
    memory: float  # bytes of a node that may hold rows
    refill: float  # bytes a second at which rows that do not fit are read again, for each batch of queries
    network: float  # bytes a second that a node receives
    dollars: float  # an hour, of a node


FLEETS = [
    Fleet("one machine of 128 cores, 2 TiB", 1, 128, 1.8 * 2**40, 7e9, 1.25e9, 6.0),
    Fleet("64 nodes of 16 cores, 64 GiB", 64, 16, 56 * 2**30, 1e9, 1.25e9, 0.7),
    Fleet("8 GPUs of 80 GB", 8, 0, 72e9, 50e9, 50e9, 3.0),
]
GPU_RATE = 1.25e14  # multiply-adds a second with selection
SLOWEST = 1.1  # how much longer than the others one node scans
BATCH_OF_RING, RANKS, RING_D = 1 << 20, 8, 768  # of the symmetric loss over ranks
MINING_JOBS = ((1_000_000, 100_000_000), (1_000_000, 1_000_000_000))  # queries, rows


def span(seconds: float) -> str:
    for name, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{1e3 * seconds:.3g} ms"


def size(count: float) -> str:
    for name, unit in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 2**20:.3g} MiB"


def swept_over_k(rows: list[Row], op: str) -> dict[int, Row]:
    """The rows of the K sweep by K, with the most threads."""
    threads = max((row["threads"] for row in rows), key=int)
    chosen = [row for row in rows if row["case"].startswith("K=") and row["op"] == op]
    return {int(r["K"]): r for r in chosen if r["variant"] == OURS and r["threads"] == threads}


def simulated(fleet: Fleet, rates: simulate.Rates, Q: int, K: int, again: float, scan: float) -> float:
    """The seconds of a job. again: of reading what does not fit in memory, of all batches; scan: a multiply-add of a node."""
    shards = tuple(K * (i + 1) // fleet.nodes - K * i // fleet.nodes for i in range(fleet.nodes))
    job = simulate.Job(Q, shards, DIMENSION, DEPTH, BATCH, ROW_BYTES)
    slower = max(scan, again / (Q * DIMENSION * max(shards)))  # rows are read while others are scanned
    return simulate.on_nodes(replace(rates, scan=slower), job, 1 / fleet.network, SLOWEST if fleet.nodes > 1 else 1.0)


def checked(runs: list[dict[str, str]]) -> list[str]:
    """The lines about how well the simulation predicts runs of this machine."""
    ratios = [float(run["measured"]) / float(run["predicted"]) for run in runs]
    within = max(max(ratio, 1 / ratio) for ratio in ratios) - 1
    lines = [
        "",
        "A simulation by discrete events (`benchmarks/simulate.py`) adds what such a sum leaves out: hashes, the scores of "
        "positives, what every rank does for every query, exchanges, merges, and ranks that wait for the slowest. Its rates "
        "come from runs of one process, two such runs side by side, and exchanges of bytes. Runs of other kinds, on the two "
        f"cores of this machine, took up to {within:.0%} more or less than it predicts (load {runs[0]['load']}; spread: "
        "largest less smallest of repeated runs, of their median):",
        "",
        "| run | predicted | measured | measured / predicted | spread |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run, ratio in zip(runs, ratios, strict=True):
        seconds = (f"{float(run[name]):.3g} s" for name in ("predicted", "measured"))
        lines.append(f"| {run['name']} | {' | '.join(seconds)} | {ratio:.2f} | {float(run['spread']):.0%} |")
    return lines


def mining(path: Path, simulation: Path) -> list[str]:
    """The lines about mining, from the measured rows of mining in `path` and of the simulation, where there are any."""
    rows = [row for row in files.newest(path, "variant", "Q", "K", "D") if row["variant"] == "negmine"]
    longest = max((row for row in rows if int(row["D"]) == MINED_D), key=lambda row: int(row["Q"]))

    def work(row: Row) -> int:
        return int(row["Q"]) * int(row["K"]) * int(row["D"])

    rate = work(longest) / float(longest["cpu_s"])  # multiply-adds a second of one core
    lines = [
        "",
        "## Mining on several machines",
        "",
        f"`mine_hard_negatives` with a margin and `count_skipped`, {DEPTH} negatives a query, made {rate:.3g} multiply-adds a "
        f"second of a core in its longest run with D = {MINED_D}. What that rate foretells of the other runs, whose fixed costs "
        "weigh more:",
        "",
        "| queries | rows | D | foretold | measured | measured / foretold |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        foretold, measured = work(row) / rate, float(row["cpu_s"])
        cells = [f"{int(row['Q']):,}", f"{int(row['K']):,}", row["D"], f"{foretold:.3g} s", f"{measured:.3g} s"]
        lines.append(f"| {' | '.join(cells)} | {measured / foretold:.2f} |")
    rates = None
    if simulation.is_file():
        rates, runs = simulate.newest_rates(simulation)
        lines += checked(runs)
    how = "Time is the larger of arithmetic and of reading rows that do not fit in memory, once for each batch of "
    if rates is not None:
        how = (
            f"Time is simulated; one node scans {SLOWEST:g} times as long as the others. Rows that do not fit in memory are "
            "read, while others are scanned, once for each batch of "
        )
    lines += [
        "",
        f"Jobs with D = {DIMENSION} in bf16, each machine holding a range of rows "
        f"([Ray, ranks or parts](mining.md#on-ray)). {how}"
        f"{BATCH:,} queries. *Assumed*, not measured: that cores keep this rate side by side and for this D; "
        f"{GPU_RATE:.3g} multiply-adds a second of a GPU; memory, the rates at which rows are read again, and prices: "
        + "; ".join(
            f"{f.what}: {size(f.memory)} a node, {f.refill / 1e9:g} GB/s, network {f.network / 1e9:g} GB/s, "
            f"{f.dollars:g} $/h a node"
            for f in FLEETS
        )
        + ". Traffic is what one node receives (queries) and sends (sort keys and counts).",
        "",
        "| queries | rows | machines | rows a node | arithmetic | read again | time | traffic a node | price |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for Q, K in MINING_JOBS:
        for fleet in FLEETS:
            held = K * ROW_BYTES / fleet.nodes
            arithmetic = Q * K * DIMENSION / (fleet.nodes * (fleet.cores * rate if fleet.cores else GPU_RATE))
            again = -(-Q // BATCH) * max(0.0, held - fleet.memory) / fleet.refill
            seconds = max(arithmetic, again)
            if rates is not None:
                scan = fleet.nodes * arithmetic / (Q * K * DIMENSION)
                seconds = simulated(fleet, rates, Q, K, again, scan)
            traffic = Q * (ROW_BYTES + 8 * DEPTH + 8) if fleet.nodes > 1 else 0
            dollars = seconds / 3600 * fleet.nodes * fleet.dollars
            lines.append(
                f"| {Q:,} | {K:,} | {fleet.what} | {size(held)} | {span(arithmetic)} | {span(again) if again else '-'} "
                f"| {span(seconds)} | {size(traffic) if traffic else '-'} | {dollars:,.0f} $ |"
            )
    return lines


def ring(rate: float, machine: str) -> list[str]:
    """The lines about a symmetric loss over ranks as a ring. rate: multiply-adds a second of a loss and its gradient here."""
    here = BATCH_OF_RING // RANKS  # pairs of one rank
    chunk = here * RING_D * 2  # bytes of one rank's features of one side, in bf16
    work = 2 * 2 * here * BATCH_OF_RING * RING_D  # both directions; the gradient of the keys costs as much as the loss
    hops = RANKS - 1
    sent = 2 * (2 * hops * chunk + RANKS * 2 * chunk)  # both directions: keys forward and backward, fp32 gradients home
    transfer = sent / FLEETS[-1].network
    return [
        "",
        f"## A batch of {BATCH_OF_RING:,} pairs",
        "",
        f"The symmetric loss of `adapters.open_clip` as a ring over {RANKS} GPUs, D = {RING_D} in bf16: each rank keeps its own "
        f"{here:,} pairs and sees the features of one other rank at a time. *Assumed*, not measured: {GPU_RATE:.3g} "
        "multiply-adds a second of a GPU, each counted for a score and the softmax mean together; "
        f"{FLEETS[-1].network / 1e9:g} GB/s between GPUs. By the rate measured on `{machine}`, one such machine in the place of "
        f"each GPU would take {span(work / rate)}.",
        "",
        "| what, of one rank and one step | |",
        "| --- | --- |",
        f"| multiply-adds | {work:.3g} |",
        f"| time of arithmetic | {span(work / GPU_RATE)} |",
        f"| features and gradients sent | {size(sent)} |",
        f"| time of sending, beside the arithmetic | {span(transfer)} |",
        f"| features held, own and passing, both sides | {size(2 * 2 * chunk)} |",
        f"| the same if all ranks' features were gathered | {size(2 * RANKS * chunk)} |",
        f"| its rows of the matrix of logits in fp32, never stored | {size(4 * here * BATCH_OF_RING)} |",
    ]


def page(path: Path) -> str:
    rows = newest(path)
    last = max(rows, key=lambda row: row["date"])
    ops = list(dict.fromkeys(job.op for job in JOBS))
    curves = {op: swept_over_k(rows, op) for op in ops}
    lines = [
        "# Planning",
        "",
        f"What larger jobs take on `{path.stem}` ({last['threads']} threads, torch {last['torch']}, {last['date'][:10]}), "
        "by the rates of `benchmarks/results/`. Written by `python -m benchmarks.plan`; measure your own machine with "
        "`make bench` first.",
        "",
        "## How far a rate carries",
        "",
        f"The time at K = {FORETELLS:,} (B = {SWEEP.B}, D = {SWEEP.D}), multiplied up, against what was measured there:",
        "",
        "| op | K | foretold | measured | measured / foretold | extra memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, curve in curves.items():
        for K, row in sorted(curve.items()):
            if K > FORETELLS:
                foretold = float(curve[FORETELLS]["median_ms"]) * K / FORETELLS
                measured = float(row["median_ms"])
                lines.append(
                    f"| {op} | {K:,} | {foretold:.3g} ms | {measured:.3g} ms | {measured / foretold:.2f} "
                    f"| {row['peak_extra_mib']} MiB |"
                )
    lines += [
        "",
        "## What a job takes",
        "",
        "Time = B K D / rate, the rate that of the longest queue above. The matrix is what eager PyTorch would store; no "
        "negmine op stores it. Keys that do not fit in memory stream from disk (`mine_hard_negatives`), at the disk's rate "
        "if that is less.",
        "",
        "| job | op | B | K | D | time here | keys | the matrix |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in JOBS:
        K, row = max(curves[job.op].items())
        rate = SWEEP.B * K * SWEEP.D / (float(row["median_ms"]) / 1e3)  # multiply-adds a second, all else included
        lines.append(
            f"| {job.what} | {job.op} | {job.B:,} | {job.K:,} | {job.D} | {span(job.B * job.K * job.D / rate)} "
            f"| {size(job.K * job.D * job.bytes_each)} | {size(4 * job.B * job.K)} |"
        )
    K, row = max(curves["info_nce"].items())
    lines += ring(SWEEP.B * K * SWEEP.D / (float(row["median_ms"]) / 1e3), path.stem)
    mined, simulation = (path.parent / folder / path.name for folder in ("mining", "simulation"))
    return "\n".join([*lines, *(mining(mined, simulation) if mined.is_file() else []), ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="?", help="the CSV file's stem (default: the one with rows of mining)")
    machine = parser.parse_args(arguments).machine
    found = [path for path in sorted(RESULTS.glob("*.csv")) if machine in (None, path.stem)]
    if machine is None and len(found) > 1:
        found = [path for path in found if (RESULTS / "mining" / path.name).is_file()] or found
    if len(found) != 1:
        raise SystemExit(f"name one of {', '.join(path.stem for path in found) or 'no results: run make bench first'}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found[0]))
    print(PAGE)


if __name__ == "__main__":
    main()
