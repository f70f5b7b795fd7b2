"""CLIP over two processes: every rank holds half of the batch, and its negatives are the pairs of both.

    python examples/clip_two_ranks.py                            starts two processes here (gloo, CPU), under a minute
    python examples/clip_two_ranks.py --quick                    40 steps
    torchrun --nproc-per-node 4 examples/clip_two_ranks.py       as many as you like; on GPUs with NCCL

Compares the gradients of the first step with those of one process that holds the whole batch, and prints their largest
difference: the ranks together compute the loss of the whole batch, gradients included. The pairs are made up: a picture is a
noisy, bent sum of the patterns of five concepts, and its caption names them, among two other words.
"""

import argparse
import os
import socket

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from negmine.adapters.open_clip import ClipLoss  # the signature of open_clip.ClipLoss

CONCEPTS, WORDS, PIXELS, WIDTH = 200, 400, 256, 64


class Clip(nn.Module):
    """Two towers and the learned scale of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, WIDTH))
        self.text = nn.EmbeddingBag(WORDS, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(words), dim=1), self.log_scale.exp()


def make_pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """images (count, PIXELS) and captions (count, 7) of word numbers; the same for the same seed on every rank."""
    patterns = torch.randn(CONCEPTS, PIXELS, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    concepts = torch.rand(count, CONCEPTS, generator=g).topk(5).indices  # (count, 5) different ones
    images = torch.tanh(patterns[concepts].sum(1)) + 0.5 * torch.randn(count, PIXELS, generator=g)
    others = torch.randint(CONCEPTS, WORDS, (count, 2), generator=g)
    return images, torch.cat([concepts, others], 1)


def train(rank: int, world: int, steps: int, batch: int, device: torch.device) -> Clip:
    """Train on batches of `batch` pairs, of which this rank computes batch / world."""
    torch.manual_seed(0)
    model = Clip().to(device)
    towers = DistributedDataParallel(model) if world > 1 else model
    # local_loss and gather_with_grad: each rank takes the loss of its own rows, and gradients travel back to the other ranks.
    # DDP's mean over the ranks is then the gradient of the whole batch's loss.
    loss_of = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    progress = tqdm(range(steps), desc=f"{world} rank(s)", unit="step", mininterval=1.0, disable=rank > 0)
    for step in progress:
        images, words = (part.chunk(world)[rank].to(device) for part in make_pairs(batch, seed=step + 1))
        loss = loss_of(*towers(images, words))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


@torch.no_grad()
def recall(model: Clip, device: torch.device) -> float:
    """The share of 500 new pictures whose own caption is the nearest."""
    images, texts, _ = model(*(part.to(device) for part in make_pairs(500, seed=10**6)))
    return ((images @ texts.T).argmax(1).cpu() == torch.arange(500)).float().mean().item()


def run(rank: int, world: int, args: argparse.Namespace) -> None:
    local = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cuda", local) if torch.cuda.device_count() >= world else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    first = train(rank, world, 1, args.batch, device)
    model = train(rank, world, args.steps, args.batch, device)
    if rank == 0:
        alone = train(0, 1, 1, args.batch, device)
        pairs = [(a.grad, b.grad) for a, b in zip(first.parameters(), alone.parameters(), strict=True)]
        gap = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        print(f"largest relative difference of a gradient from one process with the whole batch: {gap:.1e}")
        print(f"recall@1 of {world} ranks: {recall(model, device):.3f} (0.002 by chance)")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=256, help="pairs of all ranks together")
    parser.add_argument("--quick", action="store_true", help="40 steps")
    args = parser.parse_args()
    args.steps = 40 if args.quick else args.steps
    if "RANK" in os.environ:  # torchrun
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args)
        return
    with socket.socket() as free:  # a port that nobody uses
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torch.multiprocessing.spawn(run, (2, args), nprocs=2)


if __name__ == "__main__":
    main()
