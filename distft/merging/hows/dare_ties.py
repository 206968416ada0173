"""DARE's random dropping, and TIES's elected sign instead of a plain sum.

Sources: https://arxiv.org/abs/2311.03099, https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.merging.hows.pruning import SeededDensityParams, dropped, elected
from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor


class DareTiesParams(SeededDensityParams):
    """The settings."""

    normalize: bool = False
    """Divide by the weights of the changes that agree; false, as in mergekit: their sum."""


def _combine(params: DareTiesParams, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    kept = [dropped(delta, params.density, draws(index)) for index, delta in enumerate(deltas)]
    return elected(kept, weights, normalize=params.normalize)


SPEC = HowSpec(
    name="dare_ties",
    title="random entries, rescaled, elected sign (2311.03099 with 2306.01708)",
    combine=_combine,
    params=DareTiesParams,
)
