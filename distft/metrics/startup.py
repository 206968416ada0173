"""From a process's start to the end of its first step, by phase: what a requeue costs, and which rank it waited for."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.core import host
from distft.core.phase import PHASE
from distft.core.types import Batch, LossTerms, StepReport, TrainState

FIRST_STEP = "first_step"
_OF_THE_STEP = ("data", "agree", "forward", "backward", "update", "step")


@dataclass(frozen=True, kw_only=True)
class StartupTimes:
    """One rank's start. Its phases add up to the time since its process was started."""

    rank: int
    host: str
    seconds: dict[str, float]
    """Seconds by phase, in the order they are passed (see `core.phase`); `imports` comes before the first."""

    @property
    def total_s(self) -> float:
        """Seconds from the process's start to the end of its first step."""
        return sum(self.seconds.values())


class StartUp:
    """A metric without figures: after the first step it tells how the time until then was spent, and by whom."""

    def __init__(
        self,
        rank: int,
        gather: Callable[[Any], list[Any]],
        say: Callable[[str], None],
        note: Callable[..., None],
        env: Mapping[str, str],
    ) -> None:
        self._rank, self._gather, self._say, self._note = rank, gather, say, note
        self._launched_s = launched_s(env)

    def start(self) -> None:
        """Do nothing: this metric has no clock of its own."""

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        """Do nothing: micro-batches do not matter here."""

    def step(self, state: TrainState, report: StepReport) -> None:
        """Report the start-up times; collective, once."""
        if PHASE.stepped:
            return
        PHASE.stepped = True
        mine = StartupTimes(rank=self._rank, host=socket.gethostname(), seconds=phases())
        starts = self._gather(mine)
        worst = slowest(starts)
        launch = {} if self._launched_s is None else {"launch_s": round(self._launched_s, 3)}
        self._note(
            "startup",
            step=state.step,
            total_s=round(mine.total_s, 3),
            **launch,
            seconds={phase: round(seconds, 3) for phase, seconds in mine.seconds.items()},
            slowest={
                phase: {"s": round(start.seconds[phase], 3), "rank": start.rank, "host": start.host}
                for phase, start in worst.items()
            },
        )
        self._say(text(mine, worst, self._launched_s))

    def read(self) -> dict[str, float | None]:
        """Return no figures."""
        return {}


def phases() -> dict[str, float]:
    """Return the seconds of this process by phase up to now; evaluations before the first step count as `eval`."""
    now = time.monotonic()
    age = host.age_s() if PHASE.runs == 1 else None
    spent = {"imports": max(0.0, age - (now - PHASE.began))} if age is not None else {}
    for phase, seconds in [*PHASE.seconds.items(), (PHASE.phase, now - PHASE.since)]:
        name = FIRST_STEP if phase in _OF_THE_STEP else phase
        spent[name] = spent.get(name, 0.0) + seconds
    return {phase: seconds for phase, seconds in spent.items() if phase != FIRST_STEP} | {
        FIRST_STEP: spent.get(FIRST_STEP, 0.0)
    }


def launched_s(env: Mapping[str, str]) -> float | None:
    """Return the seconds from the job's start, by Slurm or its batch script, to this process's; None outside.

    Slurm says it from 23.02 on. Two machines' clocks: good to what they differ by.
    """
    began, age = env.get("SLURM_JOB_START_TIME") or env.get(host.JOB_START, ""), host.age_s()
    if not began.isdecimal() or age is None:
        return None
    return max(0.0, time.time() - age - int(began))


def slowest(starts: Sequence[StartupTimes]) -> dict[str, StartupTimes]:
    """Return, by phase, the rank that was in it longest."""
    every = dict.fromkeys(phase for start in starts for phase in start.seconds)
    return {
        phase: max((start for start in starts if phase in start.seconds), key=lambda start: start.seconds[phase])
        for phase in every
    }


def text(mine: StartupTimes, worst: Mapping[str, StartupTimes], launched: float | None) -> str:
    """Return a line like `first step 21.4 s after the process's start: imports 9.1, rows 0.4 (rank 3 on node2: 6)`."""
    parts = []
    for phase, seconds in mine.seconds.items():
        slowest = worst[phase]
        longer = slowest.rank != mine.rank and slowest.seconds[phase] > 1.2 * seconds + 0.5
        more = f" (rank {slowest.rank} on {slowest.host}: {slowest.seconds[phase]:.1f})" if longer else ""
        parts.append(f"{phase.replace('_', ' ')} {seconds:.1f}{more}")
    since = "" if launched is None else f", which came {launched:.1f} s after the job's"
    return f"first step {mine.total_s:.1f} s after the process's start{since}: {', '.join(parts)}"
