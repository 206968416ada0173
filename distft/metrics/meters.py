"""Collects a step's figures from every metric and hands them to every sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from distft.core.types import Batch, LossTerms, StepReport, TrainState
from distft.metrics.spec import Metric


class Sink(Protocol):
    """Somewhere figures go; only rank 0 has any."""

    every_step: bool
    """Takes every optimizer step; otherwise only those the recipe's log interval names."""

    def write(self, record: dict[str, Any]) -> None:
        """Write one flat record: step, position, figures."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class Meters:
    """What the loop reports to."""

    def __init__(self, metrics: Sequence[Metric], sinks: Sequence[Sink], *, epoch_at: Callable[[int], float]) -> None:
        self._metrics, self._sinks = metrics, sinks
        self._epoch_at = epoch_at

    def start(self) -> None:
        """Start the clock: what came before is not a step's time."""
        for metric in self._metrics:
            metric.start()

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Take note of a micro-batch."""
        for metric in self._metrics:
            metric.micro(batch, terms)

    def step(self, state: TrainState, report: StepReport, *, log: bool) -> None:
        """Take note of an optimizer step."""
        for metric in self._metrics:
            metric.step(state, report)
        wanted = [sink for sink in self._sinks if log or sink.every_step]
        if wanted:
            record = self._position(state)
            for metric in self._metrics:
                record |= metric.read()
            for sink in wanted:
                sink.write(record)

    def evaluated(self, state: TrainState, figures: dict[str, float] | None) -> None:
        """Take note of an evaluation; None when it was interrupted, empty when nothing was evaluated."""
        if not figures:
            return
        for sink in self._sinks:
            sink.write(self._position(state) | figures)

    def close(self) -> None:
        """Flush every sink."""
        for sink in self._sinks:
            sink.close()

    def _position(self, state: TrainState) -> dict[str, Any]:
        return {
            "step": state.step,
            "epoch": round(self._epoch_at(state.samples), 6),
            "samples": state.samples,
            "tokens": state.tokens,
            "tokens_loss": state.tokens_loss,
        }
