"""Losses with weighted negatives or a modified sum: debiased, HCL, hardness added, logQ, RINCE, IFM, dual temperature."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.options import Weight
from negmine.recipes.schedules import Number, Temperature, scheduled


def debiased(tau_plus: Number = 0.01, *, temperature: Temperature = 0.5, **keywords: Any) -> InfoNCELoss:
    """The debiased contrastive loss: InfoNCE with a sum that is corrected for the expected share of false negatives.

        loss = -log(exp(x_pos) / (exp(x_pos) + Ng))
        Ng = max((sum_j exp(x_j) - tau_plus N exp(x_pos)) / (1 - tau_plus), N exp(-1 / T))        N negatives, x = s / T

    Parameters
    ----------
    tau_plus : float or schedule
        The expected share of false negatives. The paper uses 0.1 for batches of 10 classes. If the keys of the queue are
        nearly random, 0.1 puts almost every row at the lower limit N exp(-1 / T), where the negatives of the row get no
        gradient. `clamped` in the statistics has these rows.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
    """Contrastive learning with hard negatives (HCL): the debiased loss with larger weights for harder negatives.

        the loss of `debiased` with sum_j w_j exp(x_j) in place of sum_j exp(x_j),   w_j = exp(beta x_j) / mean exp(beta x)

    Parameters
    ----------
    beta : float or schedule
        The exponent of the weights; 0 gives equal weights. ``--anneal down`` of the public code is ``step(1.0, 0.0, steps, 9)``.
    tau_plus : float or schedule
        As in `debiased`.
    detach : bool
        Whether weights are treated as constants in the gradient. The default is that of the official code.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of the paper.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
    """InfoNCE with a hardness term that is added to each negative's logit (LLaVE, EmbeddingGemma).

        logit_j = s_j / T + alpha sg[s_j]            sg = no gradient

    Parameters
    ----------
    alpha : float or schedule
        The factor of the hardness term. LLaVE uses 9 with in-batch negatives, and EmbeddingGemma 5 with explicit hard negatives.
    temperature : float, Tensor or schedule
        The scores are divided by it.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
    """Sampled softmax with the logQ correction: subtracts the log of the probability that an item is drawn from its logit.

        loss = -log(exp(x_pos - log q_pos) / (exp(x_pos - log q_pos) + sum_j exp(x_j - log q_j)))

    Parameters
    ----------
    corrected : bool
        Whether to take into account that the positive is always present and is not sampled. The probabilities must then be
        those of a single draw.
    temperature : float, Tensor or schedule
        The scores are divided by it.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys, positive_log_q=..., log_q=...)``, with the logs of the
        probabilities of the positives (B,) and of the negatives (K,) or (B, M). Leave out log_q for in-batch negatives.
        `negmine.losses.FrequencyEstimator` estimates such probabilities.

    Notes
    -----
    Two public libraries add the logarithm instead of subtracting it, which is wrong. For mixed negative sampling, pass a list of
    two pools to `info_nce`, each with a bias of -log q.

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
        The exponent, in (0, 1]. As r approaches 0, the loss approaches InfoNCE; r = 1 is the symmetric exponential loss. The
        paper calls it q.
    lam : float or schedule
        The weight of the denominator.
    temperature : float, Tensor or schedule
        The scores are divided by it. Values grow like exp(r / T), so with unit vectors keep r / T below 88.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
    """Implicit feature modification (IFM): the weighted mean of InfoNCE and of InfoNCE with an additive margin.

        loss = (nce(0) + alpha nce(epsilon)) / (1 + alpha),   nce(e) = InfoNCE with the scores s_pos - e and s_j + e

    Parameters
    ----------
    epsilon : float or schedule
        The amount by which the score of the positive is lowered and those of the negatives are raised.
    alpha : float or schedule
        The weight of the second loss.
    temperature : float, Tensor or schedule
        The scores are divided by it.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
    """Dual temperature: InfoNCE with one temperature for the negatives of a query, and another for the weights of the queries.

        loss = -sg[(1 - p(T_b)) / (1 - p(T_a))] log p(T_a)                                     sg = no gradient
        p(T) = the softmax probability of the positive at temperature T

    Parameters
    ----------
    temperature : float, Tensor or schedule
        T_a, the temperature of the loss of a query. With a small value, hard negatives get larger gradients than easy ones.
    temperature_ratio : float or schedule
        T_b / T_a. With a large T_b, the weights of the queries are more equal.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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
