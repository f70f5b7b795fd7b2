"""Mining rounds on the WordNet task: training with negatives mined once, compared with negatives mined again in each round.

    python -m benchmarks.rounds                      3 rounds of 60 steps, under three minutes on two cores
    python -m benchmarks.rounds --rounds 5 --keep-old 4

Both take the same number of steps. The negatives of a batch are the mined negatives of all its queries and the positives of the
other queries; a query's own positive is masked by id. After every round, held-out queries are ranked against the whole corpus.
"""

import argparse
import time

import torch
from torch import Tensor

import negmine
from benchmarks import wordnet
from benchmarks.train import TEMPERATURE, B, Metrics, evaluate, follow, new_heads, optimizer_of
from negmine import Select
from negmine.mining import MiningResult, mining_rounds

MINED = 8  # negatives per query
SKIPPED = 1  # the hardest negative is skipped because it is a false negative most often
EMBEDDED = 8192  # rows per call of a tower


class Trainer:
    """Two towers, with the methods `embed` and `train` that negmine.mining.mining_rounds calls."""

    def __init__(self, task: wordnet.Task, queries: Tensor, steps: int, rounds: int, refresh: bool, seed: int) -> None:
        self.task, self.queries, self.steps, self.refresh = task, queries, steps, refresh
        self.query_head, self.key_head = new_heads(task.corpus.shape[1], seed, task.corpus.device)
        self.optimizer, self.schedule = optimizer_of([*self.query_head.parameters()], steps * rounds)
        self.generator = torch.Generator().manual_seed(seed)
        self.first: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def embed(self, number: int) -> tuple[Tensor, Tensor]:
        """Embed the training queries and the corpus; without `refresh`, return the embeddings of the first call again."""
        if self.first is None or self.refresh:
            rows = (self.task.queries[self.queries], self.task.corpus)
            heads = (self.query_head, self.key_head)
            self.first = tuple(
                torch.cat([head(part) for part in x.split(EMBEDDED)]) for head, x in zip(heads, rows, strict=True)
            )
        return self.first

    def train(self, number: int, result: MiningResult) -> Metrics:
        task, negatives = self.task, torch.from_numpy(result.indices)  # (Q, n)
        for _ in range(self.steps):
            batch = torch.randint(len(self.queries), (B,), generator=self.generator)  # (B,)
            answers = task.positives[self.queries[batch]]  # (B,)
            mined = negatives[batch].flatten()
            rows = torch.cat([answers, mined[mined >= 0]]).unique()  # (K,)
            with torch.no_grad():
                follow(self.key_head, self.query_head)
                keys, positive = self.key_head(task.corpus[rows]), self.key_head(task.corpus[answers])
            query = self.query_head(task.queries[self.queries[batch]])
            among = negmine.Negatives(keys, ids=rows)
            loss = negmine.info_nce(query, positive, among, temperature=TEMPERATURE, query_ids=answers)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        return evaluate(self.query_head, self.key_head, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps per round")
    parser.add_argument("--queries", type=int, default=5000, help="training queries")
    parser.add_argument("--keep-old", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = wordnet.load()
    before = evaluate(*new_heads(task.corpus.shape[1], args.seed, task.corpus.device), task)
    queries = task.train[torch.randperm(len(task.train), generator=torch.Generator().manual_seed(2))[: args.queries]]
    print(f"{'negatives':<12}{'round':>6}{'new':>8}{'R@1':>8}{'R@10':>8}{'MRR':>8}")
    print(f"{'(none yet)':<12}{'':>14}{before.recall_1:>8.3f}{before.recall_10:>8.3f}{before.mrr:>8.3f}", flush=True)
    for name, refresh in (("mined once", False), ("each round", True)):
        start = time.perf_counter()
        trainer = Trainer(task, queries, args.steps, args.rounds, refresh, args.seed)
        rounds = mining_rounds(
            *(trainer.embed, trainer.train, task.positives[queries]),
            rounds=args.rounds,
            keep_old=args.keep_old,
            num_negatives=MINED,
            select=Select(SKIPPED),
        )
        for done in rounds:
            reached = done.outcome
            print(
                f"{name:<12}{done.number:>6}{done.new:>8.1%}{reached.recall_1:>8.3f}{reached.recall_10:>8.3f}{reached.mrr:>8.3f}"
            )
        print(f"{'':<12}{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
