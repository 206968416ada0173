"""Watches a run from a thread of its own: writes heartbeats, and ends the process when the run cannot go on.

What it looks for, every beat: a rank of this machine whose process is gone; another rank's exit.json; a main thread
(its own) that has not got on for `timeout_s`; a launcher that is gone. It needs the interpreter's lock, so a main
thread that holds it for ever is left to faulthandler, whose timer runs in C and is set anew with every beat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType

from distft.core import host, launched
from distft.core.errors import DistftError, HangError, PeerEnded
from distft.core.phase import PHASE
from distft.core.stop import LAUNCHER_GONE, STOP
from distft.health.hang_diagnosis import diagnose_hang
from distft.health.heartbeat import Heartbeat, HeartbeatFile, is_dead

MAX_BEAT_S = 5.0
HANG = HangError.exit_code
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/", "/distft/engine/")


class Watchdog:
    """`with Watchdog(...):` around a run."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world: int,
        neighbours: Iterable[int],
        timeout_s: float,
        launched: bool,
        end: Callable[[int, str], bool],
    ) -> None:
        """Nothing happens yet.

        Args:
            folder: the run's; records and stacks go to `ranks/` in it.
            rank: of this process.
            world: number of ranks.
            neighbours: ranks that may be on this machine: their processes are looked after.
            timeout_s: longest time without progress.
            launched: a launcher started this process and is to outlive it.
            end: told (exit code, reason) just before this process is ended from here; whether it was the first to know.
        """
        self._heartbeats = HeartbeatFile(folder / "ranks", rank)
        self._exit = folder / "exit.json"
        self._world, self._timeout_s, self._end = world, timeout_s, end
        self._neighbours = [neighbour for neighbour in neighbours if neighbour != rank]
        self._beat_s = min(MAX_BEAT_S, max(0.1, timeout_s / 6))
        self._record = Heartbeat(rank=rank, process=host.this_start(PHASE.runs))
        self._parent = STOP.launcher or os.getppid() if launched else None
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._stacks = None
        self._collectives: Callable[[], None] | None = None
        self._earlier: dict[int, Heartbeat] = {}
        """What an earlier start left: a process found dead in it says nothing of this one."""
        self._exit_before = _text(self._exit)
        self._thread = threading.Thread(target=self._watch, name="distft-watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._earlier = self._heartbeats.read(self._neighbours)
        with contextlib.suppress(OSError):  # a run on a full disk is watched less well, and goes on
            self._heartbeats.open()
            self._stacks = self._heartbeats.stacks(self._record.rank).open("w", encoding="utf-8")
            self._write()
            PHASE.on_enter = self._mark
            self._thread.start()
        return self

    def on(self, device: str, record: Callable[[], None] | None = None) -> None:
        """Set the device that this rank has taken, for messages, and who writes its last collectives when it hangs."""
        self._record, self._collectives = replace(self._record, device=device), record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        PHASE.on_enter = None
        if self._thread.ident is not None:
            self._thread.join(2 * self._beat_s)
        code = 0 if error is None else error.exit_code if isinstance(error, DistftError) else 1
        self._record = replace(self._record, ended=code, reason=str(error).split("\n")[0][:300] if error else "")
        with contextlib.suppress(OSError, AssertionError):
            self._write()
        faulthandler.cancel_dump_traceback_later()  # last: each heartbeat sets it anew, and it ends the process
        self._heartbeats.close()
        if self._stacks is not None:
            self._stacks.close()
            path = self._heartbeats.stacks(self._record.rank)
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()

    def cause(self, error: BaseException) -> BaseException:
        """Return what caused an error of a broken connection: a peer that died or ended; else the error itself."""
        if isinstance(error, DistftError | KeyboardInterrupt) or self._world == 1:
            return error
        until = time.monotonic() + 3 * self._beat_s  # its last words may still be on their way
        while time.monotonic() < until:
            if peer_error := self._peer():
                return peer_error
            time.sleep(min(0.1, self._beat_s))
        return error

    def _watch(self) -> None:
        idle_from, passed, peer_from = time.monotonic(), PHASE.count, None
        while not self._stop.wait(self._beat_s):
            now = time.monotonic()
            if PHASE.count != passed or PHASE.patient:
                idle_from, passed = now, PHASE.count
            with contextlib.suppress(OSError):
                self._write(idle_s=now - idle_from)
            if self._parent is not None and os.getppid() != self._parent:
                STOP.ask(LAUNCHER_GONE)
                self._parent = None
            peer = self._peer()
            peer_from = None if peer is None else peer_from or now
            if peer is not None and peer_from is not None and now - max(peer_from, idle_from) > 2 * self._beat_s:
                self._dump()
                self._leave(peer.exit_code, str(peer))  # the main thread has not found out by itself
            if now - idle_from > self._timeout_s:
                self._dump()  # at once: while it looks for who is to blame, this process may be ended by another's end
                self._leave(HANG, self._hang(now - idle_from))

    def _mark(self) -> None:
        self._heartbeats.mark(PHASE.phase, PHASE.step, PHASE.count)

    def _write(self, idle_s: float = 0.0) -> None:
        frame, waits = _innermost(self._main)
        self._record = replace(
            self._record,
            phase=PHASE.phase,
            step=PHASE.step,
            passed=PHASE.count,
            idle_s=round(idle_s, 1),
            at=frame,
            waits=waits,
            beats=self._record.beats + 1,
        )
        self._heartbeats.write(self._record)
        self._heartbeats.flush()
        if self._stacks is not None:
            faulthandler.dump_traceback_later(self._timeout_s + self._beat_s, exit=True, file=self._stacks)

    def _peer(self) -> DistftError | None:
        """Return the error of a peer whose end ends this rank too; None while there is none."""
        text = _text(self._exit)
        if text and text != self._exit_before:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(text)
                if record["code"] != 0 and record["rank"] != self._record.rank:
                    who = f"rank {record['rank']} on {record['host']}"
                    return PeerEnded(record["code"], f"{who} ended the run: {record['reason']}")
        for rank, record in self._heartbeats.read(self._neighbours).items():
            if record.ended and record.process.get("start") == self._record.process["start"]:
                return PeerEnded(record.ended, f"{record.who} ended the run: {record.reason}")  # before we came
            if record != self._earlier.get(rank) and is_dead(record):
                stacks = self._heartbeats.stacks(rank)
                if stacks.exists() and stacks.stat().st_size:
                    kept = f"; it did not let go of the interpreter for {self._timeout_s:.0f} s, its stacks: {stacks}"
                else:
                    kept = "; killed from outside (out of memory?) or crashed, see the launcher's output"
                return HangError(f"{record.who} is gone, last seen in {record.place}{kept}")
        return None

    def _hang(self, idle_s: float) -> str:
        before = self._heartbeats.read(range(self._world))
        time.sleep(2.5 * self._beat_s)  # a rank that lives has beaten twice by then
        with contextlib.suppress(OSError):
            self._write(idle_s=idle_s)
        after = self._heartbeats.read(range(self._world))
        why = diagnose_hang(before, after, self._world)
        return f"no progress for {idle_s:.0f} s: {why}; stacks in {self._heartbeats.folder}"

    def _dump(self) -> None:
        if self._stacks is not None:
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            self._stacks.flush()
        if self._collectives is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._collectives()

    def _leave(self, code: int, reason: str) -> None:
        """End this process from beside its main thread, which cannot."""
        if self._stop.is_set():  # it has just got out by itself
            return
        if self._end(code, reason):
            print(f"rank {self._record.rank}: {reason}", file=sys.stderr, flush=True)
        self._record = replace(self._record, ended=code, reason=reason[:300])
        with contextlib.suppress(OSError):
            self._heartbeats.write(self._record)
        launched.tell(code)
        os._exit(code)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _innermost(thread: int | None) -> tuple[str, bool]:
    """Return (`file.py:12 function` of the main thread, whether that is inside a collective)."""
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    if frame is None:
        return "", False
    path = frame.f_code.co_filename
    return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}", any(p in path for p in _COLLECTIVES)
