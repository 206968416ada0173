"""What an optimizer and a schedule declare about themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distft.core.registry import Params

if TYPE_CHECKING:
    import torch

ParamGroups = list[dict[str, Any]]
"""torch's form: [{"params": [...], "weight_decay": float}, ...]."""


class AdamParams(Params):
    """What every member of the Adam family is set by."""

    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases (tensors of fewer than two dimensions) are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """A named update rule."""

    name: str
    params: type[Params]
    """Has `learning_rate`, which the schedule multiplies; `weight_decay` when it decays weights."""
    build: Callable[[Any, ParamGroups], torch.optim.Optimizer]
    """(params, groups) -> optimizer; imports its library inside."""
    elementwise: bool = True
    """Each element (or fixed block of elements) is updated from itself alone, so 1-D pieces of a tensor may live
    apart. False: needs whole matrices, which sharding engines do not have."""
    library: str | None = None
    """Importable name of the package it needs beyond torch."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """A named learning-rate schedule."""

    name: str
    params: type[Params]
    build: Callable[[Any, int], Callable[[int], float]]
    """(params, total_steps) -> factor of the peak learning rate at a 0-based step."""
