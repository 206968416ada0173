"""Learning-rate schedules: a factor of the peak rate per 0-based optimizer step.

Warm-up step s of W has factor (s + 1) / W, so the first step already learns; the decay then runs from 1 at step W
towards `min_ratio` at the step after the last one, as in transformers' schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, model_validator

from distft.core.registry import Params
from distft.optim.spec import ScheduleSpec


class WarmupParams(Params):
    """The linear warm-up that every schedule starts with."""

    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all steps spent warming up."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps spent warming up."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps are two ways to say one thing; keep one")
        return self

    def num_warmup(self, total_steps: int) -> int:
        """Return the warm-up steps of a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_ratio or 0.0) * total_steps)


class DecayParams(WarmupParams):
    """A schedule that decays."""

    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end ÷ peak learning rate."""


class WsdParams(DecayParams):
    """Warm-up, stable, decay."""

    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of all steps, at the end, spent decaying linearly."""


def _warmed(params: WarmupParams, total: int, decay: Callable[[int, int], float]) -> Callable[[int], float]:
    """Return `decay(step, warmup)` behind the warm-up that `params` ask for."""
    warmup = params.num_warmup(total)

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else decay(step, warmup)

    return factor


def _left(step: int, start: int, end: int) -> float:
    """Return the share of [start, end) still ahead at `step`: 1 at start, 0 at end."""
    return max(0.0, (end - step) / max(1, end - start))


def _constant(params: WarmupParams, total: int) -> Callable[[int], float]:
    return _warmed(params, total, lambda step, warmup: 1.0)


def _linear(params: DecayParams, total: int) -> Callable[[int], float]:
    low = params.min_ratio
    return _warmed(params, total, lambda step, warmup: low + (1 - low) * _left(step, warmup, total))


def _cosine(params: DecayParams, total: int) -> Callable[[int], float]:
    low = params.min_ratio

    def decay(step: int, warmup: int) -> float:
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (1 - _left(step, warmup, total))))

    return _warmed(params, total, decay)


def _wsd(params: WsdParams, total: int) -> Callable[[int], float]:
    low, start = params.min_ratio, total - round(params.decay_ratio * total)
    return _warmed(params, total, lambda step, warmup: low + (1 - low) * min(1.0, _left(step, start, total)))


def _spec(name: str, params: type[Params], build: Callable[[Any, int], Callable[[int], float]]) -> ScheduleSpec:
    return ScheduleSpec(name=name, params=params, build=build)


CONSTANT = _spec("constant", WarmupParams, _constant)
LINEAR = _spec("linear", DecayParams, _linear)
COSINE = _spec("cosine", DecayParams, _cosine)
WSD = _spec("wsd", WsdParams, _wsd)
