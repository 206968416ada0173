"""What the API does with artifacts: queues, lists, cancels, deletes, hands out. Who makes them is `artifact_worker`.

An artifact is made of tuned models by a command: `distft export`, `distft merge` or `distft adapters combine`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from distft.core.errors import DistftError
from distft.export_formats.source import open_source
from distft.service.artifact_archive import FolderArchive
from distft.service.artifact_choices import checked_settings, export_formats
from distft.service.artifact_folder import ArtifactFolder
from distft.service.auth import Caller, note_change
from distft.service.database import ServiceDatabase, afterwards, next_position
from distft.service.errors import ApiError, missing, refuse
from distft.service.files import FileService
from distft.service.idempotency import Once
from distft.service.job_folder import JobFolder
from distft.service.models import ModelService, TunedModel
from distft.service.settings import ServiceSettings
from distft.service.tables import ArtifactRow, JobRow, new_id
from distft.service.wire import JobError, Page, page_of
from distft.service.wire_artifacts import ArtifactObject, ArtifactRequest

UNFINISHED = ("queued", "running")
MOST_OTHERS = 100
"""Newest models that are looked at for others of the same base."""


class ArtifactService:
    """Artifacts of the projects that callers belong to; another project's are not there."""

    def __init__(
        self, database: ServiceDatabase, settings: ServiceSettings, models: ModelService, files: FileService
    ) -> None:
        self._database, self._settings, self._models, self._files = database, settings, models, files

    def folder(self, artifact_id: str) -> ArtifactFolder:
        """Return an artifact's folder."""
        return ArtifactFolder(path=self._settings.artifacts / artifact_id)

    def create(self, caller: Caller, request: ArtifactRequest, once: Once) -> ArtifactObject:
        """Put an artifact into the queue.

        Raises:
            ApiError: it cannot be made, as far as that is known before anybody tries, or the project has no room.
        """
        caller.require("member")
        settings = checked_settings(request)
        sources = [self._models.tuned(caller, name) for name in request.models]
        _refuse_what_cannot_be_made(request, sources)
        digest = f"artifact {request.model_dump_json()}"
        with self._database.writing() as session:
            if (earlier := once.earlier(session, digest)) is not None:
                return artifact_object(_own(session, caller, earlier))
            for source in sources:  # while the session writes, none can go
                job = session.get(JobRow, source.job_id)
                if job is None or job.deleted_at is not None:
                    raise missing("model", source.name, param="models")
            self._refuse_too_many(session, caller)
            row = ArtifactRow(
                id=new_id("artifact-"), project_id=caller.project_id, position=next_position(session, "artifacts"),
                created_at=int(time.time()), kind=request.kind, settings=settings, status="queued", bytes=0,
                started=False,
                sources=[{"model": source.name, "job_id": source.job_id, "step": source.step} for source in sources],
            )  # fmt: skip
            session.add(row)
            session.flush()
            once.note(session, digest, row.id)
            note_change(session, caller, "artifact.create", row.id)
            return artifact_object(row)

    def page(self, caller: Caller, *, after: str | None, limit: int) -> Page:
        """Return a page of the project's artifacts, newest first."""
        with self._database.reading() as session:
            query = select(ArtifactRow).where(ArtifactRow.project_id == caller.project_id)
            if after is not None:
                query = query.where(ArtifactRow.position < _own(session, caller, after, param="after").position)
            rows = session.scalars(query.order_by(ArtifactRow.position.desc()).limit(limit + 1)).all()
        return page_of([artifact_object(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def retrieve(self, caller: Caller, artifact_id: str) -> ArtifactObject:
        """Return an artifact."""
        with self._database.reading() as session:
            return artifact_object(_own(session, caller, artifact_id))

    def cancel(self, caller: Caller, artifact_id: str) -> ArtifactObject:
        """Cancel an artifact at once; its process, if there is one, is ended by the worker."""
        caller.require("member")
        with self._database.writing() as session:
            row = _own(session, caller, artifact_id, lock=True)
            if row.status not in UNFINISHED:
                message = f"Artifact {artifact_id} is {row.status}, and cannot be cancelled."
                raise ApiError(400, message, param="artifact_id", code="invalid_cancel")
            row.status, row.finished_at = "cancelled", int(time.time())
            note_change(session, caller, "artifact.cancel", artifact_id)
            return artifact_object(row)

    def delete(self, caller: Caller, artifact_id: str) -> None:
        """Delete an artifact that has ended, and its folder.

        The row goes first; a server that dies before the folder is gone removes it at its next start.

        Raises:
            ApiError: there is no such artifact, it has not ended, or its process has not.
        """
        caller.require("member")
        with self._database.writing() as session:
            row = _own(session, caller, artifact_id, lock=True)
            if row.status in UNFINISHED:
                message = f"Artifact {artifact_id} is {row.status}: cancel it first."
                raise ApiError(400, message, param="artifact_id", code="invalid_delete")
            if row.started:
                raise ApiError(409, f"Artifact {artifact_id} is still ending; try again.", code="conflict")
            session.delete(row)
            note_change(session, caller, "artifact.delete", artifact_id)
            path = self.folder(artifact_id).path
            afterwards(session, lambda: shutil.rmtree(path, ignore_errors=True))

    def archive(self, caller: Caller, artifact_id: str) -> FolderArchive:
        """Return the files of an artifact, to be streamed as one tar below a folder of its id.

        Raises:
            ApiError: there is no such artifact, or it has no files.
        """
        with self._database.reading() as session:
            row = _own(session, caller, artifact_id)
        if row.status != "succeeded":
            message = f"Artifact {artifact_id} is {row.status}, and has no files."
            raise ApiError(400, message, param="artifact_id", code="no_content")
        try:
            return FolderArchive(self.folder(artifact_id).content, artifact_id)
        except OSError:  # it was deleted at this moment
            raise missing("artifact", artifact_id, param="artifact_id") from None

    def others(self, caller: Caller, name: str) -> list[str]:
        """Return the project's other adapters of the same base, which this one can be combined with."""
        base = self._models.tuned(caller, name).base
        same = [model for model, other in self._settings.models.items() if other.path == base.path]
        with self._database.reading() as session:
            query = select(JobRow).where(JobRow.project_id == caller.project_id, JobRow.fine_tuned_model != name)
            query = query.where(JobRow.status == "succeeded", JobRow.deleted_at.is_(None), JobRow.model.in_(same))
            rows = session.scalars(query.order_by(JobRow.position.desc()).limit(MOST_OTHERS)).all()
        runs = {row.fine_tuned_model: JobFolder(path=self._settings.jobs / row.id).run for row in rows}
        return [model for model, run in runs.items() if is_adapter(run)]

    def _refuse_too_many(self, session: Session, caller: Caller) -> None:
        query = select(func.count(ArtifactRow.id)).where(ArtifactRow.project_id == caller.project_id)
        count = session.scalar(query) or 0
        if count >= self._settings.limits.artifacts_per_project:
            message = f"The project has {count} artifacts, and may have no more: delete one."
            raise ApiError(429, message, code="quota_exceeded")
        if self._files.room(session, caller.project_id) <= 0:
            message = "The project's files and artifacts take all the bytes that it may have: delete some."
            raise ApiError(429, message, code="quota_exceeded")


def is_adapter(run: Path) -> bool | None:
    """Return whether what a run trained is an adapter; None: it has not ended, so its files do not say."""
    if (run / "final" / "adapter_config.json").is_file():
        return True
    return False if (run / "final" / "config.json").is_file() else None


def _refuse_what_cannot_be_made(request: ArtifactRequest, sources: Sequence[TunedModel]) -> None:
    """Refuse what the command would: where the files of a run that has ended say it.

    Raises:
        ApiError: status 400, in words of the one who asks.
    """
    if request.kind == "export":
        spec, run = export_formats()[request.format or ""], sources[0].run
        if is_adapter(run) is None:
            return
        try:
            reason = spec.refuses(spec.params(), open_source(str(run / "final"), run))
        except (DistftError, OSError):  # its files are damaged, or gone: the command says how
            return
        if reason:
            refuse(f"{sources[0].name} as {spec.name}: {reason}.", param="format", code="cannot_be_made")
        return
    for source in sources:
        if is_adapter(source.run) is False:
            message = f"{source.name} was trained whole, it is no adapter: export it as it is."
            refuse(message, param="models", code="cannot_be_made")
        if source.base.recipe.get("model", {}).get("init") == "random":
            message = f"{source.name} was trained from random weights, which no folder holds: it has no base."
            refuse(message, param="models", code="cannot_be_made")
    first, *others = sources
    for other in others:
        if other.base.path != first.base.path:
            message = f"{first.name} and {other.name} have different bases."
            refuse(message, param="models", code="cannot_be_made")


def artifact_object(row: ArtifactRow) -> ArtifactObject:
    """Return an artifact as the API has it."""
    return ArtifactObject(
        id=row.id, created_at=row.created_at, started_at=row.started_at, finished_at=row.finished_at,
        kind=row.kind,  # pyright: ignore[reportArgumentType]
        models=[source["model"] for source in row.sources], settings=row.settings,
        status=row.status,  # pyright: ignore[reportArgumentType]
        error=JobError(**row.error) if row.error else None, bytes=row.bytes, proof=row.proof,
    )  # fmt: skip


def _own(
    session: Session, caller: Caller, artifact_id: str, *, param: str = "artifact_id", lock: bool = False
) -> ArtifactRow:
    row = session.get(ArtifactRow, artifact_id, with_for_update=lock)
    if row is None or row.project_id != caller.project_id:
        raise missing("artifact", artifact_id, param=param)
    return row
