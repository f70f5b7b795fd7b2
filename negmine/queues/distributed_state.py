"""The state of a module for torch.distributed.checkpoint, with the rows of sharded queues as distributed tensors."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negmine.ops import checks
from negmine.queues.sharded import ShardedMoCoQueue


def distributed_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of a module for torch.distributed.checkpoint, in which the rows of each `ShardedMoCoQueue` are DTensors.

    Parameters
    ----------
    module : nn.Module
        A sharded queue, or a module that contains sharded queues. The module may be sharded by FSDP2.

    Returns
    -------
    dict
        The state of the module. Every entry shares its memory with the module, so torch.distributed.checkpoint.load fills the
        module in place. The number of ranks may differ from that of the run that saved the checkpoint.

    Raises
    ------
    TypeError
        If `module` is not a module.

    Notes
    -----
    Do not pass the plain ``state_dict()`` of a module with a sharded queue to torch.distributed.checkpoint, which assumes that
    plain tensors are equal on all ranks. A `MoCoQueue` is equal on all ranks and does not need this function.

    Examples
    --------
    >>> model = torch.nn.ModuleDict({"queue": negmine.queues.ShardedMoCoQueue(dim=16, K=100)})
    >>> state = negmine.queues.distributed_state_dict(model)
    >>> state["queue.queue"].shape  # torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    torch.Size([100, 16])
    """
    if not isinstance(module, nn.Module):
        raise checks.refuse("distributed_state_dict", "module", "a module", checks.kind_of(module), TypeError)
    state = dict(module.state_dict())
    for path, queue in module.named_modules():
        if isinstance(queue, ShardedMoCoQueue):
            prefix = f"{path}." if path else ""
            del state[prefix + "queue_range"]  # it is part of the distributed tensors
            for name, rows in queue.stored.items():
                state[prefix + name] = _distributed(rows, queue)
    return state


def _distributed(rows: Tensor, queue: ShardedMoCoQueue) -> Tensor:
    """A DTensor of all rows whose local part is this rank's rows. Without torch.distributed, the rows themselves."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    group: Any = queue.process_group or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, rows.device.type)
    shape = torch.Size([queue.K, *rows.shape[1:]])
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=rows.stride())
