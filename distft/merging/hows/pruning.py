"""Which entries of a change are kept, and the sign that most of several changes agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from distft.core.registry import Params

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DensityParams(Params):
    """What share of a change is kept."""

    density: float = Field(gt=0, le=1)
    """Share of each change's entries that is kept."""


class SeededDensityParams(DensityParams):
    """What share is kept, by random choice."""

    seed: int = Field(default=0, ge=0)
    """Of the random choice; each tensor and each adapter has numbers of its own."""


def largest(delta: Tensor, density: float) -> Tensor:
    """Return the change with all but its largest entries set to zero; at least one is kept."""
    import torch

    count = max(1, int(density * delta.numel()))
    if count >= delta.numel():
        return delta
    flat = delta.flatten()
    kept = torch.zeros_like(flat)
    index = flat.abs().topk(count).indices
    kept[index] = flat[index]
    return kept.reshape(delta.shape)


def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the change with each entry kept with probability `density`, and divided by it."""
    import torch

    kept = torch.rand(delta.shape, generator=generator) < density
    return delta * kept / density


def elected(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the weighted sum over those changes that have the sign of the whole weighted sum, entry by entry.

    `normalize`: divided by the sum of the weights of those that agree: a weighted mean instead of a sum.
    Source: https://arxiv.org/abs/2306.01708, steps 2 and 3.
    """
    import torch

    weighted = [weight * delta for delta, weight in zip(deltas, weights, strict=True)]
    sign = torch.where(sum(weighted[1:], start=weighted[0].clone()) >= 0, 1.0, -1.0)
    total, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = delta.sign() == sign
        total += delta * agrees
        share += abs(weight) * agrees
    return total / torch.where(share == 0, 1.0, share) if normalize else total
