"""What a way of combining several changes of one tensor declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.core.registry import NoParams, Params

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Draws = Callable[[int], "torch.Generator"]
"""Index of a source -> the generator of its random numbers for this tensor, the same whatever was combined before."""


@dataclass(frozen=True, kw_only=True)
class HowSpec:
    """A named way to make one change of several."""

    name: str
    title: str
    """What help says of it."""
    combine: Callable[[Any, Sequence[Tensor], Sequence[float], Draws], Tensor]
    """(params, changes of one tensor in fp32, their weights, random numbers) -> the combined change."""
    params: type[Params] = NoParams
    takes_weights: bool = True
    num_sources: int | None = None
    """How many adapters it takes; None: any number."""
    keeps_factors: bool = False
    """The result is the weighted sum, made from the factors, so that no change is ever dense."""
    keeps_ranks: bool = False
    """Nothing is cut: the result's rank is the sum of the ranks."""
