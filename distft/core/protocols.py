"""Declares the protocols of what the loop is given: step source, guard, best tracker, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distft.core.types import Batch, StepReport, TrainState


class StepSource(Protocol):
    """Training data cut into optimizer steps: prepared rows, or what is made while training."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        ...

    def epoch_at(self, samples: int) -> float:
        """Return the passes over the rows that are done once `samples` sequences are consumed."""
        ...

    def samples_in(self, step: int) -> int:
        """Return the sequences of a 0-based step on all ranks; the last one may be short."""
        ...

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step from `step` on; as many per step on every rank."""
        ...


class BatchColumns(Protocol):
    """What fills the columns that an objective asks for, such as a reference's log-probabilities."""

    def fill(self, micros: list[Batch]) -> list[Batch]:
        """Collective, once a step, without gradients: return the micro-batches with their columns."""
        ...

    def begin(self, micros: Sequence[Batch]) -> Callable[[Batch], Batch]:
        """Collective, once an evaluation, in evaluation mode: return what gives each micro-batch its columns."""
        ...


@dataclass(frozen=True)
class _NoColumns:
    def fill(self, micros: list[Batch]) -> list[Batch]:
        """Return them as they are."""
        return micros

    def begin(self, micros: Sequence[Batch]) -> Callable[[Batch], Batch]:
        """Return what changes nothing."""
        return lambda micro: micro


NO_COLUMNS: BatchColumns = _NoColumns()
"""The filler for objectives that ask for none."""


@dataclass(frozen=True, kw_only=True)
class Every:
    """When things happen between steps, as predicates of the number of steps taken."""

    log: Callable[[int], bool]
    eval: Callable[[int], bool]
    save: Callable[[int], bool]


class Guard(Protocol):
    """Decides about steps that go wrong (`distft.guard`)."""

    def allow_update(self, loss: float) -> bool:
        """Return whether a step of this global loss may change weights."""
        ...

    def after(self, state: TrainState, report: StepReport) -> None:
        """Collective, after every step; raises to end the run."""
        ...


class Best(Protocol):
    """Tracks the best evaluation so far (`distft.best`)."""

    @property
    def should_stop(self) -> bool:
        """Whether training may end early."""
        ...

    def update(self, state: TrainState, figures: dict[str, float] | None) -> dict[str, Any] | None:
        """Compare an evaluation with the best so far; return the content of best.json for a new best, else None."""
        ...


class Checkpoints(Protocol):
    """Saves training state for the loop (`distft.resume`)."""

    def save(self, state: TrainState, best: dict[str, Any] | None = None) -> None:
        """Collective: write the state of this step; `best` says that it is the best so far."""
        ...

    def poll(self, state: TrainState) -> None:
        """Collective, after every step: commit what was written in the background, if it is done."""
        ...
