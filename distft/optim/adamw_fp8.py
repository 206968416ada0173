"""AdamW with fp8 moments (e4m3) in blocks of 256: 2.03 bytes of state per element instead of 8.

Tensors under 4,096 elements keep fp32 moments. Every engine: blocks are those of what a rank holds.
Source: torchao's AdamWFp8
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes

if TYPE_CHECKING:
    import torch


def state_bytes(shape: tuple[int, ...]) -> StateBytes:
    """Return two moments as codes and constants, or as fp32 of a small tensor."""
    from distft.optim import block_states

    return StateBytes(per_tensor=block_states.state_bytes(block_states.EightBitFloats(), shape))


def build(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build AdamW over moments of codes."""
    from distft.optim.block_states import BlockAdamW, EightBitFloats

    return BlockAdamW(groups, EightBitFloats(), lr=params.learning_rate, betas=params.betas, eps=params.eps)


SPEC = OptimizerSpec(
    name="adamw_fp8", params=AdamParams, build=build, per_tensor=True, state_bytes=state_bytes, chunk_bytes=40 * 2**22
)
"""chunk_bytes: ten fp32 values for each element of a chunk, counted from the source."""
