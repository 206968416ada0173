"""DARE: drop entries of each change at random, rescale the rest, and take the weighted sum.

Source: Yu et al., https://arxiv.org/abs/2311.03099
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.merging.hows.linear import weighted_sum
from distft.merging.hows.pruning import SeededDensityParams, dropped
from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor


def _combine(params: SeededDensityParams, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    kept = [dropped(delta, params.density, draws(index)) for index, delta in enumerate(deltas)]
    return weighted_sum(None, kept, weights, draws)


SPEC = HowSpec(
    name="dare_linear",
    title="random entries, rescaled by 1 / density, weighted sum (2311.03099)",
    combine=_combine,
    params=SeededDensityParams,
)
