"""The training of the demo: a two-tower head on frozen sentence vectors, as in MoCo, one run for each recipe.

    query tower   f_q(x) = unit(x + bias + small MLP(x))     trained: AdamW, one cycle
    key tower     f_k: the same shape, an exponential moving average of f_q, without gradient
    negatives     a queue of K = 65,536 past keys, full of real keys from the start; the query's own id is masked

A recipe is an entry of RECIPES: a title, the function that creates the loss, the window of ranks of its negatives, and the inputs
that it needs in addition to keys and ids. IN_DEMO lists the recipes that the demo trains by default. Held-out queries are ranked
against the whole corpus by the same kernels: the rank of the answer is the number of entries with a higher score.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import negmine
from benchmarks.wordnet import Task

TEMPERATURE = 0.05
K = 65_536
B = 256
MOMENTUM = 0.99
LEARNING_RATE = 1e-3
SIGLIP_BIAS = -18.0  # with -10, the loss of the negatives is 1,000 times that of the positive, and the heads get worse
WARM_UP = 0.2  # fraction of the steps that have no synthetic negatives
EVALUATION_BLOCK = 512


class Head(nn.Module):
    """x (B, D) -> unit rows (B, D). It is initialized to almost the identity."""

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
    make: Callable[[int, int], nn.Module]  # (steps of the run, seed) -> the loss
    window: tuple[float, float] = (0.0, 1.0)  # ranks of its negatives, as fractions of the ranking (0: hardest)
    parents: int = 0  # synthetic negatives are mixed from this many of the hardest negatives
    # Inputs of the loss other than keys and ids. "labels": the numbers of the entries as labels, so that every key of the
    # query's entry is a positive. "support": the positive key as the only additional view. "mixed": queries mixed within the
    # batch. "reversed": queries mixed with those of the batch in reverse order, in addition to the plain ones. "pairs": the
    # positive keys of the batch and the numbers of their entries, without a queue. "frequency": the sampling probability, which
    # is the same for all entries. "guide": the sentence vectors as embeddings of the guide.
    feed: str = ""


UNSEEDED = ("sup_con", "ephn", "batch_hard", "facenet")  # recipes without random numbers


def configured(title: str, name: str, **settings: Any) -> Recipe:
    """A recipe of negmine.recipes with the temperature of the demo and the seed of the run."""
    parts = ("window", "parents", "feed")
    described = {part: settings.pop(part) for part in parts if part in settings}
    options = {"temperature": TEMPERATURE} | settings

    def make(steps: int, seed: int) -> nn.Module:
        timed = {"warmup_steps": round(WARM_UP * steps)} if described.get("parents") else {}
        keyed = {} if name in UNSEEDED else {"seed": seed}
        return getattr(negmine.recipes, name)(**options, **timed, **keyed)

    return Recipe(title, make, **described)


def annealed_ring(steps: int, seed: int) -> nn.Module:
    outer = negmine.recipes.linear(1.0, 0.1, max(1, steps // 2))
    return negmine.recipes.ring(outer, temperature=TEMPERATURE, seed=seed)


class TrainedNegatives(nn.Module):
    """AdCo: negatives that start as the keys of the queue at the first step, and are then trained by gradient ascent."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = negmine.recipes.adco(TEMPERATURE)
        self.register_parameter("memory", None)

    def forward(self, query: Tensor, positive_key: Tensor, queue: Any, *, query_ids: Tensor, step: int) -> Tensor:
        if self.memory is None:
            self.memory, self.ids = nn.Parameter(queue.keys.clone()), queue.queue_ids.clone()  # (K, D), (K,)
            self.ascent = torch.optim.SGD([self.memory], lr=3.0, momentum=0.9, weight_decay=1e-4, maximize=True)
        else:  # with the gradient of the previous step
            self.ascent.step()
            self.ascent.zero_grad()
        memory = negmine.Negatives(F.normalize(self.memory, dim=1), ids=self.ids)
        return self.loss(query, positive_key, memory, query_ids=query_ids, step=step)


IN_DEMO = {
    "all": configured("all negatives", "moco_v2"),
    "drop01": configured("all without the hardest 0.1 %", "hardest", fraction=1.0, skip=0.001, window=(0.001, 1.0)),
    "hard5": configured("hardest 5 %", "hardest", fraction=0.05, window=(0.0, 0.05)),
    "hard5_drop01": configured(
        "hardest 5 % without the hardest 0.1 %", "hardest", fraction=0.05, skip=0.001, window=(0.001, 0.05)
    ),
    "easy95": configured("easiest 95 % alone", "easiest", fraction=0.95, window=(0.05, 1.0)),
    "mochi": configured("MoCHi (1024, 1024, 128)", "mochi", parents=1024),
}
RECIPES = IN_DEMO | {
    "moco_v1": configured("MoCo v1, T = 0.07", "moco_v1", temperature=0.07),
    "moco_v2": configured("MoCo v2, T = 0.2", "moco_v2", temperature=0.2),
    "hardest": configured("hardest 1 %", "hardest", fraction=0.01, window=(0.0, 0.01)),
    "easiest": configured("only the easiest half", "easiest", fraction=0.5, window=(0.5, 1.0)),
    "ring": configured("Ring (0.1, 0.1)", "ring", window=(0.01, 0.1)),
    "ring_annealed": Recipe("Ring, outer 1.0 to 0.1 in half the steps", annealed_ring, (0.01, 0.1)),
    "synco": configured("SynCo, six kinds", "synco", parents=1024),
    "mixgcf": configured("MixGCF, one negative mixed from the hardest of 64", "mixgcf"),
    "i_mix": configured("i-Mix", "i_mix", feed="mixed"),
    "un_mix": configured("Un-Mix", "un_mix", feed="reversed"),
    "adco": Recipe("AdCo: trained negatives, memory temperature 0.02", lambda steps, seed: TrainedNegatives()),
    "debiased": configured("debiased, prior 0.0001", "debiased", tau_plus=1e-4),
    "hcl": configured("HCL, beta 0.5", "hcl", beta=0.5, tau_plus=1e-4),
    "hardness_added": configured("hardness added (LLaVE), alpha 9", "hardness_added"),
    "logq": configured("logQ correction with equal frequencies", "logq", feed="frequency"),
    "gist": configured("GIST, guided by the fixed embeddings", "gist", margin=-0.1, feed="guide"),
    "qwen3_embedding": configured("Qwen3-Embedding: also pairs of queries and of documents", "qwen3_embedding"),
    "gte": configured("GTE: as Qwen3-Embedding, both directions, no mask", "gte"),
    "decoupled": configured("decoupled", "decoupled"),
    "decoupled_weighted": configured("decoupled, weighted positives", "decoupled_weighted"),
    "rince": configured("RINCE, r 0.5, at T = 0.1", "rince", temperature=0.1),
    "ifm": configured("implicit feature modification", "ifm"),
    "dual_temperature": configured("dual temperature, 0.05 and 0.5", "dual_temperature"),
    "siglip": Recipe(
        "SigLIP, learned scale and bias",
        lambda steps, seed: negmine.recipes.siglip(1 / TEMPERATURE, SIGLIP_BIAS, seed=seed),
    ),
    "sup_con": configured("SupCon, keys of the same entry are positives", "sup_con", feed="labels"),
    "false_negative_cancellation": configured(
        "false negatives above 0.9 removed", "false_negative_cancellation", threshold=0.9, feed="support"
    ),
    "ephn": configured("EPHN: easy positive, hardest negative", "ephn", feed="labels"),
    "batch_hard": configured("batch hard triplets, margin 0.2", "batch_hard", temperature=None, feed="labels"),
    "facenet": configured(
        "FaceNet's semi-hard, margin 0.2", "facenet", max_positives=4, temperature=None, feed="labels"
    ),
    "distance_weighted": configured(
        "distance-weighted triplets", "distance_weighted", max_positives=4, temperature=None, feed="labels"
    ),
    "vse_plus_plus": Recipe("VSE++, margin 0.2", lambda steps, seed: negmine.recipes.vse_plus_plus(), feed="pairs"),
    "multi_similarity": Recipe(
        "multi-similarity", lambda steps, seed: negmine.recipes.multi_similarity(), feed="labels"
    ),
    "simans": configured("SimANS: 15 of the hardest 200, near the positive", "simans", a=100.0),
    "margin_pos": configured("score at most the positive's minus 0.05", "margin_pos"),
    "perc_pos": configured("score at most 95 % of the positive's", "perc_pos"),
}


@dataclass(frozen=True)
class Metrics:
    """Results of ranking the whole corpus for the held-out queries."""

    recall_1: float
    recall_10: float
    mrr: float


@dataclass
class Run:
    name: str
    query_head: Head
    key_head: Head
    curve: list[tuple[int, Metrics]]  # (steps done, metrics)
    ms_per_step: float  # median, without evaluation


@torch.no_grad()
def answer_ranks(query_head: Head, key_head: Head, task: Task) -> Tensor:
    """0-based rank of each held-out query's answer among the K corpus entries: (held_out,) int64."""
    corpus = key_head(task.corpus)  # (K, D)
    entries = negmine.Negatives(corpus, ids=torch.arange(len(corpus), device=corpus.device))
    ranks = []
    for block in task.held_out.split(EVALUATION_BLOCK):
        answers = task.positives[block]  # (B,)
        query = query_head(task.queries[block])  # (B, D)
        _, stats = negmine.info_nce(query, corpus[answers], entries, query_ids=answers, return_stats=True)
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


def optimizer_of(learned: list[nn.Parameter], steps: int) -> tuple[torch.optim.AdamW, OneCycleLR]:
    """The optimizer, and its learning rate schedule for this number of steps."""
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=1e-4)
    return optimizer, OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)


@torch.no_grad()
def follow(key_head: Head, query_head: Head) -> None:
    """Update the key tower, which is a moving average of the query tower (MoCo)."""
    for slow, fast in zip(key_head.parameters(), query_head.parameters(), strict=True):
        slow.lerp_(fast, 1 - MOMENTUM)


def queue_rows(task: Task, generator: torch.Generator) -> Tensor:
    """(K,) corpus rows whose keys fill the queue at the start."""
    return torch.randperm(len(task.corpus), generator=generator)[:K].to(task.corpus.device)


def train(name: str, task: Task, steps: int, seed: int, evaluate_at: list[int], before: Metrics) -> Run:
    """Train one recipe. All recipes with the same seed have the same initial weights, batches and queue entries."""
    recipe = RECIPES[name]
    device = task.corpus.device
    generator = torch.Generator().manual_seed(seed)
    query_head, key_head = new_heads(task.corpus.shape[1], seed, device)
    loss_of = recipe.make(steps, seed).to(device)
    optimizer, schedule = optimizer_of([*query_head.parameters(), *loss_of.parameters()], steps)

    queue = negmine.MoCoQueue(dim=task.corpus.shape[1], K=K, with_ids=True, random_init=False).to(device)
    rows = queue_rows(task, generator)  # (K,)
    queue.enqueue(key_head(task.corpus[rows]), ids=rows)

    uniform = torch.full((), 1 / len(task.corpus), device=device).log()  # log probability that an entry is sampled
    curve, taken = [(0, before)], []
    progress = tqdm(range(steps), desc=f"{recipe.title:<38}", unit="step", mininterval=1.0)
    for step in progress:
        start = time.perf_counter()
        batch = task.train[torch.randint(len(task.train), (B,), generator=generator).to(device)]  # (B,)
        answers = task.positives[batch]  # (B,)
        with torch.no_grad():
            follow(key_head, query_head)
            positive_key = key_head(task.corpus[answers])  # (B, D)
        inputs, extra_inputs = task.queries[batch], {}  # (B, D)
        if recipe.feed == "mixed":
            inputs, extra_inputs["share"], extra_inputs["partner"] = negmine.recipes.mixed_inputs(
                inputs, seed=seed, step=step
            )
        if recipe.feed == "support":
            extra_inputs["support"] = positive_key[:, None]  # (B, 1, D)
        if recipe.feed == "frequency":
            extra_inputs |= {"positive_log_q": uniform.expand(B), "log_q": uniform.expand(K)}
        if recipe.feed == "guide":
            extra_inputs |= {"guide_query": task.queries[batch], "guide_positive": task.corpus[answers]}
            extra_inputs["guide_keys"] = task.corpus[queue.queue_ids]  # (K, D); the queue is full
        if recipe.feed == "reversed":
            # A separate generator, so that the batches stay the same.
            share_generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            extra_inputs["share"] = share = torch.rand((), generator=share_generator).to(device)
            extra_inputs["mixed_query"] = query_head(share * inputs + (1 - share) * inputs.flip(0))
        query = query_head(inputs)  # (B, D)
        if recipe.feed == "labels":
            loss = loss_of(query, torch.cat([positive_key, queue.keys]), answers, torch.cat([answers, queue.ids]))
        elif recipe.feed == "pairs":
            loss = loss_of(query, positive_key, answers)
        else:
            loss = loss_of(query, positive_key, queue, query_ids=answers, **extra_inputs, step=step)
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
