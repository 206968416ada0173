"""AdamW whose moments live in CUDA managed memory and move to the host under pressure (bitsandbytes).

Only tensors of at least 1e5 elements are paged. Without a GPU the arithmetic is the same and nothing is paged.
Source: Dettmers et al., QLoRA, section 3 "Paged Optimizers", https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups

if TYPE_CHECKING:
    import torch


def _build_32bit(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    return PagedAdamW32bit(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps)


def _build_8bit(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    return PagedAdamW8bit(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps)


ADAMW_32BIT = OptimizerSpec(name="paged_adamw_32bit", params=AdamParams, build=_build_32bit, library="bitsandbytes")
ADAMW_8BIT = OptimizerSpec(name="paged_adamw_8bit", params=AdamParams, build=_build_8bit, library="bitsandbytes")
