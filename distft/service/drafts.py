"""Drafts: jobs that are being put together on the pages. What was chosen is in the database, not in a browser."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from distft.core.files import read_json_object, replace_json
from distft.service.auth import Caller
from distft.service.background import start_behind
from distft.service.database import ServiceDatabase
from distft.service.errors import ApiError, missing
from distft.service.files import FileService, training_file
from distft.service.fill_folder import JobFolderRequest, fill_folder
from distft.service.idempotency import Once
from distft.service.job_folder import REQUEST, JobFolder
from distft.service.jobs import JobService, method_of
from distft.service.preview import PREVIEW
from distft.service.settings import ServiceSettings
from distft.service.tables import DraftRow, new_id
from distft.service.wire import JobObject, JobRequest

AT_ONCE = 2
"""Drafts that are looked at at a time."""
KEPT_S = 30 * 24 * 3600
"""Seconds after its last change that a draft is kept."""
MOST = 200
"""Drafts of a project."""


EMPTY: dict[str, Any] = {
    "done": False, "error": None, "splits": [], "care": [], "notes": [], "num_steps": None, "parameters": None,
    "values": {}, "changed": [], "recipe": "", "advice": [], "plan": None,
}  # fmt: skip
"""Of a preview that has not begun."""


@dataclass(frozen=True, kw_only=True)
class JobDraft:
    """A job that is being put together."""

    id: str
    content: Mapping[str, Any]
    changed_at: int
    job_id: str | None

    def refuse_missing_grader(self) -> None:
        """Refuse a draft of the method reinforcement that nobody has given a grader yet.

        Raises:
            ApiError: status 400.
        """
        if self.content["method"] == "reinforcement" and not self.content.get("grader"):
            raise ApiError(400, "Choose a grader first: what an answer is worth.", param="grader", code="no_grader")

    @property
    def request(self) -> dict[str, Any]:
        """What the API would be asked for, as JSON."""
        kind = self.content["method"]
        asked = {name: self.content.get(name) for name in ("training_file", "validation_file", "model", "suffix")}
        asked |= {name: self.content.get(name) for name in ("seed", "priority", "recipe")}
        grader = {"grader": self.content.get("grader")} if kind == "reinforcement" else {}
        asked["method"] = {"type": kind, kind: {"hyperparameters": self.content.get("hyperparameters") or {}, **grader}}
        return {name: value for name, value in asked.items() if value not in (None, "")}


class DraftService:
    """Drafts of the projects that callers belong to."""

    def __init__(
        self, database: ServiceDatabase, settings: ServiceSettings, jobs: JobService, files: FileService
    ) -> None:
        self._database, self._settings, self._jobs, self._files = database, settings, jobs, files
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="preview")
        self._running: dict[str, subprocess.Popen[bytes] | None] = {}
        self._lock, self._closed = threading.Lock(), False

    def create(self, caller: Caller, *, training_file: str | None) -> JobDraft:
        """Begin a draft, with the first model that can be trained.

        Raises:
            ApiError: there is no such model, or the project has too many drafts.
        """
        caller.require("member")
        models = [name for name, base in self._settings.models.items() if base.methods]
        if not models:
            raise ApiError(400, "This server has no model that can be trained: name one in --models.", param="model")
        now = int(time.time())
        content = {
            "training_file": training_file, "model": models[0], "seed": secrets.randbelow(2**31), "priority": 0,
            "method": self._settings.models[models[0]].methods[0], "hyperparameters": {},
        }  # fmt: skip
        with self._database.writing() as session:
            query = select(DraftRow).where(DraftRow.project_id == caller.project_id)
            rows = session.scalars(query.order_by(DraftRow.changed_at.desc())).all()
            for row in [row for place, row in enumerate(rows) if place >= MOST - 1 or row.changed_at < now - KEPT_S]:
                session.delete(row)
                self._forget(row.id)
            row = DraftRow(
                id=new_id("draft-"), project_id=caller.project_id, created_at=now, changed_at=now, content=content
            )
            session.add(row)
            return _draft(row)

    def page(self, caller: Caller) -> list[JobDraft]:
        """Return the project's drafts that no job was made of, the one that was changed last first."""
        with self._database.reading() as session:
            query = select(DraftRow).where(DraftRow.project_id == caller.project_id, DraftRow.job_id.is_(None))
            return [_draft(row) for row in session.scalars(query.order_by(DraftRow.changed_at.desc()).limit(20))]

    def retrieve(self, caller: Caller, draft_id: str) -> JobDraft:
        """Return a draft."""
        with self._database.reading() as session:
            return _draft(_own(session, caller, draft_id))

    def change(self, caller: Caller, draft_id: str, changes: Mapping[str, Any]) -> JobDraft:
        """Change what is chosen; the recipe that was edited goes where it no longer belongs to the rest.

        Raises:
            ApiError: a job was made of it already.
        """
        caller.require("member")
        with self._database.writing() as session:
            row = _own(session, caller, draft_id)
            if row.job_id is not None:
                raise ApiError(409, "A job was made of this draft already.", code="draft_started")
            content = {**row.content, **changes}
            if "recipe" not in changes and content != row.content:
                content["recipe"] = None
            row.content, row.changed_at = content, int(time.time())
            return _draft(row)

    def delete(self, caller: Caller, draft_id: str) -> None:
        """Delete a draft; its files stay."""
        caller.require("member")
        with self._database.writing() as session:
            session.delete(_own(session, caller, draft_id))
        self._forget(draft_id)

    def start(self, caller: Caller, draft_id: str) -> JobObject:
        """Make the job; asked twice, it is the same job."""
        draft = self.retrieve(caller, draft_id)
        if draft.job_id is not None:
            return self._jobs.retrieve(caller, draft.job_id)
        draft.refuse_missing_grader()
        request = JobRequest.model_validate_json(json.dumps(draft.request))
        job = self._jobs.create(caller, request, Once(project_id=caller.project_id, key=draft_id))
        with self._database.writing() as session:
            _own(session, caller, draft_id).job_id = job.id
        self._forget(draft_id)
        return job

    def preview(self, caller: Caller, draft: JobDraft) -> dict[str, Any] | None:
        """Return what was found so far; None: the draft has no file. Looking begins with the first question.

        Raises:
            ApiError: the draft asks for what is not here.
        """
        if not draft.content.get("training_file"):
            return None
        draft.refuse_missing_grader()
        request = JobRequest.model_validate_json(json.dumps(draft.request))
        base = self._jobs.base_of(request)
        method, _ = method_of(request, base)
        with self._database.reading() as session:
            named = {
                param: training_file(session, caller, file_id, param=param).sha256
                for param in ("training_file", "validation_file")
                if (file_id := getattr(request, param))
            }
        asked = JobFolderRequest(
            base=base, method=method, seed=draft.content["seed"], integrations=None, recipe=request.recipe,
            training=self._files.contents.path(named["training_file"]),
            validation=self._files.contents.path(named["validation_file"]) if "validation_file" in named else None,
        )  # fmt: skip
        goal = draft.content.get("goal")
        told = json.dumps([base.model_dump_json(), method, asked.seed, asked.recipe, sorted(named.items()), goal])
        path = self._settings.data / "drafts" / f"{draft.id}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        found = read_json_object(path / PREVIEW)
        with self._lock:
            if not found.get("done") and path.name not in self._running:
                self._forget(draft.id)
                folder = JobFolder(path=path)
                fill_folder(folder, asked, self._settings)
                replace_json(path / REQUEST, folder.request() | {"goal": goal}, indent=1)
                self._running[path.name] = None
                self._pool.submit(self._look, folder)
        return EMPTY | found

    def close(self) -> None:
        """End what is being looked at; the next question begins anew."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in list(self._running.values()):
            if child is not None:
                child.kill()

    def _look(self, folder: JobFolder) -> None:
        try:
            with folder.log.open("ab") as log:
                command = [sys.executable, "-m", "distft.service.preview", str(folder.path)]
                child = start_behind(command, log, niceness=self._settings.limits.niceness)
            self._running[folder.path.name] = child
            try:
                child.wait(self._settings.limits.examine_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            found = read_json_object(folder.path / PREVIEW)
            if folder.path.exists() and not found.get("done") and not self._closed:
                error = {"code": "validation_failed", "message": "The files could not be looked at.", "param": None}
                replace_json(folder.path / PREVIEW, found | {"done": True, "error": error})
        except OSError:  # the folder went: the draft was changed, or deleted
            return
        finally:
            self._running.pop(folder.path.name, None)

    def _forget(self, draft_id: str) -> None:
        """Remove what was found for an earlier state of a draft."""
        for path in (self._settings.data / "drafts").glob(f"{draft_id}-*"):
            if (child := self._running.get(path.name)) is not None:
                child.kill()
            shutil.rmtree(path, ignore_errors=True)


def _own(session: Session, caller: Caller, draft_id: str) -> DraftRow:
    row = session.get(DraftRow, draft_id)
    if row is None or row.project_id != caller.project_id:
        raise missing("draft", draft_id)
    return row


def _draft(row: DraftRow) -> JobDraft:
    return JobDraft(id=row.id, content=dict(row.content), changed_at=row.changed_at, job_id=row.job_id)
