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
STOPPING = (*SIGNALS, signal.SIGHUP)
"""What asks to stop. SIGHUP, the end of a terminal, does not where `nohup` has had it ignored."""
PATIENCE = 3
LAUNCHER_GONE = "the launcher's end"


def hold(held: bool) -> None:
    """Keep signals that ask to stop until somebody can take them, also through an exec and in what is started now."""
    signal.pthread_sigmask(signal.SIG_BLOCK if held else signal.SIG_UNBLOCK, STOPPING)


class StopRequest:
    """One per process."""

    def __init__(self) -> None:
        self.reason = ""
        """Why a stop was requested: a signal's name or the STOP file; empty while none was."""
        self._count = 0
        self._granted = False
        self._file: Path | None = None
        self.launcher: int | None = None
        """Process number of the torchrun or accelerate that has started this one, which is not to outlive it."""

    def install(self) -> None:
        """Take over the signals; only the main thread of the main program may. What was held comes now."""
        for number in STOPPING:
            if number in SIGNALS or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self.launcher = os.getppid()
        hold(False)

    def watch(self, file: Path) -> None:
        """Watch a file that asks by existing (`runs/NAME/STOP`), for people without the right to signal."""
        self._file = file

    def requested(self) -> bool:
        """Return whether this process has been asked to stop."""
        if not self.reason and self._file is not None and self._file.exists():
            self.reason = f"the file {self._file}"
        if not self.reason and self.launcher not in (None, os.getppid()):
            self.reason = LAUNCHER_GONE
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Ask from inside this process."""
        self.reason = self.reason or reason

    def granted(self) -> None:
        """Record that the state is saved and this process ends: further signals would only cut its tidying short."""
        self._granted = True

    def clear(self) -> None:
        """Forget it, for a process that runs several jobs one after another."""
        self.reason, self._count, self._granted = "", 0, False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.reason = self.reason or signal.Signals(number).name
        if self._count >= PATIENCE and not self._granted:
            os._exit(128 + number)


STOP = StopRequest()
"""This process's."""
