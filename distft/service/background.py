"""Processes that work beside the server and give way to it where there are few cores."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from typing import BinaryIO


def start_behind(
    command: Sequence[str], log: BinaryIO, *, niceness: int, own_session: bool = False, kept: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process that writes to a log and whose share of a busy core is smaller than the server's.

    `niceness` is added to the server's. Threads and processes that it starts later inherit it. `own_session`: it does
    not end with the server. `kept`: file descriptors that it has too, such as a lock's.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=own_session, close_fds=True,
        pass_fds=kept,
    )  # fmt: skip
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, child.pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness))
    return child
