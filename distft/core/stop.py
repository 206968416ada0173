"""A wish to stop: signals and a STOP file become a flag that the loop reads; nothing happens inside a handler.

Installed before anything heavy is imported, so that a preemption during start-up is not a crash. The first two
signals ask, for a scheduler may repeat itself; the third ends the process at once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = 3


class StopRequest:
    """One per process."""

    def __init__(self) -> None:
        self.reason = ""
        """What asked: a signal's name or the STOP file; empty while nothing did."""
        self._count = 0
        self._granted = False
        self._file: Path | None = None

    def install(self) -> None:
        """Take over the signals; only the main thread of the main program may."""
        for number in SIGNALS:
            signal.signal(number, self._asked)

    def watch(self, file: Path) -> None:
        """A file that asks by existing (`runs/NAME/STOP`), for people without the right to signal."""
        self._file = file

    def asked(self) -> bool:
        """Whether this process has been asked to stop."""
        if not self.reason and self._file is not None and self._file.exists():
            self.reason = f"the file {self._file}"
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Ask from inside this process."""
        self.reason = self.reason or reason

    def granted(self) -> None:
        """The state is saved and this process on its way out: further signals would only cut its tidying short."""
        self._granted = True

    def clear(self) -> None:
        """Forget it, for a process that runs several jobs one after another."""
        self.reason, self._count, self._granted = "", 0, False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.reason = self.reason or signal.Signals(number).name
        if self._count >= PATIENCE and not self._granted:
            os._exit(128 + number)


STOP = StopRequest()
"""This process's."""
