"""triplet_loss: a hinge loss or a soft margin loss over mined triplets, and its module.

negmine/losses/triplet_mining.py mines the triplets. The loss of the chosen rows is computed by differentiable PyTorch
operations, as defined in negmine/reference/triplets.py.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from negmine import reference
from negmine.losses.gathered import Gathering
from negmine.losses.schedules import ScheduledLoss, at_start, at_step
from negmine.losses.triplet_mining import check_rule, triplets_of
from negmine.ops import checks
from negmine.ops.accumulate import widen_once
from negmine.ops.negatives import check_labelled_keys
from negmine.ops.vectors import promoted, widened
from negmine.ops.windows import Draw


def _check_temperature(op: str, temperature: Any) -> Any:
    wanted = "a number above 0, or None for the hinge"
    return (
        None if temperature is None else checks.require_scalar(op, "temperature", temperature, above=0, wanted=wanted)
    )


def triplet_loss(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    positive: str = "easy",
    negative: str = "semihard",
    margin: float = 0.2,
    temperature: float | None = None,
    distance: str = "cosine",
    max_positives: int | None = None,
    num_negatives: int = 1,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "mean",
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
    return_stats: bool = False,
) -> Any:
    """The triplet loss over mined triplets.

        v = d(query, p) - d(query, n) + margin
        loss = max(0, v)                          temperature=None
               softplus(v / temperature)          temperature=a number (soft margin; Hermans et al. use 1, with margin=0)

    Parameters
    ----------
    query : Tensor (B, D)
        Gets a gradient if it requires grad.
    keys : Tensor (K, D)
        Gets a gradient if it requires grad.
    query_labels : Tensor (B,)
        As in `mine_triplets`.
    key_labels : Tensor (K,)
        As in `mine_triplets`.
    positive, negative : str
        The rules of `mine_triplets`.
    margin : float
        The margin of the mining rule and of the loss.
    temperature : float, optional
        None for the hinge loss, or the temperature of the soft margin loss.
    distance : str
        The distance for mining and for the loss, as in `mine_triplets`.
    max_positives, num_negatives : int
        As in `mine_triplets`.
    query_ids : Tensor (B,), optional
        As in `mine_triplets`.
    key_ids : Tensor (K,), optional
        As in `mine_triplets`.
    key_mask : Tensor (K,) or (B, K) bool, optional
        As in `mine_triplets`.
    reduction : str
        ``"mean"`` over the triplets that exist, including those with loss 0; ``"sum"``; or ``"none"``, which returns (B, P, N)
        with 0 for triplets that do not exist.
    seed, step, row_offset : int or Tensor
        As in `mine_triplets`.
    backend : str, optional
        As in `info_nce`.
    return_stats : bool
        Whether to return the Triplets too.

    Returns
    -------
    Tensor () or (B, P, N)
        The loss: float32, or float64 for float64 input. It is 0 if there is no triplet. A query with NaN has no triplet.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    The gradient flows through the pairs of the mined triplets. Only their rows, (B, P, D) and (B, P, N, D), are saved, so
    keys that do not require grad may be overwritten before backward.

    Examples
    --------
    >>> rows, labels, ids = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2, torch.arange(8)
    >>> loss = negmine.triplet_loss(rows, rows, labels, labels, positive="hard", negative="hardest", query_ids=ids, key_ids=ids)
    """
    op = "triplet_loss"
    pool = check_labelled_keys(op, query, keys, query_labels, key_labels, query_ids, key_ids, key_mask)
    rule = check_rule(op, positive, negative, margin, distance, max_positives, num_negatives)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    temperature = _check_temperature(op, temperature)
    checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
    checks.require_bool(op, "return_stats", return_stats)
    query, keys = promoted(query, keys)
    found = triplets_of(op, query, keys, pool, rule, draw, backend)
    # Keys that require grad are converted to fp32 before they are gathered, so that their gradients are summed in fp32. Others
    # are gathered first.
    _, query, _, keys = widen_once(None, query, None, keys)
    rows = reference.triplet_loss(
        widened(query),
        keys,
        found.positive,
        found.negative,
        margin=rule["margin"],
        temperature=temperature,
        distance=distance,
    )
    loss = reference.reduced(rows, reduction, found.num_triplets.clamp_min(1))
    return (loss, found) if return_stats else loss


class TripletLoss(ScheduledLoss):
    """`triplet_loss` as a module, whose margin and temperature may be schedules.

    Parameters
    ----------
    margin : float, Tensor or schedule
        As in `triplet_loss`. A schedule is a callable of the step.
    positive, negative : str
        As in `mine_triplets`.
    temperature : float, Tensor or schedule, optional
        As in `triplet_loss`.
    distance, max_positives, num_negatives, reduction, seed, backend, return_stats : optional
        As in `triplet_loss`.
    gather_distributed : bool
        Whether to use the keys of all ranks, with their labels, key_ids and key_mask (K,), and with gradients across ranks.
        `query_ids` and `key_ids` must be unique in the whole dataset.
    process_group : ProcessGroup, optional
        The process group of torch.distributed. The default is all ranks.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid.

    Notes
    -----
    In training mode, calls without `step` are counted in the buffer `step`, so that each call draws new random numbers.

    Examples
    --------
    >>> loss_of = negmine.TripletLoss(0.2, positive="hard", negative="hardest")
    >>> queue = negmine.MoCoQueue(16, 100, with_labels=True)
    >>> query, labels = F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2
    >>> loss = loss_of(query, queue.keys, labels, queue.labels)
    """

    def __init__(
        self,
        margin: float | Tensor | Callable[[Tensor], float | Tensor] = 0.2,
        *,
        positive: str = "easy",
        negative: str = "semihard",
        temperature: float | Tensor | Callable[[Tensor], float | Tensor] | None = None,
        distance: str = "cosine",
        max_positives: int | None = None,
        num_negatives: int = 1,
        reduction: str = "mean",
        seed: int = 0,
        backend: str | None = None,
        return_stats: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        op = "TripletLoss"
        self.gathering = Gathering(op, gather_distributed, process_group)
        checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
        seed, _, _ = checks.require_draw(op, seed, 0, 0)
        self.options: dict[str, Any] = {
            "margin": margin,
            "positive": positive,
            "negative": negative,
            "temperature": temperature,
            "distance": distance,
            "max_positives": max_positives,
            "num_negatives": num_negatives,
            "reduction": reduction,
            "seed": seed,
            "backend": backend,
            "return_stats": return_stats,
        }
        first = at_start(self.options)
        _check_temperature(op, first["temperature"])
        rule = ("positive", "negative", "margin", "distance", "max_positives", "num_negatives")
        check_rule(op, **{name: first[name] for name in rule})

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        query_labels: Tensor,
        key_labels: Tensor,
        *,
        step: int | Tensor | None = None,
        **masks: Any,
    ) -> Any:
        """The loss of one batch.

        Parameters
        ----------
        query, keys, query_labels, key_labels
            As in `triplet_loss`.
        step : int or Tensor, optional
            The number of the training step. By default the module counts its calls.
        **masks
            query_ids, key_ids, key_mask and row_offset of `triplet_loss`.

        Returns
        -------
        Tensor () or (B, P, N)
            As `triplet_loss` returns.
        """
        step = self.count(step, query)
        options = at_step(self.options, step) | {"step": step} | masks
        return self.gathering.labelled(triplet_loss, query, keys, query_labels, key_labels, options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value not in (None, False))
