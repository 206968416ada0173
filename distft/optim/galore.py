"""GaLore: Adam on gradients that are projected to a low rank; the state of a matrix shrinks to rank over its side.

It trains all parameters, unlike LoRA. It needs whole matrices, so it runs where a rank holds them: solo and ddp.
Embeddings, the head, norms and biases are updated by AdamW.
Source: Zhao et al., https://arxiv.org/abs/2403.03507 (defaults as in its code, `galore_torch`, whose updates these
are; weight decay comes before the update, as in AdamW, and not after it).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from pydantic import Field

from distft.optim import adamw
from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes, fp32_moments

if TYPE_CHECKING:
    import torch


class GaloreParams(AdamParams):
    """What the projection is set by, beside Adam's settings."""

    rank: int = Field(default=128, ge=1)
    """Singular vectors of a gradient that are kept; at most the matrix's shorter side."""
    update_gap: int = Field(default=200, ge=1)
    """Steps between two projections, each a singular value decomposition of the gradient."""
    scale: float = Field(default=0.25, gt=0)
    """Factor of the update of a projected matrix."""


def build(params: GaloreParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build the low-rank step beside torch's own AdamW."""
    from distft.optim.matrix_steps import GaloreStep, LowRankSettings, MatrixOptimizer

    settings = LowRankSettings(
        rank=params.rank, update_gap=params.update_gap, scale=params.scale, betas=params.betas, eps=params.eps
    )
    return MatrixOptimizer(
        groups,
        learning_rate=params.learning_rate,
        matrices=lambda chosen: GaloreStep(chosen, settings),
        others=lambda rest: adamw.build(params, rest),
    )


def _matrix_bytes(params: GaloreParams, shape: tuple[int, ...]) -> StateBytes:
    """Count the projection of the shorter side and two moments of the longer one, in fp32."""
    *batch, rows, columns = shape
    rank = min(params.rank, rows, columns)
    return StateBytes(per_tensor=4 * prod(batch) * rank * (min(rows, columns) + 2 * max(rows, columns)))


SPEC = OptimizerSpec(
    name="galore",
    params=GaloreParams,
    build=build,
    elementwise=False,
    per_tensor=True,
    state_bytes=fp32_moments(2),
    matrix_state_bytes=_matrix_bytes,
    matrix_workspace_bytes=12,
)
"""matrix_workspace_bytes: the update in fp32, or singular vectors beside a copy of the gradient."""
