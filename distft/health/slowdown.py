"""Detects steps that take longer than they did although no rank is behind: a slow link shows nowhere else.

In a collective all ranks wait alike, so a straggler is looked for where ranks work alone (`straggler`). Here the run is
compared with itself: the time of a step, by phase, with that of the looks before.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("data", "agree", "forward", "backward", "update", "step")
"""Phases of a step (see `core.phase`); evaluations and saves are not counted."""
KEPT = 20
"""Looks that `usual` is the median of: a run that has become slower for good is told so this often at most."""
FEWEST = 2
LEAST_S = 0.05
"""A step; differences below this are noise, however large their ratio."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The time of the steps since the last look, against the usual time."""

    step_s: float
    """Mean of the steps since the look before."""
    usual_s: float | None
    """Median of the looks before; None while there are too few."""
    phase: str
    """Which took most of the difference; without `usual_s`, most of the time."""
    phase_s: float
    """Seconds a step in it."""
    phase_usual_s: float

    def is_slow(self, factor: float) -> bool:
        """Return whether a step takes `factor` times as long as it did."""
        usual = self.usual_s
        return usual is not None and self.step_s > factor * usual and self.step_s - usual > LEAST_S

    def __str__(self) -> str:
        return (
            f"a step takes {self.step_s:.2f} s and took {self.usual_s or 0.0:.2f} s, "
            f"{self.phase} {self.phase_s:.2f} s of it and {self.phase_usual_s:.2f} s before"
        )


class SlowdownDetector:
    """Compares the time of steps with earlier ones; one per run and rank."""

    def __init__(self) -> None:
        self._spent: dict[str, float] | None = None
        self._step = 0
        self._looks: deque[dict[str, float]] = deque(maxlen=KEPT)

    def look(self, spent: Mapping[str, float], step: int) -> StepTimes | None:
        """Compare the steps since the last call with the ones before; None at the first call, which starts the count.

        Args:
            spent: seconds by phase since the run began.
            step: the step that has just ended.
        """
        now = {phase: spent.get(phase, 0.0) for phase in PHASES}
        before, since, self._spent, self._step = self._spent, self._step, now, step
        if before is None or step <= since:  # the first, or the run has gone back to a checkpoint
            return None
        took = {phase: max(0.0, now[phase] - before[phase]) / (step - since) for phase in PHASES}
        has_usual = len(self._looks) >= FEWEST
        usual = {
            phase: statistics.median(look[phase] for look in self._looks) if has_usual else 0.0 for phase in PHASES
        }
        whole = statistics.median(sum(look.values()) for look in self._looks) if has_usual else None
        self._looks.append(took)
        phase = max(PHASES, key=lambda name: took[name] - usual[name])
        return StepTimes(
            step_s=sum(took.values()),
            usual_s=whole,
            phase=phase,
            phase_s=took[phase],
            phase_usual_s=usual[phase],
        )
