"""Losses with synthetic negatives (MoCHi, SynCo, MixGCF), mixed inputs (i-Mix, Un-Mix) or trained negatives (AdCo)."""

from typing import Any

from negmine.losses import InfoNCELoss, methods
from negmine.losses.methods import MethodLoss
from negmine.losses.mixgcf import mixgcf as mixgcf_loss
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
    """MoCHi: MoCo v2 with synthetic negatives, which are mixed from the hardest ones. `Mix` has the formulas.

    Parameters
    ----------
    hard : int
        The number of hardest negatives from which the synthetic ones are mixed.
    pairs : int
        The number of mixes of two negatives for each query.
    with_query : int
        The number of mixes of the query with a negative.
    warmup_steps : int
        The number of steps at the start without synthetic negatives. The paper uses 10 to 15 epochs.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v2.
    skip : int
        The number of very hardest negatives that are not mixed, because they are the most likely false negatives.
    distinct : bool
        Whether the two negatives of a pair must differ.
    detach : bool
        Whether synthetic negatives are treated as constants in the gradient.
    **keywords
        Other arguments of `InfoNCELoss`, such as reduction, seed or backend.

    Returns
    -------
    InfoNCELoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    For the class oracle of the paper, pass ``query_labels`` in the call, with a queue that has labels: keys with the query's
    label are then neither mixed nor used as negatives. There is no official code.

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
    """SynCo: MoCo v2 with six kinds of synthetic negatives. `Kinds` has the formulas.

    Parameters
    ----------
    hard : int
        The number of hardest negatives from which the synthetic ones are computed.
    interpolated, extrapolated, mixed, noised, graded, signed : int
        The number of synthetic negatives of each kind for a query.
    sigma, delta, eta : float or schedule
        The constants in the formulas of the last three kinds.
    warmup_steps : int
        The number of steps at the start without synthetic negatives. The paper uses 10 epochs.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v2.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

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


def mixgcf(candidates: int = 64, layers: int = 1, *, temperature: Temperature = 1.0, **keywords: Any) -> MethodLoss:
    """MixGCF: one synthetic negative, the positive mixed into the hardest of some random negatives.

        loss = log(1 + exp((q . h - q . k) / T)),   h_l = a_l k_l + (1 - a_l) n_l in each layer l,   a_l uniform in [0, 1)
        n_l: of the candidates' vectors of layer l, the one with the largest q_l . n_l

    Parameters
    ----------
    candidates : int
        The number of negatives to draw for each query, with replacement. The default is that of the public code. Drawn
        negatives that the masks hide do not count.
    layers : int
        The number of layers of the graph network. Each vector is the concatenation of the embeddings of all layers,
        including layer 0, and D must be a multiple of it. The public code uses 4. Use 1 for encoders that are not graph
        networks.
    temperature : float, Tensor or schedule
        The scores are divided by it. With 1, the loss is Bayesian personalised ranking, as in the paper.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    By default, the public code concatenates the layers, as described here. It can also add them up; for that variant, pass
    queries that repeat their sum over the layers `layers` times. The public code adds a penalty on the norms of the
    embeddings; use the weight decay of the optimiser for it.

    References
    ----------
    Huang et al. 2021 (KDD; huangtinglin/MixGCF modules/LightGCN.py).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.mixgcf(candidates=20, layers=4)(query, key, queue)
    """
    return MethodLoss(mixgcf_loss, temperature=temperature, candidates=candidates, layers=layers, **keywords)


def i_mix(*, temperature: Temperature = 0.2, **keywords: Any) -> MethodLoss:
    """i-Mix: each input is mixed with another one of the batch, and the keys of both are positives.

        loss_b = share_b ce_b(b) + (1 - share_b) ce_b(partner_b)
        ce_b(c) = -s(b, key c) / T + log of the sum of exp(s(b, k) / T) over the B positive keys and the negatives k

    Parameters
    ----------
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v2.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_keys, negative_keys, share=share, partner=partner)``: the query are the
        embeddings of the mixed inputs, the positive keys are those of the inputs before mixing, and share and partner are
        returned by `mixed_inputs`.

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


def un_mix(*, temperature: Temperature = 0.2, **keywords: Any) -> MethodLoss:
    """Un-Mix: a batch of inputs that is mixed with itself in reverse order.

        loss_b = nce(q_b, k_b) + share nce(m_b, k_b) + (1 - share) nce(m_r(b), k_b),   r(b) = B - 1 - b
        nce(q, k) = -q . k / T + log(exp(q . k / T) + sum_j exp(q . n_j / T))

    Parameters
    ----------
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is that of MoCo v2.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys, mixed_query=m, share=share)``, with the embeddings m
        (B, D) of the mixed inputs, and one number `share` for the batch, drawn from Beta(1, 1).

    Notes
    -----
    The mixed inputs are share x + (1 - share) x.flip(0), or images x in which a box is replaced by the same box of x.flip(0);
    share is then the fraction of the area outside the box. The public code for CIFAR-10 chooses between the two with
    probability 0.5. The public code for ImageNet has an option for another temperature in the mixed terms, and does not use it.

    References
    ----------
    Shen et al. 2022 (arXiv 2003.05438; szq0214/Un-Mix unmix_c10.py).

    Examples
    --------
    >>> images, encoder = torch.rand(8, 3, 4, 4), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16))
    >>> share = torch.rand(())
    >>> mixed = encoder(share * images + (1 - share) * images.flip(0))
    >>> query, queue = encoder(images), negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.un_mix()(query, query.detach(), queue, mixed_query=mixed, share=share)
    """
    return MethodLoss(methods.un_mix, temperature=temperature, **keywords)


def adco(temperature: Temperature = 0.12, memory_temperature: Temperature = 0.02, **keywords: Any) -> MethodLoss:
    """AdCo: the negatives are parameters, which are trained to be hard by gradient ascent on the loss.

        loss = -q . k / T + log(exp(q . k / T) + sum_j exp(q . n_j / T))
        d loss / d n_j = (1 / B) sum_b p_bj q_b / T_m,   p_b = the softmax of (q_b . k_b, q_b . n_1, ..) / T_m

    Parameters
    ----------
    temperature : float, Tensor or schedule
        T, the temperature of the loss and of the gradients of the query and the positive key.
    memory_temperature : float, Tensor or schedule
        T_m, the temperature of the gradient of the negatives. The default is the value in the commands of the public README;
        the default of the public code is 0.07.
    **keywords
        Other arguments of the loss: reduction, seed and backend.

    Returns
    -------
    MethodLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with negative keys that require grad.

    Notes
    -----
    The negatives are F.normalize(memory, dim=1), where memory (K, D) is trained by an optimiser with maximize=True. In the
    public code, memory is initialised with keys of the encoder, the optimiser is SGD with a learning rate of 3, momentum 0.9
    and weight decay 1e-4, and the denominator also contains the positives of the other rows.

    References
    ----------
    Hu et al. 2021 (arXiv 2011.08435; maple-research-lab/AdCo training/train.py).

    Examples
    --------
    >>> query, key = F.normalize(torch.randn(2, 8, 16), dim=2)
    >>> memory = torch.nn.Parameter(torch.randn(100, 16))
    >>> ascent = torch.optim.SGD([memory], lr=3.0, momentum=0.9, weight_decay=1e-4, maximize=True)
    >>> negmine.recipes.adco()(query, key, F.normalize(memory, dim=1)).backward()
    >>> ascent.step()
    """
    return MethodLoss(methods.adco, temperature=temperature, memory_temperature=memory_temperature, **keywords)
