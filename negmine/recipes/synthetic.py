"""Negatives and positives that are made: MoCHi, SynCo, i-Mix."""

from typing import Any

from negmine.losses import InfoNCELoss
from negmine.options import Mix
from negmine.recipes.schedules import Temperature, after


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
    hardest `skip`, which are the likeliest false negatives. The paper's class oracle is query_labels and negative_labels in the
    call: labels leave before mining, so synthetic negatives come from true negatives alone, and before the denominator.
    No official code exists; one public port indexes every query's mixes into query 0's hard set, which tests/test_rules.py
    would fail.
    """
    mix = Mix(hard, pairs, with_query, skip=skip, distinct=distinct, detach=detach)
    return InfoNCELoss(temperature, mix=after(mix, warmup_steps) if warmup_steps else mix, **keywords)
