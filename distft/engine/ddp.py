"""Whole parameters on every rank, gradients averaged once per step.

Torch's DistributedDataParallel does that, but adds the micro-batches of a step, and ranks, in the parameters' type. Of
a bf16 model with several micro-batches a step, fp32 sums are averaged here, bucket by bucket while the last backward
runs; with one, DistributedDataParallel's buckets travel in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distft.core.errors import MachineError
from distft.core.types import Weights
from distft.engine.gradient_sums import GradientSums
from distft.engine.params import EngineParams
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine

BUCKET_ELEMENTS = 2**23
"""fp32 elements that travel together, 32 MiB: DistributedDataParallel's bucket has 25 MiB."""


class DdpEngine(SoloEngine):
    """Gradients meet only in the last micro-batch of a step."""

    name = "ddp"

    def _wrap(self, weights: Weights) -> nn.Module:
        module = super()._wrap(weights)
        if self._sums_apart:
            return module
        on = [self.device] if self.device.type == "cuda" else None
        # init_sync would broadcast what every rank already filled from the same source.
        wrapped = DistributedDataParallel(module, device_ids=on, gradient_as_bucket_view=True, init_sync=False)
        self._check_spans(dist.get_world_size(wrapped.process_group))
        if weights.dtype != torch.float32 and self._grad_dtype != "bfloat16":
            wrapped.register_comm_hook(None, _average_in_fp32)
        _settle_buckets(wrapped)
        return wrapped

    def _add_in_fp32(self) -> GradientSums:
        self._check_spans(dist.get_world_size())
        return AveragedSums(self._unwrapped().parameters(), world=self.world)

    def _check_spans(self, spans: int) -> None:
        if spans != self.world:
            raise MachineError(f"ddp spans {spans} processes, {self.world} were started")

    def _unwrapped(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @contextlib.contextmanager
    def accumulating(self, *, last: bool, seed: int) -> Iterator[None]:
        """Send no gradients before the last micro-batch."""
        quiet = contextlib.nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            quiet = self.model.no_sync()
        with super().accumulating(last=last, seed=seed), quiet:
            yield


@dataclass(kw_only=True, eq=False)
class _Bucket:
    """Sums that are averaged in one message."""

    params: list[nn.Parameter] = field(default_factory=list)
    flat: Tensor | None = None
    """Its sums end to end; there from the first gradient of a step on."""
    missing: int = 0
    """Parameters whose last gradient of the step is not there yet."""
    sent: Any = None
    """The work of its all-reduce."""

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)


class AveragedSums(GradientSums):
    """fp32 sums, averaged over ranks as they become complete in the last micro-batch of a step.

    Buckets are cut once, in the reverse of the parameters' order, which is about the order gradients arrive in, and
    sent in that order on every rank, whichever is complete first.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, world: int) -> None:
        trained = [param for param in params if param.requires_grad]
        super().__init__(trained, all_types=True)
        self._world = world
        self._last = False
        self._next = 0
        self._buckets: list[_Bucket] = []
        self._of: dict[nn.Parameter, _Bucket] = {}
        for param in reversed(trained):
            bucket = self._buckets[-1] if self._buckets else None
            if bucket is None or bucket.numel + param.numel() > BUCKET_ELEMENTS:
                bucket = _Bucket()
                self._buckets.append(bucket)
            bucket.params.append(param)
            self._of[param] = bucket

    def begin_micro(self, *, last: bool) -> None:
        """Count down from every parameter in the last micro-batch."""
        self._last, self._next = last, 0
        for bucket in self._buckets:
            bucket.missing, bucket.sent = len(bucket.params), None

    def finish(self) -> None:
        """Send what no gradient has completed (a part of the model that took no part), and wait for all."""
        if not self._last:
            return
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for bucket in self._buckets:
            bucket.sent.wait()
            bucket.sent = None  # holds the bucket's memory
        self._last = False

    def drop(self, param: nn.Parameter) -> None:
        """Drop a sum; a bucket's memory is free when the last of its sums is dropped."""
        super().drop(param)
        self._of[param].flat = None

    def _first(self, param: nn.Parameter, gradient: Tensor) -> Tensor:
        self._make(self._of[param])
        return self._sums[param].copy_(gradient)

    def _make(self, bucket: _Bucket) -> None:
        """Make zeros for all of its parameters."""
        bucket.flat = torch.zeros(bucket.numel, dtype=torch.float32, device=bucket.params[0].device)
        parts = bucket.flat.split([param.numel() for param in bucket.params])
        for param, part in zip(bucket.params, parts, strict=True):
            self._sums[param] = part.view_as(param)

    def _add(self, param: Tensor) -> None:
        super()._add(param)
        assert isinstance(param, nn.Parameter)
        bucket = self._of[param]
        bucket.missing -= 1
        assert bucket.missing >= 0 or not self._last, "a gradient arrived twice in one backward pass"
        while self._last and self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: _Bucket) -> None:
        if bucket.flat is None:
            self._make(bucket)
        assert bucket.flat is not None
        bucket.sent = dist.all_reduce(bucket.flat.div_(self._world), async_op=True)


def _average_in_fp32(_, bucket):
    """Average a bf16 bucket over ranks, added in fp32 and rounded once; torch refuses string annotations."""
    mean = bucket.buffer().float().div_(dist.get_world_size())

    def rounded(done: torch.futures.Future[Any]) -> Tensor:
        return bucket.buffer().copy_(done.value()[0])

    work: Any = dist.all_reduce(mean, async_op=True)
    return work.get_future().then(rounded)


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


def open_engine(name: str, params: EngineParams, processes: Processes) -> DdpEngine:
    """Return the engine, before it has a model."""
    return DdpEngine(params, processes)
