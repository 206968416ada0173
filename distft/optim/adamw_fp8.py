"""AdamW with fp8 moments (e4m3) in blocks of 256: 2.03 bytes of state per element instead of 8.

Tensors under 4,096 elements keep fp32 moments. Every engine: blocks are those of what a rank holds.
Source: torchao's AdamWFp8
"""

from distft.optim.block_adamw import block_adamw

SPEC = block_adamw("adamw_fp8", "EightBitFloats")
