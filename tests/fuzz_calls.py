"""The random calls of tests/fuzz.py, and how each result is checked: ops, losses, recipes, modules, queues, options, datasets.

FUZZED and EXCUSED together have every public name: tests/test_fuzz.py compares them with negmine.__all__ and __all__ of its
parts.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import negmine
from negmine import (
    FalseNegatives,
    Mix,
    MoCoQueue,
    Negatives,
    Select,
    Weight,
    losses,
    mining,
    queues,
    recipes,
    report,
    selection,
)
from tests.cases import feed, negatives
from tests.fuzz_case import Case
from tests.fuzz_judge import EPS, double, near, require, rounding, same, tensors, widened

FLOOR = 64 * EPS
PARTS = (negmine, losses, selection, queues, mining, report)


def public(name: str):
    """Return the public function with this name, of negmine or of one of its parts."""
    return next(getattr(part, name) for part in PARTS if name in part.__all__)


def run(op: str, call: dict):
    """Call the public function `op`; masks among the arguments are passed as Negatives."""
    own = {
        name: tensor for name, tensor in call.items() if name in ("negative_ids", "negative_labels", "negative_mask")
    }
    given = {name: value for name, value in call.items() if name not in own}
    return public(op)(**given | ({"negative_keys": negatives(given["negative_keys"], own)} if own else {}))


def mined(case: Case) -> tuple[dict, str]:
    call = {"query": case.vectors(case.B, case.D), "negative_keys": case.vectors(case.K, case.D), **case.masks()}
    op = case.draw.choice(["mine_hardest", "mine_hardest", "rank_thresholds", "quantile"])
    if op == "mine_hardest":
        call["N"] = case.draw.choice([1, 2, case.draw.randrange(1, 500), case.K + 3])
        call["select"] = case.select(margins=True)
        if (select := call["select"]) and select.has_margin:
            call["positive_key"] = case.vectors(case.B, case.D)
    elif op == "rank_thresholds":
        shape = (case.B, 3) if case.chance(0.3) else (case.draw.randrange(1, 6),)
        ranks = torch.randint(-2, case.K + 3, shape, generator=case.generator)
        call["ranks"] = ranks if case.chance(0.5) else case.draw.randrange(case.K + 2)
    else:
        call["q"] = case.draw.choice([0.95, [0.0, 0.5, 1.0], torch.rand(4, generator=case.generator)])
    return call, op


def judge_mining(case: Case, op: str, call: dict, got) -> None:
    plain = run(op, call | {"backend": "reference"})
    if op == "mine_hardest":
        require(got.index.dtype == torch.int64 and got.scores.dtype == torch.float32, "dtypes")
        require(((got.index >= -1) & (got.index < max(case.K, 1))).all(), "an index outside the queue")
        require((got.index.sort(1)[0].diff(dim=1) != 0)[(got.index.sort(1)[0] >= 0)[:, 1:]].all(), "an index twice")
    if case.exact:
        rounds = op == "quantile"
        pairs = zip(tensors(got), tensors(plain), strict=True)
        for i, (a, b) in enumerate(pairs):
            near(f"{op}[{i}]", a, b, b, 1e-6) if rounds else same(f"{op}[{i}]", a, b)
    elif case.kind not in ("huge", "special") and not (call.get("select") and call["select"].sample):
        slack = rounding(call) + 1e-37
        truth = run(op, double(call))
        a, b, c = tensors(got)[0], tensors(truth)[0], tensors(plain)[0]
        near(op, a, b, c, slack)


def mixing(case: Case) -> tuple[dict, str]:
    call = {"query": case.vectors(case.B, case.D), "negative_keys": case.vectors(case.K, case.D), "mix": case.mix()}
    return call | case.key() | case.masks(), "mix_negatives"


def judge_mixing(case: Case, op: str, call: dict, got) -> None:
    if case.kind != "whole" or not call["mix"].detach:
        return
    plain = run(op, call | {"backend": "reference"})
    same("parents", got.parents, plain.parents)
    near("coefficients", got.coefficients, plain.coefficients, plain.coefficients, 1e-6)
    # The row of zeros is for index -1.
    q, keys = call["query"].float(), torch.cat([call["negative_keys"].float(), torch.zeros(1, case.D)])
    a, b = plain.parents.unbind(2)  # (B, S) each
    first, second = torch.where((a < 0)[..., None], q[:, None], keys[a]), keys[b]  # (B, S, D) each
    c = plain.coefficients[..., None]  # (B, S, 1)
    reach = (first.norm(dim=2) + second.norm(dim=2)) / (c * first + (1 - c) * second).norm(dim=2).clamp_min(1e-12)
    # Normalizing a short mix magnifies rounding errors.
    slack = 4 * (EPS * reach + torch.finfo(got.vectors.dtype).eps)[..., None]
    near("vectors", got.vectors, plain.vectors, plain.vectors, slack)


def loss(case: Case) -> tuple[dict, str]:
    call = {
        "query": case.vectors(case.B, case.D),
        "positive_key": case.vectors(case.B, case.D),
        "negative_keys": case.vectors(*([case.B] if case.chance(0.15) else []), case.K, case.D),
        "temperature": case.draw.choice([0.01, 0.07, 0.2, 1.0, 30.0, torch.tensor(0.2)]),
        "decoupled": case.chance(0.2),
        "reduction": case.draw.choice(["mean", "sum", "none"]),
        "return_stats": case.chance(0.5),
        "select": case.select(margins=True, replaces=True),
        **case.key(),
    }
    if call["negative_keys"].dim() == 2 and case.chance(0.7):
        call |= case.masks()
    if case.kind == "whole" and case.chance(0.4):
        call["mix"] = case.mix()
    if case.chance(0.25):
        tau = case.draw.choice([0.0, 0.0, 0.001, 0.3])
        call["weight"] = Weight(case.draw.choice([0.0, 0.5, 2.0]), tau, detach=case.chance(0.3))
    if case.kind == "whole" and case.chance(0.15):
        call["false_negatives"] = FalseNegatives(
            case.draw.choice([None, 3, 1000]), case.draw.choice([0.0, 0.5]),
            mode=case.draw.choice(["eliminate", "attract"]), reduce=case.draw.choice(["max", "mean"]),
        )  # fmt: skip
        call["support"] = case.vectors(case.B, case.draw.choice([1, 2, 4]), case.D)
    for name in ("query", "positive_key", "negative_keys", "temperature"):
        if isinstance(call[name], Tensor):
            call[name] = call[name].detach().requires_grad_(case.chance(0.6))
    return call, "info_nce"


LEAVES = ("query", "positive_key", "negative_keys", "temperature")


def differentiated(call: dict, result) -> dict[str, Tensor]:
    leaves = {n: call[n] for n in LEAVES if isinstance(call[n], Tensor) and call[n].requires_grad}
    value = tensors(result)[0]
    require(value.requires_grad == bool(leaves), "the loss requires grad where no input does, or the other way round")
    grads = torch.autograd.grad(value.double().sum(), list(leaves.values()), allow_unused=True) if leaves else ()
    return dict(zip(leaves, grads, strict=True))


def judge_loss(case: Case, op: str, call: dict, got) -> None:
    grads = differentiated(call, got)
    if case.kind == "huge" or (call["select"] and call["select"].sample and not case.exact):
        return
    exact, weight = double(call), call.get("weight")
    truth, plain = run(op, exact), run(op, call | {"backend": "reference"})
    temperature = float(call["temperature"])
    logit = (rounding(call) / temperature + EPS * 16) * (1 + (weight.beta if weight else 0.0))
    values = [tensors(r)[0] for r in (got, truth, plain)]
    rows = case.B if call["reduction"] == "sum" else 1
    if weight and weight.tau_plus:  # a difference that cancels: compared only where fp32 is precise enough
        if not float((values[1] - values[2]).detach().abs().nan_to_num(0.0).sum()) < 1e-6:
            return
        logit *= 1e3
    finite = values[1].detach()[values[1].detach().isfinite()].abs()
    slack = 4 * logit * rows + 16 * EPS * (float(finite.max()) if finite.numel() else 0.0)
    near("loss", *values, slack, case.spreads)
    if call["return_stats"] and case.exact:
        for name in ("num_negatives", "num_empty", "positive_rank"):
            same(name, getattr(got[1], name), getattr(plain[1], name))
    if logit > 1e-3 or "special" in case.kind or (call.get("mix") and not call["mix"].detach):
        return  # normalizing a short mix magnifies rounding errors of gradients
    if case.kind == "tiny" and call["select"]:
        return  # products of bf16 may round terms below 2^-126 to zero, so that different scores become equal
    wants, plains = differentiated(exact, truth), differentiated(call, plain)
    norm = max((float(call[n].detach().double().abs().max()) for n in LEAVES[:3] if call[n].numel()), default=0.0)
    for name, grad in grads.items():
        require(
            (grad is None) == (plains[name] is None) or (plains[name] or grad).eq(0).all(), f"d_{name}: one is None"
        )
        if grad is not None and wants[name] is not None:
            pull = 1.0 if name != "temperature" else case.D * norm / temperature * max(case.B, 1)
            heads = max(case.B, 1) if name == "negative_keys" else 1
            reach = (1 + 2 * (weight.beta if weight else 0.0)) * norm / temperature * pull * heads
            storage = 4 * torch.finfo(grad.dtype).eps
            near(f"d_{name}", grad, wants[name], plains[name], (16 * logit + storage) * reach + 1e-37)


def ring(case: Case) -> tuple[dict, str]:
    """MoCoQueue: enqueue batches of every kind."""
    return {"keys": case.vectors(case.B, case.D), "ids": torch.arange(case.B) if case.chance(0.5) else None}, "enqueue"


def judge_ring(case: Case, op: str, call: dict, got) -> None:
    K, keys = got.K, call["keys"].to(got.keys.dtype)
    ids = torch.full((case.B,), -1) if call["ids"] is None else call["ids"]
    finite = keys.isfinite().all(1)  # a row that is not finite is not stored
    entered = int(finite.sum())
    kept, ids = keys[finite][-K:], ids[finite][-K:]
    same("keys", got.keys, kept.roll((entered - len(kept)) % K, 0) if len(kept) == K else kept)
    same("ids", got.ids.sort()[0], ids)
    same("num_refused", got.num_refused.cpu().reshape(()), (~finite).sum())


def enqueue(keys, ids, backend):
    width = keys.shape[-1] if isinstance(keys, Tensor) and keys.dim() and keys.shape[-1] else 3
    queue = MoCoQueue(width, 37, with_ids=True, random_init=False)
    queue.enqueue(keys, ids=ids)
    return queue


RULES = [
    ("easy", "hardest"),
    ("easy", "semihard"),
    ("hard", "semihard_band"),
    ("hard", "violating"),
    ("hard", "easiest"),
]
RULES += [("semihard", "hardest"), ("all", "semihard_facenet"), ("all", "semihard"), ("multi_similarity",) * 2]


def triplets(case: Case) -> tuple[dict, str]:
    positive, negative = case.draw.choice(RULES)
    call = {"query": case.vectors(case.B, case.D), "keys": case.vectors(case.K, case.D)}
    for side, count in (("query", case.B), ("key", case.K)):
        call[f"{side}_labels"] = torch.randint(-1, case.draw.choice([1, 4, 60]), (count,), generator=case.generator)
    call |= {name.replace("negative", "key"): t for name, t in case.masks().items() if "labels" not in name}
    call |= {"positive": positive, "negative": negative, "margin": case.draw.choice([0, 0.25, 3.0])}
    call["num_negatives"] = case.draw.choice([1, 2, case.draw.randrange(1, 60)])
    call["distance"] = case.draw.choice(["cosine", "euclidean", "squared_euclidean"])
    if positive in ("all", "multi_similarity"):
        call["max_positives"] = case.draw.randrange(1, 5)
    return call, "mine_triplets"


def judge_triplets(case: Case, op: str, call: dict, got) -> None:
    """Compare exactly if scores are exact. Otherwise rounding decides about columns near a bound, and only labels are checked."""
    anchor, p, n = got.compact()
    require(len(anchor) == got.num_triplets, "the count of triplets")
    label = call["query_labels"][anchor]
    require((label >= 0).all() & (label == call["key_labels"][p]).all(), "a positive of another label")
    require((label != call["key_labels"][n]).all(), "a negative of the same label")
    if case.exact:
        plain = run(op, call | {"backend": "reference"})
        for name, a, b in zip(got._fields, got, plain, strict=True):
            same(f"{op}.{name}", a, b)


def sums(case: Case) -> tuple[dict, str]:
    op = case.draw.choice(["logsumexp", "softplus_sum", "siglip"])
    call = {"query": case.vectors(case.B, case.D), "negative_keys": case.vectors(case.K, case.D), **case.masks()}
    call |= {"select": case.select(margins=True, replaces=True), **case.key()}
    if op == "siglip" or (call["select"] and call["select"].has_margin):
        call["positive_key"] = case.vectors(case.B, case.D)
    if op == "logsumexp":
        call["temperature"] = case.draw.choice([0.05, 1.0, torch.tensor(0.2)])
    else:
        call |= {"scale": case.draw.choice([10.0, -2.0, torch.tensor(3.0)]), "bias": case.draw.choice([-10.0, 0.5])}
    if op == "siglip":
        call["reduction"] = case.draw.choice(["mean", "sum", "none"])
    return call, op


def judge_sums(case: Case, op: str, call: dict, got) -> None:
    if case.kind == "huge" or "special" in case.kind or (call["select"] and call["select"].sample and not case.exact):
        return
    truth, plain = run(op, double(call)), run(op, call | {"backend": "reference"})
    steepness = 1 / float(call["temperature"]) if op == "logsumexp" else abs(float(call["scale"]))
    terms = 1 if op == "logsumexp" else (case.K + 1) * (case.B if call.get("reduction") == "sum" else 1)
    finite = truth[truth.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    near(op, got, truth, plain, 4 * terms * (rounding(call) * steepness + FLOOR) + FLOOR * largest)


def labelled(case: Case) -> tuple[dict, str]:
    op = case.draw.choice(["sup_con", "triplet_loss", "multi_similarity"])
    call = {"query": case.vectors(case.B, case.D), "keys": case.vectors(case.K, case.D)}
    for side, count in (("query", case.B), ("key", case.K)):
        call[f"{side}_labels"] = torch.randint(-1, case.draw.choice([1, 4, 60]), (count,), generator=case.generator)
    call |= {name.replace("negative", "key"): t for name, t in case.masks().items() if "labels" not in name}
    call["reduction"] = case.draw.choice(["mean", "sum", "none"])
    if op == "sup_con":
        call |= {"temperature": case.draw.choice([0.07, 1.0]), "positives": case.draw.choice(["out", "in"])}
        call["denominator"] = case.draw.choice(["all", "own_positive", "negatives_only"])
    if op == "triplet_loss":
        call |= {
            "negative": case.draw.choice(["hardest", "semihard", "easiest"]),
            "margin": case.draw.choice([0, 0.25]),
        }
        call |= {"temperature": case.draw.choice([None, 0.5]), "num_negatives": case.draw.randrange(1, 9)}
    return call, op


def judge_labelled(case: Case, op: str, call: dict, got) -> None:
    if not case.exact or "special" in case.kind:
        return  # with other vectors, rounding decides about columns near a bound
    truth, plain = run(op, double(call)), run(op, call | {"backend": "reference"})
    steepness = {"sup_con": 1 / call.get("temperature", 1.0) if op == "sup_con" else 1.0, "multi_similarity": 50.0}
    vectors = {"query": call["query"], "negative_keys": call["keys"]}
    slack = 8 * (rounding(vectors) + FLOOR) * steepness.get(op, 2.0)
    rows = max(case.B, 1) * call.get("num_negatives", 1) if call["reduction"] == "sum" else 1
    near(
        op,
        got,
        truth,
        plain,
        slack * rows + FLOOR * float(truth.detach().abs().nan_to_num().max() if truth.numel() else 0),
    )


NUMBERS = {
    "easiest": {"fraction": 0.5},
    "hardest": {"fraction": 0.3, "skip": 0.05},
    "ring": {"outer": 0.4, "inner": 0.2},
}
NUMBERS |= {"mochi": {"hard": 9, "pairs": 5, "with_query": 4}, "facenet": {"max_positives": 3}}
NUMBERS["synco"] = {"hard": 9, "interpolated": 3, "extrapolated": 3, "mixed": 3, "noised": 2, "graded": 2, "signed": 2}
NUMBERS |= {"distance_weighted": {"max_positives": 3}, "simans": {"num_negatives": 4, "candidates": 9}}
NUMBERS["mixgcf"] = {"candidates": 9}
# Recipes whose random draws depend on the rounding of scores.
DRAWN = ("mochi", "synco", "simans", "distance_weighted", "mixgcf")
NAMES = [
    n for n in recipes.__all__ if n not in ("linear", "cosine", "exponential", "step", "whole", "Kinds", "mixed_inputs")
]


def recipe(case: Case) -> tuple[dict, str]:
    """A recipe by its name, with a batch and a queue, and with any step and row_offset."""
    name = case.draw.choice(NAMES)
    tensors_in_order, given = feed(name, *(case.vectors(n, case.D) for n in (case.B, case.B, max(case.K, case.B))))
    call = dict(zip(("first", "second", "third", "fourth"), tensors_in_order, strict=False))
    return {**call, "given": given, "name": name, "step": case.draw.choice([0, 5])}, "recipe"


def called_recipe(name, given, backend, step, first, second, third=None, fourth=None):
    """Call the module of a recipe. Invalid arguments must raise an error."""
    if name not in NAMES or not isinstance(given, dict):
        raise ValueError(f"no recipe is called {name!r}, and what it is given is a dict")
    loss = getattr(recipes, name)(**NUMBERS.get(name, {}), backend=backend)
    return loss(*(t for t in (first, second, third, fourth) if t is not None), **given, step=step)


def judge_recipe(case: Case, op: str, call: dict, got) -> None:
    if case.kind != "unit" or call["name"] in DRAWN:
        return
    truth, plain = called_recipe(**double(call) | wide(call)), called_recipe(**call | {"backend": "reference"})
    keys = call.get("third", call["second"])
    vectors = {"query": call["first"], "negative_keys": keys.keys if isinstance(keys, Negatives) else keys}
    slack = 400 * (rounding(vectors) + FLOOR) * max(1.0, float(truth.detach().abs().nan_to_num().max()))
    near(call["name"], got, truth, plain, slack * (case.B if call["name"] == "vse_plus_plus" else 1))


def wide(call: dict) -> dict:
    return {"given": {n: widened(value) for n, value in call["given"].items()}}


def module(case: Case) -> tuple[dict, str]:
    """The loss modules with random options, compared with the functions."""
    q, pos, keys = (case.vectors(n, case.D) for n in (case.B, case.B, case.K))
    labels = [torch.randint(-1, 4, (n,), generator=case.generator) for n in (case.B, case.K)]
    name = case.draw.choice(["InfoNCELoss", "SupConLoss", "TripletLoss", "MultiSimilarityLoss", "SigLIPLoss"])
    options = {
        "InfoNCELoss": {"select": case.select(margins=True), "temperature": 0.2, "return_stats": case.chance(0.3)},
        "SupConLoss": {"positives": case.draw.choice(["out", "in"]), "temperature": 0.5},
        "TripletLoss": {"negative": case.draw.choice(["hardest", "easiest"]), "margin": 0.25},
        "MultiSimilarityLoss": {"epsilon": case.draw.choice([0.0, 0.25])},
        "SigLIPLoss": {"learn": case.chance(0.5), "reduction": "none"},
    }[name]
    tensors = (q, pos, keys) if name in ("InfoNCELoss", "SigLIPLoss") else (q, keys, *labels)
    return {"name": name, "options": options, "tensors": tensors}, "module"


def called_module(name, options, tensors, backend):
    right = isinstance(name, str) and name in FUNCTION and isinstance(options, dict) and isinstance(tensors, tuple)
    if not right:
        raise ValueError(f"no module is called {name!r}, or its options are no dict and its tensors no tuple")
    return getattr(losses, name)(**options, backend=backend)(*tensors)


FUNCTION = {"InfoNCELoss": "info_nce", "SupConLoss": "sup_con", "TripletLoss": "triplet_loss"}
FUNCTION |= {"MultiSimilarityLoss": "multi_similarity", "SigLIPLoss": "siglip"}


def judge_module(case: Case, op: str, call: dict, got) -> None:
    options = {n: v for n, v in call["options"].items() if n != "learn"}
    if call["name"] == "SigLIPLoss":
        options |= {"scale": torch.tensor(math.log(10.0)).exp(), "bias": torch.tensor(-10.0)}
    want = public(FUNCTION[call["name"]])(*call["tensors"], **options, backend="cpu")
    for a, b in zip(tensors(got), tensors(want), strict=True):
        same(call["name"], a.detach(), b.detach())


def sharded(case: Case) -> tuple[dict, str]:
    """ShardedMoCoQueue on one rank, compared with the functions over its rows."""
    call = {
        "query": case.vectors(case.B, case.D),
        "keys": case.vectors(case.K, case.D),
        "N": case.draw.randrange(1, 40),
    }
    select = case.select(margins=True)
    call["select"] = None if select is None or select.sample else select  # sampling needs the whole queue on one rank
    return call | {"positive_key": case.vectors(case.B, case.D)}, "sharded"


def called_sharded(query, keys, N, positive_key, select, backend):
    width = keys.shape[-1] if isinstance(keys, torch.Tensor) and keys.dim() and keys.shape[-1] else 3
    queue = queues.ShardedMoCoQueue(width, 500, random_init=False)
    queue.enqueue(keys)
    options = {"select": select, "backend": backend}
    found = queue.mine_hardest(query, N, positive_key=positive_key, **options)
    return queue.info_nce(query, positive_key, **options, reduction="none"), *found, queue.keys


def judge_sharded(case: Case, op: str, call: dict, got) -> None:
    q, pos, options = call["query"], call["positive_key"], {"select": call["select"], "backend": "cpu"}
    want = negmine.mine_hardest(q, got[3], call["N"], positive_key=pos, **options)
    for name, a, b in zip(("scores", "index"), got[1:3], want, strict=True):
        same(f"sharded {name}", a, b)
    if "special" not in case.kind and case.kind != "huge":
        want = negmine.info_nce(q, pos, got[3], **options, reduction="none")
        near(
            "sharded loss",
            got[0],
            want.double(),
            want,
            FLOOR * (1 + float(want.detach().abs().max() if want.numel() else 0)),
        )


def dataset(case: Case) -> tuple[dict, str]:
    Q, K = max(case.B, 1), max(case.K, 1)
    call = {"query_embeddings": case.vectors(Q, case.D).float(), "corpus_embeddings": case.vectors(K, case.D).float()}
    if case.chance(0.3):
        return {**call, "k": case.draw.choice([1, 7, K + 2])}, "index"
    call["positives"] = torch.randint(0, K, (Q,), generator=case.generator)
    call["query_ids"] = range(Q)  # so that equal rows count as different queries
    if case.chance(0.2):
        # Values that are not finite are refused.
        call |= {name: call[name].nan_to_num(0.0, 0.0, 0.0) for name in list(call)[:2]}
        return {**call, "samples_per_bin": 2, "num_queries": case.draw.choice([None, 3])}, "hardness_report"
    select = case.select(margins=True)
    call |= {"num_negatives": case.draw.choice([1, 3, 12]), "batch_size": case.draw.choice([None, 7])}
    call["select"] = None if select is None or select.sample else select
    return call, case.draw.choice(["mine_hard_negatives", "rounds"])


def index(query_embeddings, corpus_embeddings, k, backend):
    """Build an index, search it, save it, load it, and search it again."""
    made = negmine.NegativeIndex.build(corpus_embeddings, backend=backend)
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "index.npz")
        again = negmine.NegativeIndex.load(Path(folder) / "index.npz")
    found, second = made.search(query_embeddings, k), again.search(query_embeddings, k)
    require((found.indices == second.indices).all(), "a loaded index finds other rows")
    return found


def rounds(query_embeddings, corpus_embeddings, positives, **options):
    done = mining.mining_rounds(
        lambda number: (query_embeddings, corpus_embeddings),
        lambda number, result: None,
        positives,
        rounds=2,
        **options,
    )
    require(done[-1].new == 0.0 or not done[-1].result.num_valid.any(), "the same embeddings bring new negatives")
    return done[-1].result


def judge_dataset(case: Case, op: str, call: dict, got) -> None:
    if op == "hardness_report":
        require(isinstance(got, report.HardnessReport), "no report")
        return
    q, keys = call["query_embeddings"], call["corpus_embeddings"]
    if op == "index":
        want = negmine.mine_hardest(q, keys, call["k"], backend="cpu")
        same("index", torch.from_numpy(got.indices), want.index)
        return
    require(isinstance(got, mining.MiningResult), "no result")
    rows, own = torch.from_numpy(got.indices), call["positives"]
    require(
        (rows != own[:, None]).all() & (rows < len(keys)).all() & (rows >= -1).all(), "a positive, or no row, is mined"
    )
    if call["select"] is None or not call["select"].has_margin:
        # Rows that are not finite are never negatives, and such queries get none.
        others = Negatives(keys, ids=torch.arange(len(keys)), mask=keys.isfinite().all(1))
        options = {"select": call["select"], "query_ids": own, "backend": "cpu"}
        want = negmine.mine_hardest(q, others, call["num_negatives"], **options)
        same("indices", rows, want.index.masked_fill(~q.isfinite().all(1)[:, None], -1))
    require((np.diff(got.scores, axis=1) <= 0)[np.isfinite(got.scores[:, 1:])].all(), "not hardest first")


def option(case: Case) -> tuple[dict, str]:
    """An option class with any values: it must raise an error, or ops must accept the option."""
    pick = case.draw.choice
    anything = [
        0,
        1,
        3,
        0.0,
        0.05,
        1.0,
        -1,
        2.5,
        math.nan,
        math.inf,
        None,
        True,
        "x",
        (0.2, 0.1),
        (0.0, 1.0),
        [1],
        2**70,
    ]
    kind = pick([Select, Mix, Weight, FalseNegatives])
    fields = [f for f in kind.__dataclass_fields__ if f not in ("_", "quantiles")]
    return {"kind": kind, "fields": {name: pick(anything) for name in fields if case.chance(0.4)}}, "option"


def called_option(kind, fields, backend):
    if kind not in (Select, Mix, Weight, FalseNegatives) or not isinstance(fields, dict):
        raise ValueError(f"no option is made by {kind!r} of fields {fields!r}")
    try:
        made = kind(**fields)
    except (ValueError, TypeError) as refusal:
        require(any(name in str(refusal) for name in fields), f"a refusal that names no field: {refusal}")
        return None
    q, keys, name = torch.ones(2, 3), torch.eye(3), {Select: "select", Mix: "mix", Weight: "weight"}.get(kind)
    given = {name: made} if name else {"false_negatives": made, "support": q[:, None]}
    if kind is Mix and max(made.pairs, made.with_query, made.hard, made.skip) > 99:
        return None  # valid, but too large for any memory
    return negmine.info_nce(q, q, keys, **given, backend=backend)


def judge_option(case: Case, op: str, call: dict, got) -> None:
    require(got is None or not got.isnan(), "a loss of whole vectors is NaN")


KINDS_OF_CALL = [
    (loss, judge_loss), (loss, judge_loss), (mined, judge_mining), (mixing, judge_mixing), (triplets, judge_triplets),
    (ring, judge_ring),
    (sums, judge_sums), (labelled, judge_labelled), (recipe, judge_recipe), (module, judge_module),
    (sharded, judge_sharded), (dataset, judge_dataset), (option, judge_option),
]  # fmt: skip
# What to call for names that are not public functions.
CALLED = {
    "enqueue": enqueue,
    "recipe": called_recipe,
    "module": called_module,
    "sharded": called_sharded,
    "option": called_option,
    "index": index,
    "rounds": rounds,
}
FUZZED = {"info_nce", "mine_hardest", "rank_thresholds", "quantile", "mix_negatives", "mine_triplets", "MoCoQueue"}
FUZZED |= {"logsumexp", "softplus_sum", "siglip", "sup_con", "triplet_loss", "multi_similarity", *FUNCTION, "recipes"}
FUZZED |= {"ShardedMoCoQueue", "mine_hard_negatives", "mining_rounds", "NegativeIndex", "hardness_report"}
FUZZED |= {"Select", "Mix", "Weight", "FalseNegatives", "Negatives"}
EXCUSED = {
    **dict.fromkeys(("InfoNCEStats", "SupConStats", "MultiSimilarityStats", "Mined", "Mixed"), "what an op returns"),
    "MatryoshkaStats": "what an op returns",
    **dict.fromkeys(("matryoshka", "late_interaction", "mine_late_interaction"), "random in tests/test_properties.py"),
    "grad_cache": "a step of training: tests/test_grad_cache.py",
    **dict.fromkeys(("Found", "Round"), "what mining returns"),
    **dict.fromkeys(
        ("MiningPlan", "Part", "Phase", "mine_part", "merge_parts"), "random in tests/test_mining_parts.py"
    ),
    **dict.fromkeys(
        ("Triplets", "MiningResult", "HardnessReport"), "what an op returns, with methods: their own tests"
    ),
    "Guide": "vectors of one call: a mask, which is fuzzed, and tests/test_pools.py",
    "newest_round": "what mining_rounds wrote to a folder: tests/test_mining_rounds.py",
    **dict.fromkeys(("from_texts", "merge_retrievers", "build_batches"), "of texts and results: their own tests"),
    "LogScale": "a number that is learned: tests/test_faults_training.py",
    **dict.fromkeys(
        ("gathered", "distributed_state_dict"), "over ranks: tests/test_ranks.py and tests/test_sharded.py"
    ),
    "moco_checkpoint_hooks": "of checkpoints: tests/test_patches.py",
    "FrequencyEstimator": "a count of ids: tests/test_logq.py",
    "mining": "a package, whose parts are named here",
    "__version__": "a string",
}
