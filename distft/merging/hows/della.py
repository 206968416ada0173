"""DELLA: drop entries at random, small ones more often than large ones, rescale each by its own chance, elect signs.

Source: Deep et al., https://arxiv.org/abs/2406.11617: the chance to drop grows from p - epsilon / 2 for the largest
entry of a row to p + epsilon / 2 for its smallest, with p = 1 - density; what is kept is divided by its chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from distft.merging.hows.pruning import SeededDensityParams, elected
from distft.merging.hows.spec import Draws, HowSpec

if TYPE_CHECKING:
    from torch import Tensor


class DellaParams(SeededDensityParams):
    """DELLA's settings."""

    epsilon: float = Field(default=0.1, ge=0, lt=1)
    """How much more often the smallest entry of a row is dropped than its largest."""
    normalize: bool = False
    """Divide by the weights of the changes that agree; false, as in mergekit: their sum."""

    @model_validator(mode="after")
    def _chances(self) -> Self:
        if self.density - self.epsilon / 2 <= 0 or self.density + self.epsilon / 2 > 1:
            raise ValueError(
                f"density {self.density} with epsilon {self.epsilon}: chances from {self.density - self.epsilon / 2:g} "
                f"to {self.density + self.epsilon / 2:g} must lie between 0 and 1"
            )
        return self


def chances_to_keep(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return each entry's chance to be kept, by its place among the sizes of its row (a vector is one row)."""
    import torch

    rows = delta.reshape(-1, delta.shape[-1])
    count = rows.shape[1]
    place = rows.abs().argsort(-1).argsort(-1).to(rows.dtype)  # 0: the smallest
    step = place / (count - 1) if count > 1 else torch.full_like(place, 0.5)
    return (density - epsilon / 2 + epsilon * step).reshape(delta.shape)


def _combine(params: DellaParams, deltas: Sequence[Tensor], weights: Sequence[float], draws: Draws) -> Tensor:
    import torch

    kept = []
    for index, delta in enumerate(deltas):
        chance = chances_to_keep(delta, params.density, params.epsilon)
        kept.append(delta * (torch.rand(delta.shape, generator=draws(index)) < chance) / chance)
    return elected(kept, weights, normalize=params.normalize)


SPEC = HowSpec(
    name="della",
    title="random entries, small ones dropped more often, elected sign (2406.11617)",
    combine=_combine,
    params=DellaParams,
)
