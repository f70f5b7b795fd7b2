"""Published methods for negatives, each as one function that returns the configured loss module.

    loss = negmine.recipes.hardest(0.05)
    loss(query, positive_key, queue, query_ids=ids)

Arguments that accept a schedule take a number, or a callable that maps the step, a 0-d tensor, to the number, such as
linear(1.0, 0.1, steps). The module evaluates it at each call. Use whole(linear(...)) for ranks. Numbers of negatives determine
shapes and cannot be schedules. Modules can be pickled, with their schedules. Each recipe also takes the other keyword arguments
of its loss, such as reduction and backend (and return_stats if it returns an InfoNCELoss), and raises ValueError or TypeError if
an argument is invalid.
"""

from negmine.losses.methods import mixed_inputs
from negmine.losses.synco import Kinds
from negmine.recipes.pools import gte, qwen3_embedding
from negmine.recipes.positives import false_negative_cancellation, siglip, sup_con
from negmine.recipes.queue import decoupled, decoupled_weighted, moco_v1, moco_v2
from negmine.recipes.schedules import cosine, exponential, linear, step, whole
from negmine.recipes.synthetic import adco, i_mix, mixgcf, mochi, synco, un_mix
from negmine.recipes.triplets import (
    batch_hard,
    distance_weighted,
    ephn,
    facenet,
    multi_similarity,
    simans,
    vse_plus_plus,
)
from negmine.recipes.weights import debiased, dual_temperature, hardness_added, hcl, ifm, logq, rince
from negmine.recipes.windows import easiest, gist, hardest, margin_pos, perc_pos, ring

__all__ = [
    "Kinds",
    "adco",
    "batch_hard",
    "cosine",
    "debiased",
    "decoupled",
    "decoupled_weighted",
    "distance_weighted",
    "dual_temperature",
    "easiest",
    "ephn",
    "exponential",
    "facenet",
    "false_negative_cancellation",
    "gist",
    "gte",
    "hardest",
    "hardness_added",
    "hcl",
    "i_mix",
    "ifm",
    "linear",
    "logq",
    "margin_pos",
    "mixed_inputs",
    "mixgcf",
    "mochi",
    "moco_v1",
    "moco_v2",
    "multi_similarity",
    "perc_pos",
    "qwen3_embedding",
    "rince",
    "ring",
    "siglip",
    "simans",
    "step",
    "sup_con",
    "synco",
    "un_mix",
    "vse_plus_plus",
    "whole",
]
