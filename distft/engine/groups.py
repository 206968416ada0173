"""Groups of ranks that shard among themselves: all, those of a node, or so many neighbours."""

from __future__ import annotations

from distft.core.errors import MachineError
from distft.engine.params import ShardWithin
from distft.engine.processes import Processes


def group_size(within: ShardWithin, processes: Processes) -> int:
    """Return the number of ranks of a group; a group is neighbouring ranks.

    Raises:
        MachineError: groups of this size do not make up the world, or the launcher does not say how large a node is.
    """
    if within == "world":
        return processes.world
    size = processes.local_world if within == "node" else within
    if size is None:
        raise MachineError(
            '[engine] shard_within = "node", but the launcher does not say how many processes each node has: '
            "start with torchrun, accelerate launch or srun with the same number on every node, or give the number"
        )
    if processes.world % size:
        raise MachineError(
            f"[engine] shard_within = {within!r}: groups of {size} do not make up {processes.world} processes; "
            f"try {', '.join(str(n) for n in range(1, processes.world + 1) if processes.world % n == 0)}"
        )
    return size
