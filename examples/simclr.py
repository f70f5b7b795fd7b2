"""SimCLR on Fashion-MNIST: two views of each image, every other view of the batch is a negative. No (2B, 2B) matrix is stored.

    python examples/simclr.py              20 epochs, about four minutes on two CPU cores
    python examples/simclr.py --quick      15 steps on a sixth of the images: shows that it runs, and little else

The loss is one call: the batch's views are at once the queries, the positives and the pool of negatives, and the number of
the image says which pairs are no negatives.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import negmine
from image_tools import Images, SmallConvNet, augment, features, head, knn_accuracy, load_idx


def simclr_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, arXiv 2002.05709) of unit views first, second (B, D)."""
    views = torch.cat([first, second])  # (2B, D)
    image = torch.arange(len(first), device=views.device).repeat(2)  # (2B,)
    return negmine.info_nce(
        views,
        torch.cat([second, first]),  # the positive of a view is the other view of its image
        negmine.Negatives(views, ids=image),  # all views of the batch ...
        query_ids=image,  # ... but those of the same image
        temperature=temperature,
    )


def dense_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The same by its formula, with the (2B, 2B) matrix."""
    views = torch.cat([first, second])
    scores = (views @ views.T / temperature).fill_diagonal_(-torch.inf)  # a view is no negative of itself
    B = len(first)
    return F.cross_entropy(scores, torch.cat([torch.arange(B) + B, torch.arange(B)]).to(views.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--rate", type=float, default=0.06, help="learning rate of SGD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="15 steps of 128 of 2,000 images")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    batch = 128 if args.quick else args.batch

    images = Images(*(part.to(args.device) for part in load_idx()))
    train, labels, test, test_labels = (part[:2000] for part in images) if args.quick else images
    steps = 15 if args.quick else args.epochs * (len(train) // batch)
    encoder = SmallConvNet().to(args.device)
    projection = head(encoder.dim).to(args.device)
    model = nn.Sequential(encoder, projection)
    optimizer = torch.optim.SGD(model.parameters(), args.rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def accuracy() -> float:
        return knn_accuracy(features(encoder, train), labels, features(encoder, test), test_labels)

    before = accuracy()
    progress = tqdm(range(steps), unit="step", mininterval=1.0)
    for step in progress:
        rows = torch.randint(len(train), (batch,), device=args.device)
        views = model(torch.cat([augment(train[rows]), augment(train[rows])]))  # (2B, 128)
        first, second = F.normalize(views, dim=1).chunk(2)
        loss = simclr_loss(first, second, args.temperature)
        if step == 0:
            start = loss.item()
            gap = abs(start - dense_loss(first.detach(), second.detach(), args.temperature).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    print(f"difference from the dense formula at the first step: {gap:.1e}")
    print(f"loss: {start:.3f} at first, {loss.item():.3f} at the end; {math.log(2 * batch - 1):.3f} by chance")
    print(f"k-NN accuracy: {before:.3f} before training, {accuracy():.3f} after {steps} steps")


if __name__ == "__main__":
    main()
