"""AdamW in fp32, torch's fused kernel: the reference optimizer.

Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, fp32_moments

if TYPE_CHECKING:
    import torch


def build(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build AdamW with one kernel launch per group and step; 8 bytes of state per element."""
    import torch

    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps, fused=True)


SPEC = OptimizerSpec(name="adamw", params=AdamParams, build=build, per_tensor=True, state_bytes=fp32_moments(2))
