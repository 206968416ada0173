"""Names of models: those that may be trained, those that jobs made, their checkpoints, and who may use them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from distft.demo.files import locate_path
from distft.service.auth import Caller, note_change
from distft.service.database import ServiceDatabase, next_position
from distft.service.errors import ApiError, missing, refuse
from distft.service.job_folder import JobFolder
from distft.service.settings import ServedBase, ServiceSettings
from distft.service.tables import CheckpointRow, JobRow, PermissionRow, ProjectRow, new_id
from distft.service.wire import ModelObject, Page, PermissionObject, page_of

SYSTEM = "distft"


@dataclass(frozen=True, kw_only=True)
class ModelToAsk:
    """What a model's name means on this machine."""

    name: str
    base: ServedBase
    given: str
    """A run folder, a checkpoint's, or the base's path."""


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A model that a job of the caller's project made, or a checkpoint of it."""

    name: str
    job_id: str
    step: int | None
    """Of a checkpoint; None: the model that the job ended with."""
    base: ServedBase
    run: Path
    """Folder of the job's run."""


class ModelService:
    """What the API does with models and with permissions on them."""

    def __init__(self, database: ServiceDatabase, settings: ServiceSettings) -> None:
        self._database, self._settings = database, settings
        self._began = int(time.time())

    def page(self, caller: Caller) -> Page:
        """Return every model that the caller may use."""
        models = [self._base_object(name) for name in self._settings.models]
        with self._database.reading() as session:
            done = JobRow.status == "succeeded", JobRow.deleted_at.is_(None)
            query = select(JobRow).where(JobRow.project_id == caller.project_id, *done).order_by(JobRow.position)
            models += [_tuned_object(row) for row in session.scalars(query)]
            granted = select(PermissionRow.checkpoint).where(PermissionRow.project_id == caller.project_id)
            for name in session.scalars(granted):
                job, _ = _named(session, name)
                if job is not None and job.deleted_at is None:
                    models.append(_object(session, name))
        return page_of(models, has_more=False)

    def retrieve(self, caller: Caller, name: str) -> ModelObject:
        """Return one model."""
        if name in self._settings.models:
            return self._base_object(name)
        with self._database.reading() as session:
            self._find(session, caller, name)
            return _object(session, name)

    def delete(self, caller: Caller, name: str) -> None:
        """Delete a tuned model: it can no longer be asked, nor can its checkpoints."""
        caller.require("member")
        if name in self._settings.models:
            raise ApiError(403, f"The model {name} is the server's.", param="model", code="insufficient_permissions")
        with self._database.writing() as session:
            query = select(JobRow).where(JobRow.fine_tuned_model == name, JobRow.project_id == caller.project_id)
            row = session.scalar(query.where(JobRow.status == "succeeded", JobRow.deleted_at.is_(None)))
            if row is None:
                raise missing("model", name, param="model")
            row.deleted_at = int(time.time())
            for point in session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == row.id)):
                session.delete(point)
            note_change(session, caller, "model.delete", name)

    def find(self, caller: Caller, name: str) -> ModelToAsk:
        """Return what a name means.

        Raises:
            ApiError: the caller may use no such model.
        """
        if name in self._settings.models:
            base = self._settings.models[name]
            if base.recipe.get("model", {}).get("init") == "random":
                message = f"The model {name} has no weights of its own: jobs train it from random ones."
                raise ApiError(400, message, param="model", code="model_not_servable")
            return ModelToAsk(name=name, base=base, given=locate_path(base.path))
        with self._database.reading() as session:
            job, step = self._find(session, caller, name)
        folder = JobFolder(path=self._settings.jobs / job.id).run
        given = folder if step is None else folder / "checkpoints" / f"step-{step:08d}"
        base = self._settings.models.get(job.model)
        if base is None:
            raise ApiError(404, f"The model {job.model}, which {name} was made of, is no longer here.", param="model")
        return ModelToAsk(name=name, base=base, given=str(given))

    def tuned(self, caller: Caller, name: str) -> TunedModel:
        """Return a tuned model of the caller's own project: to be asked is one thing, to be taken away another.

        Raises:
            ApiError: it is the server's, or the project has no such model.
        """
        if name in self._settings.models:
            raise ApiError(400, f"The model {name} is the server's: name one that a job made.", param="models")
        with self._database.reading() as session:
            try:
                job, step = self._find(session, caller, name, owner=True)
            except ApiError:
                raise missing("model", name, param="models") from None
        base = self._settings.models.get(job.model)
        if base is None:
            raise ApiError(404, f"The model {job.model}, which {name} was made of, is no longer here.", param="models")
        run = JobFolder(path=self._settings.jobs / job.id).run
        return TunedModel(name=name, job_id=job.id, step=step, base=base, run=run)

    def permissions(
        self, caller: Caller, checkpoint: str, *, after: str | None, limit: int, project_id: str | None, ascending: bool
    ) -> Page:
        """Return a page of the projects that may use a checkpoint."""
        caller.require("admin")
        with self._database.reading() as session:
            self._find(session, caller, checkpoint, owner=True)
            query = select(PermissionRow).where(PermissionRow.checkpoint == checkpoint)
            if project_id is not None:
                query = query.where(PermissionRow.project_id == project_id)
            if after is not None:
                last = session.get(PermissionRow, after)
                if last is None or last.checkpoint != checkpoint:
                    raise missing("permission", after, param="after")
                behind = PermissionRow.position > last.position if ascending else PermissionRow.position < last.position
                query = query.where(behind)
            query = query.order_by(PermissionRow.position if ascending else PermissionRow.position.desc())
            rows = session.scalars(query.limit(limit + 1)).all()
        return page_of([_permission(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def permit(self, caller: Caller, checkpoint: str, project_ids: list[str]) -> Page:
        """Let projects use a checkpoint."""
        caller.require("admin")
        made: list[PermissionObject] = []
        with self._database.writing() as session:
            self._find(session, caller, checkpoint, owner=True)
            for project_id in dict.fromkeys(project_ids):
                if session.get(ProjectRow, project_id) is None:
                    raise missing("project", project_id, param="project_ids")
                if project_id == caller.project_id:
                    refuse("The project has the checkpoint already.", param="project_ids")
                query = select(PermissionRow).where(PermissionRow.checkpoint == checkpoint)
                row = session.scalar(query.where(PermissionRow.project_id == project_id))
                if row is None:
                    row = PermissionRow(
                        id=new_id("cp_"), checkpoint=checkpoint, owner_id=caller.project_id, project_id=project_id,
                        created_at=int(time.time()), position=next_position(session, "permissions"),
                    )  # fmt: skip
                    session.add(row)
                    session.flush()
                made.append(_permission(row))
            note_change(session, caller, "checkpoint.permit", checkpoint)
        return page_of(made, has_more=False)

    def forbid(self, caller: Caller, checkpoint: str, permission_id: str) -> None:
        """Take a permission back."""
        caller.require("admin")
        with self._database.writing() as session:
            row = session.get(PermissionRow, permission_id)
            if row is None or row.checkpoint != checkpoint or row.owner_id != caller.project_id:
                raise missing("permission", permission_id, param="permission_id")
            session.delete(row)
            note_change(session, caller, "checkpoint.forbid", permission_id)

    def _find(self, session: Session, caller: Caller, name: str, *, owner: bool = False) -> tuple[JobRow, int | None]:
        """Return the job of a tuned model's or checkpoint's name, and the checkpoint's step."""
        job, step = _named(session, name)
        if job is None or job.deleted_at is not None:
            raise missing("model", name, param="model")
        if job.project_id != caller.project_id:
            query = select(PermissionRow.id).where(PermissionRow.checkpoint == name)
            if owner or session.scalar(query.where(PermissionRow.project_id == caller.project_id)) is None:
                raise missing("model", name, param="model")
        return job, step

    def _base_object(self, name: str) -> ModelObject:
        return ModelObject(id=name, created=self._began, owned_by=SYSTEM)


def _named(session: Session, name: str) -> tuple[JobRow | None, int | None]:
    job = session.scalar(select(JobRow).where(JobRow.fine_tuned_model == name, JobRow.status == "succeeded"))
    if job is not None:
        return job, None
    point = session.scalar(select(CheckpointRow).where(CheckpointRow.name == name))
    return (None, None) if point is None else (session.get(JobRow, point.job_id), point.step)


def _object(session: Session, name: str) -> ModelObject:
    job, step = _named(session, name)
    if job is None:
        raise missing("model", name, param="model")
    made = _tuned_object(job)
    return made if step is None else made.model_copy(update={"id": name})


def _tuned_object(row: JobRow) -> ModelObject:
    return ModelObject(id=row.fine_tuned_model, created=row.finished_at or row.created_at, owned_by=row.project_id)


def _permission(row: PermissionRow) -> PermissionObject:
    return PermissionObject(id=row.id, created_at=row.created_at, project_id=row.project_id)
