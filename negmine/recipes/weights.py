"""How the negatives weigh: debiased, by hardness, by margin, by temperature."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.options import Weight
from negmine.recipes.schedules import Number, Temperature, scheduled


def debiased(tau_plus: Number = 0.01, *, temperature: Temperature = 0.5, **keywords: Any) -> InfoNCELoss:
    """Debiased contrastive loss (Chuang et al. 2020, arXiv 2007.00224; chingyaoc/DCL main.py).

        Ng = max((sum_j exp(x_j) - tau_plus N exp(x_pos)) / (1 - tau_plus), N exp(-1 / T))

    The paper's tau_plus = 0.1 is a prior for 10 classes in a batch. Against a queue of near-random vectors it clamps nearly
    every row, whose negatives then get no gradient; the default here is 0.01, and `clamped` in the statistics tells.
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
    """Hard negatives by reweighting (Robinson et al. 2020, arXiv 2010.04592; joshr17/HCL image/main.py, not its printed figure).

    w_j = exp(beta x_j) / mean exp(beta x), debiased as above; beta multiplies s / T. The gradient flows through the weights
    unless detach. beta may be a schedule: the public `--anneal down` is step(1.0, 0.0, steps, 9).
    """
    weight = scheduled(Weight, beta=beta, tau_plus=tau_plus, detach=detach)
    return InfoNCELoss(temperature, weight=weight, **keywords)


def hardness_added(alpha: Number = 9.0, *, temperature: Temperature = 0.02, **keywords: Any) -> MethodLoss:
    """LLaVE's hardness weighting (Lan et al. 2025, arXiv 2503.04812; sentence-transformers' hardness_mode).

    alpha sg[s_j] is added to each negative's logit: alpha 9 on in-batch negatives (LLaVE), 5 on explicit hard ones
    (EmbeddingGemma); see negmine/losses/methods.py, hardness_added.
    """
    return MethodLoss(methods.hardness_added, temperature=temperature, alpha=alpha, **keywords)


def logq(*, corrected: bool = False, temperature: Temperature = 0.05, **keywords: Any) -> MethodLoss:
    """The logQ correction of sampled softmax (Yi et al. 2019, RecSys; corrected=True: Khrylchenko et al. 2025, arXiv 2507.09331).

    Call with positive_log_q= and, but for in-batch negatives, log_q=: logs of the probabilities that an item is drawn, such as
    negmine.losses.FrequencyEstimator's. They are subtracted from the logits; two public libraries have added them. See
    negmine/losses/methods.py, logq. Mixed negative sampling is a list of two pools in info_nce, each with a bias of its own.
    """
    return MethodLoss(methods.logq, temperature=temperature, corrected=corrected, **keywords)


def rince(r: Number = 0.5, lam: Number = 0.01, *, temperature: Temperature = 0.5, **keywords: Any) -> MethodLoss:
    """RINCE (Chuang et al. 2022, arXiv 2201.04309): -exp(r x_pos) / r + (lam (exp(x_pos) + sum_j exp(x_j)))^r / r.

    The paper's `q` is r here, for q is a query. See negmine/losses/methods.py, rince.
    """
    return MethodLoss(methods.rince, temperature=temperature, r=r, lam=lam, **keywords)


def ifm(epsilon: Number = 0.1, alpha: Number = 1.0, *, temperature: Temperature = 0.2, **keywords: Any) -> MethodLoss:
    """IFM (Robinson et al. 2021, arXiv 2106.11230): InfoNCE averaged with InfoNCE at an additive margin of 2 epsilon.

    (nce(0) + alpha nce(epsilon)) / (1 + alpha); see negmine/losses/methods.py, ifm.
    """
    return MethodLoss(methods.ifm, temperature=temperature, epsilon=epsilon, alpha=alpha, **keywords)


def dual_temperature(temperature: Temperature = 0.1, temperature_ratio: Number = 10.0, **keywords: Any) -> MethodLoss:
    """Dual temperature (Zhang et al. 2022, arXiv 2203.17248): see negmine/losses/methods.py, dual_temperature."""
    return MethodLoss(
        methods.dual_temperature, temperature=temperature, temperature_ratio=temperature_ratio, **keywords
    )
