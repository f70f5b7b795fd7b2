"""Random calls of every public op on the CPU backend, judged by the reference: python -m tests.fuzz --seconds 60 --seed 0

A call must raise ValueError, TypeError or BackendUnavailable in a sentence, or agree with the reference. On small integers
(scaled by a power of two) it agrees bit for bit in what it selects, NaN and inf included; on real vectors within the rounding
of the scores. Huge norms, where fp32 overflows in some order of summation, must only come back.

The calls run in a process of their own, so that a crash is a fault with a number like any other. A fault is printed with the
command that repeats it: --seed S --case N.
"""

import argparse
import multiprocessing
import sys
import time
import warnings

import torch
from torch import Tensor

import negmine
from negmine import FalseNegatives, MoCoQueue, Weight, backends
from tests import fuzz_more
from tests.fuzz_case import Case
from tests.fuzz_judge import EPS, double, near, require, rounding, same, tensors

REFUSED = (ValueError, TypeError, backends.BackendUnavailable)


def mining(case: Case) -> tuple[dict, str]:
    call = {"query": case.vectors(case.B, case.D), "negative_keys": case.vectors(case.K, case.D), **case.masks()}
    op = case.draw.choice(["mine_hardest", "mine_hardest", "rank_thresholds", "percentile"])
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
    plain = getattr(negmine, op)(**call | {"backend": "reference"})
    if op == "mine_hardest":
        require(got.index.dtype == torch.int64 and got.scores.dtype == torch.float32, "dtypes")
        require(((got.index >= -1) & (got.index < max(case.K, 1))).all(), "an index outside the queue")
        require((got.index.sort(1)[0].diff(dim=1) != 0)[(got.index.sort(1)[0] >= 0)[:, 1:]].all(), "an index twice")
    if case.exact:
        rounds = op == "percentile"
        pairs = zip(tensors(got), tensors(plain), strict=True)
        for i, (a, b) in enumerate(pairs):
            near(f"{op}[{i}]", a, b, b, 1e-6) if rounds else same(f"{op}[{i}]", a, b)
    elif case.kind not in ("huge", "special") and not (call.get("select") and call["select"].sample):
        slack = rounding(call) + 1e-37
        truth = getattr(negmine, op)(**double(call))
        a, b, c = tensors(got)[0], tensors(truth)[0], tensors(plain)[0]
        near(op, a, b, c, slack)


def mixing(case: Case) -> tuple[dict, str]:
    call = {"query": case.vectors(case.B, case.D), "negative_keys": case.vectors(case.K, case.D), "mix": case.mix()}
    return call | case.key() | case.masks(), "mix_negatives"


def judge_mixing(case: Case, op: str, call: dict, got) -> None:
    if case.kind != "whole" or not call["mix"].detach:
        return
    plain = negmine.mix_negatives(**call | {"backend": "reference"})
    same("parents", got.parents, plain.parents)
    near("coefficients", got.coefficients, plain.coefficients, plain.coefficients, 1e-6)
    q, keys = (
        call["query"].float(),
        torch.cat([call["negative_keys"].float(), torch.zeros(1, case.D)]),
    )  # row -1 is zero
    a, b = plain.parents.unbind(2)  # (B, S) each
    first, second = torch.where((a < 0)[..., None], q[:, None], keys[a]), keys[b]  # (B, S, D) each
    c = plain.coefficients[..., None]  # (B, S, 1)
    reach = (first.norm(dim=2) + second.norm(dim=2)) / (c * first + (1 - c) * second).norm(dim=2).clamp_min(1e-12)
    slack = 4 * (EPS * reach + torch.finfo(got.vectors.dtype).eps)[..., None]  # a short mix magnifies its rounding
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
    truth, plain = negmine.info_nce(**exact), negmine.info_nce(**call | {"backend": "reference"})
    temperature = float(call["temperature"])
    logit = (rounding(call) / temperature + EPS * 16) * (1 + (weight.beta if weight else 0.0))
    values = [tensors(r)[0] for r in (got, truth, plain)]
    rows = case.B if call["reduction"] == "sum" else 1
    if weight and weight.tau_plus:  # its difference cancels: only where fp32 can say
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
        return  # a short mix magnifies the rounding of what flows through it
    if case.kind == "tiny" and call["select"]:
        return  # products of bf16 may take terms below 2^-126 as zero: those scores tie, and have the ranks of ties
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
    """Not an op, but public: batches of every kind into a queue."""
    return {"keys": case.vectors(case.B, case.D), "ids": torch.arange(case.B) if case.chance(0.5) else None}, "enqueue"


def judge_ring(case: Case, op: str, call: dict, got) -> None:
    K, ids = got.K, call["ids"]
    kept = call["keys"][-K:] if case.B else call["keys"]
    same("keys", got.keys, kept.roll((case.B - len(kept)) % K, 0) if len(kept) == K else kept)
    same("ids", got.ids.sort()[0], (torch.full((case.B,), -1) if ids is None else ids)[-K:])


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
    if positive in ("all", "multi_similarity"):
        call["max_positives"] = case.draw.randrange(1, 5)
    return call, "mine_triplets"


def judge_triplets(case: Case, op: str, call: dict, got) -> None:
    """Exact where scores are; elsewhere a column near a bound may fall to either side, and only the labels are certain."""
    anchor, p, n = got.compact()
    require(len(anchor) == got.num_triplets, "the count of triplets")
    label = call["query_labels"][anchor]
    require((label >= 0).all() & (label == call["key_labels"][p]).all(), "a positive of another label")
    require((label != call["key_labels"][n]).all(), "a negative of the same label")
    if case.exact:
        plain = negmine.mine_triplets(**call | {"backend": "reference"})
        for name, a, b in zip(got._fields, got, plain, strict=True):
            same(f"{op}.{name}", a, b)


KINDS_OF_CALL = [
    (loss, judge_loss),
    (loss, judge_loss),
    (mining, judge_mining),
    (mixing, judge_mixing),
    (triplets, judge_triplets),
    (ring, judge_ring),
    *fuzz_more.KINDS_OF_CALL,
]
CALLED = {"enqueue": enqueue, **fuzz_more.CALLED}  # what is no op of that name


def run_case(seed: int, number: int) -> str:
    """'agrees' or 'refused'; raises Fault, or whatever else a call raised."""
    case = Case(seed, number)
    make, judge = case.draw.choice(KINDS_OF_CALL)
    call, op = make(case)
    whole_call = dict(call)
    call = case.spoiled(call) | {"backend": "cpu"}
    spoiled = any(call[name] is not value for name, value in whole_call.items())
    function = CALLED[op] if op in CALLED else getattr(negmine, op)
    try:
        result = function(**call)
    except REFUSED as refusal:
        require(len(str(refusal).split()) > 3, f"{op}: a refusal in no words: {refusal!r}")
        require(spoiled, f"{op} refuses a call that is right: {refusal}")
        return "refused"
    if not spoiled:
        judge(case, op, call, result)
    return "agrees"


def described(seed: int, number: int) -> str:
    """The call of a case in words."""
    case = Case(seed, number)
    make, _ = case.draw.choice(KINDS_OF_CALL)
    call, op = make(case)
    words = [
        f"{name}={value.dtype} {tuple(value.shape)} strides {value.stride()}"
        if isinstance(value, Tensor)
        else f"{name}={value}"
        for name, value in case.spoiled(call).items()
    ]
    return f"{op} on {case.kind} vectors: {', '.join(words)}"


def run(seed: int, first: int, seconds: float, only: bool, at, faults) -> None:
    """Cases from `first` on until the time is up; `at` shows the parent which one runs."""
    warnings.simplefilter("ignore")
    end, counts = time.monotonic() + seconds, {"agrees": 0, "refused": 0}
    while time.monotonic() < end:
        number = first + sum(counts.values())
        at.value = number
        torch.set_num_threads(1 if number % 8 else 2)  # two threads on busy cores wait for each other most of the time
        try:
            counts[run_case(seed, number)] += 1
        except Exception as error:
            counts["refused"] += 1
            faults.put(f"--seed {seed} --case {number}: {type(error).__name__}: {error}\n    {described(seed, number)}")
        if only:
            break
    faults.put(counts)


def fuzz(seconds: float, seed: int, case: int | None = None) -> tuple[list[str], dict[str, int]]:
    """The faults, a sentence each, and how many calls agreed or were refused."""
    context = multiprocessing.get_context("spawn")
    at, faults = context.Value("q", -1), context.Queue()
    found: list[str] = []
    worker = context.Process(target=run, args=(seed, case or 0, seconds, case is not None, at, faults))
    worker.start()
    while True:
        try:
            item = faults.get(timeout=0.5)
        except multiprocessing.queues.Empty:  # type: ignore[attr-defined]
            if not worker.is_alive() and faults.empty():
                found.append(f"--seed {seed} --case {at.value}: crashed with exit code {worker.exitcode}")
                return found, {}
            continue
        if isinstance(item, dict):
            worker.join()
            return found, item
        found.append(item)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat one case")
    asked = parser.parse_args()
    faults_found, totals = fuzz(asked.seconds, asked.seed, asked.case)
    print(*faults_found, f"{len(faults_found)} faults; calls: {totals}", sep="\n")
    sys.exit(bool(faults_found))
