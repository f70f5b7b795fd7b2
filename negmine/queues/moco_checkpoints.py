"""Checkpoints of MoCo models in the format of the published code, with the queue in the state of its parent module."""

from functools import partial
from typing import Any

from torch import nn

from negmine.ops import checks
from negmine.queues.moco import MoCoQueue


def moco_checkpoint_hooks(module: nn.Module, name: str = "queue") -> None:
    """Make a module that has a `MoCoQueue` load and save checkpoints in the format of the published MoCo code.

    The published code stores the queue in two buffers of the module: `name` (D, K) and `name`_ptr (1,). With the hooks,
    ``load_state_dict(strict=True)`` accepts both this format and the format of `MoCoQueue`, and ``state_dict()`` returns the
    published format, which the original model can load. A queue that stores ids or labels, or that is not full yet, cannot be
    expressed in the published format and is saved in the format of `MoCoQueue`.

    Parameters
    ----------
    module : nn.Module
        The module that has the queue as an attribute. Call this function once, in its constructor, after creating the queue.
    name : str
        The name of the attribute.

    Raises
    ------
    TypeError
        If `module` is not a module, or has no MoCoQueue of this name.

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
        raise checks.refuse(op, "module", "the module that has the queue", checks.kind_of(module), TypeError)
    queue = getattr(module, name, None) if isinstance(name, str) else None
    if type(queue) is not MoCoQueue:
        raise checks.refuse(op, "name", "the name of an attribute of module that is a MoCoQueue", name, TypeError)
    module.register_load_state_dict_pre_hook(partial(_before_loading, name))
    module.register_state_dict_post_hook(partial(_after_saving, name))


def _before_loading(name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Rename the two entries of the published format to those of the queue."""
    if prefix + name not in state_dict:
        return
    for old, new in ((name, "queue"), (f"{name}_ptr", "queue_ptr")):
        if prefix + old in state_dict:
            state_dict[f"{prefix}{name}.{new}"] = state_dict.pop(prefix + old)


def _after_saving(name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Replace the entries of the queue by those of the published format, which are views."""
    queue: MoCoQueue = getattr(module, name)
    own = f"{prefix}{name}."
    if queue.queue_ids is not None or queue.queue_labels is not None or len(queue) < queue.K:
        return
    entries = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(own)}
    state_dict[prefix + name] = entries[own + "queue"].T
    state_dict[f"{prefix}{name}_ptr"] = entries[own + "queue_ptr"]
