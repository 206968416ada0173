"""Muon: the momentum of a weight matrix, made orthogonal; 4 bytes of state per element instead of Adam's 8.

It needs whole matrices, so it runs where a rank holds them: solo and ddp. Embeddings, the head, norms and biases are
updated by AdamW, as its authors do. Updates have the size of Adam's (`match_rms_adamw`), so that one learning rate,
one that AdamW would get, serves both.
Sources: Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., https://arxiv.org/abs/2502.16982
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from pydantic import Field

from distft.optim import adamw
from distft.optim.spec import AdamParams, OptimizerSpec, ParamGroups, StateBytes, fp32_moments

if TYPE_CHECKING:
    import torch


class MuonParams(AdamParams):
    """torch.optim.Muon's settings; `betas` and `eps` are those of AdamW beside it."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum that is made orthogonal."""
    nesterov: bool = True
    """Looks one step ahead along the momentum."""
    newton_schulz_steps: int = Field(default=5, ge=1, lt=100)
    """Iterations that bring singular values near 1."""


def build(params: MuonParams, groups: ParamGroups) -> torch.optim.Optimizer:
    """Build torch's own Muon beside torch's own AdamW."""
    import torch

    from distft.optim.matrix_steps import MatrixOptimizer

    return MatrixOptimizer(
        groups,
        learning_rate=params.learning_rate,
        matrices=lambda chosen: torch.optim.Muon(
            chosen,
            lr=params.learning_rate,
            momentum=params.momentum,
            nesterov=params.nesterov,
            ns_steps=params.newton_schulz_steps,
            adjust_lr_fn="match_rms_adamw",
        ),
        others=lambda rest: adamw.build(params, rest),
    )


def _matrix_bytes(params: MuonParams, shape: tuple[int, ...]) -> StateBytes:
    return StateBytes(per_tensor=4 * prod(shape))


SPEC = OptimizerSpec(
    name="muon",
    params=MuonParams,
    build=build,
    elementwise=False,
    per_tensor=True,
    state_bytes=fp32_moments(2),
    matrix_state_bytes=_matrix_bytes,
    matrix_dims=2,
    matrix_workspace_bytes=14,
)
"""matrix_workspace_bytes: Nesterov's look ahead in fp32 and five copies in bf16 while one matrix is made orthogonal."""
