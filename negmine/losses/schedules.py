"""ScheduledLoss: a module that counts its own steps, for losses with schedules as options and draws counted by step."""

from typing import Any

from torch import nn

from negmine.options import is_int


class ScheduledLoss(nn.Module):
    """`step` counts the calls in training mode that named none; it travels in state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def count(self, step: int | None) -> int:
        """The step of this call: the one named, or the next of our own."""
        if step is None:
            step = self.step
            self.step += self.training
        return step

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        step: Any = state.get("step") if isinstance(state, dict) else None
        if not is_int(step) or not 0 <= step < 2**32:
            wanted = "{'step': an int in [0, 2**32)}"
            raise ValueError(f"{type(self).__name__}: the saved state must be {wanted}, got {state!r}")
        self.step = step


def at_step(options: dict[str, Any], step: int) -> dict[str, Any]:
    """The options with every schedule, a callable of the step, evaluated."""
    return {name: value(step) if callable(value) else value for name, value in options.items()}
