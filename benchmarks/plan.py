"""Estimate the time of larger jobs from measured rates: write docs/planning.md from benchmarks/results/<machine>.csv.

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
MINED_D = 384  # the rate of mining is taken from a run with this D
DIMENSION, ROW_BYTES, BATCH, DEPTH = 768, 2 * 768, 8192, 5  # mining jobs: bf16 rows, 5 negatives per query
PREDICTS = 65536  # the times of longer queues are predicted from the rate at this K


@dataclass(frozen=True)
class Job:
    what: str
    op: str
    B: int
    K: int
    D: int
    bytes_each: int  # bytes of one element of the keys


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
    """Machines (nodes) that each hold a range of the corpus rows. Memory, rates and prices are assumptions."""

    what: str
    nodes: int
    cores: int  # cores per node; 0: each node is a GPU with GPU_RATE
    memory: float  # bytes per node for corpus rows
    refill: float  # bytes per second; rows that do not fit into memory are read again for every batch of queries
    network: float  # bytes per second that a node receives
    dollars: float  # price of a node per hour


FLEETS = [
    Fleet("one machine of 128 cores, 2 TiB", 1, 128, 1.8 * 2**40, 7e9, 1.25e9, 6.0),
    Fleet("64 nodes of 16 cores, 64 GiB", 64, 16, 56 * 2**30, 1e9, 1.25e9, 0.7),
    Fleet("8 GPUs of 80 GB", 8, 0, 72e9, 50e9, 50e9, 3.0),
]
GPU_RATE = 1.25e14  # multiply-adds per second, the selection of negatives included
SLOWEST = 1.1  # one node needs this many times as long for its scan as the others
BATCH_OF_RING, RANKS, RING_D = 1 << 20, 8, 768  # the symmetric loss, distributed over ranks as a ring
MINING_JOBS = ((1_000_000, 100_000_000), (1_000_000, 1_000_000_000))  # queries, rows


def duration(seconds: float) -> str:
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
    """Rows of the K sweep, by K; of rows with different numbers of threads, those with the most."""
    threads = max((row["threads"] for row in rows), key=int)
    chosen = [row for row in rows if row["case"].startswith("K=") and row["op"] == op]
    return {int(r["K"]): r for r in chosen if r["variant"] == OURS and r["threads"] == threads}


def simulated(fleet: Fleet, rates: simulate.Rates, Q: int, K: int, again: float, scan: float) -> float:
    """Return the simulated seconds of a job.

    again: seconds in which a node rereads the rows that do not fit into memory, summed over all batches of queries.
    scan: seconds per multiply-add of one node.
    """
    shards = tuple(K * (i + 1) // fleet.nodes - K * i // fleet.nodes for i in range(fleet.nodes))
    job = simulate.Job(Q, shards, DIMENSION, DEPTH, BATCH, ROW_BYTES)
    slower = max(scan, again / (Q * DIMENSION * max(shards)))  # reading and scanning overlap
    return simulate.on_nodes(replace(rates, scan=slower), job, 1 / fleet.network, SLOWEST if fleet.nodes > 1 else 1.0)


def checked(runs: list[dict[str, str]]) -> list[str]:
    """Markdown lines about how well the simulation predicts runs on this machine."""
    ratios = [float(run["measured"]) / float(run["predicted"]) for run in runs]
    within = max(max(ratio, 1 / ratio) for ratio in ratios) - 1
    lines = [
        "",
        "A discrete-event simulation (`benchmarks/simulate.py`) also includes hashes, the scores of positives, the work that "
        "every rank does for every query, communication, merges, and waiting for the slowest rank. Its rates come from runs "
        "of one process, from two such runs at the same time, and from exchanges of bytes. Runs of other kinds, on the two "
        f"cores of this machine, took up to {within:.0%} more or less than it predicts (load {runs[0]['load']}). The spread "
        "is the difference between the slowest and the fastest of repeated runs, divided by their median.",
        "",
        "| run | predicted | measured | measured / predicted | spread |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run, ratio in zip(runs, ratios, strict=True):
        seconds = (f"{float(run[name]):.3g} s" for name in ("predicted", "measured"))
        lines.append(f"| {run['name']} | {' | '.join(seconds)} | {ratio:.2f} | {float(run['spread']):.0%} |")
    return lines


def mining(path: Path, simulation: Path) -> list[str]:
    """Markdown lines about mining, from the rows in `path` and, if the file `simulation` exists, from its rates."""
    rows = [row for row in files.newest(path, "variant", "Q", "K", "D") if row["variant"] == "negmine"]
    longest = max((row for row in rows if int(row["D"]) == MINED_D), key=lambda row: int(row["Q"]))

    def work(row: Row) -> int:
        return int(row["Q"]) * int(row["K"]) * int(row["D"])

    rate = work(longest) / float(longest["cpu_s"])  # multiply-adds per second of one core
    lines = [
        "",
        "## Mining on several machines",
        "",
        f"In its longest run with D = {MINED_D}, `mine_hard_negatives` with a margin, `count_skipped` and {DEPTH} negatives per "
        f"query computed {rate:.3g} multiply-adds per second and core. The table compares the times that follow from this rate "
        "with those of other runs, in which fixed costs matter more.",
        "",
        "| queries | rows | D | predicted | measured | measured / predicted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        predicted, measured = work(row) / rate, float(row["cpu_s"])
        cells = [f"{int(row['Q']):,}", f"{int(row['K']):,}", row["D"], f"{predicted:.3g} s", f"{measured:.3g} s"]
        lines.append(f"| {' | '.join(cells)} | {measured / predicted:.2f} |")
    rates = None
    if simulation.is_file():
        rates, runs = simulate.newest_rates(simulation)
        lines += checked(runs)
    how = (
        "The time is that of the arithmetic, or of reading rows that do not fit into memory if this takes longer, once for "
        "each batch of "
    )
    if rates is not None:
        how = (
            f"The time is simulated; one node needs {SLOWEST:g} times as long for its scan as the others. Rows that do not fit "
            "into memory are read while others are scanned, once for each batch of "
        )
    lines += [
        "",
        f"The next table has jobs with D = {DIMENSION} in bf16. Each machine has a range of rows "
        f"([Ray, ranks or parts](mining.md#on-ray)). {how}"
        f"{BATCH:,} queries. Traffic is what one node receives (queries) and sends (sort keys and counts). These assumptions "
        "were not measured:",
        "",
        "- All cores of a machine reach this rate at the same time, and also for this D.",
        f"- A GPU computes {GPU_RATE:.3g} multiply-adds per second.",
        *(
            f"- {f.what[0].upper()}{f.what[1:]}: {size(f.memory)} per node for rows, which are read again at "
            f"{f.refill / 1e9:g} GB/s, network {f.network / 1e9:g} GB/s, {f.dollars:g} $/h per node."
            for f in FLEETS
        ),
        "",
        "| queries | rows | machines | rows per node | arithmetic | read again | time | traffic per node | price |",
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
                f"| {Q:,} | {K:,} | {fleet.what} | {size(held)} | {duration(arithmetic)} | {duration(again) if again else '-'} "
                f"| {duration(seconds)} | {size(traffic) if traffic else '-'} | {dollars:,.0f} $ |"
            )
    return lines


def ring(rate: float, machine: str) -> list[str]:
    """Markdown lines about a symmetric loss that is distributed over ranks as a ring.

    rate: multiply-adds per second of the loss and its gradient on `machine`.
    """
    pairs = BATCH_OF_RING // RANKS  # per rank
    chunk = pairs * RING_D * 2  # bytes of one rank's features of one side, in bf16
    work = 2 * 2 * pairs * BATCH_OF_RING * RING_D  # both directions; the gradient of the keys costs as much as the loss
    hops = RANKS - 1
    # Both directions: keys are sent around in forward and in backward, fp32 gradients to the ranks of the keys.
    sent = 2 * (2 * hops * chunk + RANKS * 2 * chunk)
    transfer = sent / FLEETS[-1].network
    return [
        "",
        f"## A batch of {BATCH_OF_RING:,} pairs",
        "",
        f"The symmetric loss of `negmine.adapters.open_clip` on {RANKS} GPUs, with D = {RING_D} in bf16. Each rank keeps its own "
        f"{pairs:,} pairs, and the features of the other ranks are sent around a ring. Two rates were *assumed* and not "
        f"measured: {GPU_RATE:.3g} multiply-adds per second and GPU, where a score and its share of the softmax mean count as "
        f"one, and {FLEETS[-1].network / 1e9:g} GB/s between GPUs. At the rate measured on `{machine}`, eight such machines "
        f"in place of the GPUs would need {duration(work / rate)}.",
        "",
        "| for one rank and one step | |",
        "| --- | --- |",
        f"| multiply-adds | {work:.3g} |",
        f"| time of the arithmetic | {duration(work / GPU_RATE)} |",
        f"| features and gradients sent | {size(sent)} |",
        f"| time of sending, during the arithmetic | {duration(transfer)} |",
        f"| features in memory, of this rank and of one other | {size(2 * 2 * chunk)} |",
        f"| the same if the features of all ranks were gathered | {size(2 * RANKS * chunk)} |",
        f"| its rows of the matrix of logits in fp32, which are not stored | {size(4 * pairs * BATCH_OF_RING)} |",
    ]


def page(path: Path) -> str:
    rows = newest(path)
    last = max(rows, key=lambda row: row["date"])
    ops = list(dict.fromkeys(job.op for job in JOBS))
    curves = {op: swept_over_k(rows, op) for op in ops}
    lines = [
        "# Planning",
        "",
        f"This page estimates the time and memory of larger jobs on `{path.stem}` ({last['threads']} threads, torch "
        f"{last['torch']}, {last['date'][:10]}) from the measurements in `benchmarks/results/`. It is written by "
        "`python -m benchmarks.plan`; to get the page for your own machine, run `make bench` first.",
        "",
        "## How well a rate predicts longer queues",
        "",
        f"The predicted time is that of K = {PREDICTS:,} (B = {SWEEP.B}, D = {SWEEP.D}), multiplied by K / {PREDICTS:,}.",
        "",
        "| op | K | predicted | measured | measured / predicted | extra memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, curve in curves.items():
        for K, row in sorted(curve.items()):
            if K > PREDICTS:
                predicted = float(curve[PREDICTS]["median_ms"]) * K / PREDICTS
                measured = float(row["median_ms"])
                lines.append(
                    f"| {op} | {K:,} | {predicted:.3g} ms | {measured:.3g} ms | {measured / predicted:.2f} "
                    f"| {row['peak_extra_mib']} MiB |"
                )
    lines += [
        "",
        "## Estimates for single jobs",
        "",
        "The time is B K D / rate, with the rate of the longest queue above. The last column is the size of the (B, K) matrix "
        "in fp32, which plain PyTorch would store and negmine does not. If keys do not fit into memory, "
        "`mine_hard_negatives` reads them from disk, and the speed of the disk may limit it.",
        "",
        "| job | op | B | K | D | time on this machine | keys | (B, K) matrix |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in JOBS:
        K, row = max(curves[job.op].items())
        rate = SWEEP.B * K * SWEEP.D / (float(row["median_ms"]) / 1e3)  # multiply-adds per second of the whole call
        lines.append(
            f"| {job.what} | {job.op} | {job.B:,} | {job.K:,} | {job.D} | {duration(job.B * job.K * job.D / rate)} "
            f"| {size(job.K * job.D * job.bytes_each)} | {size(4 * job.B * job.K)} |"
        )
    K, row = max(curves["info_nce"].items())
    lines += ring(SWEEP.B * K * SWEEP.D / (float(row["median_ms"]) / 1e3), path.stem)
    mined, simulation = (path.parent / folder / path.name for folder in ("mining", "simulation"))
    return "\n".join([*lines, *(mining(mined, simulation) if mined.is_file() else []), ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "machine", nargs="?", help="name of a CSV file without .csv (default: the one with rows of mining)"
    )
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
