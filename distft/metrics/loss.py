"""What the optimizer step reported: loss, learning rate, gradient norm."""

from __future__ import annotations

from distft.core.types import Batch, LossTerms, StepReport, TrainState
from distft.metrics.spec import MetricSpec, RunFacts


class LossMetric:
    """`loss` is the mean over the whole step on all ranks, `grad_norm` before clipping, and the objective's figures."""

    def __init__(self, facts: RunFacts) -> None:
        self._figures: dict[str, float | None] = {}

    def start(self) -> None:
        """Do nothing: this metric has no clock."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Do nothing: the step's report has all that is needed."""

    def step(self, state: TrainState, report: StepReport) -> None:
        """Keep the report."""
        self._figures = {"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm, **report.figures}

    def read(self) -> dict[str, float | None]:
        """Return the last step's figures."""
        return self._figures


SPEC = MetricSpec(name="loss", build=LossMetric)
