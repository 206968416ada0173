"""Jobs as processes of this machine, each in a session of its own: they do not end with the server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from distft.core import host
from distft.service.background import start_behind
from distft.service.job_folder import JobFolder
from distft.service.runner import RunnerSpec, RunnerState
from distft.service.settings import ServedBase, ServiceSettings


class LocalRunner:
    """Starts `distft.service.start`, which takes the job's lock."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._niceness = settings.limits.niceness
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, folder: JobFolder, base: ServedBase, attempt: int) -> str | None:
        """Start it; a start of the same job that lives already makes this one end by itself."""
        command = [sys.executable, "-m", "distft.service.start", str(folder.path), str(attempt), str(base.nproc)]
        with folder.log.open("ab") as log:
            child = start_behind(command, log, niceness=self._niceness, own_session=True)
        self._started[folder.job_id] = child
        return None

    def is_alive(self, folder: JobFolder, name: str | None) -> bool:
        """Return whether a process holds the lock, or one that was just started has not come to it yet."""
        child = self._started.get(folder.job_id)
        if child is not None and child.poll() is None:
            return True
        if child is not None:
            del self._started[folder.job_id]
        return folder.is_alive()

    def state(self, folder: JobFolder, name: str | None) -> RunnerState | None:
        """Return None: a process that lives runs."""
        return None

    def release(self, folder: JobFolder, name: str | None) -> None:
        """Do nothing: a process that has stopped stays so."""

    def kill(self, folder: JobFolder, name: str | None) -> None:
        """Kill the processes of the session that holds the lock."""
        process = folder.processes()
        if not folder.is_alive() or not host.is_neighbour(process):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process["pid"], signal.SIGKILL)


SPEC = RunnerSpec(name="local", build=LocalRunner)
