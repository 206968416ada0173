"""What checks are made of: what they are asked, what they see, what they find."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import MachineError

if TYPE_CHECKING:
    from distft.engine.bandwidth import ProbeRanks
    from distft.recipe import Recipe

Facts = dict[str, Any]
"""What one process has seen; JSON."""


class Severity(enum.Enum):
    """What a finding means for a run."""

    OK = "ok"
    WARN = "warn"
    """It would run, and not as it should."""
    FAIL = "fail"
    """It would not run, or should not."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row of the doctor's table: verdict, message and fix of one check."""

    verdict: Severity
    message: str
    fix: str = ""
    hosts: tuple[str, ...] = ()
    """Hosts that cause it and that a run should avoid; empty: it is no single host's fault."""


def ok(message: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(verdict=Severity.OK, message=message)


def warn(message: str, fix: str, hosts: Iterable[str] = ()) -> Finding:
    """Return a finding that does not prevent a run."""
    return Finding(verdict=Severity.WARN, message=message, fix=fix, hosts=tuple(dict.fromkeys(hosts)))


def fail(message: str, fix: str, hosts: Iterable[str] = ()) -> Finding:
    """Return a finding that prevents a run."""
    return Finding(verdict=Severity.FAIL, message=message, fix=fix, hosts=tuple(dict.fromkeys(hosts)))


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The command line."""

    recipe: Recipe | None = None
    shared: Path = Path()
    """A folder that all hosts should see."""
    output: Path = Path()
    """Where runs go: its disk is measured."""
    short: bool = False
    """Seconds, before every job: one process on each host, little data."""
    gib: float | None = None
    """Data in each test of disk and network; None: by the device."""
    link_floor_gb_per_s: float | None = None
    disk_floor_gb_per_s: float | None = None
    per_host: int | None = None
    """Processes that the run will have on each host, where the doctor has fewer."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """One process, as `look` sees it."""

    rank: int
    world: int
    local_rank: int
    env: Mapping[str, str]
    options: DoctorOptions
    hosts: tuple[str, ...]
    """Host of every rank; before the processes have met, of this one alone."""
    group: ProbeRanks | None = None
    """None: alone, or not yet."""

    @property
    def leaders(self) -> list[int]:
        """The first rank of every host."""
        return [rank for rank, host in enumerate(self.hosts) if host not in self.hosts[:rank]]

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.local_rank == 0 if self.group is None else self.rank in self.leaders

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        return [value] if self.group is None else self.group.gather(value)

    def from_first(self, value: Any) -> Any:
        """Rank 0's."""
        return self.gather(value)[0]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One process's facts, as `judge` gets them."""

    rank: int
    host: str
    facts: Facts

    @property
    def who(self) -> str:
        """`rank 3 (node2)`."""
        return f"rank {self.rank} ({self.host})"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[Here], Facts]
    judge: Callable[[Sequence[Seen], DoctorOptions], Iterator[Finding]]
    together: bool = False
    """It needs the processes to have met, or takes long."""
    short: bool = True
    """A part of the short form."""
    gate: bool = False
    """Where it fails, the processes would meet in vain or hang: nothing further is tried."""


def run_look(check: Check, here: Here) -> Facts:
    """Return the facts of a check; an error that stopped it is a fact too."""
    try:
        return check.look(here)
    except (OSError, RuntimeError, ValueError, MachineError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def run_judge(check: Check, seen: Sequence[Seen], options: DoctorOptions) -> list[Finding]:
    """Return the check's findings, with one for each process that could not look."""
    broken = [process for process in seen if "error" in process.facts]
    findings = [
        fail(f"{process.who} could not look: {process.facts['error']}", "see the message", [process.host])
        for process in broken[:3]
    ]
    whole = [process for process in seen if "error" not in process.facts]
    return findings + (list(check.judge(whole, options)) if whole else [])


def by_host(seen: Sequence[Seen]) -> list[Seen]:
    """Return the first process of each host."""
    hosts: dict[str, Seen] = {}
    for process in seen:
        hosts.setdefault(process.host, process)
    return list(hosts.values())


def odd_ones(seen: Sequence[Seen], key: Callable[[Seen], Any]) -> tuple[Any, list[Seen]]:
    """Return (the most frequent value, the processes with another one); of a draw the first one's value counts."""
    values = [key(process) for process in seen]
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    return usual, [process for process, value in zip(seen, values, strict=True) if value != usual]


def names(items: Iterable[object], most: int = 4) -> str:
    """Return `node1, node2, node3, node4 and 12 more`."""
    listed = [str(item) for item in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
