"""What runs the jobs: what a runner is. The registry of them is in `runners`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from distft.core.registry import NoParams, Params
from distft.service.job_folder import JobFolder
from distft.service.settings import ServedBase, ServiceSettings


@dataclass(frozen=True, kw_only=True)
class RunnerState:
    """Where a live run stands with what runs it, in words."""

    key: str
    """Another key is another state, which is an event of the job."""
    waits: bool
    """Whether it is in a queue of the runner's, and no process of it runs."""
    words: str
    """For the job's page, while it is so."""
    event: str
    """What has happened, as an event's message."""
    is_setback: bool = False
    """Whether the run lost what it ran on."""


class JobRunner(Protocol):
    """Starts runs, and knows whether they live. Nothing it knows is lost with the server."""

    def start(self, folder: JobFolder, base: ServedBase, attempt: int) -> str | None:
        """Start the run of a job; return what this runner calls it, if it has a name for it.

        Raises:
            DistftError: it cannot be started.
        """
        ...

    def is_alive(self, folder: JobFolder, name: str | None) -> bool:
        """Return whether the last start may still do something."""
        ...

    def state(self, folder: JobFolder, name: str | None) -> RunnerState | None:
        """Return where a live run stands, as `is_alive` has just seen it; None: there is nothing to say."""
        ...

    def release(self, folder: JobFolder, name: str | None) -> None:
        """Leave a run alone that has saved and stopped: nothing is to start it again by itself."""
        ...

    def kill(self, folder: JobFolder, name: str | None) -> None:
        """End the last start at once."""
        ...


def _on_this_machine(base: ServedBase) -> tuple[int, int]:
    return base.nproc, 1


@dataclass(frozen=True, kw_only=True)
class RunnerSpec:
    """A runner that `--runner` may name."""

    name: str
    build: Callable[[ServiceSettings], JobRunner]
    layout: Callable[[ServedBase], tuple[int, int]] = _on_this_machine
    """Model -> (processes on each node, nodes) of its jobs: what recipes are made and planned for."""
    params: type[Params] = NoParams
