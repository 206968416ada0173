"""AdamW whose moments live in CUDA managed memory and move to the host under pressure (bitsandbytes).

Only tensors of at least 1e5 elements are paged. Without a GPU the arithmetic is the same and nothing is paged.
Source: Dettmers et al., QLoRA, section 3 "Paged Optimizers", https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from distft.optim import adamw_8bit
from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes

if TYPE_CHECKING:
    import torch


def _build_32bit(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    from distft.optim.bitsandbytes_step import waiting_once

    return waiting_once(PagedAdamW32bit)(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps)


def _build_8bit(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    from distft.optim.bitsandbytes_step import waiting_once

    return waiting_once(PagedAdamW8bit)(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps)


SMALLEST_PAGED = 100_000
"""Elements from which on moments are allocated as managed memory (bitsandbytes' `get_state_buffer`)."""


def _state_32bit(shape: tuple[int, ...]) -> StateBytes:
    moments = 8 * prod(shape)
    return StateBytes(per_tensor=moments, pageable=moments if prod(shape) >= SMALLEST_PAGED else 0)


def _state_8bit(shape: tuple[int, ...]) -> StateBytes:
    """Count 8-bit state; constants and code books stay in ordinary memory."""
    plain = adamw_8bit.state_bytes(shape)
    return replace(plain, pageable=2 * prod(shape) if prod(shape) >= SMALLEST_PAGED else 0)


ADAMW_32BIT = OptimizerSpec(
    name="paged_adamw_32bit",
    params=AdamParams,
    build=_build_32bit,
    per_tensor=True,
    library="bitsandbytes",
    state_bytes=_state_32bit,
)
ADAMW_8BIT = OptimizerSpec(
    name="paged_adamw_8bit",
    params=AdamParams,
    build=_build_8bit,
    per_tensor=True,
    library="bitsandbytes",
    state_bytes=_state_8bit,
)
