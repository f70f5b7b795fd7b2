"""The state of a module for torch.distributed.checkpoint, with the rows of sharded queues as distributed tensors."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negmine.ops import checks
from negmine.queues.sharded import ShardedMoCoQueue


def distributed_state_dict(module: nn.Module) -> dict[str, Any]:
    """module.state_dict() in which the rows of every ShardedMoCoQueue are DTensors, for torch.distributed.checkpoint.

        torch.distributed.checkpoint.save(distributed_state_dict(model), checkpoint_id=folder)
        torch.distributed.checkpoint.load(distributed_state_dict(model), checkpoint_id=folder)

    Every entry shares its memory with the module, so that loading fills the module in place, in any number of ranks. A plain
    state_dict() must not be given to torch.distributed.checkpoint where a module has a sharded queue: entries of one name are
    taken for equal on all ranks. A MoCoQueue is the same on all ranks and needs nothing. module: the queue itself, or a module
    that holds queues, sharded by FSDP2 or not. Raises TypeError for anything but a module.
    """
    if not isinstance(module, nn.Module):
        raise checks.refuse("distributed_state_dict", "module", "a module", type(module).__name__, TypeError)
    state = dict(module.state_dict())
    for path, queue in module.named_modules():
        if isinstance(queue, ShardedMoCoQueue):
            prefix = f"{path}." if path else ""
            del state[prefix + "queue_range"]  # the distributed tensors know it
            for name, rows in queue.stored.items():
                state[prefix + name] = _distributed(rows, queue)
    return state


def _distributed(rows: Tensor, queue: ShardedMoCoQueue) -> Tensor:
    """This rank's rows as a part of the tensor of all rows; without torch.distributed, the rows."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    group: Any = queue.process_group or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, rows.device.type)
    shape = torch.Size([queue.K, *rows.shape[1:]])
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=rows.stride())
