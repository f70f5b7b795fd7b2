"""Every error of the public API: the call, the type of the exception and words of its message."""

import re

import pytest
import torch

import negmine
from negmine import FalseNegatives, Mix, MoCoQueue, Negatives, Select, Weight
from negmine.ops import backends

B, K, D = 3, 7, 4
q, pos, keys = torch.randn(B, D), torch.randn(B, D), torch.randn(K, D)
ids_b, ids_k = torch.arange(B), torch.arange(K)


def loss(query=q, positive=pos, negatives=keys, **options):
    return lambda: negmine.info_nce(query, positive, negatives, **options)


def mine(query=q, negatives=keys, N=2, **options):
    return lambda: negmine.mine_hardest(query, negatives, N, **options)


def own(**given):
    """Negatives with ids, labels or a mask."""
    return Negatives(keys, **given)


def option(cls, *args, **kwargs):
    return lambda: cls(*args, **kwargs)


def enqueue(*args, **kwargs):
    return lambda: MoCoQueue(D, 5, with_ids=True).enqueue(*args, **kwargs)


REFUSALS = [
    # vectors
    (loss(query=[1.0]), TypeError, "info_nce: query must be a tensor, got a list, which torch.as_tensor converts"),
    (loss(query=q.long()), TypeError, "query must be a floating tensor"),
    (
        loss(query=q[0]),
        ValueError,
        r"query must be of shape (B, D) with D of 1 or more, got float32 tensor of shape (4,)",
    ),
    (loss(query=torch.zeros(3, 0)), ValueError, "query must be of shape (B, D) with D of 1 or more"),
    (loss(positive=None), TypeError, "positive_key must be a tensor, got None"),
    (loss(positive=pos[:2]), ValueError, "positive_key must be of query's shape (3, 4)"),
    (loss(positive=pos.int()), TypeError, "positive_key must be a floating tensor"),
    (loss(negatives=keys[:, :2]), ValueError, "negative_keys must be of shape (K, D) or (B, M, D) with query's D = 4"),
    (loss(negatives=keys[0]), ValueError, "negative_keys must be of shape (K, D) or (B, M, D)"),
    (loss(negatives=torch.randn(2, 5, D)), ValueError, "negative_keys must be of shape (B, M, D) with query's B = 3"),
    (loss(negatives=keys.to("meta")), ValueError, "negative_keys must be on the device of query (cpu)"),
    (mine(negatives=torch.randn(2, 5, D)), ValueError, "negative_keys must be of shape (B, M, D) with query's B = 3"),
    (
        lambda: negmine.mix_negatives(q, torch.randn(B, 5, D), Mix()),
        ValueError,
        "mix_negatives: negative_keys must be of shape (K, D)",
    ),
    (
        loss(negatives={"keys": keys}),
        TypeError,
        "negative_keys must be a tensor, a MoCoQueue, a Negatives, or None for in-batch negatives, got a dict",
    ),
    (mine(negatives=None), ValueError, "negative_keys must be given if there is no positive_key, got None"),
    # scalars
    (loss(temperature=0), ValueError, "temperature must be a number above 0 or a 0-d floating tensor, got 0"),
    (loss(temperature=-1.0), ValueError, "temperature must be a number above 0"),
    (loss(temperature=float("nan")), ValueError, "temperature must be a number above 0"),
    (loss(temperature="warm"), ValueError, "temperature must be a number above 0"),
    (loss(temperature=torch.ones(2)), ValueError, "temperature must be a number above 0 or a 0-d floating tensor"),
    (loss(temperature=torch.tensor(1)), ValueError, "temperature must be a number above 0 or a 0-d floating tensor"),
    (loss(reduction="avg"), ValueError, "reduction must be 'mean' or 'sum' or 'none', got 'avg'"),
    (loss(decoupled=1), TypeError, "decoupled must be True or False, got 1"),
    (loss(return_stats="yes"), TypeError, "return_stats must be True or False"),
    (loss(seed=-1), ValueError, "seed must be an int in [0, 2**32), got -1"),
    (loss(seed=1.5), ValueError, "seed must be an int in [0, 2**32)"),
    (loss(step=2**32), ValueError, "step must be an int in [0, 2**32) or a 0-d int64 tensor"),
    (loss(step=torch.zeros(2, dtype=torch.int64)), ValueError, "step must be an int in [0, 2**32) or a 0-d int64"),
    (loss(row_offset=torch.tensor(0.0)), ValueError, "row_offset must be an int in [0, 2**63) or a 0-d int64 tensor"),
    (loss(row_offset=-2), ValueError, "row_offset must be an int in [0, 2**63) or a 0-d int64 tensor, got -2"),
    (mine(N=0), ValueError, "mine_hardest: N must be an int of 1 or more, got 0"),
    (mine(N=2.0), ValueError, "N must be an int of 1 or more"),
    (mine(N=True), ValueError, "N must be an int of 1 or more"),
    # options of the wrong type, and pairs of arguments of which one is missing
    (loss(select=0.05), TypeError, "select must be a negmine.Select or None, got 0.05"),
    (loss(mix=1024), TypeError, "mix must be a negmine.Mix or None"),
    (loss(weight=1.0), TypeError, "weight must be a negmine.Weight or None"),
    (
        loss(false_negatives=True, support=q[:, None]),
        TypeError,
        "false_negatives must be a negmine.FalseNegatives or None",
    ),
    (
        loss(false_negatives=FalseNegatives()),
        ValueError,
        "support must be given together with false_negatives, got None",
    ),
    (loss(support=q[:, None]), ValueError, "false_negatives must be given together with support, got None"),
    (loss(false_negatives=FalseNegatives(), support=q), ValueError, "support must be of shape (B, V, D)"),
    (
        loss(false_negatives=FalseNegatives(), support=q[:2, None]),
        ValueError,
        "support must be of shape (B, V, D) with query's B = 3",
    ),
    (
        loss(query_ids=ids_b),
        ValueError,
        "negative_keys.ids must be given together with query_ids, as in Negatives(keys, ids=...), got None",
    ),
    (loss(negatives=own(ids=ids_k)), ValueError, "query_ids must be given together with negative_keys.ids"),
    (loss(query_labels=ids_b), ValueError, "negative_keys.labels must be given together with query_labels"),
    (loss(negatives=own(labels=ids_k)), ValueError, "query_labels must be given together with negative_keys.labels"),
    (
        mine(query_labels=ids_b),
        ValueError,
        "mine_hardest: negative_keys.labels must be given together with query_labels",
    ),
    (
        loss(query_ids=ids_b.float(), negatives=own(ids=ids_k)),
        TypeError,
        "query_ids must be an integer tensor",
    ),
    (loss(query_ids=ids_k, negatives=own(ids=ids_k)), ValueError, "query_ids must be of shape (3,)"),
    (loss(query_ids=ids_b, negatives=own(ids=ids_b)), ValueError, "negative_keys.ids must be of shape (7,)"),
    (loss(negatives=own(mask=torch.ones(K))), TypeError, "negative_keys.mask must be a bool tensor (True = usable)"),
    (
        loss(negatives=own(mask=torch.ones(B, dtype=torch.bool))),
        ValueError,
        "negative_keys.mask must be of shape (7,) or (3, 7)",
    ),
    (
        loss(negatives=own(mask=torch.ones(K, dtype=torch.bool, device="meta"))),
        ValueError,
        "negative_keys.mask must be on the device of query",
    ),
    # Negatives
    (
        option(Negatives, keys, ids=[1]),
        TypeError,
        "Negatives: ids must be a tensor or None, got a list, which torch.as_tensor converts",
    ),
    (option(Negatives, keys, mask=True), TypeError, "Negatives: mask must be a tensor or None, got a bool"),
    (
        option(Negatives, None, labels=ids_k),
        ValueError,
        "Negatives: ids and labels must be None for in-batch negatives",
    ),
    (
        loss(negatives=MoCoQueue(D, K), query_ids=ids_b),
        ValueError,
        "query_ids must be None, because the queue was created without with_ids=True",
    ),
    # arguments of single functions
    (
        mine(select=Select(0, 2, absolute_margin=0.1)),
        ValueError,
        "positive_key must be given if select has a margin",
    ),
    (mine(select=Select(sample=2, replace=True)), ValueError, "select must be without replace"),
    (mine(positive_key=pos[:1]), ValueError, "mine_hardest: positive_key must be of query's shape"),
    (lambda: negmine.mix_negatives(q, keys, None), TypeError, "mix_negatives: mix must be a negmine.Mix, got None"),
    (lambda: negmine.mix_negatives(q, keys, 3), TypeError, "mix_negatives: mix must be a negmine.Mix, got 3"),
    (lambda: negmine.rank_thresholds(q, keys, 1.5), ValueError, "rank_thresholds: ranks must be 0-based ranks"),
    (lambda: negmine.rank_thresholds(q, keys, [-1]), ValueError, "ranks must be 0-based ranks"),
    (lambda: negmine.rank_thresholds(q, keys, torch.zeros(2, 2, dtype=torch.long)), ValueError, "with query's B = 3"),
    (lambda: negmine.quantile(q, keys, 95), ValueError, "quantile: q must be a number in [0, 1]"),
    (lambda: negmine.quantile(q, keys, []), ValueError, "quantile: q must be a number in [0, 1]"),
    # backends
    (loss(backend="gpu"), ValueError, "backend must be None, 'cuda', 'triton', 'cpu', 'reference', got 'gpu'"),
    (loss(backend="cuda"), backends.BackendUnavailable, "backend 'cuda' cannot run logsumexp on cpu tensors (cuda"),
    (lambda: negmine.logsumexp(torch.ones(2, 3), True), TypeError, "logsumexp: negative_keys must be a tensor"),
    (
        loss(query=q.double(), positive=pos.double(), negatives=keys.double(), backend="cpu"),
        backends.BackendUnavailable,
        "float64 input",
    ),
    # Select
    (option(Select, -1), ValueError, "range_min must be a rank (int, 0 or more) or a fraction"),
    (option(Select, 1.0), ValueError, "range_min must be a rank"),
    (option(Select, True), ValueError, "range_min must be a rank"),
    (
        option(Select, 0, 1.5),
        ValueError,
        "range_max must be a rank (int, 1 or more), a fraction (float in (0, 1]; 0.05 is 5 %) or None, got 1.5",
    ),
    (option(Select, 0, 0), ValueError, "range_max must be a rank"),
    (option(Select, 0, 2**70), ValueError, "range_max must be a rank"),  # more than any tensor holds
    (option(Select, max_score=2**70), ValueError, "max_score must be a finite number"),
    (option(Select, 5, 4), ValueError, "range_min must be below range_max=4, got 5"),
    (option(Select, 0.5, 0.1), ValueError, "range_min must be below range_max=0.1"),
    (option(Select, min_score="a"), ValueError, "min_score must be a finite number or None"),
    (option(Select, min_score=0.5, max_score=0.1), ValueError, "min_score must be at most max_score=0.1"),
    (option(Select, max_score=float("inf")), ValueError, "max_score must be a finite number"),
    (option(Select, absolute_margin="x"), ValueError, "absolute_margin must be a finite number"),
    (option(Select, relative_margin=float("nan")), ValueError, "relative_margin must be a finite number"),
    (option(Select, sample=0), ValueError, "sample must be an int of 1 or more, or None, got 0"),
    (option(Select, replace=1, sample=2), ValueError, "replace must be True or False"),
    (option(Select, replace=True), ValueError, "replace must be False unless sample is given"),
    # Mix
    (option(Mix, 0), ValueError, "hard must be an int of 1 or more"),
    (option(Mix, 4, -1), ValueError, "pairs must be an int of 0 or more"),
    (option(Mix, 4, 1, 0.5), ValueError, "with_query must be an int of 0 or more"),
    (option(Mix, skip=-1), ValueError, "skip must be an int of 0 or more"),
    (option(Mix, pair_range=(0.5, 0.2)), ValueError, "pair_range must be (low, high) with 0 <= low <= high <= 1"),
    (option(Mix, query_range=0.5), ValueError, "query_range must be (low, high)"),
    (option(Mix, concentration=0.0), ValueError, "concentration must be a number above 0"),
    (option(Mix, distinct=1), ValueError, "distinct must be True or False"),
    (option(Mix, detach=None), ValueError, "detach must be True or False"),
    # Weight
    (option(Weight, -0.5), ValueError, "beta must be a number of 0 or more"),
    (option(Weight, 1.0, 1.0), ValueError, "tau_plus must be a number in [0, 1)"),
    (option(Weight, detach=0), ValueError, "detach must be True or False"),
    # FalseNegatives
    (option(FalseNegatives, 0), ValueError, "top_k must be an int of 1 or more, or None"),
    (option(FalseNegatives, 3, "x"), ValueError, "threshold must be a finite number or None"),
    (option(FalseNegatives, None, None), ValueError, "top_k must be given if threshold is None"),
    (option(FalseNegatives, mode="drop"), ValueError, "mode must be 'eliminate' or 'attract', got 'drop'"),
    (option(FalseNegatives, reduce="sum"), ValueError, "reduce must be 'max' or 'mean'"),
    # InfoNCELoss and MoCoQueue
    (option(negmine.InfoNCELoss, 0.0), ValueError, "InfoNCELoss: temperature must be a number above 0"),
    (option(negmine.InfoNCELoss, select=3), TypeError, "InfoNCELoss: select must be a negmine.Select or None"),
    (option(negmine.InfoNCELoss, reduction="avg"), ValueError, "InfoNCELoss: reduction must be"),
    (option(negmine.InfoNCELoss, seed=-1), ValueError, "InfoNCELoss: seed must be an int"),
    (option(MoCoQueue, 0), ValueError, "MoCoQueue: dim must be an int of 1 or more, got 0"),
    (option(MoCoQueue, 4, 0), ValueError, "MoCoQueue: K must be an int of 1 or more"),
    (option(MoCoQueue, 4, 8, dtype=torch.int8), TypeError, "dtype must be a floating torch.dtype or None"),
    (option(MoCoQueue, 4, 8, with_ids=1), TypeError, "with_ids must be True or False"),
    (enqueue(torch.zeros(2, D + 1)), ValueError, "keys must be of shape (B, D) with the queue's D = 4"),
    (enqueue(torch.zeros(2, D).long()), TypeError, "keys must be a floating tensor"),
    (enqueue(torch.zeros(2, D), ids=torch.zeros(3).long()), ValueError, "ids must be an integer tensor of shape (2,)"),
    (
        enqueue(torch.zeros(2, D), labels=torch.zeros(2).long()),
        ValueError,
        "labels must be None, because the queue was created without with_labels=True",
    ),
]


@pytest.mark.parametrize("call, error, words", REFUSALS, ids=[words[:60] for _, _, words in REFUSALS])
def test_refusal(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_an_unknown_NEGMINE_BACKEND_is_refused_at_import(tmp_path):
    import os
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-c", "import negmine"],
        env={**os.environ, "NEGMINE_BACKEND": "fpga"},
        capture_output=True,
        text=True,
    )
    assert (
        run.returncode != 0 and "NEGMINE_BACKEND must be one of cuda, triton, cpu, reference, got 'fpga'" in run.stderr
    )
