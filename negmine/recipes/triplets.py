"""Published triplet and pair losses, each as one function that returns the configured loss module.

loss = negmine.recipes.ephn()
loss(embeddings, embeddings, labels, labels, query_ids=ids, key_ids=ids)   within a batch; a sample is not its own positive
loss(query, queue.keys, labels, queue.labels)                              with the keys of a queue that has labels
"""

from typing import Any

import torch
from torch import Tensor

from negmine import reference
from negmine.losses.mined_pairs import MultiSimilarityLoss
from negmine.losses.schedules import ScheduledLoss, at_step
from negmine.losses.triplet import TripletLoss
from negmine.ops import checks, philox
from negmine.ops.column_lists import gather_rows
from negmine.ops.negatives import check_negatives
from negmine.ops.vectors import frozen, promoted, score_of_positive, widened
from negmine.recipes.schedules import Number
from negmine.selection import mine_hardest


def batch_hard(margin: Number = 0.2, *, temperature: Number | None = None, **keywords: Any) -> TripletLoss:
    """Batch hard triplets: the farthest positive and the nearest negative of each query.

        loss = max(0, d_p - d_n + margin), or with a temperature log(1 + exp((d_p - d_n + margin) / T))

    Parameters
    ----------
    margin : float or schedule
        The margin m between the distances.
    temperature : float or schedule, optional
        If given, the soft margin loss is used. The paper uses ``temperature=1.0, margin=0.0``.
    **keywords
        Other arguments of `TripletLoss`, such as reduction, seed or backend.

    Returns
    -------
    TripletLoss
        The loss. Call it as ``loss(query, keys, query_labels, key_labels)``.

    Notes
    -----
    The defaults of tensorflow/addons are margin=1.0 and distance="squared_euclidean". The mean is taken over the queries that
    have a triplet.

    References
    ----------
    Hermans et al. 2017 (arXiv 1703.07737; tensorflow/addons triplet_hard_loss).

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.recipes.batch_hard()(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    """
    return TripletLoss(margin, positive="hard", negative="hardest", temperature=temperature, **keywords)


def facenet(max_positives: int, *, margin: Number = 0.2, **keywords: Any) -> TripletLoss:
    """The semi-hard triplets of FaceNet: every positive, with the nearest negative that is farther than this positive.

        loss = max(0, d_p - d_n + margin),   d the squared Euclidean distance

    Parameters
    ----------
    max_positives : int
        The number of positives to use for each query. To use all, pass the largest number that a query can have.
    margin : float or schedule
        The margin between the squared Euclidean distances.
    **keywords
        Other arguments of `TripletLoss`, such as reduction, seed or backend.

    Returns
    -------
    TripletLoss
        The loss. Call it as ``loss(query, keys, query_labels, key_labels)``.

    Notes
    -----
    If no negative is farther than the positive, the farthest negative is used. The mean is taken over all positive pairs,
    including those whose loss is 0.

    References
    ----------
    Schroff et al. 2015 (arXiv 1503.03832; tensorflow/addons triplet_semihard_loss).

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.recipes.facenet(3)(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    """
    return TripletLoss(
        margin,
        positive="all",
        negative="semihard_facenet",
        max_positives=max_positives,
        distance="squared_euclidean",
        **keywords,
    )


def distance_weighted(
    max_positives: int, *, margin: Number = 0.2, distance: str = "euclidean", **keywords: Any
) -> TripletLoss:
    """Distance-weighted sampling: every positive, with a negative that is sampled uniformly over distances.

        loss = max(0, d_p - d_n + margin)
        probability of n_j ~ 1 / q(d_j),   log q(d) = (D - 2) log d + (D - 3) / 2 log(1 - d^2 / 4),   d = ||query - n_j||

    Parameters
    ----------
    max_positives : int
        The number of positives to use for each query. To use all, pass the largest number that a query can have.
    margin : float or schedule
        The margin between the distances. The margin loss of the paper, which has a learned boundary, is not implemented.
    distance : str
        ``"euclidean"``, ``"squared_euclidean"`` or ``"cosine"``.
    **keywords
        Other arguments of `TripletLoss`, such as reduction, seed or backend.

    Returns
    -------
    TripletLoss
        The loss. Call it as ``loss(query, keys, query_labels, key_labels)``.

    Notes
    -----
    For the sampling, distances below 0.5 count as 0.5, and negatives with d >= 1.4 are not drawn.

    References
    ----------
    Wu et al. 2017 (arXiv 1706.07567; pytorch-metric-learning DistanceWeightedMiner).

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.recipes.distance_weighted(3)(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    """
    return TripletLoss(
        margin, positive="all", negative="distance_weighted", max_positives=max_positives, distance=distance, **keywords
    )


def ephn(temperature: Number = 0.1, *, semihard: bool = False, **keywords: Any) -> TripletLoss:
    """Easy positive, hard negative (EPHN), or with `semihard` easy positive, semi-hard negative (EPSHN).

        loss = -log(exp(s_p / T) / (exp(s_p / T) + exp(s_n / T))) = softplus((s_n - s_p) / T)

    Parameters
    ----------
    temperature : float or schedule
        The difference of the scores is divided by it.
    semihard : bool
        Whether to use the hardest of the negatives that score lower than the positive, instead of the hardest of all.
    **keywords
        Other arguments of `TripletLoss`, such as reduction, seed or backend.

    Returns
    -------
    TripletLoss
        The loss. Call it as ``loss(query, keys, query_labels, key_labels)``.

    Notes
    -----
    The public code leaves out queries with scores of 0 or less, and assumes that a key with a score above 0.9999 is the query
    itself. Here no queries are left out, and the query itself is identified by ids.

    References
    ----------
    Xuan et al. 2020 (arXiv 1904.04370; littleredxh/EasyPositiveHardNegative Loss.py).

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.recipes.ephn()(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    """
    rule = "semihard" if semihard else "hardest"
    return TripletLoss(0.0, positive="easy", negative=rule, temperature=temperature, **keywords)


def multi_similarity(
    alpha: Number = 2.0, beta: Number = 50.0, base: Number = 0.5, *, epsilon: Number = 0.1, **keywords: Any
) -> MultiSimilarityLoss:
    """The multi-similarity loss with its mining. `multi_similarity` of `negmine.losses` has the formulas.

    Parameters
    ----------
    alpha, beta, base : float or schedule
        The constants of the loss.
    epsilon : float or schedule
        The margin of the mining.
    **keywords
        Other arguments of `MultiSimilarityLoss`, such as reduction or backend.

    Returns
    -------
    MultiSimilarityLoss
        The loss. Call it as ``loss(query, keys, query_labels, key_labels)``.

    References
    ----------
    Wang et al. 2019 (arXiv 1904.06627).

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.recipes.multi_similarity()(rows, rows, labels, labels, query_ids=ids, key_ids=ids)
    """
    return MultiSimilarityLoss(alpha, beta, base, epsilon=epsilon, **keywords)


class VSEPlusPlusLoss(ScheduledLoss):
    """The loss of `vse_plus_plus`, called with the two sides of B pairs."""

    def __init__(self, margin: Number, reduction: str, backend: str | None) -> None:
        super().__init__()
        checks.require_choice("vse_plus_plus", "reduction", reduction, ("mean", "sum"))
        self.side = TripletLoss(margin, positive="easy", negative="hardest", reduction=reduction, backend=backend)

    def forward(
        self, image: Tensor, caption: Tensor, labels: Tensor | None = None, *, step: int | Tensor | None = None
    ) -> Tensor:
        """image, caption (B, D): row b of both is a pair. labels (B,): rows with equal labels are not negatives."""
        op = "vse_plus_plus"
        checks.require_vectors(op, "image", image, "(B, D)", (2,))
        checks.require_vectors(op, "caption", caption, "(B, D)", (2,), image, "image")
        if caption.shape != image.shape:
            raise checks.refuse(op, "caption", f"of image's shape {tuple(image.shape)}", caption)
        if labels is not None:
            checks.require_tensor(op, "labels", labels, image)
            if labels.shape != image.shape[:1]:
                raise checks.refuse(op, "labels", f"of shape (B,) with image's B = {len(image)}", labels)
        own = torch.arange(len(image), device=image.device)
        others = None if labels is None else (labels[:, None] != labels) | (own[:, None] == own)  # (B, B)
        call = {"key_mask": others, "step": self.count(step, image)}
        return self.side(image, caption, own, own, **call) + self.side(caption, image, own, own, **call)


def vse_plus_plus(margin: Number = 0.2, *, reduction: str = "sum", backend: str | None = None) -> VSEPlusPlusLoss:
    """VSE++: a hinge loss with the hardest negative of the batch, in both directions.

        loss = sum_b max(0, margin + max_n s(i_b, c_n) - s(i_b, c_b)) + sum_b max(0, margin + max_n s(i_n, c_b) - s(i_b, c_b))

    Parameters
    ----------
    margin : float or schedule
        The margin between the scores. The default of the public code is 0, but its commands set 0.2.
    reduction : str
        ``"sum"`` over the batch, as in the public code, or ``"mean"``.
    backend : str, optional
        As in `info_nce`.

    Returns
    -------
    VSEPlusPlusLoss
        The loss. Call it as ``loss(image, caption)`` with embeddings (B, D), or as ``loss(image, caption, labels)`` with labels
        (B,); rows with equal labels are then not negatives of each other.

    References
    ----------
    Faghri et al. 2018 (arXiv 1707.05612; fartashf/vsepp model.py with max_violation).

    Examples
    --------
    >>> images, captions = F.normalize(torch.randn(2, 8, 16), dim=2).unbind()
    >>> loss = negmine.recipes.vse_plus_plus()(images, captions)
    """
    return VSEPlusPlusLoss(margin, reduction, backend)


class SimANSLoss(ScheduledLoss):
    """The loss of `simans`. In training mode, calls without `step` are counted in the buffer `step`."""

    def __init__(self, kernel: str, options: dict[str, Any], **fixed: Any) -> None:
        super().__init__()
        self.kernel, self.options, self.fixed = kernel, options, fixed

    def at(self, step: int | Tensor) -> dict[str, Any]:
        """The options at a step: schedules are evaluated and checked."""
        given, op = at_step(self.options, step), "simans"
        for name in ("num_negatives", "candidates"):
            given[name] = checks.require_count(op, name, given[name])
        if given["candidates"] < given["num_negatives"]:
            raise checks.refuse(
                op, "candidates", f"at least num_negatives={given['num_negatives']}", given["candidates"]
            )
        for name in ("a", "tau"):
            given[name] = checks.require_scalar(op, name, given[name], least=0)
        given["b"] = checks.require_scalar(op, "b", given["b"])
        given["temperature"] = checks.require_temperature(op, given["temperature"])
        return given

    def sample(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Any,
        *,
        step: int | Tensor,
        row_offset: int | Tensor = 0,
        **masks: Any,
    ) -> Tensor:
        """(B, num_negatives) int64: the drawn columns, hardest first, -1 past the end of a pool."""
        seed, backend, given = self.fixed["seed"], self.fixed["backend"], self.at(step)
        seed, step, row_offset = checks.require_draw("simans", seed, step, row_offset)
        masks |= {"positive_key": positive_key, "backend": backend}
        mined = mine_hardest(query, negative_keys, given["candidates"], **masks)  # (B, C)
        with torch.no_grad():
            gap = mined.scores.double() - score_of_positive(query, positive_key).double()[:, None]  # (B, C)
            rows = torch.arange(len(query), device=query.device) + row_offset  # (B,)
            places = torch.arange(given["candidates"], device=query.device)  # (C,)
            word = philox.words(rows, places, philox.STREAM_WEIGHTED, seed, step)[0]  # (B, C)
            log_p = (
                -given["a"] * (gap - given["b"]).square() if self.kernel == "gaussian" else -given["tau"] * gap.abs()
            )
            drawn = (log_p + philox.gumbel(word)).masked_fill(mined.index < 0, -torch.inf)  # log p up to a constant
            kept = drawn.argsort(dim=1, descending=True, stable=True)[:, : given["num_negatives"]].sort(1).values
            return mined.index.gather(1, kept)

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Any,
        *,
        step: int | Tensor | None = None,
        row_offset: int | Tensor = 0,
        **masks: Any,
    ) -> Tensor:
        """masks: query_ids and query_labels of mine_hardest."""
        tags = masks.get("query_ids"), masks.get("query_labels")
        keys, pool = check_negatives(
            "simans", query, positive_key, negative_keys, *tags, options=("select",), with_bias=True
        )
        if pool.bias is not None:
            raise checks.refuse("simans", "negative_keys.bias", "None, because negatives are drawn by score", pool.bias)
        checks.require_positive("simans", positive_key, query)
        draw = {"step": self.count(step, query), "row_offset": row_offset}
        index = self.sample(query, positive_key, negative_keys, **draw, **masks)  # (B, n)
        query, positive_key, keys = promoted(query, positive_key, keys)
        q = widened(query)
        drawn = gather_rows(keys, index, q.dtype)  # (B, n, D)
        temperature = self.at(draw["step"])["temperature"]
        rows, _ = reference.info_nce(q, frozen(positive_key, None), drawn, temperature=temperature, usable=index >= 0)
        return reference.reduced(rows, self.fixed["reduction"])


def simans(
    num_negatives: int = 15,
    *,
    candidates: int = 200,
    kernel: str = "gaussian",
    a: Number = 1.0,
    b: Number = 0.0,
    tau: Number = 3.0,
    temperature: Number = 1.0,
    reduction: str = "mean",
    seed: int = 0,
    backend: str | None = None,
) -> SimANSLoss:
    """SimANS: InfoNCE with a random sample of the hardest negatives, which prefers those near the positive's score.

        probability of candidate j:   "gaussian"  p_j ~ exp(-a (s_j - s_pos - b)^2)
                                      "laplace"   p_j ~ exp(-tau |s_j - s_pos|)

    Parameters
    ----------
    num_negatives : int
        The number of negatives to draw for each query, without replacement.
    candidates : int
        The number of hardest negatives from which they are drawn.
    kernel : str
        ``"gaussian"`` as in the paper, or ``"laplace"`` as in the public code.
    a, b : float or schedule
        The parameters of ``"gaussian"``. The published values are for inner products of the order of 10 to 100. Cosines differ
        by less than 2, so they need an `a` of the order of 10 to 1,000.
    tau : float or schedule
        The parameter of ``"laplace"``. The public code uses 3 for MS MARCO.
    temperature : float, Tensor or schedule
        The scores are divided by it. The default is meant for inner products of the order of 10 to 100.
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"``.
    seed : int
        The seed of the random numbers.
    backend : str, optional
        As in `info_nce`.

    Returns
    -------
    SimANSLoss
        The loss. Call it as ``loss(query, positive_key, negative_keys)``, with ``query_ids`` or ``query_labels`` if needed.

    Notes
    -----
    The defaults of candidates, num_negatives and a are not from the paper. If s_pos is 0, the public code uses the last
    candidates; this recipe does not.

    References
    ----------
    Zhou et al. 2022 (arXiv 2210.11773; microsoft/SimXNS SimANS).

    Examples
    --------
    >>> query, key = torch.randn(2, 8, 16)
    >>> queue = negmine.MoCoQueue(16, 100)
    >>> loss = negmine.recipes.simans(4, candidates=50, a=100.0, temperature=0.05)(query, key, queue)
    """
    op = "simans"
    checks.require_choice(op, "kernel", kernel, ("gaussian", "laplace"))
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    checks.require_draw(op, seed, 0, 0)
    options = {"num_negatives": num_negatives, "candidates": candidates, "a": a, "b": b, "tau": tau}
    fixed = {"reduction": reduction, "seed": seed, "backend": backend}
    made = SimANSLoss(kernel, options | {"temperature": temperature}, **fixed)
    made.at(torch.zeros((), dtype=torch.int64, device="cpu"))  # raises an error for invalid values
    return made
