"""ScheduledLoss: a module that counts its steps, for losses with schedules or with random draws that depend on the step."""

from typing import Any

import torch
from torch import Tensor, nn

from negmine.ops import checks


class ScheduledLoss(nn.Module):
    """A loss whose buffer `step`, () int64, counts the calls in training mode without an explicit step.

    The buffer is the only state. It is part of state_dict, is copied and broadcast like any other buffer, and is read on the
    device. Activation checkpointing calls the module again in backward; this call is not counted and uses the step of the
    forward pass. If a forward pass calls the module more than once under checkpointing, each call must pass `step`.
    """

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._checkpointed: list[Tensor] = []  # steps of the last forward pass, which may be run again
        self._ran_again = False

    def count(self, step: int | Tensor | None, like: Tensor) -> Tensor:
        """The step of this call as () int64 on the device of `like`: the given one, or the next one of the counter."""
        device = like.device if isinstance(like, Tensor) else self.step.device  # other types raise an error later
        if step is not None:
            _, step, _ = checks.require_draw(type(self).__name__, 0, step, 0)
            return step.to(device) if isinstance(step, Tensor) else torch.full((), step, device=device)
        if self.step.device != device:  # a loss that was not moved to a device follows its input
            self.step = self.step.to(device)
        if not torch.compiler.is_compiling() and is_recomputed():
            return self._step_again()
        step = self.step.clone()
        if self.training:
            self.step.add_(1)
            if not torch.compiler.is_compiling() and may_be_recomputed():
                if self._ran_again:
                    self._checkpointed, self._ran_again = [], False
                self._checkpointed = [*self._checkpointed[-1:], step]
        return step

    def _step_again(self) -> Tensor:
        """The step of the forward call that activation checkpointing is running again."""
        if not self.training:
            return self.step.clone()
        self._ran_again = True
        if len(self._checkpointed) != 1:
            raise ValueError(
                f"{type(self).__name__}: step must be given under activation checkpointing if the module is called more "
                "than once before the backward pass, got None"
            )
        return self._checkpointed[0]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the steps of the last forward pass."""
        return self.__dict__ | {"_checkpointed": [], "_ran_again": False}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        step = state_dict.get(prefix + "step")
        if step is not None and not _is_step(step):
            wanted = "a 0-d int64 tensor with a value in [0, 2**32)"
            args[-1].append(f"{prefix}step must be {wanted}, got {checks.describe(step)}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def _is_step(value: Any) -> bool:
    good = isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64
    return good and (value.is_meta or 0 <= int(value) < 2**32)


def is_recomputed() -> bool:
    """True if activation checkpointing is running a forward pass again, inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def refuse_recomputation(op: str) -> None:
    """Raise an error if activation checkpointing runs a module again, because its queue has changed since the forward pass."""
    if not torch.compiler.is_compiling() and is_recomputed():
        raise RuntimeError(f"{op}: a module that owns a queue must be called outside of activation checkpointing")


def may_be_recomputed() -> bool:
    """True if activation checkpointing may run this forward pass: it records no graph, or has hooks on saved tensors."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def at_step(options: dict[str, Any], step: int | Tensor) -> dict[str, Any]:
    """The options with every schedule evaluated. A schedule is a callable of the step."""
    return {name: value(step) if callable(value) else value for name, value in options.items()}


def at_start(options: dict[str, Any]) -> dict[str, Any]:
    """The options at step 0, for checks at construction."""
    return at_step(options, torch.zeros((), dtype=torch.int64, device="cpu"))
