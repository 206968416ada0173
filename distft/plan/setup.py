"""One way of running a recipe on one machine: every choice made, nothing computed yet."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from distft.core.accelerators import Accelerator
from distft.engine import ENGINES
from distft.engine.auto import choose as choose_engine
from distft.engine.groups import group_size
from distft.engine.processes import Processes
from distft.model import cross_entropy
from distft.model.cross_entropy import HeadLoss
from distft.plan import kernels
from distft.plan.rates import ASSUMED, Rates
from distft.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of one kind in nodes of one size."""

    gpu: Accelerator
    gpus_per_node: int
    nodes: int = 1
    rates: Rates = ASSUMED
    """What these GPUs reach."""

    @property
    def world(self) -> int:
        """Processes: one for each GPU."""
        return self.gpus_per_node * self.nodes

    @property
    def link_bytes_per_s(self) -> float:
        """Slowest link that a collective over all GPUs crosses."""
        return self.gpu.link_bytes_per_s if self.nodes == 1 else self.gpu.between_nodes_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What memory and speed follow from, together with the model."""

    recipe: Recipe
    machine: Machine
    engine: str
    micro_batch_size: int
    micros_per_step: int
    checkpointing: str
    """off | selective | full."""
    loss: str
    """fused | chunked | full."""

    @property
    def tokens(self) -> int:
        """Of one micro-batch: packed sequences are taken as full."""
        return self.micro_batch_size * self.recipe.data.max_length

    @property
    def offload(self) -> str:
        """None | optimizer | all."""
        params: Any = self.recipe.engine.params
        return getattr(params, "offload", "none")

    @property
    def shards(self) -> int:
        """Ranks that cut one tensor among themselves, under an engine that cuts: all, or those of a group (fsdp2)."""
        return self._group if self.engine == "fsdp2" else self.machine.world

    @property
    def second_copy_over(self) -> int:
        """zero3: ranks that keep a second copy of the weights among them; 0: there is none."""
        return self._group if self.engine == "zero3" and self._group < self.machine.world else 0

    @property
    def gathers_once(self) -> bool:
        """fsdp2: weights stay whole, and gradients unreduced, over the micro-batches of a step."""
        params: Any = self.recipe.engine.params
        return self.engine == "fsdp2" and getattr(params, "gather", "") == "once_a_step"

    @property
    def _group(self) -> int:
        params: Any = self.recipe.engine.params
        within: int | str = getattr(params, "shard_within", "world")
        if isinstance(within, int):
            return within
        return self.machine.world if within == "world" else self.machine.gpus_per_node

    @property
    def head_loss(self) -> HeadLoss:
        """What runs, or on the meta device stands for it (see `distft.model.cross_entropy.choose`)."""
        per_token = self.recipe.objective.spec.per_token
        return {
            "fused": kernels.fused_loss,
            "chunked": cross_entropy.chunked_loss if per_token else cross_entropy.chunked_sum,
            "full": cross_entropy.full_loss,
        }[self.loss]

    @property
    def kernel(self) -> str:
        """What attends on a GPU: a kernel that keeps no [T, T] matrix, whichever package it comes from; or eager."""
        return kernels.EAGER if self.recipe.model.attention == "eager" else kernels.FLASH


def has_liger() -> bool:
    """Whether liger-kernel, and with it the fused loss, is installed here."""
    return importlib.util.find_spec("liger_kernel") is not None


def loss_of(recipe: Recipe, *, liger: bool) -> str:
    """The head's loss on a GPU (see `distft.model.cross_entropy.choose`); `liger`: the package is there."""
    wanted = recipe.model.cross_entropy
    if wanted != "auto":
        return wanted
    return "fused" if liger and not recipe.objective.spec.per_token else "chunked"


def resolve_engine(recipe: Recipe, machine: Machine, *, wants: str = "") -> str:
    """The engine the job would run on this machine; `wants`: what its launcher was configured for.

    Raises:
        MachineError: it cannot.
    """
    params: Any = recipe.engine.params
    there = Processes(
        rank=0,
        world=machine.world,
        local_rank=0,
        device=torch.device("cuda"),
        launcher="plan",
        wants=wants,
        joined=False,
        local_world=machine.gpus_per_node,
    )
    group_size(getattr(params, "shard_within", "world"), there)
    name, _ = choose_engine(
        recipe.engine.name,
        ENGINES,
        there,
        trains_all=not recipe.method.spec.adapter,
        elementwise=recipe.optim.spec.elementwise,
        offload=getattr(recipe.engine.params, "offload", "none"),
    )
    return name
