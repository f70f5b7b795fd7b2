"""Checkpoints of whole MoCo models: the queue as the published builder stores it, in the state of the module that holds it."""

from functools import partial
from typing import Any

from torch import nn

from negmine.ops import checks
from negmine.queues.moco import MoCoQueue


def moco_checkpoint_hooks(module: nn.Module, name: str = "queue") -> None:
    """Let a module that holds a `MoCoQueue` load and save checkpoints of the published MoCo code.

    That code keeps its queue in the module's own buffers, `name` (D, K) and `name`_ptr (1,). With the hooks,
    ``load_state_dict(strict=True)`` takes such a state as well as the queue's own, and ``state_dict()`` returns the
    published form, which the unpatched model loads. A queue that stores ids or labels, or is not full yet, has no such form
    and is saved as its own entries.

    Parameters
    ----------
    module : nn.Module
        The module that holds the queue. Call this once, in its constructor, after the queue is made.
    name : str
        The queue's name in the module.

    Raises
    ------
    TypeError
        Where there is no such queue.

    Examples
    --------
    >>> model = torch.nn.Module()
    >>> model.queue = negmine.MoCoQueue(dim=16, K=100)
    >>> negmine.queues.moco_checkpoint_hooks(model, "queue")
    >>> model.state_dict()["queue"].shape
    torch.Size([16, 100])
    """
    op = "moco_checkpoint_hooks"
    if not isinstance(module, nn.Module):
        raise checks.refuse(op, "module", "the module that holds the queue", type(module).__name__, TypeError)
    queue = getattr(module, name, None) if isinstance(name, str) else None
    if type(queue) is not MoCoQueue:
        raise checks.refuse(op, "name", "the name of a MoCoQueue in module", name, TypeError)
    module.register_load_state_dict_pre_hook(partial(_before_loading, name))
    module.register_state_dict_post_hook(partial(_after_saving, name))


def _before_loading(name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Convert the two entries of the published builder to those of the queue."""
    if prefix + name not in state_dict:
        return
    for old, new in ((name, "queue"), (f"{name}_ptr", "queue_ptr")):
        if prefix + old in state_dict:
            state_dict[f"{prefix}{name}.{new}"] = state_dict.pop(prefix + old)


def _after_saving(name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Convert the entries of the queue to the names and shapes of the published builder, as views."""
    queue: MoCoQueue = getattr(module, name)
    own = f"{prefix}{name}."
    if queue.queue_ids is not None or queue.queue_labels is not None or len(queue) < queue.K:
        return
    entries = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(own)}
    state_dict[prefix + name] = entries[own + "queue"].T
    state_dict[f"{prefix}{name}_ptr"] = entries[own + "queue_ptr"]
