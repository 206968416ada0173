"""Whole parameters on every rank, gradients averaged once per step (torch DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
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
        _settle_buckets(wrapped)
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


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Have the buckets cut as they will stay, before the first step.

    DDP cuts them anew after its first backward pass, in the order gradients arrived. With three ranks or more a sum's
    rounding depends on where in its bucket a gradient lies, so the first step after a resume would differ in the last
    bit from the same step of a run that was not interrupted. A backward pass of zeros, which reaches the last layers
    first as a real one does, has the new cut made at the first forward of either.
    """
    params = [param for param in wrapped.module.parameters() if param.requires_grad]
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    torch.stack([param.sum() * 0.0 for param in params]).float().sum().backward()
    for param in params:
        param.grad = None


def open_engine(name: str, params: NoParams, placed: Processes) -> DdpEngine:
    """The engine, before it has a model."""
    return DdpEngine(placed)
