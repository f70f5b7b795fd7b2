"""Two towers for recommendation, with and without the correction for popularity (logQ), on long-tail data that is made up.

    python examples/recommender_logq.py             2,000 steps of each, about a minute on two CPU cores
    python examples/recommender_logq.py --quick     300 steps of each

The negatives of a batch are the items of its other rows, so that a popular item is a negative more often than a rare one. Left
as it is, the softmax learns log p(item | user) - log p(item), and recommends what is rare. Subtracting log q of each item from
its logit takes that back (Yi et al. 2019, Sampling-bias-corrected neural modeling for large corpus item recommendations): of
the negatives and of the positive. Reported: how often one of the 10 items with the highest scores is the one that a
user took next, and the median popularity rank of these 10 beside that of the items that are really taken.
"""

import argparse

import torch
from torch import Tensor, nn
from tqdm import tqdm

import negmine

USERS, ITEMS, TASTES = 4000, 2000, 16


class Towers(nn.Module):
    """Scores are inner products: of vectors of any length, so that an item's can say how popular it is."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(TASTES, 64), nn.ReLU(), nn.Linear(64, dim))
        self.item = nn.Embedding(ITEMS, dim)
        nn.init.normal_(self.item.weight, std=0.1)

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return self.user(users), self.item(items)


def make_data(interactions: int) -> tuple[Tensor, Tensor, Tensor]:
    """tastes (USERS, TASTES) of the users, and who took what: users, items (interactions,).

    p(item | user) is proportional to 1 / (rank of the item + 10) times exp(inner product of their tastes).
    """
    g = torch.Generator().manual_seed(0)
    tastes = torch.randn(USERS, TASTES, generator=g)
    item_tastes = 0.4 * torch.randn(ITEMS, TASTES, generator=g)
    popularity = 1 / (torch.arange(ITEMS) + 10.0)  # Zipf's law with a flat head; item 0 is the most popular
    chance = torch.softmax(tastes @ item_tastes.T + popularity.log(), 1)  # (USERS, ITEMS)
    items = torch.multinomial(chance, interactions // USERS, replacement=True, generator=g)  # (USERS, taken by each)
    users = torch.arange(USERS)[:, None].expand_as(items)
    mixed = torch.randperm(items.numel(), generator=g)
    return tastes, users.reshape(-1)[mixed], items.reshape(-1)[mixed]


def train(corrected: bool, tastes: Tensor, users: Tensor, items: Tensor, steps: int, batch: int, seed: int) -> Towers:
    torch.manual_seed(seed)
    towers = Towers()
    optimizer = torch.optim.Adam(towers.parameters(), 5e-3)
    loss_of = negmine.recipes.logq(temperature=1.0) if corrected else negmine.InfoNCELoss(1.0)
    # The chance that an item is in a row of a batch: how often it was taken. Where that is not known in advance,
    # negmine.losses.FrequencyEstimator counts items while batches pass.
    log_q = (torch.bincount(items, minlength=ITEMS) / len(items)).clamp_min(1e-9).log()  # (ITEMS,)
    progress = tqdm(range(steps), desc="logQ" if corrected else "plain", unit="step", mininterval=1.0)
    for _ in progress:
        rows = torch.randint(len(users), (batch,))
        user, item = towers(tastes[users[rows]], items[rows])  # (B, D) each
        # The negatives are the items of the other rows; rows with the same item are no negatives of each other.
        given = {"positive_log_q": log_q[items[rows]]} if corrected else {}
        loss = loss_of(user, item, query_ids=items[rows], **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return towers


@torch.no_grad()
def recommend(towers: Towers, tastes: Tensor) -> Tensor:
    """The 10 items with the highest scores for each user: (users, 10)."""
    users, items = towers(tastes, torch.arange(ITEMS))
    return negmine.mine_hardest(users, items, 10).index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="300 steps")
    args = parser.parse_args()
    steps = 300 if args.quick else args.steps

    tastes, users, items = make_data(120_000)
    tested = slice(100_000, None)  # the last interactions are for testing
    towers = {
        name: train(name == "logQ", tastes, users[:100_000], items[:100_000], steps, args.batch, args.seed)
        for name in ("plain", "logQ")
    }
    print(f"items that users take: median popularity rank {items[tested].median().item()}")
    for name, model in towers.items():
        found = recommend(model, tastes[users[tested]])  # (T, 10)
        recall = (found == items[tested, None]).any(1).float().mean().item()
        print(f"{name:<6} recall@10 {recall:.3f}   median popularity rank {found.median().item()}")


if __name__ == "__main__":
    main()
