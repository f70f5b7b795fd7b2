"""Negatives and positives that are made: MoCHi, SynCo, i-Mix."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.losses.synco import Kinds
from negmine.losses.synco import synco as synco_loss
from negmine.options import Mix
from negmine.recipes.schedules import Number, Temperature, after, scheduled


def mochi(
    hard: int = 1024,
    pairs: int = 1024,
    with_query: int = 128,
    *,
    warmup_steps: int = 0,
    temperature: Temperature = 0.2,
    skip: int = 0,
    distinct: bool = True,
    detach: bool = True,
    **keywords: Any,
) -> InfoNCELoss:
    """MoCHi (Kalantidis et al. 2020, arXiv 2010.01028): MoCo v2 plus `pairs` and `with_query` synthetic negatives a query.

    `Mix` states the formulas. warmup_steps: train without them first (10 to 15 epochs in the paper). skip: mix none of the
    hardest `skip`, which are the likeliest false negatives. The paper's class oracle is query_labels and the labels of the
    negatives in the call: labels leave before mining, so synthetic negatives come from true negatives alone, and before the
    denominator. The counts fix shapes, so they do not vary with the step.
    No official code exists; one public port indexes every query's mixes into query 0's hard set, which tests/test_rules.py
    would fail.
    """
    mix = scheduled(Mix, hard=hard, pairs=pairs, with_query=with_query, skip=skip, distinct=distinct, detach=detach)
    return InfoNCELoss(temperature, mix=after(mix, warmup_steps) if warmup_steps else mix, **keywords)


def synco(
    hard: int = 1024,
    interpolated: int = 256,
    extrapolated: int = 256,
    mixed: int = 256,
    noised: int = 64,
    graded: int = 64,
    signed: int = 64,
    *,
    sigma: Number = 0.01,
    delta: Number = 0.01,
    eta: Number = 0.01,
    warmup_steps: int = 0,
    temperature: Temperature = 0.2,
    **keywords: Any,
) -> MethodLoss:
    """SynCo (Giakoumoglou and Stathaki 2024, arXiv 2410.02401): MoCo v2 plus six kinds of synthetic negatives.

    `Kinds` states the formulas, negmine/losses/synco.py what differs from the public code. warmup_steps: train without them first
    (10 epochs there).
    """
    counts = {"interpolated": interpolated, "extrapolated": extrapolated, "mixed": mixed}
    counts |= {"noised": noised, "graded": graded, "signed": signed}
    kinds = scheduled(Kinds, hard=hard, **counts, sigma=sigma, delta=delta, eta=eta)
    chosen = after(kinds, warmup_steps) if warmup_steps else kinds
    return MethodLoss(synco_loss, temperature=temperature, kinds=chosen, **keywords)


def i_mix(*, temperature: Temperature = 0.2, **keywords: Any) -> MethodLoss:
    """i-Mix (Lee et al. 2021, arXiv 2010.08887; kibok90/imix builder.py). Call with share= and partner= of mixed_inputs.

    mixed, share, partner = mixed_inputs(images);  loss(encode(mixed), keys_of(images), queue.keys, share=share, partner=partner)
    """
    return MethodLoss(methods.i_mix, temperature=temperature, **keywords)
