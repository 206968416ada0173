"""AdamW with 4-bit moments in blocks of 128: 1.06 bytes of state per element instead of 8.

Tensors under 4,096 elements keep fp32 moments. Every engine: blocks are those of what a rank holds.
Source: https://arxiv.org/abs/2309.01507 (Li et al., Memory Efficient Optimizers with 4-bit States); torchao's AdamW4bit
"""

from distft.optim.block_adamw import block_adamw

SPEC = block_adamw("adamw_4bit", "FourBits")
