"""What an optimizer and a schedule declare about themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distft.core.registry import Params

if TYPE_CHECKING:
    import torch

ParamGroups = list[dict[str, Any]]
"""torch's form: [{"params": [...], "weight_decay": float}, ...]."""


MATRIX = "matrix"
"""Key of a parameter group: True where it holds weight matrices of transformer blocks, for optimizers that ask."""


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
class StateBytes:
    """Bytes of state an optimizer keeps for one tensor, without its step counter."""

    per_tensor: int
    """Bytes that belong to this tensor alone."""
    pageable: int = 0
    """The part of `per_tensor` that a GPU may keep in managed memory."""
    shared: int = 0
    """Code books: once for the whole optimizer, however many tensors use them."""


def fp32_moments(count: int) -> Callable[[tuple[int, ...]], StateBytes]:
    """Return the state of an optimizer that keeps `count` fp32 values for each element."""
    return lambda shape: StateBytes(per_tensor=4 * count * prod(shape))


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
    per_tensor: bool = False
    """`step()` changes the tensors that have a gradient, each from its own state alone, so that an update may take a
    few tensors at a time and needs fp32 gradients of those only. False: it gets all of them at once."""
    library: str | None = None
    """Importable name of the package it needs beyond torch."""
    state_bytes: Callable[[tuple[int, ...]], StateBytes] | None = None
    """Shape of an fp32 tensor -> what is kept for it. None: a plan steps the optimizer once on small tensors and
    counts."""
    matrix_state_bytes: Callable[[Any, tuple[int, ...]], StateBytes] | None = None
    """(params, shape) -> what is kept for a weight matrix of a transformer block, which then is in a group of its own
    (`MATRIX`) and has another rule than embeddings, the head, norms and biases. None: one rule for all."""
    matrix_dims: int | None = None
    """Most dimensions of a weight matrix; None: leading ones are batches of matrices."""
    matrix_workspace_bytes: int = 0
    """Made for each element of one weight matrix while it is updated, freed after it."""
    chunk_bytes: int = 0
    """Made while any tensors are updated, whatever their size, freed after it."""
    update_bytes: int = 0
    """Made for each trained element while all tensors are updated at once, freed after it."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """A named learning-rate schedule."""

    name: str
    params: type[Params]
    build: Callable[[Any, int], Callable[[int], float]]
    """(params, total_steps) -> factor of the peak learning rate at a 0-based step."""
