"""Keep each change's largest entries and take the weighted sum, without electing signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.merging.hows.linear import weighted_sum
from distft.merging.hows.pruning import DensityParams, largest
from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor


def _combine(params: DensityParams, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    return weighted_sum(None, [largest(delta, params.density) for delta in deltas], weights, draws)


SPEC = HowSpec(name="magnitude_prune", title="largest entries, weighted sum", combine=_combine, params=DensityParams)
