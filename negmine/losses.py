"""The losses as modules: the options at construction, tensors and masks in the call."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from negmine import checks
from negmine.info_nce import InfoNCEStats, info_nce
from negmine.options import FalseNegatives, Mix, Select, Weight
from negmine.stepped import Stepped, at_step
from negmine.sup_con import SupConStats, sup_con


class InfoNCELoss(Stepped):
    """info_nce as a module; its keywords are info_nce's.

    temperature, select, mix, weight and false_negatives may be schedules: a callable of the step that returns the value of that
    step. Calls in training mode that name no `step` count themselves, so that every one draws new mixes and samples; the count
    travels in state_dict. A temperature given as an nn.Parameter is learned with the rest.
    """

    def __init__(
        self,
        temperature: float | Tensor | Callable[[int], float] = 0.07,
        *,
        select: Select | Callable[[int], Select | None] | None = None,
        mix: Mix | Callable[[int], Mix | None] | None = None,
        weight: Weight | Callable[[int], Weight | None] | None = None,
        false_negatives: FalseNegatives | Callable[[int], FalseNegatives | None] | None = None,
        decoupled: bool = False,
        reduction: str = "mean",
        seed: int = 0,
        backend: str | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        op = "InfoNCELoss"
        options = {"select": select, "mix": mix, "weight": weight, "false_negatives": false_negatives}
        if not callable(temperature):
            checks.require_temperature(op, temperature)
        checks.require_options(op, **{name: value for name, value in options.items() if not callable(value)})
        checks.require_bool(op, "decoupled", decoupled)
        checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
        checks.require_draw(op, seed, 0, 0)
        self.temperature = temperature
        self.options: dict[str, Any] = options
        self.fixed: dict[str, Any] = {
            "decoupled": decoupled,
            "reduction": reduction,
            "seed": seed,
            "backend": backend,
            "return_stats": return_stats,
        }

    def at(self, step: int) -> dict[str, Any]:
        """The keywords of info_nce at this step, schedules evaluated."""
        return at_step({"temperature": self.temperature, **self.options}, step) | self.fixed

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor,
        *,
        step: int | None = None,
        **masks: Any,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """masks: query_ids, negative_ids, query_labels, negative_labels, negative_mask, support, row_offset of info_nce."""
        step = self.count(step)
        return info_nce(query, positive_key, negative_keys, step=step, **self.at(step), **masks)

    def extra_repr(self) -> str:
        given = {name: value for name, value in (self.options | self.fixed).items() if value not in (None, False)}
        return ", ".join([f"temperature={self.temperature!r}", *(f"{name}={value!r}" for name, value in given.items())])


class SupConLoss(Stepped):
    """sup_con as a module; its keywords are sup_con's.

    temperature may be a schedule, a callable of the step; one given as an nn.Parameter is learned with the rest. Calls in
    training mode that name no `step` count themselves; the count travels in state_dict.
    """

    def __init__(
        self,
        temperature: float | Tensor | Callable[[int], float] = 0.07,
        *,
        positives: str = "out",
        denominator: str = "all",
        reduction: str = "mean",
        backend: str | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        op = "SupConLoss"
        if not callable(temperature):
            checks.require_temperature(op, temperature)
        checks.require_choice(op, "positives", positives, ("out", "in"))
        checks.require_choice(op, "denominator", denominator, ("all", "own_positive", "negatives_only"))
        checks.require_choice(op, "reduction", reduction, checks.REDUCTIONS)
        self.temperature = temperature
        self.options: dict[str, Any] = {
            "positives": positives,
            "denominator": denominator,
            "reduction": reduction,
            "backend": backend,
            "return_stats": return_stats,
        }

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        query_labels: Tensor,
        key_labels: Tensor,
        *,
        step: int | None = None,
        **masks: Any,
    ) -> Tensor | tuple[Tensor, SupConStats]:
        """masks: query_ids, key_ids, key_mask of sup_con."""
        options = at_step({"temperature": self.temperature, **self.options}, self.count(step))
        return sup_con(query, keys, query_labels, key_labels, **options, **masks)

    def extra_repr(self) -> str:
        return ", ".join([f"temperature={self.temperature!r}", *(f"{k}={v!r}" for k, v in self.options.items() if v)])
