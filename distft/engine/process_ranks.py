"""The ranks of a run over its process group (see `distft.core.ranks`): host objects and host numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from distft.engine import recursive_doubling
from distft.engine.processes import Processes


class ProcessRanks:
    """Exchanges small host objects between the processes that have joined."""

    def __init__(self, processes: Processes) -> None:
        self.rank, self.world, self.device = processes.rank, processes.world, processes.device

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, pickled over gloo; for small host objects."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value, group=self._host_group)
        return everyone

    def gather_to_rank0(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, pickled over gloo; nothing on the others."""
        if self.world == 1:
            return [value]
        everyone: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, everyone, group=self._host_group)
        return everyone or []

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Return the host numbers summed over all ranks, without touching the accelerator."""
        if self.world == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > recursive_doubling.RING_RANKS:
            return recursive_doubling.summed(total, self.rank, self.world).tolist()
        dist.all_reduce(total)
        return total.tolist()

    def all_true(self, value: bool) -> bool:
        """Return whether it is true on every rank: a sum, where gathering objects passes a message per rank, twice."""
        return self.sum_over_ranks(value)[0] == self.world

    def barrier(self) -> None:
        """Barrier over all ranks, on the host's numbers."""
        self.sum_over_ranks(0.0)

    @functools.cached_property
    def _host_group(self) -> Any:
        """A gloo group of its own: pickled objects over NCCL would wait for the accelerator."""
        return dist.new_group(backend="gloo") if self.device.type == "cuda" else None
