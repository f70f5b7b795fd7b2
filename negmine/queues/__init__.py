"""Queues of past keys: in one process, or with rows that are distributed over the ranks of a process group."""

from negmine.queues.distributed_state import distributed_state_dict
from negmine.queues.moco import MoCoQueue
from negmine.queues.moco_checkpoints import moco_checkpoint_hooks
from negmine.queues.sharded import ShardedMoCoQueue

__all__ = ["MoCoQueue", "ShardedMoCoQueue", "distributed_state_dict", "moco_checkpoint_hooks"]
