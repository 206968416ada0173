"""Two changes, interpolated along the arc between their directions, tensor by tensor.

Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; as mergekit does with weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from distft.core.registry import Params
from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 0.9995
"""Cosine from which on the arc is a line, and the formula divides by nearly nothing."""


class SlerpParams(Params):
    """Slerp's settings."""

    t: float = Field(ge=0, le=1)
    """Place on the way: 0 is the first adapter, 1 the second."""


def _combine(params: SlerpParams, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    import torch

    first, second = deltas
    norms = first.norm() * second.norm()
    cosine = float((first * second).sum() / norms) if norms > 0 else 1.0
    if abs(cosine) > _PARALLEL:
        return (1 - params.t) * first + params.t * second
    angle = torch.arccos(torch.tensor(cosine))
    ours, theirs = (torch.sin(part * angle) / torch.sin(angle) for part in (1 - params.t, params.t))
    return ours * first + theirs * second


SPEC = HowSpec(
    name="slerp",
    title="two adapters, along the arc between their changes",
    combine=_combine,
    params=SlerpParams,
    takes_weights=False,
    num_sources=2,
)
