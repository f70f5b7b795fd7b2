"""Likely mistakes of new users: each raises an error that says what to do instead."""

import re

import numpy as np
import pytest
import torch

import negmine
from negmine import Guide, Mix, MoCoQueue, Negatives, Select, Weight, recipes
from negmine.adapters.open_clip import ClipLoss
from negmine.adapters.pytorch_metric_learning import CrossBatchMemory
from negmine.cli import main

B, K, D = 4, 20, 8
torch.manual_seed(0)
q, p, k = (torch.randn(n, D) for n in (B, B, K))
ids = torch.arange(B)


def loss(query=q, positive=p, negatives=k, **options):
    return negmine.info_nce(query, positive, negatives, **options)


def mine(query=q, corpus=k, positives=(0, 1, 2, 3), **options):
    return negmine.mine_hard_negatives(query, corpus, list(positives), **options)


MISTAKES = {
    "whole numbers as vectors": (lambda: loss(q.int()), "query must be a floating tensor"),
    "an array as a vector": (
        lambda: loss(q.numpy()),
        "query must be a tensor, got a NumPy array, which torch.as_tensor converts",
    ),
    "keys transposed": (lambda: loss(negatives=k.T), "of shape (K, D) or (B, M, D) with query's D = 8"),
    "one positive for all": (lambda: loss(positive=p[0]), "positive_key must be of shape (B, D)"),
    "temperature 0": (lambda: loss(temperature=0), "temperature must be a number above 0"),
    "another reduction": (lambda: loss(reduction="avg"), "reduction must be 'mean' or 'sum' or 'none'"),
    "labels as floats": (
        lambda: negmine.sup_con(q, k, torch.zeros(B), torch.zeros(K)),
        "sup_con: query_labels must be an integer tensor",
    ),
    "no labels": (
        lambda: negmine.sup_con(q, k),
        "sup_con: query_labels must be given, or else positive_mask or positive_weights",
    ),
    "a queue of another width": (lambda: loss(negatives=MoCoQueue(16, K)), "with query's D = 8, got"),
    "keys of another width": (
        lambda: MoCoQueue(D, K).enqueue(torch.randn(B, 16)),
        "MoCoQueue.enqueue: keys must be of shape (B, D) with the queue's D = 8",
    ),
    "ids into a queue without": (lambda: MoCoQueue(D, K).enqueue(p, ids=ids), "created without with_ids=True"),
    "ids of queries, none of the queue": (
        lambda: loss(negatives=MoCoQueue(D, K), query_ids=ids),
        "query_ids must be None, because the queue was created without with_ids=True",
    ),
    "ids of queries, none of the keys": (lambda: loss(query_ids=ids), "as in Negatives(keys, ids=...), got None"),
    "a queue of whole numbers": (lambda: MoCoQueue(D, K, dtype=torch.int8), "dtype must be a floating torch.dtype"),
    "a mask of numbers": (
        lambda: loss(negatives=Negatives(k, mask=torch.ones(K))),
        "mask must be a bool tensor (True = usable)",
    ),
    "a mask transposed": (
        lambda: loss(negatives=Negatives(k, mask=torch.ones(K, B).bool())),
        "mask must be of shape (20,) or (4, 20)",
    ),
    "keys on another device": (lambda: loss(negatives=k.to("meta")), "on the device of query (cpu)"),
    "an unknown backend": (lambda: loss(backend="gpu"), "backend must be None, 'cuda', 'triton', 'cpu', 'reference'"),
    "a backend of another device": (
        lambda: loss(backend="cuda"),
        "backend 'cuda' cannot run logsumexp on cpu tensors (cuda takes cuda tensors)",
    ),
    "percent": (
        lambda: Select(0, 5.0),
        "Select: range_max must be a rank (int, 1 or more), a fraction (float in (0, 1]; 0.05",
    ),
    "a window the wrong way round": (lambda: Select(0.5, 0.1), "Select: range_min must be below range_max=0.1"),
    "a bare window": (lambda: loss(select=(0, 0.05)), "select must be a negmine.Select or None, got (0, 0.05)"),
    "no rows to mix": (lambda: Mix(0), "Mix: hard must be an int of 1 or more"),
    "a prior of 1": (lambda: Weight(tau_plus=1), "Weight: tau_plus must be a number in [0, 1)"),
    "a margin without a positive": (
        lambda: negmine.mine_hardest(q, k, 5, select=Select(absolute_margin=0.1)),
        "positive_key must be given if select has a margin",
    ),
    "no negatives wanted": (lambda: negmine.mine_hardest(q, k, 0), "N must be an int of 1 or more"),
    "a quantile in percent": (lambda: negmine.quantile(q, k, 95), "q must be a number in [0, 1]"),
    "features of another batch": (
        lambda: ClipLoss()(q, p[:2], 1.0),
        "ClipLoss: text_features must be of image_features' shape (4, 8)",
    ),
    "features of another width": (
        lambda: ClipLoss()(q, torch.randn(B, 9), 1.0),
        "text_features must be of shape (B, D) with image_features' D = 8",
    ),
    "a path to nothing": (
        lambda: mine("nowhere.npy"),
        "must be the path of an existing .npy, .safetensors or .parquet",
    ),
    "names without ids": (
        lambda: mine(positives="abcd"),
        "positives must be row numbers; to give ids of documents, pass corpus_ids",
    ),
    "unknown names": (
        lambda: mine(positives=["d99"] * B, corpus_ids=[f"d{i}" for i in range(K)]),
        "positives must be ids of corpus_ids",
    ),
    "a row beyond the corpus": (lambda: mine(positives=(0, 1, 2, 99)), "row numbers of the corpus, in [0, 20)"),
    "positives of some queries": (
        lambda: mine(positives=(0, 1)),
        "positives must be of 4 entries, one for each query, got 2 entries",
    ),
    "a corpus of another model": (
        lambda: mine(corpus=torch.randn(K, 9)),
        "corpus_embeddings must be of query_embeddings' D = 8",
    ),
    "a filter beside select": (lambda: mine(relative_margin=0.05), "given as select=Select(relative_margin=0.05)"),
    "an unknown strategy": (lambda: mine(sampling_strategy="hard"), "'top' or 'random' or 'weighted'"),
    "arrays of whole numbers": (lambda: mine(np.ones((B, D), int)), "must be float32, float16, bfloat16 or float64"),
    "training data without texts": (
        lambda: mine().to_jsonl("train.jsonl"),
        "to_jsonl: query_texts must be given, here or when the negatives are mined",
    ),
    "a list of rows as keys": (
        lambda: loss(negatives=[[0.1] * D] * K),
        "negative_keys[0] must be a tensor, a MoCoQueue, a Negatives, or None for in-batch negatives, got a list, which torch",
    ),
    "several queues where one is taken": (
        lambda: negmine.mine_hardest(q, [k, k], 3),
        "negative_keys must be a tensor, a MoCoQueue, a Negatives, or None for in-batch negatives, got several pools, but mine_",
    ),
    "negatives in negatives": (
        lambda: loss(negatives=Negatives(Negatives(k))),
        "negative_keys.keys must be a tensor, a MoCoQueue, or None, got a Negatives",
    ),
    "ids in a list": (
        lambda: loss(negatives=Negatives(k, ids=torch.arange(K)), query_ids=[1, 2, 3, 4]),
        "query_ids must be a tensor, got a list, which torch.as_tensor converts",
    ),
    "a schedule in a function": (
        lambda: loss(temperature=recipes.linear(1.0, 0.1, 10)),
        "temperature must be a number above 0 or a 0-d floating tensor (schedules and LogScale are for modules",
    ),
    "a guide of another width": (
        lambda: Guide(q, p, torch.randn(K, 9)),
        "Guide: keys must be of shape (K, G) or (B, M, G) with query's G = 8, got float32 tensor of shape (20, 9)",
    ),
    "a fraction as a rank": (
        lambda: negmine.rank_thresholds(q, k, [0.05]),
        "(for fractions, use quantile), got [0.05]",
    ),
    "nothing to mix": (lambda: negmine.mix_negatives(q, k, None), "mix_negatives: mix must be a negmine.Mix, got None"),
    "one view and no labels": (
        lambda: negmine.sup_con(q, None),
        "query_labels must be given if keys is None and query has one view, because no query would have a positive",
    ),
    "a recipe as a loss": (
        lambda: recipes.mochi(q, p, k),
        "Mix: hard must be an int of 1 or more, got float32 tensor of shape (4, 8) on cpu",
    ),
    "the name of a schedule": (lambda: recipes.ring("linear"), "ring: outer must be a finite number or a 0-d floating"),
    "percent in a word": (lambda: recipes.perc_pos("95%"), "perc_pos: percentage must be a finite number or a 0-d"),
    "a schedule of ranks": (
        lambda: recipes.hardest(recipes.linear(100, 10, 1000)),
        "got 100.0 (use whole for a schedule of ranks)",
    ),
    "a schedule of counts": (
        lambda: recipes.mochi(5, recipes.whole(recipes.linear(8, 4, 1000))),
        "(numbers of negatives determine shapes and cannot be schedules)",
    ),
    "an option of another recipe": (
        lambda: recipes.rince(gamma=1.0),
        "rince: there is no argument gamma; its arguments are temperature, r, lam, reduction,",
    ),
    "half an option": (
        lambda: recipes.rince(temperatur=0.1),
        "rince: there is no argument temperatur; did you mean temp",
    ),
    "a word for a number": (
        lambda: recipes.ifm("small"),
        "ifm: epsilon must be a finite number or a 0-d floating tensor",
    ),
    "the temperature of SigLIP": (
        lambda: negmine.SigLIPLoss(temperature=0.1),
        "SigLIPLoss: there is no argument temperature; its arguments are scale, bias, learn",
    ),
    "queries of another batch in a recipe": (
        lambda: recipes.qwen3_embedding()(q, p[:2]),
        "qwen3_embedding: positive_key must be of query's shape (4, 8)",
    ),
    "a loss without labels in a memory": (
        lambda: CrossBatchMemory(negmine.InfoNCELoss(), D),
        "CrossBatchMemory: loss must be a TripletLoss, SupConLoss or MultiSimilarityLoss, or a loss of pytorch-metric-learning",
    ),
    "a misspelt option": (
        lambda: mine(num_negative=3),
        "mine_hard_negatives: there is no argument num_negative; did you mean num_negatives?",
    ),
    "an option of another package": (
        lambda: mine(top_k=3),
        "mine_hard_negatives: there is no argument top_k; see help(mine_hard_negatives)",
    ),
    "a misspelt option with texts": (
        lambda: negmine.mining.from_texts(len, ["a"], ["b"], [0], num_negs=3),
        "from_texts: there is no argument num_negs; did you mean num_negatives?",
    ),
    "a misspelt option in rounds": (
        lambda: negmine.mining.mining_rounds(lambda number: 1 / 0, lambda number, result: None, [0], num_negs=3),
        "mining_rounds: there is no argument num_negs; did you mean num_negatives?",
    ),
    "a round of queries only": (
        lambda: negmine.mining.mining_rounds(lambda number: q, lambda number, result: None, [0, 1, 2, 3]),
        "embed must be a function that returns (query_embeddings, corpus_embeddings), or None, got one that returns a Tensor",
    ),
    "ids of half the corpus": (
        lambda: mine(corpus_ids=["a", "b"]),
        "corpus_ids must be 20 ids, one per row, got 2",
    ),
    "a table of vectors as positives": (
        lambda: negmine.mine_hard_negatives(q, k, q.numpy()),
        "positives[0] must be a flat sequence of ints, got float32 array of shape (8,)",
    ),
    "a file of another kind": (lambda: negmine.mining.MiningResult.load(__file__), "was not written by save"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_python(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError, negmine.ops.backends.BackendUnavailable)) as raised:
        call()
    sentence = str(raised.value)
    assert words in sentence and "\n" not in sentence and re.match(r"[\w.]+: ", sentence), sentence


FILES = "--query-embeddings q.npy --corpus-embeddings c.npy --positives p.npy"
COMMANDS = {
    "no command": ("", 2, "negmine: the following arguments are required: command (see negmine --help)"),
    "an unknown command": ("mien", 2, "invalid choice: 'mien' (choose from 'mine',"),
    "no input": (
        "mine --output o.npz",
        2,
        "--positives; --beir, --collection or --data gives the positives, and --model",
    ),
    "no output": (
        f"mine {FILES}",
        2,
        "negmine mine: give --output or --jsonl, a file for the result (see negmine mine --help)",
    ),
    "a word for a number": (
        f"mine {FILES} --num-negatives three",
        2,
        "negmine mine: --num-negatives must be an int, got 'three' (see negmine mine --help)",
    ),
    "half an option": (f"mine {FILES} --range 5", 2, "--range could match --range-mode, --range-min, --range-max"),
    "a misspelt option": (
        f"mine {FILES} --output o.npz --num-negative-keys 5",
        2,
        "there is no option --num-negative-keys; did you mean --num-negatives?",
    ),
    "a percentage": (
        f"mine {FILES} --output o.npz --max-score 5%",
        2,
        "--max-score must be a number or none, got '5%'",
    ),
    "an unknown option": (f"mine {FILES} --output o.npz --top 5", 2, "negmine mine: there is no option --top (see"),
    "percent": (f"mine {FILES} --output o.npz --range-max 5.0", 2, "Select: range_max must be a rank"),
    "an unknown backend": (f"mine {FILES} --output o.npz --backend gpu", 2, "backend must be None, 'cuda', 'triton'"),
    "an unknown form": (
        f"mine {FILES} --output o.jsonl --form colbert",
        2,
        "form must be 'flagembedding' or 'tevatron'",
    ),
    "no texts": (f"mine {FILES} --output o.jsonl", 2, "--output needs --query-texts and --corpus-texts, or a data set"),
    "a folder that is not there": (
        f"mine {FILES} --output no/o.npz",
        1,
        "'no/o.npz' could not be written, because 'no' is a folder that does not exist",
    ),
    "an output that exists": (f"mine {FILES} --output p.npy", 2, "negmine mine: --output must"),
    "an input that is not there": (
        "mine --query-embeddings x.npy --corpus-embeddings c.npy --positives p.npy --output o.npz",
        2,
        "query_embeddings must be the path of an existing .npy",
    ),
    "a data set that is not there": (
        "mine --beir no --model m --output o.jsonl",
        2,
        "'no' must be a folder with files in it",
    ),
    "an index that is not there": (
        "index search --index no.index --query-embeddings q.npy --k 3 --output f.npz",
        2,
        "path must be an existing file, got 'no.index'",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("files")
    for name, rows in (("q", q.numpy()), ("c", k.numpy()), ("p", np.arange(B))):
        np.save(made / f"{name}.npy", rows)
    return made


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_on_the_command_line(mistake, folder, monkeypatch, capsys):
    words, code, sentence = COMMANDS[mistake]
    monkeypatch.chdir(folder)
    assert main(words.split()) == code
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and said.startswith("negmine") and "Errno" not in said, said
