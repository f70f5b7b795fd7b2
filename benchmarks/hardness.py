"""Measure properties of negatives by their rank: scores, share of the gradient, and relation to the answer in WordNet.

    python -m benchmarks.hardness --out out        negmine.hardness_report for the nouns of WordNet, with its taxonomy

`report` writes that page. `measure_hardness` computes the figure of the demo, for a sample of held-out queries and the K corpus
rows that are in the queue at the start:

    scores     the density of (score - score of the positive), and the thresholds of the hardest 0.1 % and 5 %
    attention  the share of the gradient of the negatives, softmax(score / T), that comes from the hardest r ranks
    related    the share of the negatives near rank r that are another sense of the same word, a direct hypernym or hyponym, or
               from the same lexicographer file: they are related in meaning, or even false negatives
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import negmine
from benchmarks.peers import MIX
from benchmarks.train import TEMPERATURE, Head
from benchmarks.wordnet import Task, Taxonomy, Texts, load, load_texts
from negmine.report import HardnessReport

QUERIES = 256
BINS = torch.linspace(-1.3, 0.5, 181)
THRESHOLDS = (0.001, 0.05)
RANKS = torch.tensor([1, 2, 4, 8, 16, 32, 65, 130, 260, 520, 1024, 2048, 3276, 6553, 13107, 26214, 45875, 62259, 65536])


@dataclass
class Hardness:
    density: Tensor  # (len(BINS) - 1,) of score - positive's score
    synthetic_density: Tensor  # the same for MoCHi's synthetic negatives
    thresholds: dict[float, float]  # fraction -> mean of (the score at that rank - the positive's)
    attention: Tensor  # (len(RANKS),) share of the gradient that comes from the hardest RANKS
    related: dict[str, Tensor]  # name -> (len(RANKS),) share within (previous rank, this rank]


class Relations:
    """Which corpus rows are related to a given one in WordNet."""

    def __init__(self, task: Task, texts: Texts) -> None:
        self.lexname_of = task.lexname_of.tolist()
        self.texts = texts
        self.rows_of_lemma: dict[str, set[int]] = {}
        for row, lemmas in enumerate(texts.lemmas):
            for lemma in lemmas:
                self.rows_of_lemma.setdefault(lemma.lower(), set()).add(row)
        self.broader: dict[int, set[int]] = {}
        self.narrower: dict[int, set[int]] = {}
        for child, parent in task.hypernyms.tolist():
            self.broader.setdefault(child, set()).add(parent)
            self.narrower.setdefault(parent, set()).add(child)

    def same_word(self, row: int) -> set[int]:
        return set().union(*(self.rows_of_lemma[lemma.lower()] for lemma in self.texts.lemmas[row])) - {row}

    def direct_relations(self, row: int) -> set[int]:
        return self.broader.get(row, set()) | self.narrower.get(row, set())

    def marks(self, answer: int, row: int) -> list[str]:
        """Reasons why `row` may be a false negative of a query with this answer."""
        found = []
        if self.texts.glosses[row] == self.texts.glosses[answer]:
            found.append("same gloss")
        if row in self.same_word(answer):
            found.append("same word")
        if row in self.broader.get(answer, set()):
            found.append("broader")
        if row in self.narrower.get(answer, set()):
            found.append("narrower")
        return found


def density(relative: Tensor) -> Tensor:
    counts = torch.histogram(relative.flatten().float().cpu(), BINS).hist  # (len(BINS) - 1,)
    return counts / counts.sum() / (BINS[1] - BINS[0])


@torch.no_grad()
def measure_hardness(query_head: Head, key_head: Head, task: Task, rows: Tensor, relations: Relations) -> Hardness:
    """rows (K,): the corpus rows that are negatives."""
    chosen = task.held_out[:: len(task.held_out) // QUERIES][:QUERIES]  # (B,)
    answers = task.positives[chosen]  # (B,)
    query, keys = query_head(task.queries[chosen]), key_head(task.corpus[rows])  # (B, D), (K, D)
    negatives = negmine.Negatives(keys, ids=rows)
    positive = (query * key_head(task.corpus[answers])).sum(dim=1, keepdim=True)  # (B, 1)

    ranks = [int(fraction * len(rows)) for fraction in THRESHOLDS]
    thresholds = (negmine.rank_thresholds(query, negatives, ranks, query_ids=answers) - positive).mean(dim=0).tolist()
    synthetic = negmine.mix_negatives(query, negatives, MIX, query_ids=answers).vectors  # (B, S, D)
    synthetic_scores = torch.einsum("bd,bsd->bs", query, synthetic)  # (B, S)

    # The picture shows the whole ranking, which no op returns, so the matrix of scores is stored and sorted here.
    scores = (query @ keys.T).masked_fill(answers[:, None] == rows, float("-inf"))  # (B, K)
    ordered, index = scores.sort(dim=1, descending=True)  # (B, K), (B, K)
    attention = (ordered / TEMPERATURE).softmax(dim=1).cumsum(dim=1).mean(dim=0).cpu()[RANKS - 1]  # (len(RANKS),)
    relative = (ordered - positive)[ordered > float("-inf")]

    rank_of = torch.empty_like(index).scatter_(1, index, torch.arange(len(rows), device=index.device).expand_as(index))
    column_of = {row: column for column, row in enumerate(rows.tolist())}
    width = RANKS.diff(prepend=torch.zeros(1, dtype=torch.long)).double() * len(chosen)  # (len(RANKS),)

    def share(relation: list[list[int]]) -> Tensor:
        """relation: the related corpus rows of each query -> (len(RANKS),) their share in each range of ranks."""
        ranks_found = [
            rank_of[b, column_of[row]].item()
            for b, related_rows in enumerate(relation)
            for row in related_rows
            if row in column_of
        ]
        span = torch.bucketize(torch.tensor(ranks_found, dtype=torch.long) + 1, RANKS)
        return torch.bincount(span, minlength=len(RANKS)).double() / width

    same_file = task.lexname_of[rows[index]] == task.lexname_of[answers][:, None]  # (B, K)
    in_span = torch.bucketize(torch.arange(1, len(rows) + 1), RANKS)  # (K,)
    related = {
        "same lexicographer file": torch.bincount(in_span, same_file.sum(dim=0).cpu().double()) / width,
        "same word, other sense": share([sorted(relations.same_word(answer)) for answer in answers.tolist()]),
        "direct hypernym or hyponym": share(
            [sorted(relations.direct_relations(answer)) for answer in answers.tolist()]
        ),
    }
    return Hardness(
        density(relative),
        density(synthetic_scores - positive),
        dict(zip(THRESHOLDS, thresholds, strict=True)),
        attention,
        related,
    )


def report(task: Task, texts: Texts, num_queries: int | None = 512, **options) -> HardnessReport:
    """A report about the nouns of the task: held-out queries against all noun entries, with similarities from the taxonomy.

    Only nouns form a single tree, in which any two entries can be compared. The class is the lexicographer file.
    """
    is_noun = torch.tensor([name.startswith("noun.") for name in task.lexnames])[task.lexname_of]  # (K,)
    rows = is_noun.nonzero()[:, 0]  # (nouns,)
    asked = task.held_out[is_noun[task.positives[task.held_out]]]  # (Q,)
    place = torch.full((len(task.corpus),), -1).index_put_((rows,), torch.arange(len(rows)))  # corpus row -> noun
    answers, files = task.positives[asked], task.lexname_of.numpy()
    tree = Taxonomy(task.hypernyms, len(task.corpus))

    def similarity(which: int):
        return lambda q, k: tree.compare(answers[q].numpy(), rows[k].numpy())[which]

    return negmine.hardness_report(
        task.queries[asked],
        task.corpus[rows],
        place[answers],
        query_labels=files[answers],
        corpus_labels=files[rows],
        class_similarity={"depth of the common hypernym": similarity(0), "path similarity": similarity(1)},
        query_texts=[
            f"{texts.lemmas[a][0]}: {texts.examples[q]}" for q, a in zip(asked.tolist(), answers, strict=True)
        ],
        corpus_texts=[f"{', '.join(texts.lemmas[row])}: {texts.glosses[row]}" for row in rows.tolist()],
        num_queries=num_queries,
        title="How hard are WordNet's negatives?",
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=512, help="held-out noun examples to look at")
    parser.add_argument("--out", type=Path, default=Path("out"), help="hardness.html and hardness.json go here")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    made = report(load(), load_texts(), args.queries, show_progress_bar=True, page=args.out / "hardness.html")
    made.save(args.out / "hardness.json")
    print(f"{made.summary()}\n\nThe page: {(args.out / 'hardness.html').resolve()}")


if __name__ == "__main__":
    main()
