"""Whether the run folder is one folder for all processes, and keeps the promises that checkpoints and locks rest on."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distft.core import faults
from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, names, ok, warn
from distft.doctor.places import Probe

GIB = 2**30
SOON_S = 10.0
"""NFS may remember for some seconds that a file was not there."""
LEAST_SPACE, LITTLE_SPACE = GIB, 20 * GIB
LEAST_INODES = 10_000


def look(here: Here) -> Facts:
    """Write on each process, then look for the others' files; rank 0 replaces a file that all read, and locks it."""
    probe = Probe(here.options.shared, here.from_first(Probe(here.options.shared).name))
    wrote = _try(lambda: _write(probe, here.rank))
    everyone = here.gather(wrote)
    there = [rank for rank, error in enumerate(everyone) if not error]
    missing = _missing(probe, there)
    here.gather(None)  # nobody goes on while others still look
    replaced = _try(lambda: _replace(probe)) if here.rank == 0 else ""
    if here.from_first(replaced) == "":
        replaced = replaced or _try(lambda: _see_replaced(probe))
    lock = _lock(probe, here)
    here.gather(None)
    facts = {"folder": str(probe.parent), "wrote": wrote, "missing": missing, "replaced": replaced, "lock": lock}
    facts |= _space(probe)
    if here.rank == 0 or missing:  # whoever is in a folder of its own tidies that one up
        probe.__exit__(None, None, None)
    return facts


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether the folder is one for all, writable by all, and has room."""
    folder, findings = seen[0].facts["folder"], list[Finding]()
    unable = [process for process in seen if process.facts["wrote"]]
    if unable:
        findings.append(
            fail(
                f"{folder}: {names(process.who for process in unable)} cannot write: {unable[0].facts['wrote']}",
                "permissions (ls -ld), quota, read-only mount; or another output_dir",
                {process.host for process in unable} if len(unable) < len(seen) else (),
            )
        )
    apart = _apart(seen)
    if apart:
        hosts = names({process.host: 0 for process in apart})
        message = f"{folder} of {hosts} is not the others' folder: {apart[0].who} does not see what they wrote"
        findings.append(
            fail(
                message,
                "put output_dir on a file system that every host mounts (df PATH on each)",
                (o.host for o in apart),
            )
        )
    stale = [process for process in seen if process.facts["replaced"] and process not in apart]
    if stale and not unable:
        message = f"{folder}: a file that rank 0 replaced is not whole for {stale[0].who}: {stale[0].facts['replaced']}"
        findings.append(fail(message, "the file system has no atomic rename: keep runs elsewhere", ()))
    broken = [process for process in seen if process.facts["lock"] and process not in apart]
    if broken and not unable:
        message = f"{folder}: {broken[0].facts['lock']} ({names(process.who for process in broken)})"
        fix = "two starts may take a dead run's folder over at once: mount with locks (Lustre: -o flock; NFS 4)"
        findings.append(warn(message, fix))
    findings += _room(seen)
    yield from findings
    if not findings:
        facts = min(seen, key=lambda process: process.facts["space"]).facts
        all_ = f"{len(seen)} processes see each other's files, " if len(seen) > 1 else ""
        yield ok(f"{folder}: {all_}{facts['space'] / GIB:.0f} GiB free")


def _room(seen: Sequence[Seen]) -> Iterator[Finding]:
    facts = min(seen, key=lambda process: process.facts["space"]).facts
    fix = "remove what is not needed (older checkpoints: [checkpoint] keep), or another output_dir"
    if facts["space"] < LITTLE_SPACE:
        say = fail if facts["space"] < LEAST_SPACE else warn
        yield say(f"{facts['folder']}: {facts['space'] / GIB:.2f} GiB free", fix)
    if facts["inodes"] is not None and facts["inodes"] < LEAST_INODES:
        yield warn(f"{facts['folder']}: room for {facts['inodes']} more files", fix)


def _apart(seen: Sequence[Seen]) -> list[Seen]:
    """Return the processes outside the largest set of processes that see each other's files."""
    sets = dict[tuple[int, ...], list[Seen]]()
    for process in seen:
        if not process.facts["wrote"]:
            sets.setdefault(tuple(process.facts["missing"]), []).append(process)
    together = max(sets.values(), key=len, default=[])
    return [process for process in seen if not process.facts["wrote"] and process not in together]


def _write(probe: Probe, rank: int) -> None:
    faults.inject("shared", rank=rank)
    probe.path.mkdir(exist_ok=True)
    probe.write(f"rank-{rank}", str(rank).encode())


def _missing(probe: Probe, ranks: list[int]) -> list[int]:
    until = time.monotonic() + SOON_S
    while True:
        missing = [rank for rank in ranks if _read(probe, f"rank-{rank}") != str(rank).encode()]
        if not missing or time.monotonic() > until:
            return missing
        time.sleep(0.2)


def _replace(probe: Probe) -> None:
    """Replace a file as a checkpoint is committed: a new file takes an old one's place."""
    probe.write("state", b"old" * 1000)
    probe.write("state.tmp", b"new" * 1000)
    os.replace(probe.path / "state.tmp", probe.path / "state")


def _see_replaced(probe: Probe) -> None:
    until = time.monotonic() + SOON_S
    while (content := _read(probe, "state")) != b"new" * 1000:
        if time.monotonic() > until:
            raise OSError(errno.ESTALE, "absent" if content is None else f"{len(content)} bytes of something else")
        time.sleep(0.2)


def _lock(probe: Probe, here: Here) -> str:
    """Return what is wrong with locks, as `checkpoint.lock` uses them: rank 0 holds one that others must not get."""
    descriptor, problem = None, ""
    try:
        descriptor = os.open(probe.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if here.rank == 0:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = f"a lock (flock) is refused: {error.strerror}"
    here.gather(None)
    if descriptor is not None and here.rank != 0:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            problem = "a lock (flock) that one host holds does not keep another one out"
        except BlockingIOError:
            pass
        except OSError as error:
            problem = f"a lock (flock) is refused: {error.strerror}"
    here.gather(None)
    if descriptor is not None:
        os.close(descriptor)
    return problem


def _space(probe: Probe) -> dict[str, Any]:
    try:
        has = os.statvfs(probe.parent)
    except OSError:
        return {"space": 0, "inodes": 0}
    return {"space": has.f_bavail * has.f_frsize, "inodes": has.f_favail if has.f_files else None}


def _read(probe: Probe, name: str) -> bytes | None:
    try:
        os.listdir(probe.path)  # makes NFS look again
        return (probe.path / name).read_bytes()
    except OSError:
        return None


def _try(act: Callable[[], None]) -> str:
    """Return what went wrong; empty: nothing."""
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
    return ""


CHECK = Check(name="shared folder", look=look, judge=judge, together=True)
