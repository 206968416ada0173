"""Runs a command of one or many ranks as if this process were they: signals reach them, and none of them outlives it.

torchrun and `accelerate launch` do neither. They make 1 of every exit code, die of SIGUSR1, kill after 30 s a rank
that is still saving, and when they are killed leave their ranks running. So signals go past the launcher, straight to
the ranks; each rank tells the code it ends with (`distft.core.launched`); and a keeper ends what this process, once it
is killed, no longer can (`distft.core.keeper`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from distft.core import launched
from distft.core.errors import PREEMPTED_AND_SAVED
from distft.core.stop import PATIENCE, SIGNALS, STOPPING, hold

_POLL_S = 0.1
SAME_WISH_S = 0.05
"""A signal that comes again within this time is not sent by an impatient person."""
_PR_SET_PDEATHSIG = 1
_NOT_PASSED_ON = (
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGWINCH),
    *(signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG),
)
"""About this process or its terminal alone; two of them cannot be caught."""
_OWN_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP)
"""What a crash of this process itself would raise."""
PASSED_ON = frozenset(signal.Signals) - frozenset((*_NOT_PASSED_ON, *_OWN_FAULTS))
_LIBC: Any = ctypes.CDLL(None)


@dataclass(kw_only=True)
class CommandExit:
    """How a command ended."""

    code: int
    """Exit code of the first rank that failed; 128 + N when signal N ended it."""
    signals: list[int] = field(default_factory=list[int])
    """Signals that this process received meanwhile."""
    timed_out: bool = False


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    launcher: bool,
    saves: bool = True,
    cwd: Path | None = None,
    output: Any = None,
    timeout_s: float | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> CommandExit:
    """Run `command` to its end; every signal that this process is sent meanwhile goes to its ranks.

    Args:
        command: a launcher's command line, or that of the one rank itself.
        env: of the command.
        launcher: ranks are what the command starts.
        saves: the ranks take signals as a wish to stop (`distft.core.stop`); one that arrives before they can is kept
            for them. Else signals end them.
        cwd: where it runs.
        output: file for its standard output and error; None: this process's own.
        timeout_s: after which it is killed.
        meanwhile: called several times a second.
    """
    mark = uuid.uuid4().hex
    codes = _file_of_codes()
    held = {launched.MARK: mark, launched.CODES: str(codes)}
    with _taken_over() as signals, _keeper(mark, codes) as done:
        try:
            if signals.sent:  # before anything was started
                return CommandExit(code=_code_of_signal(signals.sent[0]), signals=signals.sent)
            process = subprocess.Popen(
                _quietly(command) if launcher else list(command), env={**env, **held}, cwd=cwd,
                stdin=subprocess.DEVNULL if output else None, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=_child(os.getpid(), launcher=launcher, saves=saves),
            )  # fmt: skip
            return _Running(process, mark, codes, signals, launcher, timeout_s, meanwhile).wait()
        finally:
            launched.kill(mark)  # also what a rank has left behind
            done()
            if codes != Path(os.devnull):
                codes.unlink(missing_ok=True)


def _file_of_codes() -> Path:
    """Make an empty file; where none can be made (a full disk) no code is told, and the launcher's is taken."""
    try:
        handle, name = tempfile.mkstemp(prefix="distft-codes-")
    except OSError:
        return Path(os.devnull)
    os.close(handle)
    return Path(name)


def _quietly(command: Sequence[str]) -> list[str]:
    """Return `python -m LAUNCHER ...` without its report of a rank's end that the rank has reported itself."""
    python, flag, *rest = command
    assert flag == "-m"
    return [python, "-m", "distft.core.launcher", *rest]


class _Signals:
    """Signals this process was sent, in order."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._last = (0, 0.0)

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: `timeout` signals the process, then its group, which is one wish to stop, not two."""
        before, now = self._last, time.monotonic()
        self._last = number, now
        if not (number in STOPPING and number == before[0] and now - before[1] < SAME_WISH_S):
            self.sent.append(number)


@contextlib.contextmanager
def _taken_over() -> Generator[_Signals]:
    """Install handlers for every signal that can be passed on, but those that this process ignores."""
    signals = _Signals()
    before: dict[int, Any] = {}
    for number in PASSED_ON:
        ignored = signal.getsignal(number) is signal.SIG_IGN and number not in SIGNALS
        if not ignored:
            with contextlib.suppress(OSError, ValueError):  # the C library keeps some for itself
                before[number] = signal.signal(number, signals.take)
    hold(False)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _keeper(mark: str, codes: Path) -> Generator[Callable[[], None]]:
    """A process that outlives this one if this one is killed; what is given is called when there is nothing to keep."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distft.core.keeper", mark, str(codes)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    pipe = process.stdin
    assert pipe is not None

    def done() -> None:
        with contextlib.suppress(OSError):
            pipe.write(b".")
            pipe.flush()

    try:
        yield done
    finally:
        with contextlib.suppress(OSError):
            pipe.close()
        process.wait()


def _child(parent: int, *, launcher: bool, saves: bool) -> Callable[[], None]:
    """Prepare the child between fork and exec."""
    # A launcher that is killed takes its ranks along: each sees that its parent is gone, saves and ends. A rank is
    # asked itself.
    number = signal.SIGKILL if launcher else signal.SIGTERM

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(128 + number)
        # Inherited by the ranks, which let the signals come once they can take them (`STOP.install`).
        hold(saves)

    return prepare


@dataclass
class _Running:
    """A command that runs."""

    process: subprocess.Popen[bytes]
    mark: str
    codes: Path
    signals: _Signals
    launcher: bool
    timeout_s: float | None
    meanwhile: Callable[[], None] | None

    def wait(self) -> CommandExit:
        """Pass signals on until it has ended."""
        passed, began = 0, time.monotonic()
        while self._goes_on():
            while passed < len(self.signals.sent):
                number = self.signals.sent[passed]
                passed += 1
                if not self._pass_on(number):
                    return self._killed(_code_of_signal(number))
            if sum(number in STOPPING for number in self.signals.sent) >= PATIENCE:
                return self._killed(128 + self.signals.sent[-1])
            if self.timeout_s is not None and time.monotonic() - began > self.timeout_s:
                ended = self._killed(128 + signal.SIGKILL)
                ended.timed_out = True
                return ended
            if self.meanwhile is not None:
                self.meanwhile()
        return CommandExit(code=self._code(), signals=self.signals.sent)

    def _goes_on(self) -> bool:
        """Return whether the command, or a rank whose launcher has died, is still there; waits a little."""
        try:
            self.process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            return True
        if self.launcher and launched.ranks(self.mark, self.process.pid):
            time.sleep(_POLL_S)
            return True
        return False

    def _pass_on(self, number: int) -> bool:
        """Send it to the ranks; False when there are none yet and the signal asks to stop."""
        ranks = launched.ranks(self.mark, self.process.pid) if self.launcher else [self.process.pid]
        if not ranks:
            return number not in STOPPING
        if number == signal.SIGTSTP:  # which the kernel ignores where no terminal could continue the process
            launched.send(ranks, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            launched.send(ranks, number)
        return True

    def _killed(self, code: int) -> CommandExit:
        launched.kill(self.mark)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        return CommandExit(code=code, signals=self.signals.sent)

    def _code(self) -> int:
        """Return the exit code of the first rank that failed; else the command's own."""
        command_code = self.process.returncode
        rank_code = launched.first_failing_code(self.codes)
        if command_code == 0 or rank_code in (None, 0):
            return command_code if command_code >= 0 else 128 - command_code
        return rank_code


def _code_of_signal(number: int) -> int:
    """Return the code of a run that was asked to stop before it began: the same command starts it."""
    return PREEMPTED_AND_SAVED if number in STOPPING else 128 + number
