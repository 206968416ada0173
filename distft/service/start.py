"""`python -m distft.service.start FOLDER ATTEMPT NPROC`: one start of a job's run, which outlives the server.

It holds the job's lock, which the run inherits, so that no second start can run beside it, and says how the run ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from distft.core import host
from distft.core.errors import BusyError
from distft.core.files import replace_json
from distft.service.job_folder import JobFolder

LAST_LINES, TRIES = 12, 20


def main(argv: list[str]) -> int:
    """Run one start; its exit code is the run's."""
    folder, attempt, nproc = JobFolder(path=Path(argv[0])), int(argv[1]), int(argv[2])
    held, tries = folder.hold(), TRIES
    while held is None and tries:  # a server that looks whether the job lives holds the lock for a moment
        time.sleep(0.05)
        held, tries = folder.hold(), tries - 1
    if held is None:
        return BusyError.exit_code  # a start of this job lives: it will say how it ended
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, signal.SIG_IGN
        )  # whole groups are signalled: the run decides, and this tells how it ended
    folder.forget_end()
    command = [sys.executable, "-m", "distft.train", str(folder.recipe)]
    if nproc > 1:
        command = [sys.executable, "-m", "distft.cli", "train", str(folder.recipe), "--nproc", str(nproc)]
    with folder.log.open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(held,), cwd=folder.path,
            preexec_fn=_default_signals,
        )  # fmt: skip
    replace_json(folder.path / "process.json", host.identity() | {"attempt": attempt, "child": child.pid})
    code = child.wait()
    ended = folder.exit()
    if ended and ended.get("code") is not None:
        code, reason = int(ended["code"]), str(ended.get("reason", ""))
    elif code < 0:
        return 128 - code  # killed: nobody knows why, so nobody says; the worker starts it again
    else:
        reason = _last_words(folder.log)
    folder.write_ended(attempt=attempt, code=code, reason=reason)
    return code


def _default_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _last_words(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, LAST_LINES)).strip()


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
