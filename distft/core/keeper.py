"""`python -m distft.core.keeper MARK CODES`: ends a launch whose supervisor was killed.

It reads its standard input, which the supervisor holds open: a word there means that all has ended well, an end
without a word that the supervisor is gone. Then every rank is asked to stop, and what is left after GRACE_S is killed.
A process of its own and in its own session, so that nothing that stops the supervisor or a rank stops it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from distft.core import launched

GRACE_S = 20.0
"""For a rank to save and end after it was asked. Nothing of a launch is left 30 s after its supervisor was killed."""
_POLL_S = 0.2


def main(mark: str, codes: str) -> None:
    """Wait for the supervisor's end, and see to it that nothing of its launch survives it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    if os.read(0, 1):
        return
    # Session leaders only: a process that prepares rows for a rank ends with it, and would not understand the signal.
    launched.send(launched.ranks(mark, launcher=0), signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    while launched.ranks(mark, launcher=0) and time.monotonic() < until:
        time.sleep(_POLL_S)
    launched.kill(mark)
    if codes != os.devnull:
        with contextlib.suppress(OSError):
            Path(codes).unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
