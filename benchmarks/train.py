"""The demo's training: a two-tower head on frozen sentence vectors, MoCo-style, one run a recipe.

    query tower   f_q(x) = unit(x + bias + small MLP(x))     trained: AdamW, one cycle
    key tower     f_k: the same shape, an exponential moving average of f_q, without gradient
    negatives     a queue of K = 65,536 past keys, full of real keys from the start; the query's own id is masked

A recipe is an entry of RECIPES: a title, the function that gives the loss of one step, and the window of ranks that
its negatives lie in. Held-out queries are ranked against the whole corpus by the same kernels: the rank of the answer
is the number of entries scored above it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import negmine
from benchmarks.peers import MIX
from benchmarks.wordnet import Task

TEMPERATURE = 0.05
K = 65_536
B = 256
MOMENTUM = 0.99
LEARNING_RATE = 1e-3
WARM_UP = 0.2  # of the steps, without synthetic negatives
EVALUATION_BLOCK = 512


class Head(nn.Module):
    """x (B, D) -> unit rows (B, D); at the start almost the identity."""

    def __init__(self, dim: int, hidden: int = 768) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(dim))
            self.linear.bias.zero_()
            self.mlp[2].weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x) + self.mlp(x), dim=1)


@dataclass(frozen=True)
class Recipe:
    title: str
    loss: Callable[..., Tensor]  # loss(progress in [0, 1), **what info_nce takes) -> ()
    window: tuple[float, float] = (0.0, 1.0)  # where its negatives lie, fractions of the ranking, hardest first
    parents: int = 0  # the hardest ranks that synthetic negatives are mixed from


def windowed(title: str, range_min: float, range_max: float) -> Recipe:
    select = negmine.Select(range_min, range_max)
    return Recipe(title, lambda progress, **call: negmine.info_nce(**call, select=select), (range_min, range_max))


def mochi_loss(progress: float, **call: object) -> Tensor:
    return negmine.info_nce(**call, mix=MIX if progress >= WARM_UP else None)


RECIPES = {
    "all": Recipe("all negatives", lambda progress, **call: negmine.info_nce(**call)),
    "drop01": windowed("without the hardest 0.1 %", 0.001, 1.0),
    "hard5": windowed("hardest 5 %", 0.0, 0.05),
    "hard5_drop01": windowed("hardest 5 % without the hardest 0.1 %", 0.001, 0.05),
    "easy95": windowed("easiest 95 % alone", 0.05, 1.0),
    "mochi": Recipe("MoCHi (1024, 1024, 128)", mochi_loss, parents=MIX.hard),
}


@dataclass(frozen=True)
class Metrics:
    """Held-out queries against the whole corpus."""

    recall_1: float
    recall_10: float
    mrr: float


@dataclass
class Run:
    name: str
    query_head: Head
    key_head: Head
    curve: list[tuple[int, Metrics]]  # (steps done, what the heads reach)
    ms_per_step: float  # median, evaluation apart


@torch.no_grad()
def answer_ranks(query_head: Head, key_head: Head, task: Task) -> Tensor:
    """0-based rank of each held-out query's answer among the K corpus entries: (held_out,) int64."""
    corpus = key_head(task.corpus)  # (K, D)
    rows = torch.arange(len(corpus), device=corpus.device)  # (K,)
    ranks = []
    for block in task.held_out.split(EVALUATION_BLOCK):
        answers = task.positives[block]  # (B,)
        query = query_head(task.queries[block])  # (B, D)
        _, stats = negmine.info_nce(
            query, corpus[answers], corpus, query_ids=answers, negative_ids=rows, return_stats=True
        )
        ranks.append(stats.positive_rank)
    return torch.cat(ranks)


def evaluate(query_head: Head, key_head: Head, task: Task) -> Metrics:
    ranks = answer_ranks(query_head, key_head, task).double()
    return Metrics(
        (ranks < 1).double().mean().item(), (ranks < 10).double().mean().item(), (1 / (ranks + 1)).mean().item()
    )


def new_heads(dim: int, seed: int, device: torch.device) -> tuple[Head, Head]:
    """The query tower, and the key tower that starts equal to it."""
    torch.manual_seed(seed)
    query_head, key_head = Head(dim).to(device), Head(dim).to(device)
    key_head.load_state_dict(query_head.state_dict())
    return query_head, key_head.requires_grad_(False)


def queue_rows(task: Task, generator: torch.Generator) -> Tensor:
    """The corpus rows that fill the queue at the start: (K,)."""
    return torch.randperm(len(task.corpus), generator=generator)[:K].to(task.corpus.device)


def train(name: str, task: Task, steps: int, seed: int, evaluate_at: list[int], before: Metrics) -> Run:
    """Train one recipe; every recipe of a seed sees the same start, the same batches and the same queue entries."""
    recipe = RECIPES[name]
    device = task.corpus.device
    generator = torch.Generator().manual_seed(seed)
    query_head, key_head = new_heads(task.corpus.shape[1], seed, device)
    optimizer = torch.optim.AdamW(query_head.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    queue = negmine.MoCoQueue(dim=task.corpus.shape[1], K=K, with_ids=True, random_init=False).to(device)
    rows = queue_rows(task, generator)  # (K,)
    queue.enqueue(key_head(task.corpus[rows]), ids=rows)

    curve, taken = [(0, before)], []
    progress = tqdm(range(steps), desc=f"{recipe.title:<38}", unit="step", mininterval=1.0)
    for step in progress:
        start = time.perf_counter()
        batch = task.train[torch.randint(len(task.train), (B,), generator=generator).to(device)]  # (B,)
        answers = task.positives[batch]  # (B,)
        with torch.no_grad():
            for slow, fast in zip(key_head.parameters(), query_head.parameters(), strict=True):
                slow.lerp_(fast, 1 - MOMENTUM)
            positive_key = key_head(task.corpus[answers])  # (B, D)
        loss = recipe.loss(
            step / steps,
            query=query_head(task.queries[batch]),
            positive_key=positive_key,
            negative_keys=queue.keys,
            temperature=TEMPERATURE,
            query_ids=answers,
            negative_ids=queue.ids,
            seed=seed,
            step=step,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        entering = torch.randint(len(task.corpus), (B,), generator=generator).to(device)  # (B,)
        with torch.no_grad():
            queue.enqueue(key_head(task.corpus[entering]), ids=entering)
        reached = loss.item()
        taken.append(1e3 * (time.perf_counter() - start))
        if step + 1 in evaluate_at:
            curve.append((step + 1, evaluate(query_head, key_head, task)))
        progress.set_postfix(loss=f"{reached:.3f}", mrr=f"{curve[-1][1].mrr:.3f}", refresh=False)
    return Run(name, query_head, key_head, curve, statistics.median(taken))
