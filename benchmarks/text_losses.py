"""Time and memory of the losses of the sentence-transformers adapter and of the original classes, on given embeddings.

    python -m benchmarks.text_losses             4,096 rows with 4 hard negatives, D = 384
    python -m benchmarks.text_losses --table     only writes the table of docs/adapters.md again, from the newest rows

Each (class, loss) runs in its own process, first on a small batch and then on the whole batch, with the value and the gradients
of all embeddings. The model returns its input, so that only the loss is timed. Cached losses use mini-batches of 32, and the
guide of GIST has the width of the model. `peak_extra_mib` is the peak of the resident memory minus its value before. The values
of the two packages must agree. GISTEmbedLoss of sentence-transformers is left out, because it would need arrays of (B, B, D), 24
GiB each at this size.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mining import status_mib
from benchmarks.rows import RESULTS, append, commit, machine_name, read, write_between

LOSSES: dict[str, tuple[str, dict[str, Any], int]] = {  # name -> class, options, hard negatives
    "ranking": ("MultipleNegativesRankingLoss", {}, 4),
    "ranking_4": (
        "MultipleNegativesRankingLoss",
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        4,
    ),
    "cached": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 32}, 4),
    "cached_gist": ("CachedGISTEmbedLoss", {"mini_batch_size": 32}, 4),
}
TITLES = {
    "ranking": "`MultipleNegativesRankingLoss`",
    "ranking_4": "the same, all four directions",
    "cached": "`CachedMultipleNegativesRankingLoss`",
    "cached_gist": "`CachedGISTEmbedLoss`, batch of 1,024",
}
SMALLER = {"cached_gist": 1024}  # because the original class computes elementwise products of (B, B, D) elements
PLACES = ("negmine", "sentence-transformers")
PAGE = RESULTS.parents[1] / "docs/adapters.md"
BEGIN = "<!-- made by `python -m benchmarks.text_losses` from benchmarks/results/text-losses -->"


class Given(nn.Module):
    """A model that returns its input as the embeddings, or different embeddings if it is a guide (shift is not 0)."""

    max_seq_length = 1

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.tokenizer = shift, None

    def __getitem__(self, module: int) -> nn.Module:  # the original classes look at the first module of a model
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = features["input_ids"]
        return {"sentence_embedding": rows if not self.shift else F.normalize(rows.detach() + self.shift, dim=1)}


def classes(place: str) -> Any:
    if place == "negmine":
        from negmine.adapters import sentence_transformers

        return sentence_transformers
    from sentence_transformers.sentence_transformer import losses

    return losses


def step(place: str, name: str, columns: list[Tensor]) -> float:
    """Compute the loss and the gradients of the columns; return the loss."""
    kind, options, _ = LOSSES[name]
    models = [Given(0.0)] + ([Given(0.02)] if "GIST" in kind else [])
    if len(models) > 1:  # the original class needs a tokenizer of transformers
        from tokenizers import Tokenizer
        from tokenizers import models as kinds
        from transformers import PreTrainedTokenizerFast

        for model in models:
            model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"a": 0}, "a")))
    loss = getattr(classes(place), kind)(*models, **options)
    value = loss([{"input_ids": column} for column in columns], None)
    value.backward()
    return value.item()


def measured(place: str, name: str, batch: int, dim: int) -> dict[str, Any]:
    negatives = LOSSES[name][2]
    torch.manual_seed(0)
    anchors = F.normalize(torch.randn(batch, dim), dim=1)
    columns = [anchors] + [F.normalize(anchors + 0.1 * torch.randn(batch, dim), dim=1) for _ in range(1 + negatives)]
    step(place, name, [column[:64].clone().requires_grad_() for column in columns])
    columns = [column.requires_grad_() for column in columns]
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    before, start, cpu = status_mib("VmRSS"), time.perf_counter(), time.process_time()
    value = step(place, name, columns)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    extra = round(status_mib("VmHWM") - before)
    return {"B": batch, "D": dim, "negatives": negatives, "loss": f"{value:.6f}", "wall_s": f"{seconds:.2f}",
            "cpu_s": f"{cpu:.2f}", "peak_extra_mib": extra, "load": f"{os.getloadavg()[0]:.1f}"}  # fmt: skip


def table() -> str:
    lines = []
    for path in sorted((RESULTS / "text-losses").glob("*.csv")):
        newest = {(row["name"], row["place"]): row for row in read(path)}
        lines += [
            "| loss | CPU s, negmine | CPU s, original | memory, negmine | memory, original |",
            "| --- " * 5 + "|",
        ]
        for name, title in TITLES.items():
            both = [newest.get((name, place)) for place in PLACES]
            if all(both):
                times = " | ".join(f"{float(row['cpu_s']):.1f}" for row in both if row)
                memory = " | ".join(f"{int(row['peak_extra_mib']):,} MiB" for row in both if row)
                lines.append(f"| {title} | {times} | {memory} |")
        one = newest["ranking", PLACES[0]]
        threads = "1 thread" if one["threads"] == "1" else f"{one['threads']} threads"
        lines += ["", f"B = {int(one['B']):,}, {one['negatives']} hard negatives, D = {one['D']}; {path.stem}, {threads}, "
                  f"torch {one['torch']}, commit {one['commit']}, {one['date'][:10]}.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument(
        "--alone",
        nargs=2,
        metavar=("PLACE", "LOSS"),
        help="measure one loss of one package in this process, and print its row",
    )
    parser.add_argument("--table", action="store_true", help="measure nothing; only write the table")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measured(*args.alone, args.batch, args.dim)))
        return
    stamp = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit()}
    stamp |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    path = RESULTS / "text-losses" / f"{machine_name('cpu')}.csv"
    for name in () if args.table else args.losses:
        values, batch = [], min(args.batch, SMALLER.get(name, args.batch))
        for place in PLACES:
            command = [sys.executable, "-m", "benchmarks.text_losses", "--alone", place, name]
            command += [f"--batch={batch}", f"--dim={args.dim}"]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(run.stdout.splitlines()[-1])
            values.append(float(row["loss"]))
            print(
                f"{name:<12}{place:<24}{row['cpu_s']:>8} CPU s{row['peak_extra_mib']:>8} MiB   loss {row['loss']}",
                flush=True,
            )
            if args.batch == 4096:
                row = stamp | {"name": name, "place": place} | row
                append(path, list(row), [row])
        if abs(values[0] - values[1]) > 1e-4 * max(1.0, abs(values[1])):
            raise SystemExit(f"{name}: the values differ: {values}")
    write_between(PAGE, BEGIN, table())


if __name__ == "__main__":
    main()
