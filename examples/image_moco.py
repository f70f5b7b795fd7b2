"""MoCo v2 on images, with the queue and any recipe of negmine by name.

    python examples/image_moco.py                                       Fashion-MNIST, 1,500 steps: some minutes on two CPU cores
    python examples/image_moco.py --quick                               20 steps on 2,000 images
    python examples/image_moco.py --recipe hardest --option fraction=0.05 skip=0.001
    python examples/image_moco.py --recipe mochi --option hard=512 pairs=512 with_query=64
    python examples/image_moco.py --oracle                              no negatives of the query's own class
    python examples/image_moco.py --data /usr/share/datasets/fashion-mnist        all 60,000 images
    python examples/image_moco.py --data folder/ --size 64 --arch resnet18        class folders; needs Pillow and torchvision
    python examples/image_moco.py --data torchvision:CIFAR10 --root ~/data --size 32 --amp bf16
    torchrun --nproc-per-node 8 examples/image_moco.py ...              the batch and the work split over 8 processes

Reports, on test images and for features before the head: the accuracy of 20 nearest neighbours and of a linear probe; and of the
embeddings after the head alignment and uniformity (lower is better for both). Also the share of a step that the loss takes.
--checkpoint FILE saves a run as it goes, and goes on from there when the file exists.
"""

import argparse
import ast
import csv
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import negmine
from image_tools import (
    Images,
    alignment_and_uniformity,
    augment,
    encoder_of,
    features,
    head,
    knn_accuracy,
    load,
    probe_accuracy,
)

# What a recipe is fed beside the query, the key and the queue. The others take these three and the ids; gist, logq and adco,
# which need a guide's embeddings, how often each item is drawn, or trained negatives, are not for this script.
BY_LABELS = ("sup_con", "ephn", "batch_hard", "facenet", "distance_weighted", "multi_similarity")
FEEDS = dict.fromkeys(BY_LABELS, "labels") | {
    "vse_plus_plus": "pairs",
    "i_mix": "mixed",
    "un_mix": "reversed",
    "false_negative_cancellation": "support",
}
TIMED_EVERY = 10  # steps; timing one waits for the device


class Ranks:
    """This process among those that torchrun started, or alone."""

    def __init__(self, device: str | None) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def part(self, rows: Tensor) -> Tensor:
        """This rank's rows of a batch."""
        return rows.chunk(self.world)[self.rank]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


class MoCo(nn.Module):
    """The query encoder with its head, and the key encoder that follows it."""

    def __init__(self, arch: str, channels: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.query, self.key = (self._tower(arch, channels, dim) for _ in range(2))
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)

    @staticmethod
    def _tower(arch: str, channels: int, dim: int) -> nn.Sequential:
        encoder, width = encoder_of(arch, channels)
        return nn.Sequential(encoder, head(width, dim))

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)

    @torch.no_grad()
    def keys(self, views: Tensor, ranks: Ranks, step: int) -> Tensor:
        """Unit keys (B, D). Over several ranks the views are shuffled first, so that a rank's batch statistics don't give
        away which keys go with its queries (MoCo's shuffled batch norm)."""
        if ranks.world == 1:
            return F.normalize(self.key(views), dim=1)
        everyone = ranks.gather(views)
        shuffled = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(step)).to(views.device)
        keys = ranks.gather(F.normalize(self.key(everyone[ranks.part(shuffled)]), dim=1))
        return ranks.part(keys[shuffled.argsort()])


def loss_by_name(name: str, options: list[str], temperature: float | None) -> nn.Module:
    """A recipe with its options, "name=value" each."""
    given = dict(option.split("=", 1) for option in options)
    settings = {option: ast.literal_eval(value) for option, value in given.items()}
    if temperature is not None:
        settings["temperature"] = temperature
    return getattr(negmine.recipes, name)(**settings)


@torch.no_grad()
def evaluate(model: MoCo, images: Images) -> dict[str, float]:
    encoder = model.query[0]
    known, asked = features(encoder, images.train), features(encoder, images.test)
    model.eval()
    first, second = (
        torch.cat([F.normalize(model.query(augment(part)), dim=1) for part in images.test[:4000].split(500)])
        for _ in range(2)
    )
    model.train()
    alignment, uniformity = alignment_and_uniformity(first, second)
    return {
        "knn": knn_accuracy(known, images.train_labels, asked, images.test_labels),
        "probe": probe_accuracy(known, images.train_labels, asked, images.test_labels),
        "alignment": alignment,
        "uniformity": uniformity,
    }


class Clock:
    """Wall time of some steps, and of the loss in them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.step, self.loss, self.marks = device, [], [], []

    def mark(self, step: int) -> None:
        """Called before the step, before and after the loss, and after the step."""
        if step % TIMED_EVERY:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())
        if len(self.marks) == 4:
            start, before, after, end = self.marks
            self.step.append(1e3 * (end - start))
            self.loss.append(1e3 * (after - before))
            self.marks = []


def train(args: argparse.Namespace, images: Images, ranks: Ranks) -> tuple[MoCo, list[dict[str, float]]]:
    """Train one recipe; the measures at each evaluation. Runs of one seed see the same start, batches and views."""
    torch.manual_seed(args.seed)
    device = ranks.device
    model = MoCo(args.arch, images.train.shape[1], args.dim, args.momentum).to(device)
    query_tower = DistributedDataParallel(model.query) if ranks.world > 1 else model.query
    queue = negmine.MoCoQueue(args.dim, args.queue, with_ids=True, with_labels=True, gather_distributed=True).to(device)
    loss_of = loss_by_name(args.recipe, args.option, args.temperature).to(device)
    plain = negmine.recipes.moco_v2(args.temperature or 0.2)
    feed = FEEDS.get(args.recipe, "")
    learned = [*model.query.parameters(), *loss_of.parameters()]
    optimizer = torch.optim.SGD(learned, args.rate, momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    state = {
        "model": model,
        "queue": queue,
        "loss": loss_of,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": scaler,
    }
    start, results = 0, []
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
        start, results = saved["step"], saved["results"]
        for name, part in state.items():
            part.load_state_dict(saved[name])
    if not results:
        results = [{"step": 0, **evaluate(model, images)}]

    clock = Clock(device)
    progress = tqdm(range(start, args.steps), desc=args.recipe, unit="step", mininterval=1.0, disable=ranks.rank > 0)
    for step in progress:
        clock.mark(step)
        # Every step draws from a seed of its own, so that a resumed run sees what it would have seen.
        torch.manual_seed(args.seed * 1_000_003 + step)
        rows = ranks.part(torch.randint(len(images.train), (args.batch,))).to(device)  # (B,) image numbers
        torch.manual_seed((args.seed * 1_000_003 + step) * ranks.world + ranks.rank)
        inputs, labels, further = augment(images.train[rows]), images.train_labels[rows], {}
        if feed == "mixed":
            inputs, further["share"], further["partner"] = negmine.recipes.mixed_inputs(
                inputs, seed=args.seed, step=step
            )
        with torch.autocast(device.type, amp, enabled=amp is not None):
            if feed == "reversed":  # both are queries of one pass
                further["share"] = share = torch.rand((), device=device)
                inputs = torch.cat([inputs, share * inputs + (1 - share) * inputs.flip(0)])
            query = F.normalize(query_tower(inputs), dim=1)  # (B, D)
            if feed == "reversed":
                query, further["mixed_query"] = query.chunk(2)
            model.follow()
            key = model.keys(augment(images.train[rows]), ranks, step)  # (B, D)
            if feed == "support":  # a third view of each image tells its false negatives
                further["support"] = model.keys(augment(images.train[rows]), ranks, step)[:, None]
        if args.oracle:
            further["query_labels"] = labels

        clock.mark(step)
        if step < args.plain_steps:
            loss = plain(query, key, queue, query_ids=rows)
        elif feed == "labels":  # every key of the same image is a positive
            loss = loss_of(query, torch.cat([key, queue.keys.to(key.dtype)]), rows, torch.cat([rows, queue.ids]))
        elif feed == "pairs":
            loss = loss_of(query, key, rows)
        else:
            further["row_offset"] = ranks.rank * len(rows)  # draws are those of one process
            loss = loss_of(query, key, queue, query_ids=rows, step=step, **further)
        clock.mark(step)

        queue.enqueue(key.to(queue.queue.dtype), ids=rows, labels=labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        clock.mark(step)
        if step % TIMED_EVERY == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", knn=f"{results[-1]['knn']:.3f}", refresh=False)
        if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
            results.append({"step": step + 1, **evaluate(model, images)})
            if args.checkpoint and ranks.rank == 0:
                saved = {name: part.state_dict() for name, part in state.items()}
                unfinished = args.checkpoint.with_suffix(".tmp")
                torch.save({"step": step + 1, "results": results, **saved}, unfinished)
                unfinished.replace(args.checkpoint)
    if clock.step:
        results[-1] |= {"step_ms": statistics.median(clock.step), "loss_ms": statistics.median(clock.loss)}
    return model, results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="fashion-mnist, torchvision:NAME, or a folder")
    parser.add_argument("--root", default="data", help="folder of torchvision's data sets")
    parser.add_argument("--size", type=int, default=32, help="side of a picture from a folder or from torchvision")
    parser.add_argument("--arch", default="small", help="small, or a ResNet of torchvision.models")
    parser.add_argument("--recipe", default="moco_v2", help="a function of negmine.recipes")
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="the recipe's arguments")
    parser.add_argument("--oracle", action="store_true", help="mask negatives of the query's class")
    parser.add_argument("--plain-steps", type=int, default=200, help="steps of MoCo v2 before the recipe begins")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256, help="images of all ranks together")
    parser.add_argument("--queue", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--momentum", type=float, default=0.99, help="of the key encoder")
    parser.add_argument("--temperature", type=float, help="default: the recipe's")
    parser.add_argument("--rate", type=float, default=0.12, help="learning rate of SGD, which falls by a cosine")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--amp", choices=["bf16", "fp16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--checkpoint", type=Path, help="saved at every evaluation; read at the start where it exists")
    parser.add_argument("--csv", type=Path, help="append one line a run")
    parser.add_argument("--quick", action="store_true", help="20 steps of 64 images, 2,000 images, a queue of 1,024")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.batch, args.queue, args.plain_steps = 20, 64, 1024, 5
    return args


def main() -> None:
    args = parse()
    ranks = Ranks(args.device)
    images = load(args.data, args.size, args.root)
    images = Images(*(part[: 2000 if args.quick else None].to(ranks.device) for part in images))
    _, results = train(args, images, ranks)
    if ranks.rank == 0:
        for found in results:
            print(
                f"step {found['step']:>5}   k-NN {found['knn']:.3f}   linear probe {found['probe']:.3f}   "
                f"alignment {found['alignment']:.3f}   uniformity {found['uniformity']:.3f}"
            )
        last = results[-1]
        if "step_ms" in last:
            step_ms, loss_ms = last["step_ms"], last["loss_ms"]
            print(f"{step_ms:.0f} ms a step, of which the loss {loss_ms:.1f} ms ({loss_ms / step_ms:.0%})")
        if args.csv:
            line = {"data": args.data, "recipe": args.recipe, "options": " ".join(args.option), "oracle": args.oracle,
                    "seed": args.seed, **last}  # fmt: skip
            is_new = not args.csv.exists()
            with args.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, line)
                if is_new:
                    writer.writeheader()
                writer.writerow(line)
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
