"""What a phase is: steps with a share of the time, each kept when it is done, and how it is shown."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.first_hour import ROOT

Measured = dict[str, Any]


class StepFailed(Exception):
    """A step could not be measured; says why."""


class OutOfTime(Exception):
    """A step was cut off: it begins anew next time."""


class NotHere(Exception):
    """A step cannot be done on this machine, and why."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measurement."""

    name: str
    run: Callable[[], Measured]
    least_s: float = 0.0
    """It is not begun with less time than this."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Part of the page."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A chapter of the first hour."""

    name: str
    title: str
    share: float
    """Of the time, against those of the phases that are still to come."""
    steps: Callable[[Context], Iterator[Step]]
    show: Callable[[dict[str, Measured]], Iterator[Table | str]]
    """Tables and sentences from what its steps have measured, by step."""
    wrong: Callable[[dict[str, Measured]], Iterator[str]] = lambda measured: iter(())
    """What is not as it should be in that, each as a sentence; called with what there is so far."""
    why_not: Callable[[Context], str] = lambda context: ""
    """Why it does not apply here; empty where it does."""


@dataclass(kw_only=True)
class Context:
    """The machine, and where files go."""

    out: Path
    gpus: tuple[str, ...]
    """Product names; empty on a CPU."""
    ranks: int
    """Processes of the phases with several: GPUs, or two on a CPU."""
    deadline: float = field(default=0.0)
    """Of the phase, on the monotonic clock."""
    work: Path = Path()
    """For files that steps leave to later ones."""

    @property
    def toy(self) -> bool:
        """Toy size: there is no GPU."""
        return not self.gpus

    @property
    def device(self) -> str:
        """As the driver names it."""
        return self.gpus[0] if self.gpus else "cpu"

    def left_s(self) -> float:
        """Of the phase's time."""
        return self.deadline - time.monotonic()

    def run(
        self,
        command: Sequence[str],
        log: str,
        *,
        launcher: bool = False,
        meanwhile: Callable[[], None] | None = None,
        limit_s: float | None = None,
        **env: str,
    ) -> int:
        """The exit code of a command whose output goes to `log`; however it ends, so have its processes.

        Raises:
            OutOfTime: it did not end within the phase's time, or within `limit_s`.
            KeyboardInterrupt: this process was asked to stop meanwhile.
        """
        from distft.bench.case_launcher import OWN_PREFIXES
        from distft.core import supervise

        timeout = min(self.left_s(), limit_s or self.left_s())
        if timeout <= 0:
            raise OutOfTime("no time was left")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(OWN_PREFIXES)}
        path = self.work / log
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as output:
            ended = supervise.run(
                list(command), env=clean | env, launcher=launcher, saves=False, cwd=ROOT, output=output,
                timeout_s=timeout, meanwhile=meanwhile,
            )  # fmt: skip
        if ended.signals:
            raise KeyboardInterrupt(signal.Signals(ended.signals[0]).name)
        if ended.timed_out:
            raise OutOfTime(f"not done after {timeout:.0f} s; see {log}")
        return ended.code

    def worker(self, task: str, told: dict[str, Any], *, world: int = 1, **env: str) -> Measured:
        """What a task of `work.py` found, in `world` fresh processes.

        Raises:
            StepFailed: it ended otherwise; with the last line it printed.
        """
        import json

        stem = self.work / task
        stem.parent.mkdir(parents=True, exist_ok=True)
        given, found = stem.with_suffix(".told.json"), stem.with_suffix(".found.json")
        found.unlink(missing_ok=True)
        given.write_text(json.dumps(told), encoding="utf-8")
        command = [*self.python(world), "-m", "benchmarks.first_hour.work", task, str(given), str(found)]
        code = self.run(command, f"{task}.log", launcher=world > 1, **env)
        if code or not found.is_file():
            raise StepFailed(f"exit code {code}: {self.last_line(f'{task}.log')}")
        return json.loads(found.read_text(encoding="utf-8"))

    def python(self, world: int) -> list[str]:
        """The beginning of a command line whose next words are `-m MODULE`."""
        if world == 1:
            return [sys.executable]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        return [*torchrun, "--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(world)]

    def last_line(self, log: str) -> str:
        """What a command printed last."""
        lines = (self.work / log).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
