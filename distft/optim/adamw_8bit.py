"""AdamW with block-wise 8-bit moments (bitsandbytes): 2 bytes of state per element instead of 8.

Tensors under 4,096 elements keep fp32 moments (the library's rule): at that size nothing is saved.
Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes

if TYPE_CHECKING:
    import torch


SMALLEST_8BIT = 4096
"""Elements from which on a tensor's moments are 8-bit (bitsandbytes' `min_8bit_size`)."""
BLOCK = 256
"""Elements that share an fp32 constant."""
CODE_BOOK_BYTES = 256 * 4
"""fp32 values that the codes of one moment stand for; signed for the first, unsigned for the second."""


def state_bytes(shape: tuple[int, ...]) -> StateBytes:
    """Return two moments of a byte an element and a constant a block, or of fp32 in a small tensor."""
    numel = prod(shape)
    if numel < SMALLEST_8BIT:
        return StateBytes(per_tensor=8 * numel)
    return StateBytes(per_tensor=2 * numel + 2 * 4 * -(-numel // BLOCK), shared=2 * CODE_BOOK_BYTES)


def build(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build AdamW with moments quantised in blocks of 256 elements."""
    from bitsandbytes.optim.adamw import AdamW8bit

    from distft.optim.bitsandbytes_step import waiting_once

    return waiting_once(AdamW8bit)(groups, lr=params.learning_rate, betas=params.betas, eps=params.eps)


SPEC = OptimizerSpec(
    name="adamw_8bit", params=AdamParams, build=build, per_tensor=True, library="bitsandbytes", state_bytes=state_bytes
)
