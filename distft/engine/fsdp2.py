"""Parameters, gradients and optimizer state sharded by rows, gathered block by block (torch fully_shard).

Ranks form a grid of `replicas` x `shards`: each tensor is cut among the ranks of a group and repeated over the groups,
so gathers stay inside a group (a node) and only gradients cross between groups. One group of all is plain sharding.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distft.core.errors import MachineError
from distft.core.types import Weights
from distft.engine.fragments import Fragment
from distft.engine.gradient_sums import GradientSums
from distft.engine.groups import group_size
from distft.engine.params import Fsdp2Params
from distft.engine.processes import Processes
from distft.engine.solo import SoloEngine


class Fsdp2Engine(SoloEngine):
    """A block is filled on the device and sharded before the next one is filled: no rank ever holds the model."""

    name = "fsdp2"
    sharded = True
    collective_forward = True

    def __init__(self, params: Fsdp2Params, processes: Processes) -> None:
        super().__init__(params, processes)
        self._offload: OffloadPolicy = (
            CPUOffloadPolicy(pin_memory=processes.device.type == "cuda") if params.offload == "all" else OffloadPolicy()
        )
        self._once_a_step = params.gather == "once_a_step"
        self._shards = group_size(params.shard_within, processes)
        self._replicas = processes.world // self._shards
        self._replica, self._shard = divmod(processes.rank, self._shards)

    def _wrap(self, weights: Weights) -> nn.Module:
        if self._replicas == 1:
            mesh = init_device_mesh(self.device.type, (self.world,))
        else:
            names = ("replicas", "shards")
            mesh = init_device_mesh(self.device.type, (self._replicas, self._shards), mesh_dim_names=names)
        reduced = torch.bfloat16 if self._grad_dtype == "bfloat16" else torch.float32
        policy = MixedPrecisionPolicy(reduce_dtype=reduced)
        # None: blocks are given back after their forward, and the root, which the backward needs first, is not.
        reshard = False if self._once_a_step else None
        kept_whole = {id(unit) for unit in weights.ends}
        for unit in [*weights.blocks, *weights.ends, weights.module]:
            weights.fill(unit, self.device)
            resharded = False if id(unit) in kept_whole else reshard
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=resharded, mp_policy=policy, offload_policy=self._offload
            )
        self._check_sharded(weights.module)
        return weights.module

    def _add_in_fp32(self) -> GradientSums | None:
        """Return None where the library itself adds in fp32: unreduced gradients, or a group's shares."""
        return None if self._once_a_step or self._replicas > 1 else super()._add_in_fp32()

    def _check_sharded(self, module: nn.Module) -> None:
        name, biggest = max(module.named_parameters(), key=lambda item: item[1].numel())
        rows, rest = biggest.shape[0], biggest.numel() // biggest.shape[0]
        if not isinstance(biggest, DTensor) or biggest.to_local().numel() > -(-rows // self._shards) * rest:
            raise MachineError(f"fsdp2 was asked for, but {name} is whole on rank {self.rank}")

    @contextlib.contextmanager
    def accumulating(self, *, last: bool, seed: int) -> Iterator[None]:
        """Let groups meet only in the last micro-batch.

        Gathered once a step, weights stay whole and gradients unreduced until then.
        """
        root: Any = self.model
        if self._replicas > 1:
            root.set_requires_all_reduce(last)
        if self._once_a_step:
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)
        with super().accumulating(last=last, seed=seed):
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give weights back at the end: a forward without a backward leaves them gathered."""
        with super().evaluating():
            yield
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _fragments(self, *, whole: bool = False) -> Iterator[Fragment]:
        """Yield whole rows: rank r of a group holds the r-th of `shards` equal chunks of rows, rounded up.

        Replicas write a slice of their chunk each; `whole`: each reads all of it.
        """
        shapes = {name: param.shape for name, param in self._unwrapped().named_parameters()}
        first, parts = (0, 1) if whole else (self._replica, self._replicas)
        for name, flat in self._owned:
            rows, numel = shapes[name][0], shapes[name].numel()
            start = min(self._shard * -(-rows // self._shards), rows) * (numel // rows)
            offset, end = flat.numel() * first // parts, flat.numel() * (first + 1) // parts
            yield Fragment(
                name=name,
                numel=numel,
                start=start + offset,
                length=end - offset,
                flat=flat,
                offset=offset,
                layout=f"rows-{self._shard}-of-{self._shards}/{name}",
                writes_blocks=self._replica == 0,
            )

    def _whole(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            on_device: Any = tensor.to(self.device)  # gloo and NCCL gather where their group lives
            tensor = on_device.full_tensor()
        return super()._whole(tensor)

    @property
    def _copies_of_gradients(self) -> int:
        """Every rank has rows of its own, but each gradient is there once a replica."""
        return self._replicas


def open_engine(name: str, params: Fsdp2Params, processes: Processes) -> Fsdp2Engine:
    """Return the engine, before it has a model."""
    return Fsdp2Engine(params, processes)
