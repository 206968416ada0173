"""Records which phase of a run the main thread is in, so that the watchdog and injected faults can tell.

Points of a run, in order: `rows` `fetch` `join` `model` `weights` `restore`; then per step `data` `agree` `forward`
`backward` `update` `step`, with `columns` where an objective has some of the whole batch, `rewards` while answers are
judged, `eval` and `save` in between;
at the end `export`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from distft.core import faults
from distft.core.errors import Preempted
from distft.core.stop import STOP


class PhaseTracker:
    """One per process. Written by the main thread only; readers see whole words, so there is nothing to lock."""

    def __init__(self) -> None:
        self.runs = -1  # not one yet: `begin` counts them
        """Runs that this process has begun; equal on all ranks of a program that runs several."""
        self.begin()

    def begin(self) -> None:
        """Begin a run: nothing has been passed yet, and until `training` a stop is granted at once."""
        self.runs += 1
        self.began = time.monotonic()
        self.phase, self.step = "start", 0
        self.count = 0
        """Points passed: the same on every rank at the same place of the loop, so a rank with fewer is behind."""
        self.since = self.began
        self.patient = False
        """Waiting for something that another process does outside any collective: not a hang, however long."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds by phase."""
        self.on_enter: Callable[[], None] | None = None
        """Called at every point, before anything may happen there."""
        self.stepped = False
        """This run has finished a step: what comes now is no start-up any more."""
        self._training = False

    def training(self) -> None:
        """Begin training: from here on all ranks agree on a stop at the next step; there is something to save."""
        self._training = True

    def enter(self, phase: str, step: int | None = None, *, patient: bool = False) -> None:
        """Record that the main thread has come to `phase` (of the step that is being made).

        Raises:
            Preempted: asked to stop before training began.
        """
        now = time.monotonic()
        self.seconds[self.phase] += now - self.since
        self.phase, self.step, self.patient, self.since = phase, self.step if step is None else step, patient, now
        self.count += 1
        if self.on_enter is not None:
            self.on_enter()
        faults.inject(phase, step=self.step)
        if not self._training and STOP.requested():
            raise Preempted(f"stopped by {STOP.reason} before training began ({phase}), so there is nothing to save")


PHASE = PhaseTracker()
"""This process's."""
