"""Adafactor: the second moment of a matrix kept as one row and one column; almost no state.

It needs whole matrices, so it runs where a rank holds them: solo and ddp.
Source: Shazeer & Stern, https://arxiv.org/abs/1804.04235
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from pydantic import Field

from distft.core.registry import Params
from distft.optim.spec import OptimizerSpec, ParamGroups, StateBytes

if TYPE_CHECKING:
    import torch


class AdafactorParams(Params):
    """torch.optim.Adafactor's settings."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Upper bound of the relative step size."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases are left out."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """Exponent of the second moment's decay: beta2 = 1 - step ** beta2_decay."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root-mean-square of an update."""


def build(params: AdafactorParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build torch's own implementation."""
    import torch

    return torch.optim.Adafactor(
        groups, lr=params.learning_rate, beta2_decay=params.beta2_decay, d=params.clip_threshold
    )


def _state_bytes(shape: tuple[int, ...]) -> StateBytes:
    """Count fp32: one row and one column of every matrix, a whole second moment of a vector."""
    if len(shape) < 2:
        return StateBytes(per_tensor=4 * prod(shape))
    *outer, rows, columns = shape
    return StateBytes(per_tensor=4 * prod(outer) * (rows + columns))


SPEC = OptimizerSpec(
    name="adafactor",
    params=AdafactorParams,
    build=build,
    elementwise=False,
    per_tensor=True,
    state_bytes=_state_bytes,
    update_bytes=4,
)
"""update_bytes: torch forms the whole second moment of all matrices, rows times columns, before it updates any."""
