"""What an objective declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.core.registry import Params

if TYPE_CHECKING:
    from torch import nn

    from distft.core.types import Batch, LossTerms


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """A named objective."""

    name: str
    params: type[Params]
    weight: Callable[[Any, Sequence[Batch]], float]
    """(params, micro-batches of one rank and step) -> what the step's loss sum is divided by, before summing over
    ranks: supervised tokens, or pairs."""
    terms: Callable[[Any, nn.Module, Batch], LossTerms]
    """(params, model, micro-batch) -> sums; calls the model once."""
    per_token: bool = False
    """Needs the loss of each token, not only of all together."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A spec with its parameters: what the loop calls."""

    spec: ObjectiveSpec
    params: Any

    def weight(self, micros: Sequence[Batch]) -> float:
        """See `ObjectiveSpec.weight`."""
        return self.spec.weight(self.params, micros)

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """See `ObjectiveSpec.terms`."""
        return self.spec.terms(self.params, model, batch)
