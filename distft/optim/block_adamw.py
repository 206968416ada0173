"""What optimizers over moments of codes share (`distft.optim.block_states`), without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes

if TYPE_CHECKING:
    import torch

    from distft.optim.block_states import BlockFormat


def block_adamw(name: str, code_format: str) -> OptimizerSpec:
    """Return AdamW over moments in a format, by the name of its class in `block_states`."""

    def formatted() -> BlockFormat:
        from distft.optim import block_states

        return getattr(block_states, code_format)()

    def state_bytes(shape: tuple[int, ...]) -> StateBytes:
        from distft.optim import block_states

        return StateBytes(per_tensor=block_states.state_bytes(formatted(), shape))

    def build(params: AdamParams, groups: ParamGroups) -> torch.optim.Optimizer:
        from distft.optim.block_states import BlockAdamW

        return BlockAdamW(groups, formatted(), lr=params.learning_rate, betas=params.betas, eps=params.eps)

    return OptimizerSpec(
        name=name,
        params=AdamParams,
        build=build,
        per_tensor=True,
        state_bytes=state_bytes,
        chunk_bytes=40 * 2**22,  # ten fp32 values for each element of a chunk, counted from the source
    )
