"""Named faults on demand, so that every failure the run must survive has a test: inert unless DISTFT_FAULT is set.

`DISTFT_FAULT="kill:rank=1,point=P3,step=4;enospc:point=P5"`: at that point of that rank and step the process

    kill, term, usr1, int, stop   gets SIGKILL, SIGTERM, SIGUSR1, SIGINT, SIGSTOP
    raise, enospc                 gets an error, or a full disk
    hang, spin                    waits for ever; or does so holding the interpreter's lock, as a stuck C call does
    slow                          sleeps `seconds=0.5`
    skew                          has a clock that is `seconds=90` ahead there (`now`)

What is left out matches anything; `times=N` limits a fault to its first N matches in a process (1 unless told), and
`skip=N` lets N of them pass before.
Points: P0 to P9 of a save (`distft.checkpoint`), everything `distft.core.phase` is told, and `import` (before it).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from distft.core.errors import MachineError

VARIABLE = "DISTFT_FAULT"
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
    "stop": signal.SIGSTOP,
}
KINDS = (*SIGNALS, "raise", "enospc", "hang", "spin", "slow", "skew")
KEYS = ("rank", "step", "times", "skip")
FOR_EVER_S = 10**6


class InjectedFault(RuntimeError):
    """The error that `raise` raises."""


class Faults(Protocol):
    """Fires planned faults at named points of a run."""

    def inject(self, point: str, *, rank: int | None = None, step: int | None = None) -> None:
        """Fire the faults that are planned for `point`, which the run has reached."""
        ...


@dataclass
class PlannedFault:
    """One planned failure; None matches anything."""

    kind: str
    point: str | None = None
    rank: int | None = None
    step: int | None = None
    times: int = 1
    skip: int = 0
    seconds: float = 0.0
    """Duration for `slow` and `skew`."""
    matched: int = 0

    def is_due(self, point: str, rank: int, step: int | None) -> bool:
        """Return whether the fault fires here; counts the match."""
        if self.point in (None, point) and self.rank in (None, rank) and self.step in (None, step):
            self.matched += 1
            return self.skip < self.matched <= self.skip + self.times
        return False


@dataclass
class Injector:
    """Fires planned faults."""

    planned: list[PlannedFault] = field(default_factory=list[PlannedFault])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, point: str, *, rank: int | None = None, step: int | None = None) -> None:
        """Fire what is planned here.

        Raises:
            InjectedFault: a `raise` is due.
            OSError: an `enospc` is due.
        """
        if not self.planned:
            return
        rank = _rank_of_environment() if rank is None else rank
        for fault in self.planned:
            with self.lock:
                due = fault.kind != "skew" and fault.is_due(point, rank, step)
            if due:
                _fire(fault, f"injected at {point} of rank {rank}" + (f", step {step}" if step is not None else ""))


def parse(text: str) -> list[PlannedFault]:
    """Parse the faults that `text` plans.

    Raises:
        MachineError: `text` is not in the form of this file's head.
    """
    return [_parse_one(part.strip()) for part in text.split(";") if part.strip()]


def inject(point: str, *, rank: int | None = None, step: int | None = None) -> None:
    """Fire what DISTFT_FAULT plans for this point; costs a dictionary look-up when it is not set."""
    text = os.environ.get(VARIABLE)
    if text:
        _injector_of(text).inject(point, rank=rank, step=step)


def now(point: str, *, rank: int) -> float:
    """Return this rank's wall-clock time at that point: the true one, unless DISTFT_FAULT plans a `skew`."""
    text = os.environ.get(VARIABLE)
    ahead = [fault for fault in parse(text) if fault.kind == "skew"] if text else []
    return time.time() + sum(fault.seconds for fault in ahead if fault.is_due(point, rank, None))


class FromEnvironment:
    """`inject` as an object, for rooms that are handed their `Faults`."""

    def inject(self, point: str, *, rank: int | None = None, step: int | None = None) -> None:
        """Call the function of that name."""
        inject(point, rank=rank, step=step)


_injectors: dict[str, Injector] = {}


def _injector_of(text: str) -> Injector:
    if text not in _injectors:
        _injectors[text] = Injector(parse(text))
    return _injectors[text]


def _parse_one(part: str) -> PlannedFault:
    kind, _, rest = part.partition(":")
    fault = PlannedFault(kind.strip())
    problem = "" if fault.kind in KINDS else f'unknown fault "{fault.kind}"'
    for pair in filter(None, (item.strip() for item in rest.split(","))):
        key, _, value = (text.strip() for text in pair.partition("="))
        if key == "point" and value:
            fault.point = value
        elif key in KEYS and value.isdecimal():
            setattr(fault, key, int(value))
        elif key == "seconds" and value.replace(".", "", 1).isdecimal():
            fault.seconds = float(value)
        else:
            problem = problem or f'cannot read "{pair}"'
    if problem:
        raise MachineError(
            f'{VARIABLE}="{part}": {problem}; write KIND:rank=1,point=P3,step=4 with KIND one of {", ".join(KINDS)}'
        )
    return fault


def _fire(fault: PlannedFault, where: str) -> None:
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind == "raise":
        raise InjectedFault(where)
    elif fault.kind == "hang":
        while True:
            time.sleep(FOR_EVER_S)
    elif fault.kind == "spin":
        while True:  # PyDLL keeps the interpreter's lock during the call; a signal ends one sleep
            ctypes.PyDLL(None).sleep(FOR_EVER_S)
    elif fault.kind == "slow":
        time.sleep(fault.seconds)
    else:
        raise OSError(errno.ENOSPC, f"No space left on device, {where}")


def _rank_of_environment() -> int:
    for name in ("RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0
