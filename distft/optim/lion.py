"""Lion: the sign of an interpolated momentum; 4 bytes of state per element (bitsandbytes).

Source: Chen et al., Symbolic Discovery of Optimization Algorithms, https://arxiv.org/abs/2302.06675
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from distft.core.registry import Params
from distft.optim.spec import OptimizerSpec, ParamGroups, fp32_moments

if TYPE_CHECKING:
    import torch


class LionParams(Params):
    """Lion wants about a tenth of AdamW's learning rate and ten times its weight decay."""

    learning_rate: float = Field(default=2e-6, gt=0)
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases are left out."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Interpolation of the update, and decay of the momentum."""


def build(params: LionParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Return the 32-bit variant."""
    from bitsandbytes.optim.lion import Lion32bit

    from distft.optim.bitsandbytes_step import waiting_once

    return waiting_once(Lion32bit)(groups, lr=params.learning_rate, betas=params.betas)


SPEC = OptimizerSpec(
    name="lion", params=LionParams, build=build, per_tensor=True, library="bitsandbytes", state_bytes=fp32_moments(1)
)
