"""APOLLO: the gradient itself, scaled as Adam would scale it in a random space of few dimensions.

All parameters are trained with the memory of SGD and a little. It needs whole matrices, so it runs where a rank holds
them: solo and ddp. Embeddings, the head, norms and biases are updated by AdamW. APOLLO-Mini is
`rank = 1, scale = 128, scale_by = "tensor"`.
Source: Zhu et al., https://arxiv.org/abs/2412.05270 (the updates of its code, `apollo_torch`; projections are drawn
anew from seeds instead of being kept, and weight decay comes before the update, as in AdamW).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.optim import adamw
from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes, fp32_moments

if TYPE_CHECKING:
    import torch


class ApolloParams(AdamParams):
    """What the projection is set by, beside Adam's settings."""

    rank: int = Field(default=256, ge=1)
    """Dimensions of the random space; at most the matrix's shorter side."""
    update_gap: int = Field(default=200, ge=1)
    """Steps between two projections."""
    scale: float = Field(default=1.0, gt=0)
    """The update of a projected matrix is multiplied by its square root."""
    scale_by: Literal["channel", "tensor"] = "channel"
    """One factor for each channel of a matrix, or one for all of it."""


def build(params: ApolloParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build the low-rank step beside torch's own AdamW."""
    from distft.optim.matrix_steps import ApolloStep, LowRankSettings, MatrixOptimizer

    settings = LowRankSettings(
        rank=params.rank, update_gap=params.update_gap, scale=params.scale, betas=params.betas, eps=params.eps
    )
    return MatrixOptimizer(
        groups,
        learning_rate=params.learning_rate,
        matrices=lambda chosen: ApolloStep(chosen, settings, tensor=params.scale_by == "tensor"),
        others=lambda rest: adamw.build(params, rest),
    )


def _matrix_bytes(params: ApolloParams, shape: tuple[int, ...]) -> StateBytes:
    """Count two moments of the longer side and one norm of each matrix, in fp32."""
    *batch, rows, columns = shape
    rank = min(params.rank, rows, columns)
    return StateBytes(per_tensor=4 * prod(batch) * (2 * rank * max(rows, columns) + 1))


SPEC = OptimizerSpec(
    name="apollo",
    params=ApolloParams,
    build=build,
    elementwise=False,
    per_tensor=True,
    state_bytes=fp32_moments(2),
    matrix_state_bytes=_matrix_bytes,
    matrix_workspace_bytes=8,
)
"""matrix_workspace_bytes: the scaled gradient and the update, in fp32."""
