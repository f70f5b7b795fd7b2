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
    """MoCHi: MoCo v2 with synthetic negatives, mixed from the hardest ones.

    Parameters
    ----------
    hard : int
        How many of the hardest negatives are mixed. The counts do not vary with the step, because they fix shapes.
    pairs : int
        How many mixes of two negatives each query gets.
    with_query : int
        How many mixes of the query with a negative.
    warmup_steps : int
        How many steps to train without them first; 10 to 15 epochs in the paper.
    temperature : float, Tensor or schedule
        Divides the scores; 0.2 as in MoCo v2.
    skip : int
        How many of the hardest are not mixed, because they are the most likely false negatives.
    distinct : bool
        Mix two different negatives in each pair.
    detach : bool
        The synthetic negatives carry no gradient.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

    Notes
    -----
    `negmine.Mix` has the formulas. The paper's class oracle is a call with labels: rows of the query's label are left out
    before mining and from the denominator. There is no official code.

    References
    ----------
    Kalantidis et al. 2020 (arXiv 2010.01028).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.mochi(20, 10, 5)(query, key, queue)
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
    """SynCo: MoCo v2 with six kinds of synthetic negatives.

    Parameters
    ----------
    hard : int
        From how many of the hardest negatives the synthetic ones are made.
    interpolated, extrapolated, mixed, noised, graded, signed : int
        How many of each kind; `Kinds` has the formulas.
    sigma, delta, eta : float or schedule
        The sizes of the last three kinds.
    warmup_steps : int
        How many steps to train without them first; 10 epochs in the paper.
    temperature : float, Tensor or schedule
        Divides the scores; 0.2 as in MoCo v2.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Giakoumoglou and Stathaki 2024 (arXiv 2410.02401; giakoumoglou/synco synco/builder.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.synco(20, 4, 4, 4, 2, 2, 2)(query, key, queue)
    """
    counts = {"interpolated": interpolated, "extrapolated": extrapolated, "mixed": mixed}
    counts |= {"noised": noised, "graded": graded, "signed": signed}
    kinds = scheduled(Kinds, hard=hard, **counts, sigma=sigma, delta=delta, eta=eta)
    chosen = after(kinds, warmup_steps) if warmup_steps else kinds
    return MethodLoss(synco_loss, temperature=temperature, kinds=chosen, **keywords)


def i_mix(*, temperature: Temperature = 0.2, **keywords: Any) -> MethodLoss:
    """i-Mix: virtual labels for mixed inputs.

        loss_b = share_b ce_b(b) + (1 - share_b) ce_b(partner_b)
        ce_b(c) = -s(b, key c) / T + log sum over keys of exp(s / T)

    Parameters
    ----------
    temperature : float, Tensor or schedule
        Divides the scores; 0.2 as in MoCo v2.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with the query of the mixed inputs, the keys of the unmixed ones, and share= and partner= of
        `mixed_inputs`.

    References
    ----------
    Lee et al. 2021 (arXiv 2010.08887; kibok90/imix builder.py).

    Examples
    --------
    >>> images, encoder = torch.rand(8, 3, 4, 4), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16))
    >>> mixed, share, partner = negmine.recipes.mixed_inputs(images)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.i_mix()(encoder(mixed), encoder(images).detach(), queue, share=share, partner=partner)
    """
    return MethodLoss(methods.i_mix, temperature=temperature, **keywords)
