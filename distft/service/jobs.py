"""What the API does with jobs: makes, lists, pauses, resumes, cancels. What they do by themselves is `worker`."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from distft.service.auth import Caller, note_change
from distft.service.database import ServiceDatabase, next_position
from distft.service.errors import ApiError, missing, refuse
from distft.service.files import ContentStore, training_file
from distft.service.fill_folder import JobFolderRequest, fill_folder
from distft.service.graders import read_grader
from distft.service.idempotency import Once
from distft.service.job_cards import JobCard, card_of
from distft.service.job_folder import JobFolder
from distft.service.settings import ServedBase, ServiceSettings
from distft.service.tables import CheckpointRow, EventRow, JobRow, ProjectRow, new_id
from distft.service.webhooks import queue_webhooks
from distft.service.wire import (
    CheckpointMetrics,
    CheckpointObject,
    DpoMethod,
    EventObject,
    JobError,
    JobObject,
    JobRequest,
    Page,
    ReinforcementMethod,
    SupervisedMethod,
    page_of,
)

UNFINISHED = ("validating_files", "queued", "running", "paused")
FINISHED = ("succeeded", "failed", "cancelled")
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class JobService:
    """Jobs of the projects that callers belong to; another project's are not there."""

    def __init__(self, database: ServiceDatabase, settings: ServiceSettings, contents: ContentStore) -> None:
        self._database, self._settings, self._contents = database, settings, contents

    def folder(self, job_id: str) -> JobFolder:
        """Return a job's folder."""
        return JobFolder(path=self._settings.jobs / job_id)

    def create(self, caller: Caller, request: JobRequest, once: Once) -> JobObject:
        """Make a job; its files are looked at, and it is planned, before it waits for its turn.

        Raises:
            ApiError: it asks for what is not here, or the project may have no more.
        """
        caller.require("member")
        base, method, hyperparameters = self.refuse_unserved(request)
        digest = f"job {request.model_dump_json()}"
        with self._database.writing() as session:
            if (earlier := once.earlier(session, digest)) is not None:
                return job_object(_own(session, caller, earlier))
            training = training_file(session, caller, request.training_file, param="training_file")
            validation = None
            if request.validation_file is not None:
                validation = training_file(session, caller, request.validation_file, param="validation_file")
            self._refuse_too_many(session, caller)
            project = session.get_one(ProjectRow, caller.project_id)
            job_id = new_id("ftjob-")
            row = JobRow(
                id=job_id,
                project_id=caller.project_id,
                position=next_position(session, "jobs"),
                created_at=int(time.time()),
                model=request.model,
                method=method,
                hyperparameters=hyperparameters,
                training_file=training.id,
                validation_file=validation.id if validation else None,
                training_sha256=training.sha256,
                validation_sha256=validation.sha256 if validation else None,
                suffix=request.suffix or "",
                seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
                metadata_=request.metadata,
                integrations=[entry.model_dump(exclude_none=True) for entry in request.integrations or ()] or None,
                priority=request.priority,
                status="validating_files",
                fine_tuned_model=f"ft:{request.model}:{project.name}:{request.suffix or ''}:{new_id('', 8)}",
            )
            session.add(row)
            session.flush()
            self._fill_folder(row, base, request.recipe)
            once.note(session, digest, job_id)
            add_event(session, row, f"Created fine-tuning job: {job_id}")
            add_event(session, row, f"Validating training file: {training.id}")
            note_change(session, caller, "job.create", job_id)
            return job_object(row)

    def page(
        self, caller: Caller, *, after: str | None, limit: int, metadata: Mapping[str, str] | None, null_metadata: bool
    ) -> Page:
        """Return a page of the project's jobs, newest first; those with all of `metadata`, or with none."""
        of_metadata = [JobRow.metadata_[key].as_string() == value for key, value in (metadata or {}).items()]
        if null_metadata:
            of_metadata.append(JobRow.metadata_.is_(None))
        rows = self._rows(caller, after, limit + 1, of_metadata)
        return page_of([job_object(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def cards(self, caller: Caller, *, after: str | None, limit: int, status: str | None) -> tuple[list[JobCard], bool]:
        """Return jobs as people see them, newest first, and whether there are more; all, or those of one status."""
        rows = self._rows(caller, after, limit + 1, [] if status is None else [JobRow.status == status])
        return [card_of(row) for row in rows[:limit]], len(rows) > limit

    def card(self, caller: Caller, job_id: str) -> JobCard:
        """Return a job as people see it."""
        with self._database.reading() as session:
            return card_of(_own(session, caller, job_id))

    def _rows(
        self, caller: Caller, after: str | None, limit: int, conditions: Sequence[ColumnElement[bool]]
    ) -> Sequence[JobRow]:
        with self._database.reading() as session:
            query = select(JobRow).where(JobRow.project_id == caller.project_id, *conditions)
            if after is not None:
                query = query.where(JobRow.position < _own(session, caller, after, param="after").position)
            return session.scalars(query.order_by(JobRow.position.desc()).limit(limit)).all()

    def retrieve(self, caller: Caller, job_id: str) -> JobObject:
        """Return a job."""
        with self._database.reading() as session:
            return job_object(_own(session, caller, job_id))

    def recipe(self, caller: Caller, job_id: str) -> str:
        """Return a job's recipe as TOML."""
        with self._database.reading() as session:
            _own(session, caller, job_id)
        try:
            return self.folder(job_id).recipe.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise missing("recipe yet of fine-tuning job", job_id) from None

    def cancel(self, caller: Caller, job_id: str) -> JobObject:
        """Cancel a job at once; its process, if there is one, is ended by the worker."""
        return self._wish(caller, job_id, "cancel", UNFINISHED, self._cancel)

    def pause(self, caller: Caller, job_id: str) -> JobObject:
        """Ask a job to save and stop; it is `paused` once it has."""
        return self._wish(caller, job_id, "pause", ("validating_files", "queued", "running"), self._pause)

    def resume(self, caller: Caller, job_id: str) -> JobObject:
        """Let a paused job, or one that is about to pause, go on: the same command, from its checkpoint."""
        return self._wish(caller, job_id, "resume", ("paused", "running"), self._resume)

    def prioritize(self, caller: Caller, job_id: str, priority: int) -> JobObject:
        """Change a job's place in the queue: a higher priority is started first."""

        def set_priority(session: Session, row: JobRow) -> None:
            row.priority = priority
            add_event(session, row, f"The job has the priority {priority}.")

        return self._wish(caller, job_id, "prioritize", UNFINISHED, set_priority)

    def events(self, caller: Caller, job_id: str, *, after: str | None, limit: int) -> Page:
        """Return a page of a job's events, newest first."""
        with self._database.reading() as session:
            _own(session, caller, job_id)
            query = select(EventRow).where(EventRow.job_id == job_id)
            if after is not None:
                last = session.get(EventRow, after)
                if last is None or last.job_id != job_id:
                    raise missing("event", after, param="after")
                query = query.where(EventRow.number < last.number)
            rows = session.scalars(query.order_by(EventRow.number.desc()).limit(limit + 1)).all()
        return page_of([_event(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def checkpoints(self, caller: Caller, job_id: str, *, after: str | None, limit: int) -> Page:
        """Return a page of a job's checkpoints, newest first."""
        with self._database.reading() as session:
            _own(session, caller, job_id)
            query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
            if after is not None:
                last = session.get(CheckpointRow, after)
                if last is None or last.job_id != job_id:
                    raise missing("checkpoint", after, param="after")
                query = query.where(CheckpointRow.step < last.step)
            rows = session.scalars(query.order_by(CheckpointRow.step.desc()).limit(limit + 1)).all()
        return page_of([_checkpoint(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def refuse_unserved(self, request: JobRequest) -> tuple[ServedBase, dict[str, Any], dict[str, Any]]:
        """Return model, method and hyper-parameters of a request that can be served.

        Raises:
            ApiError: it asks for what is not here.
        """
        base = self.base_of(request)
        method, hyperparameters = method_of(request, base)
        if request.suffix is not None and not _SUFFIX.fullmatch(request.suffix):
            refuse("A suffix holds letters, digits, dots, dashes and underscores.", param="suffix")
        _refuse_wandb_details(request)
        return base, method, hyperparameters

    def base_of(self, request: JobRequest) -> ServedBase:
        """Return the model that a job is made of.

        Raises:
            ApiError: there is none of this name.
        """
        if request.model not in self._settings.models:
            known = ", ".join(self._settings.models)
            message = f"The model '{request.model[:100]}' cannot be fine-tuned here. Models here: {known}"
            raise ApiError(400, message, param="model", code="model_not_available")
        return self._settings.models[request.model]

    def _refuse_too_many(self, session: Session, caller: Caller) -> None:
        query = select(func.count(JobRow.id)).where(JobRow.project_id == caller.project_id)
        count = session.scalar(query.where(JobRow.status.in_(UNFINISHED))) or 0
        if count >= self._settings.limits.unfinished_per_project:
            message = f"The project has {count} jobs that have not ended, and may have no more."
            raise ApiError(429, message, code="quota_exceeded")

    def _fill_folder(self, row: JobRow, base: ServedBase, recipe: str | None) -> None:
        """Write what was asked; the rows are linked, so that they outlive the files they came as."""
        folder = self.folder(row.id)
        asked = JobFolderRequest(
            base=base, method=row.method, seed=row.seed, integrations=row.integrations, recipe=recipe,
            training=self._contents.path(row.training_sha256),
            validation=self._contents.path(row.validation_sha256) if row.validation_sha256 else None,
        )  # fmt: skip
        fill_folder(folder, asked, self._settings)

    def _wish(self, caller: Caller, job_id: str, verb: str, allowed: Sequence[str], act: Any) -> JobObject:
        caller.require("member")
        with self._database.writing() as session:
            row = _own(session, caller, job_id, lock=True)
            if row.status not in allowed:
                message = f"Job {job_id} is {row.status}, and cannot be {verb}{'d' if verb[-1] == 'e' else 'led'}."
                raise ApiError(400, message, param="fine_tuning_job_id", code=f"invalid_{verb}")
            act(session, row)
            note_change(session, caller, f"job.{verb}", job_id)
            return job_object(row)

    def _cancel(self, session: Session, row: JobRow) -> None:
        row.wish = "cancel"
        row.status, row.finished_at, row.estimated_finish = "cancelled", int(time.time()), None
        add_event(session, row, "The job was cancelled.")
        queue_webhooks(session, row, "cancelled")

    def _pause(self, session: Session, row: JobRow) -> None:
        row.wish = "pause"
        if row.status != "running":  # there is nothing to save
            row.status = "paused"
            add_event(session, row, "The job is paused before it has started.")
        else:
            row.stopping_since = int(time.time())
            add_event(session, row, "The job was asked to save and stop.")

    def _resume(self, session: Session, row: JobRow) -> None:
        if row.status == "running" and row.wish != "pause":
            raise ApiError(400, f"Job {row.id} is running.", param="fine_tuning_job_id", code="invalid_resume")
        row.wish = "run"
        if row.status == "paused":
            examined = self.folder(row.id).examined() is not None
            row.status = "queued" if examined else "validating_files"
        add_event(session, row, "The job goes on.")


def add_event(
    session: Session, row: JobRow, message: str, *, level: str = "info", type: str = "message",
    data: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Add an event to a job, whose row the session has locked or made."""
    row.num_events += 1
    session.add(
        EventRow(
            id=new_id("ftevent-"), job_id=row.id, number=row.num_events, created_at=int(time.time()), level=level,
            type=type, message=message, data=data,
        )
    )  # fmt: skip


def job_object(row: JobRow) -> JobObject:
    """Return a job as the API has it."""
    succeeded = row.status == "succeeded"
    return JobObject(
        id=row.id,
        created_at=row.created_at,
        finished_at=row.finished_at,
        model=row.model,
        fine_tuned_model=row.fine_tuned_model if succeeded and row.deleted_at is None else None,
        organization_id=row.project_id,
        status=row.status,  # pyright: ignore[reportArgumentType]
        hyperparameters=row.hyperparameters,
        training_file=row.training_file,
        validation_file=row.validation_file,
        result_files=[row.result_file] if row.result_file else [],
        trained_tokens=row.trained_tokens if row.status in FINISHED else None,
        error=JobError(**row.error) if row.error else None,
        seed=row.seed,
        estimated_finish=row.estimated_finish,
        integrations=row.integrations,
        method=row.method,
        metadata=row.metadata_,
    )


def _own(
    session: Session, caller: Caller, job_id: str, *, param: str = "fine_tuning_job_id", lock: bool = False
) -> JobRow:
    row = session.get(JobRow, job_id, with_for_update=lock)
    if row is None or row.project_id != caller.project_id:
        raise missing("fine-tuning job", job_id, param=param)
    return row


def method_of(request: JobRequest, base: ServedBase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `method` as it is answered, and the hyper-parameters.

    Raises:
        ApiError: the model cannot be trained by this method, or two places say two things.
    """
    kind = request.method.type if request.method else "supervised"
    if kind not in base.methods:
        trained = (
            f"is trained by {', '.join(base.methods)} here, not by {kind}" if base.methods else "only answers here"
        )
        message = f"The model {request.model} {trained}."
        raise ApiError(400, message, param="method.type", code="unsupported_method")
    inner = getattr(request.method, kind, None) or (DpoMethod() if kind == "dpo" else SupervisedMethod())
    if isinstance(inner, ReinforcementMethod):
        _refuse_unserved(inner)
    values = inner.hyperparameters.model_dump()
    if request.hyperparameters is not None:
        older = request.hyperparameters.model_dump(exclude_unset=True)
        newer = inner.hyperparameters.model_dump(exclude_unset=True)
        if clash := [key for key in older if key in newer and newer[key] != older[key]]:
            refuse(f"{clash[0]} is given twice, with two values: keep method's.", param=f"hyperparameters.{clash[0]}")
        values |= older
    grader = {"grader": inner.grader} if isinstance(inner, ReinforcementMethod) else {}
    return {"type": kind, kind: {**grader, "hyperparameters": values}}, values


def _refuse_unserved(method: ReinforcementMethod) -> None:
    read_grader(method.grader, param="method.reinforcement.grader")
    if method.hyperparameters.reasoning_effort != "default":
        message = "No model here is told how long to think: reasoning_effort is default."
        param = "method.reinforcement.hyperparameters.reasoning_effort"
        raise ApiError(400, message, param=param, code="unsupported_parameter")


def _refuse_wandb_details(request: JobRequest) -> None:
    for entry in request.integrations or ():
        for name in ("entity", "name", "tags"):
            if getattr(entry.wandb, name) is not None:
                message = f"integrations.wandb.{name} has no counterpart here: the project alone is named."
                raise ApiError(400, message, param=f"integrations.wandb.{name}", code="unsupported_parameter")


def _event(row: EventRow) -> EventObject:
    return EventObject(
        id=row.id,
        created_at=row.created_at,
        level=row.level,  # pyright: ignore[reportArgumentType]
        message=row.message,
        type=row.type,  # pyright: ignore[reportArgumentType]
        data=row.data,
    )


def _checkpoint(row: CheckpointRow) -> CheckpointObject:
    return CheckpointObject(
        id=row.id,
        created_at=row.created_at,
        fine_tuned_model_checkpoint=row.name,
        step_number=row.step,
        metrics=CheckpointMetrics(**row.metrics),
        fine_tuning_job_id=row.job_id,
    )
