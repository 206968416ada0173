"""AdamW with block-wise 8-bit moments (bitsandbytes): 2 bytes of state per element instead of 8.

Tensors under 4,096 elements keep fp32 moments (the library's rule): at that size nothing is saved.
Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups

if TYPE_CHECKING:
    import torch


def build(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Moments are quantised in blocks of 256 elements."""
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps)


SPEC = OptimizerSpec(name="adamw_8bit", params=AdamParams, build=build, library="bitsandbytes")
