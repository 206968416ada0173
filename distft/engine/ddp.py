"""Whole parameters on every rank, gradients averaged once per step (torch DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distft.core.errors import MachineError
from distft.core.registry import NoParams
from distft.core.types import Weights
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine


class DdpEngine(SoloEngine):
    """Gradients meet only in the last micro-batch of a step."""

    name = "ddp"

    def _wrap(self, weights: Weights) -> nn.Module:
        module = super()._wrap(weights)
        on = [self.device] if self.device.type == "cuda" else None
        # init_sync would broadcast what every rank already filled from the same source.
        wrapped = DistributedDataParallel(module, device_ids=on, gradient_as_bucket_view=True, init_sync=False)
        spans = dist.get_world_size(wrapped.process_group)
        if spans != self.world:
            raise MachineError(f"ddp spans {spans} processes, {self.world} were started")
        return wrapped

    def _unwrapped(self) -> nn.Module:
        assert isinstance(self.model, DistributedDataParallel)
        return self.model.module

    @contextlib.contextmanager
    def accumulating(self, *, last: bool, seed: int) -> Iterator[None]:
        """No gradient traffic before the last micro-batch."""
        assert isinstance(self.model, DistributedDataParallel)
        quiet = contextlib.nullcontext() if last else self.model.no_sync()
        with super().accumulating(last=last, seed=seed), quiet:
            yield


def open_engine(name: str, params: NoParams, placed: Processes) -> DdpEngine:
    """The engine, before it has a model."""
    return DdpEngine(placed)
