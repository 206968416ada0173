"""The thread that makes artifacts, one at a time, each by a process of its own. Its memory is the database and folders.

A process that an earlier server has started is ended and its artifact made anew, unless it had said how it ended: so a
server that dies at any moment loses none, and makes none twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from distft.core.errors import DistftError, FileSystemError
from distft.demo.files import locate_path
from distft.service.artifact_archive import plain_files
from distft.service.artifact_folder import ArtifactFolder
from distft.service.background import start_behind
from distft.service.database import ServiceDatabase, afterwards
from distft.service.files import FileService
from distft.service.job_folder import JobFolder
from distft.service.settings import ServiceSettings
from distft.service.tables import ArtifactRow, JobRow

LOOKS_S = 0.25
"""Between two looks at the artifacts."""
LONGEST_MESSAGE = 4000
_LOG = logging.getLogger("distft.service")


@dataclass(frozen=True, kw_only=True)
class _Making:
    """The process of this server that makes an artifact."""

    artifact_id: str
    child: subprocess.Popen[bytes]
    began: float
    """By the monotonic clock."""


class ArtifactWorker:
    """Makes the artifacts of one server."""

    def __init__(self, database: ServiceDatabase, settings: ServiceSettings, files: FileService) -> None:
        self._database, self._settings, self._files = database, settings, files
        self._making: _Making | None = None
        self._vanished = Counter[str]()
        """Times that an artifact's process ended without a word, in this server's life."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="artifacts", daemon=True)

    def start(self) -> None:
        """Remove folders that no row speaks of, and begin."""
        self._remove_orphans()
        self._thread.start()

    def stop(self) -> None:
        """Stop; what is being made is made anew by the next server."""
        self._stop.set()
        self._thread.join(timeout=10)
        if self._making is not None:
            _kill_group(self._making.child.pid)
            self._making.child.wait()

    def look(self) -> None:
        """Follow what is being made; where nothing is, begin with what waits longest."""
        with self._database.reading() as session:
            started = session.scalars(select(ArtifactRow.id).where(ArtifactRow.started.is_(True))).all()
            waits = select(ArtifactRow.id).where(ArtifactRow.status == "queued", ArtifactRow.started.is_(False))
            first = session.scalar(waits.order_by(ArtifactRow.position).limit(1))
        for artifact_id in started:
            self._guarded(self._follow, artifact_id)
        if not started and first is not None:
            self._guarded(self._begin, first)

    def _begin(self, artifact_id: str) -> None:
        """Start the process: first it is written down that there may be one, then there is one."""
        with self._database.writing() as session:
            row = session.get_one(ArtifactRow, artifact_id, with_for_update=True)
            if row.status != "queued" or row.started:
                return
            request = self._request(session, row)
            if isinstance(request, str):
                _fail(row, code="model_not_found", message=request)
                return
            row.started, row.status, row.started_at = True, "running", int(time.time())
        folder = self._folder(artifact_id)
        folder.make_anew(request)
        held = folder.hold()
        if held is None:  # cannot be: the folder is new
            raise FileSystemError(f"{folder.path}: its lock is taken")
        try:
            with folder.log.open("ab") as log:
                command = [*self._settings.make_artifact, str(folder.path)]
                niceness = self._settings.limits.niceness
                child = start_behind(command, log, niceness=niceness, own_session=True, kept=[held])
            self._making = _Making(artifact_id=artifact_id, child=child, began=time.monotonic())
            folder.write_process(child.pid)
        finally:
            os.close(held)  # the process has it too

    def _request(self, session: Session, row: ArtifactRow) -> dict[str, Any] | str:
        """Return what the process is asked for, or why nothing can be asked."""
        folder = self._folder(row.id).path
        names = {f"{folder}/content": row.id, f"{folder}/": ""}
        sources: list[dict[str, Any]] = []
        for source in row.sources:
            job = session.get(JobRow, source["job_id"])
            if job is None or job.deleted_at is not None:
                return f"The model {source['model']} is no longer here."
            if (base := self._settings.models.get(job.model)) is None:
                return f"The model {job.model}, which {source['model']} was made of, is no longer here."
            run = JobFolder(path=self._settings.jobs / job.id).run
            names |= {str(run): job.fine_tuned_model, f"{run}/": ""}
            try:
                located = locate_path(base.path)
            except DistftError as error:
                return f"The model {job.model} is not there: {error}"
            if Path(located).is_absolute():
                names[located] = job.model
            sources.append({**source, "run": str(run)})
        return {"kind": row.kind, "sources": sources, "settings": row.settings, "names": names}

    def _follow(self, artifact_id: str) -> None:
        """End a process that takes too long or that nobody wants any more; take in what one has made."""
        folder = self._folder(artifact_id)
        with self._database.reading() as session:
            row = session.get_one(ArtifactRow, artifact_id)
        making = self._making if self._making is not None and self._making.artifact_id == artifact_id else None
        late = making is not None and time.monotonic() - making.began > self._settings.limits.artifact_s
        if making is not None:
            if making.child.poll() is None and row.status == "running" and not late:
                return
            if making.child.poll() is None or folder.is_alive():  # also what it has left behind
                _kill_group(making.child.pid)
                making.child.wait()
        elif folder.is_alive() and (group := folder.process_group()) is not None:
            _kill_group(group)  # an earlier server's; one that has not been written down yet ends with its server
        if folder.is_alive():
            return  # it is ending
        self._end(artifact_id, folder, late=late, vanished=making is not None)
        if making is not None:
            self._making = None

    def _end(self, artifact_id: str, folder: ArtifactFolder, *, late: bool, vanished: bool) -> None:
        """Decide what becomes of an artifact that no process works on."""
        made = folder.made()
        with self._database.writing() as session:
            row = session.get_one(ArtifactRow, artifact_id, with_for_update=True)
            row.started = False
            if row.status == "running":
                if "proof" in made:
                    self._succeed(session, row, folder, made["proof"])
                elif "error" in made:
                    _fail(row, code=made["error"]["code"], message=made["error"]["message"])
                elif late:
                    limit = self._settings.limits.artifact_s
                    _fail(row, code="time_limit", message=f"It was not made within {limit:g} seconds.")
                elif vanished and self._vanished[artifact_id] >= self._settings.limits.lost_starts:
                    times = self._vanished[artifact_id] + 1
                    _fail(row, code="process_lost", message=f"Its process vanished {times} times without a word.")
                else:
                    self._vanished[artifact_id] += vanished
                    row.status = "queued"
            keep = row.status == "succeeded"
            afterwards(session, lambda: folder.remove_rest(keep_content=keep))

    def _succeed(self, session: Session, row: ArtifactRow, folder: ArtifactFolder, proof: dict[str, Any]) -> None:
        try:
            num_bytes = sum(file.size for file in plain_files(folder.content, row.id))
        except OSError:
            _fail(row, code="no_content", message="Its process left no folder.")
            return
        except FileSystemError as error:
            _fail(row, code="no_content", message=str(error))
            return
        if num_bytes > self._files.room(session, row.project_id):
            message = f"Its {num_bytes:,} bytes are more than the project may still have: delete some."
            _fail(row, code="quota_exceeded", message=message)
            return
        row.status, row.finished_at, row.bytes, row.proof = "succeeded", int(time.time()), num_bytes, proof

    def _folder(self, artifact_id: str) -> ArtifactFolder:
        return ArtifactFolder(path=self._settings.artifacts / artifact_id)

    def _remove_orphans(self) -> None:
        self._settings.artifacts.mkdir(parents=True, exist_ok=True)
        with self._database.reading() as session:
            known = set(session.scalars(select(ArtifactRow.id)))
        for path in self._settings.artifacts.iterdir():
            if path.name.startswith("artifact-") and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)

    def _guarded(self, work: Callable[[str], None], artifact_id: str) -> None:
        """Do a piece of work on one artifact; what goes wrong there is logged and tried again."""
        try:
            work(artifact_id)
        except DBAPIError:
            raise
        except Exception:
            _LOG.exception("a look at an artifact failed", extra={"artifact": artifact_id})
            self._stop.wait(1.0)  # a full disk is not free at the next look

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:  # the database may be away for a while
                _LOG.exception("the worker of artifacts could not look")
                self._stop.wait(1.0)
            self._stop.wait(LOOKS_S)


def _fail(row: ArtifactRow, *, code: str, message: str) -> None:
    row.status, row.finished_at = "failed", int(time.time())
    row.error = {"code": code, "message": message[:LONGEST_MESSAGE], "param": None}


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
