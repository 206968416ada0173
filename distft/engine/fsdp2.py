"""Parameters, gradients and optimizer state sharded by rows, gathered block by block (torch fully_shard).

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distft.core.errors import MachineError
from distft.core.types import Weights
from distft.engine.fragments import Fragment
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine
from distft.engine.spec import Fsdp2Params


class Fsdp2Engine(SoloEngine):
    """A block is filled on the device and sharded before the next one is filled: no rank ever holds the model."""

    name = "fsdp2"
    sharded = True

    def __init__(self, params: Fsdp2Params, placed: Processes) -> None:
        super().__init__(placed)
        self._offload: OffloadPolicy = (
            CPUOffloadPolicy(pin_memory=placed.device.type == "cuda") if params.offload == "all" else OffloadPolicy()
        )

    def _wrap(self, weights: Weights) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for unit in [*weights.blocks, weights.module]:
            weights.fill(unit, self.device)
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=self._offload)
        self._check_sharded(weights.module)
        return weights.module

    def _check_sharded(self, module: nn.Module) -> None:
        name, biggest = max(module.named_parameters(), key=lambda item: item[1].numel())
        if not isinstance(biggest, DTensor) or biggest.to_local().numel() > -(-biggest.shape[0] // self.world) * (
            biggest.numel() // biggest.shape[0]
        ):
            raise MachineError(f"fsdp2 was asked for, but {name} is whole on rank {self.rank}")

    def _fragments(self, *, whole: bool = False) -> Iterator[Fragment]:
        """Whole rows: rank r holds the r-th of `world` equal chunks of rows, rounded up."""
        shapes = {name: param.shape for name, param in self._unwrapped().named_parameters()}
        for name, flat in self._owned:
            rows, numel = shapes[name][0], shapes[name].numel()
            start = min(self.rank * -(-rows // self.world), rows) * (numel // rows)
            layout = f"rows-{self.rank}-of-{self.world}/{name}"
            yield Fragment(name=name, numel=numel, start=start, length=flat.numel(), flat=flat, offset=0, layout=layout)

    def _whole(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            on_device: Any = tensor.to(self.device)  # gloo and NCCL gather where their group lives
            tensor = on_device.full_tensor()
        return super()._whole(tensor)

    def _summed(self, values: Tensor) -> list[float]:
        dist.all_reduce(values)
        return values.tolist()


def open_engine(name: str, params: Fsdp2Params, placed: Processes) -> Fsdp2Engine:
    """The engine, before it has a model."""
    return Fsdp2Engine(params, placed)
