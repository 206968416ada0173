"""One live run per output folder: `lock.json`, taken by rank 0.

On the same machine a lock is stale when its process is gone (number and start time, so that a reused number does not
fool us). From elsewhere only the heartbeat can tell: it is stale when the file has not changed for STALE_S of our own
monotonic time; clocks of two machines are never compared.

A Slurm job that comes back needs less: Slurm has ended its earlier start, or lost the node it was on. There the lock's
age, by the file system's clock, tells at once whether it has missed beats; where that clock is wrong, too, there is
still Slurm's word, and whoever has lost its lock finds out at its next beat and writes nothing more.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distft.checkpoint.durable import read_regular
from distft.core import host
from distft.core.errors import BusyError, FileSystemError, explain
from distft.core.files import parse_json_object, replace_file, write_file

LOCK = "lock.json"
GUARD = ".lock.guard"
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
BEAT_S = 10.0
STALE_S = 60.0
MISSED_BEATS = 2.5
"""After so many an earlier start of this very job is gone."""


class RunLock:
    """`with RunLock(folder):` or `acquire` and `release`."""

    def __init__(
        self, folder: Path, *, job: str | None = None, beat_s: float = BEAT_S, stale_s: float = STALE_S
    ) -> None:
        """Nothing happens yet.

        Args:
            folder: the run's; it must exist.
            job: what to call this run in messages; None: the Slurm job, if any.
            beat_s: seconds between heartbeats.
            stale_s: seconds without one after which another machine's lock is dead.
        """
        self.path = folder / LOCK
        self._job = job or os.environ.get("SLURM_JOB_ID")
        self._beat_s, self._stale_s = beat_s, stale_s
        self._slurm = _slurm_start(os.environ)
        self._token = uuid.uuid4().hex
        self._held_by: int | None = None
        self._stop = threading.Event()
        self.lost = False
        """Another run has taken the lock away (this process was frozen for longer than stale_s)."""

    def acquire(self) -> None:
        """Take the lock; waits up to stale_s for another machine's heartbeat.

        Raises:
            BusyError: a live run has it; names host, process and job.
            FileSystemError: the folder cannot be written.
        """
        try:
            while not self._create():
                holder = self._read()
                if holder is None:
                    continue  # released this moment
                if not self._is_dead(holder):
                    raise BusyError(_busy_message(self.path.parent, _owner(holder)))
                if self._take_over(holder):
                    break
        except OSError as error:
            raise FileSystemError(f"{self.path}: cannot be written ({explain(error)})") from error
        self._held_by = os.getpid()
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(self._stop,), name="lock-heartbeat", daemon=True).start()

    def release(self) -> None:
        """Give it back; nothing happens when it is not ours (any more, or in a forked child)."""
        self._stop.set()
        if self._held_by == os.getpid():
            self._held_by = None
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self.path.unlink()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def _write_aside(self) -> Path:
        aside = self.path.with_name(f".{LOCK}.{self._token}")
        write_file(aside, self._owner_text())
        return aside

    def _owner_text(self) -> str:
        owner = host.identity() | {"job": self._job, "started": _now(), "token": self._token, "slurm": self._slurm}
        return json.dumps(owner, indent=1) + "\n"

    def _create(self) -> bool:
        """Make the lock complete or not at all: link() fails when the name exists, also on NFS."""
        aside = self._write_aside()
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, *UNSUPPORTED):
                raise
            return self._create_without_links(aside)  # some FUSE and object stores
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _create_without_links(self, aside: Path) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(aside.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
        return True

    def _read(self) -> bytes | None:
        """Read the lock's bytes; None when there is none."""
        try:
            return read_regular(self.path, limit=1 << 16)
        except FileNotFoundError:
            return None

    def _is_ours(self) -> bool:
        return _owner(self._read() or b"").get("token") == self._token

    def _is_dead(self, holder: bytes) -> bool:
        owner = _owner(holder)
        if host.is_neighbour(owner):
            return host.is_gone(owner)
        if _came_before(owner.get("slurm"), self._slurm):
            return self._stays_silent(holder, max(0.0, MISSED_BEATS * self._beat_s - self._age_s()))
        return self._stays_silent(holder, self._stale_s)

    def _age_s(self) -> float:
        """Return the seconds since the last beat, by the clock that stamps files; 0 where it cannot be told."""
        aside = self._write_aside()
        try:
            return max(0.0, aside.stat().st_mtime - self.path.stat().st_mtime)
        except FileNotFoundError:
            return 0.0
        finally:
            aside.unlink(missing_ok=True)

    def _stays_silent(self, holder: bytes, for_s: float) -> bool:
        """Watch the lock for so long; False as soon as anything about it changes."""
        seen = self._signs(holder)
        until = time.monotonic() + for_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._stale_s / 20))
            if self._signs(self._read()) != seen:
                return False
        return True

    def _signs(self, holder: bytes | None) -> tuple[bytes | None, int]:
        try:
            return holder, os.stat(self.path).st_mtime_ns
        except FileNotFoundError:
            return None, 0

    def _take_over(self, holder: bytes) -> bool:
        """Put our lock in a dead one's place, unless somebody else has just done so.

        Of several that found the same dead lock, one at a time looks again and replaces it; the kernel gives the
        guard back when its holder dies, which a file of our own would not.
        """
        descriptor = os.open(self.path.with_name(GUARD), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _guarded(descriptor) or self._read() != holder:
                return False
            replace_file(self.path, self._owner_text())
            return True
        finally:
            os.close(descriptor)

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a full or absent disk for a moment: the next beat may pass
                if self._held_by != os.getpid():
                    return
                if not self._is_ours():
                    self.lost = True
                    return
                os.utime(self.path)


def _guarded(descriptor: int) -> bool:
    """Hold the guard file exclusively; False when somebody else keeps it (then look at the lock again)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.05)
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, *UNSUPPORTED):
            raise  # a Lustre mount without -o flock: taking over is then not safe against a second one doing the same
    return True


def _owner(holder: bytes) -> dict[str, Any]:
    """Return what a lock says; empty when it cannot be read (then only its heartbeat counts)."""
    return parse_json_object(holder) or {}


def _slurm_start(env: Mapping[str, str]) -> dict[str, Any] | None:
    """Return which start of which Slurm job this is; None outside of any."""
    if "SLURM_JOB_ID" not in env:
        return None
    restart = env.get("SLURM_RESTART_COUNT", "0")  # unset in the first
    cluster = env.get("SLURM_CLUSTER_NAME", "")
    return {"cluster": cluster, "job": env["SLURM_JOB_ID"], "restart": int(restart) if restart.isdecimal() else 0}


def _came_before(holder: Any, ours: dict[str, Any] | None) -> bool:
    """Return whether the lock is an earlier start's of the same job."""
    return (
        isinstance(holder, dict)
        and ours is not None
        and all(holder.get(key) == ours[key] for key in ("cluster", "job"))
        and isinstance(holder.get("restart"), int)
        and holder["restart"] < ours["restart"]
    )


def _busy_message(folder: Path, owner: dict[str, Any]) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    return (
        f"{folder} is in use: host {owner.get('host', 'unknown')}, process {owner.get('pid', 'unknown')}{job}, "
        f"since {owner.get('started', 'unknown')}; wait for it, stop it, or choose another output_dir"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
