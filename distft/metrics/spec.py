"""What a metric is: something that sees micro-batches and steps, and reads out numbers named with their unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from distft.core.types import Batch, LossTerms, StepReport, TrainState


class Metric(Protocol):
    """One instance per run and rank. Nothing here may wait for the accelerator except `read`."""

    def start(self) -> None:
        """Start before the first step, and again after a pause (an evaluation) between two steps."""
        ...

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Take note of a micro-batch of this rank."""
        ...

    def step(self, state: TrainState, report: StepReport) -> None:
        """Take note of an optimizer step; `state` and `report` are equal on all ranks."""
        ...

    def read(self) -> dict[str, float | None]:
        """Return the step's figures by name; None where this machine cannot say."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What metrics may want to know about the run; fixed before the first step."""

    world: int
    device_name: str
    """"cpu" or the accelerator's product name."""
    flops_per_token: float
    """Matrix-product FLOPs per token, forward and backward, without attention scores."""
    flops_per_squared_length: float
    """Attention FLOPs per (document length)**2, forward and backward, causal."""
    start: TrainState


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A named metric."""

    name: str
    build: Callable[[RunFacts], Metric]
