"""What is noted while a case trains: the time of each step, its loss, its tokens, and gradients as they are held.

Steps are timed one by one on the host, which each step waits for once anyway (the finite check); the accelerator is
waited for at the two edges of the measured block only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distft.core.types import Batch, LossTerms, StepReport, TrainState

SETTLED_STEPS = 3
"""Steps without a new compiled graph before anything is measured."""
MOST_WARMUP = 40
"""Further warm-up steps that compilation may take; one that goes on is measured and flagged."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value, by linear interpolation between neighbours."""
    if len(values) == 1:
        return Spread(median=values[0], p10=values[0], p90=values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(median=statistics.median(values), p10=tenths[0], p90=tenths[-1])


class Clock:
    """A metric that times `steps` steps after at least `warmup` others; `done` when it has them."""

    def __init__(
        self,
        *,
        warmup: int,
        steps: int,
        sync: Callable[[], None] = lambda: None,
        graphs: Callable[[], int] = lambda: 0,
        edge: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with the first step of the warm-up.

        Args:
            warmup: steps to discard.
            steps: steps to measure.
            sync: waits for the accelerator.
            graphs: how many graphs have been compiled so far.
            edge: called once, between warm-up and measuring.
        """
        self._warmup, self._steps = warmup, steps
        self._sync, self._graphs, self._edge = sync, graphs, edge
        self._compiled = 0
        self._compiled_at = 0
        self._measuring = False
        self._since = 0.0
        self._began = 0.0
        self._before = TrainState()
        self._slots, self._squares = 0, 0.0
        self.discarded = 0
        """Warm-up steps."""
        self.settled = True
        """Nothing was compiled any more when measuring began."""
        self.done = False
        self.losses: list[float] = []
        """Losses of every step, warm-up included."""
        self.grad_norms: list[float] = []
        self.left_out = 0
        """Steps whose update was left out."""
        self.times_s: list[float] = []
        """Seconds of the measured steps."""
        self.block_s = 0.0
        """Seconds from edge to edge."""
        self.tokens, self.tokens_loss = 0, 0
        """Tokens of the measured steps on all ranks."""
        self.slots, self.squares = 0, 0.0
        """On this rank, of the measured steps: positions computed, filler included, and squared document lengths."""

    def start(self) -> None:
        """Begin the loop."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Take note of host figures only."""
        self._slots += len(batch.input_ids_T)
        self._squares += float(batch.squared_lengths)

    def step(self, state: TrainState, report: StepReport) -> None:
        """Take note of a step's end, as far as the host knows."""
        self.losses.append(report.loss)
        self.grad_norms.append(report.grad_norm)
        self.left_out += not report.updated
        if not self._measuring:
            if self._is_warm(len(self.losses)):
                self._begin(state)
            return
        now = time.perf_counter()
        if len(self.times_s) + 1 == self._steps:
            self._sync()
            now = time.perf_counter()
            self._end(state, now)
        self.times_s.append(now - self._since)
        self._since = now

    def read(self) -> dict[str, float | None]:
        """Return nothing: no sink writes while time is measured."""
        return {}

    def _is_warm(self, taken: int) -> bool:
        graphs = self._graphs()
        if graphs != self._compiled:
            self._compiled, self._compiled_at = graphs, taken
        if taken < self._warmup:
            return False
        self.settled = not graphs or taken - self._compiled_at >= SETTLED_STEPS
        return self.settled or taken >= self._warmup + MOST_WARMUP

    def _begin(self, state: TrainState) -> None:
        self._sync()
        self._edge()
        self._measuring, self.discarded = True, len(self.losses)
        self._before, self._slots, self._squares = state, 0, 0.0
        self._began = self._since = time.perf_counter()

    def _end(self, state: TrainState, now: float) -> None:
        self.block_s = now - self._began
        self.tokens = state.tokens - self._before.tokens
        self.tokens_loss = state.tokens_loss - self._before.tokens_loss
        self.slots, self.squares = self._slots, self._squares
        self.settled = self.settled and self._graphs() == self._compiled
        self.done = True


class Count:
    """A metric that is `done` after some steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def done(self) -> bool:
        """They are taken."""
        return self._left <= 0

    def start(self) -> None:
        """Begin the loop."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Ignore the micro-batch."""

    def step(self, state: TrainState, report: StepReport) -> None:
        """Count one step less."""
        self._left -= 1

    def read(self) -> dict[str, float | None]:
        """Return nothing."""
        return {}


class GradientBytes:
    """A metric that counts gradients after the first step's micro-batches: after the last one, what is updated from."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._first = True
        self.held = 0
        """Bytes between the last backward of the first step and its update."""

    def start(self) -> None:
        """Begin the loop."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Count sizes of storages; nothing is waited for."""
        if self._first:
            self.held = self._count()

    def step(self, state: TrainState, report: StepReport) -> None:
        """Stop counting, so that later steps are not disturbed."""
        self._first = False

    def read(self) -> dict[str, float | None]:
        """Return nothing."""
        return {}


class Nobody:
    """The loop's judges and keepers of a run that keeps nothing: every update is taken, nothing is saved."""

    should_stop = False

    def allow_update(self, loss: float) -> bool:
        """Allow every update."""
        return True

    def after(self, state: TrainState, report: StepReport) -> None:
        """Take no action; a step that was skipped shows in the clock."""

    def update(self, state: TrainState, figures: dict[str, float] | None) -> dict[str, Any] | None:
        """Keep nothing."""
        return None

    def save(self, state: TrainState, best: dict[str, Any] | None = None) -> None:
        """Keep nothing."""

    def poll(self, state: TrainState) -> None:
        """Do nothing: nothing is being written."""
