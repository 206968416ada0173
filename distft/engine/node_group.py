"""The ranks of one node, for what they need only once between them, such as the files of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distft.core.errors import PeerEnded
from distft.core.types import Weights
from distft.engine.processes import Processes


class NodeGroup:
    """Ranks of a node; a `core.ranks.ReadGroup`.

    A node is a block of neighbouring ranks. Where the launcher's blocks are not machines, values still arrive
    everywhere, over a slower link.
    """

    def __init__(self, processes: Processes, size: int) -> None:
        """Collective among the ranks of the node."""
        self._first = processes.rank - processes.rank % size
        self.rank, self.size = processes.rank - self._first, size
        # All are of one node: the group that is there, for another NCCL communicator would take memory of its own.
        self._is_subgroup = size < processes.world
        self._group: Any = None
        if self._is_subgroup:
            members = list(range(self._first, self._first + size))
            self._group = dist.new_group(members, use_local_synchronization=True)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` (contiguous, any type) with the one that rank `source` of the node has; collective."""
        if tensor.numel():  # as bytes, which every backend sends
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), self._first + source, group=self._group)

    def raise_together(self, failure: Exception | None) -> None:
        """Let no rank go on where one has failed; collective, over the host.

        Raises:
            Exception: this rank's own `failure`.
            PeerEnded: another rank of the node has failed.
        """
        code = 0 if failure is None else getattr(failure, "exit_code", 1)
        codes = torch.zeros(self.size, dtype=torch.int64)
        codes[self.rank] = code
        dist.all_reduce(codes, group=self._group)
        failed = [rank for rank, rank_code in enumerate(codes.tolist()) if rank_code]
        if not failed:
            return
        message = self._text(f"{failure}" if code else "", failed[0])
        if failure is not None:
            raise failure
        raise PeerEnded(int(codes[failed[0]]), message)

    def _text(self, text: str, source: int) -> str:
        """Return the text of rank `source`, on every rank; collective."""
        encoded = text.encode()
        length = torch.tensor([len(encoded)])
        dist.broadcast(length, self._first + source, group=self._group)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        if len(buffer):
            dist.broadcast(buffer, self._first + source, group=self._group)
        return bytes(buffer.tolist()).decode()

    def close(self) -> None:
        """Give back what a group of its own took; collective."""
        if self._is_subgroup:
            dist.destroy_process_group(self._group)


@contextlib.contextmanager
def reading_once(weights: Weights, processes: Processes) -> Iterator[None]:
    """Let the ranks of a node read each weight once between them, inside the context; collective.

    Not where a launcher does not say how many processes a node has: then every rank reads for itself. On an error the
    group is left as it is: giving up an NCCL communicator waits for ranks that may not come.
    """
    size = processes.local_world
    if processes.world == 1 or size is None or size == 1:
        yield
        return
    group = NodeGroup(processes, size)
    weights.read_within(group)
    yield
    weights.read_within(None)
    group.close()
