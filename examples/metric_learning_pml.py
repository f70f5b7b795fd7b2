"""pytorch-metric-learning with negmine's miner and memory: two lines of an existing training loop change.

    pip install pytorch-metric-learning
    python examples/metric_learning_pml.py             three runs of eight epochs each, some minutes on two CPU cores
    python examples/metric_learning_pml.py --quick     a few steps

Trains an embedding of Fashion-MNIST from its labels three times, and reports recall@1 of test images among training images:

    peer      its TripletMarginLoss with its BatchEasyHardMiner
    miner     the same loss with NegmineMiner, which finds the same pairs without the (B, B) matrix
    memory    negmine's MultiSimilarityLoss over a memory of the last 4,096 embeddings: no tuples of indices at all
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import negmine
from image_tools import Images, SmallConvNet, as_float, features, knn_accuracy, load_idx
from negmine.adapters.pytorch_metric_learning import CrossBatchMemory, NegmineMiner

Loss = Callable[[Tensor, Tensor], Tensor]


def losses_of(names: list[str], memory_size: int) -> dict[str, Loss]:
    """loss(embeddings, labels) of each run."""
    try:
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import BatchEasyHardMiner
    except ImportError as missing:
        sys.exit(f"metric_learning_pml.py: pip install pytorch-metric-learning ({missing})")

    triplet = TripletMarginLoss(margin=0.2)
    peer_miner = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="semihard")
    our_miner = NegmineMiner("easy", "semihard")  # what changes
    memory = CrossBatchMemory(negmine.MultiSimilarityLoss(), embedding_size=64, memory_size=memory_size)
    made: dict[str, Loss] = {
        "peer": lambda embeddings, labels: triplet(embeddings, labels, peer_miner(embeddings, labels)),
        "miner": lambda embeddings, labels: triplet(embeddings, labels, our_miner(embeddings, labels)),
        "memory": memory,
    }
    return {name: made[name] for name in names}


def train(name: str, loss_of: Loss, images: Images, steps: int, batch: int, seed: int) -> float:
    """Recall@1 after training with one loss; every run sees the same start and the same batches."""
    torch.manual_seed(seed)
    device = images.train.device
    model = nn.Sequential(SmallConvNet(), nn.Linear(SmallConvNet.dim, 64)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    progress = tqdm(range(steps), desc=f"{name:<8}", unit="step", mininterval=1.0)
    for _ in progress:
        rows = torch.randint(len(images.train), (batch,), device=device)
        embeddings = F.normalize(model(as_float(images.train[rows])), dim=1)  # (B, 64)
        loss = loss_of(embeddings, images.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    known, asked = features(model, images.train), features(model, images.test)
    return knn_accuracy(known, images.train_labels, asked, images.test_labels, k=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", default=["peer", "miner", "memory"], choices=["peer", "miner", "memory"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--memory-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="12 steps on 2,000 images")
    args = parser.parse_args()

    losses = losses_of(args.run, args.memory_size)
    images = Images(*(part[: 2000 if args.quick else None].to(args.device) for part in load_idx()))
    steps = 12 if args.quick else args.epochs * (len(images.train) // args.batch)
    pixels = Images(*(F.normalize(part.flatten(1).float(), dim=1) if part.ndim > 1 else part for part in images))
    print(f"pixels   recall@1 {knn_accuracy(*pixels, k=1):.3f}")
    for name, loss_of in losses.items():
        print(f"{name:<8} recall@1 {train(name, loss_of, images, steps, args.batch, args.seed):.3f}")


if __name__ == "__main__":
    main()
