"""How the negatives weigh: debiased, by hardness, by margin, by temperature."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.options import Weight
from negmine.recipes.schedules import Number, Temperature, scheduled


def debiased(tau_plus: Number = 0.01, *, temperature: Temperature = 0.5, **keywords: Any) -> InfoNCELoss:
    """Debiased contrastive loss: subtracts the expected share of false negatives.

        Ng = max((sum_j exp(x_j) - tau_plus N exp(x_pos)) / (1 - tau_plus), N exp(-1 / T))

    Parameters
    ----------
    tau_plus : float or schedule
        The expected share of false negatives. The paper uses 0.1, for batches of 10 classes. With a queue of nearly random
        vectors, 0.1 clamps nearly all rows to the lower bound, where negatives get no gradient; `clamped` in the statistics
        shows which.
    temperature : float, Tensor or schedule
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Chuang et al. 2020 (arXiv 2007.00224; chingyaoc/DCL main.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss, stats = negmine.recipes.debiased(return_stats=True)(query, key, queue)
    >>> stats.clamped.shape
    torch.Size([8])
    """
    return InfoNCELoss(temperature, weight=scheduled(Weight, tau_plus=tau_plus), **keywords)


def hcl(
    beta: Number = 1.0,
    tau_plus: Number = 0.01,
    *,
    detach: bool = False,
    temperature: Temperature = 0.5,
    **keywords: Any,
) -> InfoNCELoss:
    """Hard negatives by reweighting (HCL): harder negatives count more.

        w_j = exp(beta x_j) / mean exp(beta x),   x = s / T

    Parameters
    ----------
    beta : float or schedule
        The importance exponent; 0 gives equal weights. `--anneal down` of the public code is `step(1.0, 0.0, steps, 9)`.
    tau_plus : float or schedule
        As in `debiased`.
    detach : bool
        Compute no gradient of the weights; the official code does.
    temperature : float, Tensor or schedule
        Divides the scores; as in the paper.
    **keywords
        Further arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Robinson et al. 2020 (arXiv 2010.04592; joshr17/HCL image/main.py, which differs from its printed figure).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.hcl(0.5)(query, key, queue)
    """
    weight = scheduled(Weight, beta=beta, tau_plus=tau_plus, detach=detach)
    return InfoNCELoss(temperature, weight=weight, **keywords)


def hardness_added(alpha: Number = 9.0, *, temperature: Temperature = 0.02, **keywords: Any) -> MethodLoss:
    """Hardness added to each negative's logit (LLaVE, EmbeddingGemma).

        logit_j = s_j / T + alpha sg[s_j]            sg = no gradient

    Parameters
    ----------
    alpha : float or schedule
        LLaVE uses 9 on in-batch negatives, EmbeddingGemma 5 on explicit hard negatives.
    temperature : float, Tensor or schedule
        Divides the scores; 0.02.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Lan et al. 2025 (arXiv 2503.04812); hardness_mode of sentence-transformers.

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.hardness_added(9.0)(query, key, queue)
    """
    return MethodLoss(methods.hardness_added, temperature=temperature, alpha=alpha, **keywords)


def logq(*, corrected: bool = False, temperature: Temperature = 0.05, **keywords: Any) -> MethodLoss:
    """Sampled softmax with the logQ correction: subtracts the log of how often each item is drawn.

        logit_j = x_j - log q_j

    Parameters
    ----------
    corrected : bool
        The form for a positive that is not sampled. Its probabilities must be those of a single draw.
    temperature : float, Tensor or schedule
        Divides the scores; 0.05.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with positive_log_q= (B,) and, except for in-batch negatives, log_q= (K,) or (B, M): logs of
        probabilities, such as those of `negmine.losses.FrequencyEstimator`.

    Notes
    -----
    Two public libraries add the logarithm instead of subtracting it, which is wrong. For mixed negative sampling, pass a list of
    two pools to `info_nce`, each with its own bias.

    References
    ----------
    Yi et al. 2019 (RecSys); corrected: Khrylchenko et al. 2025 (arXiv 2507.09331).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> log_q = torch.rand(8).log()
    >>> loss = negmine.recipes.logq()(query, key, None, positive_log_q=log_q)
    """
    return MethodLoss(methods.logq, temperature=temperature, corrected=corrected, **keywords)


def rince(r: Number = 0.5, lam: Number = 0.01, *, temperature: Temperature = 0.5, **keywords: Any) -> MethodLoss:
    """A loss that is robust to false positives (RINCE).

        loss = -exp(r x_pos) / r + (lam (exp(x_pos) + sum_j exp(x_j)))^r / r

    Parameters
    ----------
    r : float or schedule
        In (0, 1]: near 0 it approaches InfoNCE, 1 is the symmetric exponential loss. The paper calls it q.
    lam : float or schedule
        The weight of the denominator.
    temperature : float, Tensor or schedule
        Divides the scores; 0.5; keep r / T below 88 with unit vectors, because values grow as exp(r / T).
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Chuang et al. 2022 (arXiv 2201.04309; chingyaoc/RINCE README).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.rince()(F.normalize(query, dim=1), F.normalize(key, dim=1), queue)
    """
    return MethodLoss(methods.rince, temperature=temperature, r=r, lam=lam, **keywords)


def ifm(epsilon: Number = 0.1, alpha: Number = 1.0, *, temperature: Temperature = 0.2, **keywords: Any) -> MethodLoss:
    """Implicit feature modification (IFM): InfoNCE averaged with InfoNCE at an additive margin.

        loss = (nce(0) + alpha nce(epsilon)) / (1 + alpha)

    Parameters
    ----------
    epsilon : float or schedule
        The positive's score is lowered by this, and those of negatives are raised by it.
    alpha : float or schedule
        The weight of the second loss.
    temperature : float, Tensor or schedule
        Divides the scores; 0.2.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Robinson et al. 2021 (arXiv 2106.11230; joshr17/IFM moco-master/moco/adv_builder.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.ifm(0.1)(query, key, queue)
    """
    return MethodLoss(methods.ifm, temperature=temperature, epsilon=epsilon, alpha=alpha, **keywords)


def dual_temperature(temperature: Temperature = 0.1, temperature_ratio: Number = 10.0, **keywords: Any) -> MethodLoss:
    """Dual temperature: one temperature within a query, another between queries.

        loss = -sg[(1 - p(T_b)) / (1 - p(T_a))] log p(T_a),   p(T) = the positive's share at T,   sg = no gradient

    Parameters
    ----------
    temperature : float, Tensor or schedule
        T_a, within a query. A small value separates its negatives more.
    temperature_ratio : float or schedule
        T_b / T_a. A large T_b makes the weights of queries more equal.
    **keywords
        Further arguments of `MethodLoss`, such as reduction, seed or backend.

    Returns
    -------
    MethodLoss
        The loss, to call with query, positive key, negatives and masks.

    References
    ----------
    Zhang et al. 2022 (arXiv 2203.17248).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.dual_temperature(0.1, 10.0)(query, key, queue)
    """
    return MethodLoss(
        methods.dual_temperature, temperature=temperature, temperature_ratio=temperature_ratio, **keywords
    )
