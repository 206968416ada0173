"""TIES: keep each change's largest entries, elect a sign for each entry, and average those that have it.

Source: Yadav et al., https://arxiv.org/abs/2306.01708. The paper trims over the whole model; here, as in mergekit, each
tensor is trimmed for itself, so that layers are read one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.merging.hows.pruning import DensityParams, elected, largest
from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor


class TiesParams(DensityParams):
    """TIES's settings."""

    normalize: bool = True
    """Divide by the weights of the changes that agree, as the paper's mean; false: their sum."""
    scale: float = 1.0
    """Factor of the result; the paper's lambda."""


def _combine(params: TiesParams, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    trimmed = [largest(delta, params.density) for delta in deltas]
    return params.scale * elected(trimmed, weights, normalize=params.normalize)


SPEC = HowSpec(
    name="ties",
    title="largest entries, elected sign, mean of those that agree (2306.01708)",
    combine=_combine,
    params=TiesParams,
)
