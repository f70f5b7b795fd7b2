"""Find out, without a GPU, what kernels an op launches on one, and write results/gpu-model/launches.csv for gpu_model.py.

    python -m benchmarks.gpu_trace [--backend triton]

A call is traced on meta tensors while torch reports the properties of the GPU, so the launches are those that would happen
there. Triton kernels are compiled ahead of time, and those of kernels/cuda are taken from the compiled library. The instructions
of their loops are counted in the machine code, as in tests/test_aot.py and tests/test_cuda_build.py. The number of iterations of
a loop follows from the arguments of the launch, or, if it depends on the data, is an assumption.
"""

import argparse
import math
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import peers
from benchmarks.cases import Case, Inputs
from benchmarks.gpu_model import BACKENDS, CARDS, FOLDER, OPS, SHAPES, Launch, mixed_bytes
from benchmarks.rows import read, write
from negmine.ops import backends
from negmine.ops.registry import OPS as DECLARED
from tests import aot, sass

ROOT = Path(__file__).resolve().parents[1]
HALVINGS = 14  # steps of a bisection that finds one of a few thousand scores
CERTIFIED_PASSES = 4.5  # passes over the survivors of a row until the cut is found; tests/test_triton.py counts them
# Kernels of the exact search, whose programs return at once if the row is certain.
IDLE = ("exact_rank_kernel", "exact_collect_kernel")
# Arguments of which a kernel reads or writes only a few entries.
HARDLY_READ = {"scan_kernel": ("survivors_ptr",), "sample_kernel": ("keys_ptr",), "mix_logsumexp_kernel": ("keys_ptr",)}
# PyTorch's topk of int64 does a radix selection and a sort: the number of launches, and how often it reads its input.
TOPK_LAUNCHES, TOPK_READS = 25, 9
SURVIVORS = 1700  # columns of a row that a scan keeps for N = 1,024; about as many for two ranks
CUDA_SAMPLE = {"mine_hardest": 4096, "rank_thresholds": 8192}
ARCHITECTURES = {80: "80", 90: "90a"}  # for which kernels/cuda is compiled, by compute capability

# The other kernels of kernels/cuda, which do not compute the scores of the whole queue, by mangled names for bf16 and D = 128.
OTHERS = {
    "merge": r"12merge_kernelIL\w*E1E",
    "loss": r"11loss_kernelIL\w*E1ELi0E",
    "mixed loss": r"11loss_kernelIL\w*E1ELi1ELb1E",
    "sample": r"13sample_kernelIL\w*E1ELi8E",
    "cut": r"10cut_kernel",
    "finish": r"13finish_kernelENS\w*Pass",
    "brackets": r"15brackets_kernel",
    "finish ranks": r"13finish_kernelILi2E",
    "rank_window": r"18rank_window_kernel",
    "mix_logsumexp": r"20mix_logsumexp_kernelIL\w*4KindE2ELi1ELb0E",
    "count": r"11mask_kernel",
}


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def bytes_of(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


class TorchOps(TorchDispatchMode):
    """Records a row for every torch op that runs on the device."""

    def __init__(self, launched: list[Any]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if aot.runs_on_device(func):
            name = func._schema.name.removeprefix("aten::")
            launches, reads = (TOPK_LAUNCHES, TOPK_READS) if name == "topk" else (1, 1)
            row = {"launches": launches, "bytes": reads * bytes_of(list(args)) + bytes_of(result)}
            self.launched.append((f"torch {name}", row))
        return result


def turns_of(name: str, at: dict[str, Any]) -> int:
    """The number of iterations of the main loop in a program of a Triton kernel. at: the arguments by name."""
    known: dict[str, Callable[[], float]] = {
        "logsumexp_kernel": lambda: at["tiles_per_split"],
        "count_negatives_kernel": lambda: at["tiles_per_split"],
        "scan_kernel": lambda: at["K"] / at["BLOCK_K"] / at["SPLITS"],
        "sample_quantile_kernel": lambda: HALVINGS,
        "sample_brackets_kernel": lambda: 2 * at["R"] * HALVINGS,
        "select_certified_kernel": lambda: CERTIFIED_PASSES * math.ceil(at["W"] / at["BLOCK_W"]),
        "certificate_kernel": lambda: at["BUFFERS"] / at["BLOCK_P"],
        "info_nce_kernel": lambda: at["SPLITS"] / at["BLOCK_P"],
        "mix_logsumexp_kernel": lambda: at["draws"].total / at["BLOCK_S"],
    }
    return math.ceil(known[name]()) if name in known else 0


class Triton:
    """Makes rows from the launches of Triton kernels."""

    def __init__(self, capability: int) -> None:
        import negmine.kernels.triton as ops

        self.capability = capability
        self.functions = {name: getattr(ops, name) for name in ops.__all__}
        self.counts: dict[str, dict] = {}

    def rows(self, launch: aot.Launch) -> list[tuple[str, dict]]:
        kernel = launch.kernel.fn.__name__
        programs = math.prod(launch.grid)
        if kernel in IDLE:
            return [(kernel, {"programs": programs})]
        key = str(launch.key)
        if key not in self.counts:
            self.counts[key] = aot.inspect_launch(launch, self.capability)
            print(f"sm_{self.capability} {self.counts[key]}", flush=True)
        count = self.counts[key]
        at = dict(zip((p.name for p in launch.kernel.params), launch.args, strict=True))
        turns, per_turn, warps = turns_of(kernel, at), count["longest_loop"], count["warps"]
        multiply_adds = exponentials = 0
        if count["products"]:
            tile = at["BLOCK_B"] * at["BLOCK_K"]
            if turns:
                per_turn = round(count["per_score"] * tile / (32 * warps))
            sums = kernel == "logsumexp_kernel"
            scores = programs * max(turns, 1) * tile
            multiply_adds = scores * at["D"] * (2 if sums else 1)
            exponentials = scores if sums else 0
        read = [value for name, value in at.items() if name not in HARDLY_READ.get(kernel, ())]
        row = {
            "programs": programs, "warps": warps, "turns": turns, "per_turn": per_turn if turns else 0,
            "outside": count["outside_of_loops"], "multiply_adds": multiply_adds, "exponentials": exponentials,
            "bytes": bytes_of(read),
        }  # fmt: skip
        if kernel == "mix_logsumexp_kernel":
            row["gathered"] = mixed_bytes(programs, at["D"])
        return [(count["kernel"], row)]


class Cuda:
    """Makes rows from the calls of ops in kernels/cuda. The launches of each op are listed here, following its source."""

    def __init__(self, capability: int, processors: int, launched: list[Any]) -> None:
        self.processors, self.launched = processors, launched
        self.counts = self.counted(ARCHITECTURES[capability])
        ranking = ("count_negatives", "mine_hardest", "rank_thresholds")
        names = ("info_nce", "logsumexp", "mix_logsumexp", "mix_negatives", *ranking)
        self.functions = {name: self.recorded(name) for name in names}

    def counted(self, architecture: str) -> dict[str, dict]:
        """The instructions of each kernel by a short name, which ends in "pairs" if it checks each pair against the pool."""
        (library,) = ROOT.glob("negmine/_ops_cuda*.so")
        found: dict[str, dict] = {}
        with tempfile.TemporaryDirectory() as folder:
            sass.show("cuobjdump", "-xelf", f"sm_{architecture}", library, folder=Path(folder))
            for cubin in Path(folder).glob(f"*sm_{architecture}.cubin"):
                for mangled, code in sass.functions(cubin).items():
                    scoring = sass.scoring(mangled, code, architecture)
                    names = [name for name, pattern in OTHERS.items() if re.search(pattern, mangled)]
                    row = {
                        "turn": max(map(len, sass.innermost(code)), default=0),
                        "outside": sass.outside_of_loops(code),
                        "scores": 0,
                    }
                    if scoring is not None and scoring.brackets == (2 if scoring.kernel == "rank" else 1):
                        names = [scoring.kernel + " pairs" * scoring.by_pair]
                        row |= {"turn": scoring.instructions, "scores": scoring.scores}
                    found |= {name: row for name in names}
        missing = set(OTHERS) - set(found)
        if missing:
            raise SystemExit(
                f"gpu_trace: {library.name} has no kernel {', '.join(sorted(missing))} for sm_{architecture}"
            )
        return found

    def recorded(self, op: str) -> Callable:
        """A function that records its call and returns empty results of the right shapes."""

        def call(*arguments: Any) -> Any:
            self.launched.append((op, dict(zip((x.name for x in DECLARED[op].arguments), arguments, strict=True))))
            return DECLARED[op].fake(*arguments)

        return call

    def row(self, kernel: str, programs: int, warps: int, turns: float = 0, **more: int) -> tuple[str, dict]:
        count = self.counts[kernel]
        row = {"programs": programs, "warps": warps, "turns": math.ceil(turns), "outside": count["outside"]}
        return kernel, row | {"per_turn": count["turn"] if turns else 0} | more

    def scored(self, kernel: str, B: int, K: int, D: int, splits: int, products: int, bytes: int) -> tuple[str, dict]:
        programs, rows = math.ceil(B / 128) * splits, 128
        scores = self.counts[kernel]["scores"]  # of one thread in one iteration; there are 128 threads
        turns = math.ceil(K / splits / 64) * 64 * rows / (128 * scores)
        all_scores = programs * math.ceil(K / splits / 64) * 64 * rows
        more = {"multiply_adds": products * D * all_scores, "exponentials": all_scores if products == 2 else 0}
        return self.row(kernel, programs, 4, turns, bytes=bytes, **more)

    def rows(self, op: str, at: dict[str, Any]) -> list[tuple[str, dict]]:
        query, keys = at["query"], at["negative_keys"]
        (B, D), K = query.shape, keys.shape[0]
        read = bytes_of([query, keys])
        pairs = " pairs" * any(at.get(x) is not None for x in ("query_ids", "query_labels", "lower", "upper"))
        splits = max(1, 2 * self.processors // math.ceil(B / 128))

        def selected(kind: str, scan: str, cut: str, finish: str) -> list[tuple[str, dict]]:
            sample, scan_splits = CUDA_SAMPLE[kind], min(splits, SURVIVORS // 32 + 25)
            kept = 8 * B * SURVIVORS
            if kind == "mine_hardest":  # reads survivors, counts digits, and sorts 1,024 in 55 steps of 2 iterations
                cutting, finishing = HALVINGS, 5 * SURVIVORS / 256 + 2 * 55
            else:  # histograms; each warp reads the buffers of every eighth split three times
                cutting, finishing = 2, 3 * math.ceil(scan_splits / 8) * math.ceil(SURVIVORS / (128 * scan_splits))
            return [
                self.row("sample", math.ceil(B / 128) * min(splits, sample // 64), 4, multiply_adds=B * sample * D,
                         bytes=2 * D * (B + sample) + 4 * B * sample),
                self.row(cut, B, sample // 1024, cutting, bytes=4 * B * sample),
                self.scored(scan + pairs, B, K, D, scan_splits, 1, read + kept),
                ("recover", {"programs": math.ceil(B / 128)}),
                self.row(finish, B, 8, finishing, bytes=kept + 12 * B * 1024),
            ]  # fmt: skip

        if op == "mine_hardest":
            return selected(op, "scan", "cut", "finish")
        if op == "rank_thresholds":
            return selected(op, "rank", "brackets", "finish ranks")
        if op == "mix_logsumexp":
            total = at["pairs"] + at["with_query"]
            return [
                self.row(op, B, 8, total / 32, bytes=bytes_of([query, at["hard_index"]]), gathered=mixed_bytes(B, D))
            ]
        if op == "count_negatives":
            return [self.row("count", math.ceil(B / 128) * splits, 4, K / splits / 32), ("add", {"programs": B // 128})]
        if op not in ("logsumexp", "info_nce"):
            raise SystemExit(f"gpu_trace: the launches of {op} are not known")
        total = at["pairs"] + at["with_query"] if op == "info_nce" and at["hard"] else 0
        rows = self.rows("mine_hardest", at) if total or at.get("N") else []
        if at["ranks"] is not None:
            rows += [*self.rows("rank_thresholds", at), self.row("rank_window", math.ceil(B / 128), 4)]
            pairs = " pairs"
        parts = 4 * splits * B * (D + 5)
        summed = self.scored("sum" + pairs, B, K, D, splits, 2, read + parts)
        finished = parts + 4 * B * D
        if op == "logsumexp":
            return rows + [summed, self.row("merge", B, 8, splits / 8, bytes=finished)] * at["scales"].numel()
        finished += bytes_of([query, at["positive_key"]])
        if not total:
            return [*rows, summed, self.row("loss", B, 8, splits / 8, bytes=finished)]
        finished += 8 * B * min(at["skip"] + at["hard"], K)
        return [*rows, summed, self.row("mixed loss", B, 8, total / 32, bytes=finished, gathered=mixed_bytes(B, D))]


def meta_inputs(case: Case, with_ids: bool) -> Inputs:
    """Inputs of a case that have only shapes."""

    def empty(dtype: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    vectors = [empty(case.dtype, rows, case.D) for rows in (case.B, case.B, case.K)]
    ids = [empty("int64", rows) if with_ids else None for rows in (case.B, case.K)]
    return Inputs(*vectors, *ids)


def merged(rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Merge all torch ops into one row, because each only takes the time of its memory traffic."""
    kernels = [(name, row) for name, row in rows if not name.startswith("torch ")]
    of_torch = [row for name, row in rows if name.startswith("torch ")]
    if not of_torch:
        return kernels
    return [*kernels, ("torch", {name: sum(row[name] for row in of_torch) for name in ("launches", "bytes")})]


def trace(name: str, backend: str, wanted: tuple[str, ...] = OPS) -> list[Launch]:
    """The launches of a backend on a GPU, for these ops with every shape and kind of pool."""
    card = CARDS[name]
    launched = aot.stand_in(card.capability, card.processors)
    ops = Triton(card.capability) if backend == "triton" else Cuda(card.capability, card.processors, launched)
    backends.BACKENDS = (backends.Backend(backend, "meta", ops.functions), backends.Backend("reference", "any"))
    backends._chosen.clear()
    found = []
    for op in wanted:
        for ids in ("", "ids"):
            for case in SHAPES:
                inputs = meta_inputs(case, bool(ids))
                call = peers.OPS[op].fused
                call(inputs, backend)  # fills caches
                launched.clear()
                with TorchOps(launched):
                    call(inputs, backend)
                rows: list[tuple[str, dict]] = []
                for each in list(launched):
                    if isinstance(each, aot.Launch):
                        rows += ops.rows(each)
                    elif each[0].startswith("torch "):
                        rows.append(each)
                    else:
                        rows += ops.rows(*each)
                found += [Launch(name, backend, op, ids, case.B, kernel, **row) for kernel, row in merged(rows)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="rows of other backends are kept"
    )
    args = parser.parse_args()
    path = FOLDER / "launches.csv"
    kept = [launch for launch in map(Launch.of, read(path)) if launch.backend not in args.backend]
    found = kept + [launch for name in CARDS for backend in args.backend for launch in trace(name, backend)]
    found.sort(key=lambda launch: (list(CARDS).index(launch.card), BACKENDS.index(launch.backend)))
    write(path, list(Launch._fields), [launch._asdict() for launch in found])


if __name__ == "__main__":
    main()
