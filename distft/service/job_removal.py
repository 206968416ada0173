"""A job that has ended is removed: its rows, its model's name, its result file and its folder."""

from __future__ import annotations

import shutil

from sqlalchemy import delete, select

from distft.service.auth import Caller, note_change
from distft.service.database import ServiceDatabase
from distft.service.errors import ApiError, missing
from distft.service.files import ContentStore
from distft.service.jobs import FINISHED, JobService
from distft.service.tables import CheckpointRow, EventRow, FileRow, JobRow, PermissionRow


class JobRemoval:
    """Removes jobs; files that people uploaded stay, and so do contents that anything else needs."""

    def __init__(self, database: ServiceDatabase, jobs: JobService, contents: ContentStore) -> None:
        self._database, self._jobs, self._contents = database, jobs, contents

    def remove(self, caller: Caller, job_id: str) -> None:
        """Remove a job that has ended, and everything that it made.

        The rows go first, in one transaction; a server that dies before the folder is gone removes it at its next
        start, as every folder that no row speaks of.

        Raises:
            ApiError: there is no such job, it has not ended, or its process has not.
        """
        caller.require("member")
        folder = self._jobs.folder(job_id)
        with self._database.writing() as session:
            row = session.get(JobRow, job_id, with_for_update=True)
            if row is None or row.project_id != caller.project_id:
                raise missing("fine-tuning job", job_id, param="fine_tuning_job_id")
            if row.status not in FINISHED:
                message = f"Job {job_id} is {row.status}: cancel it first."
                raise ApiError(400, message, param="fine_tuning_job_id", code="invalid_delete")
            if row.started:
                raise ApiError(409, f"Job {job_id} is still ending; try again.", code="conflict")
            names = [row.fine_tuned_model]
            names += session.scalars(select(CheckpointRow.name).where(CheckpointRow.job_id == job_id))
            session.execute(delete(PermissionRow).where(PermissionRow.checkpoint.in_(names)))
            for table in (EventRow, CheckpointRow):
                session.execute(delete(table).where(table.job_id == job_id))
            result = session.get(FileRow, row.result_file) if row.result_file else None
            session.delete(row)
            if result is not None:
                session.delete(result)
                session.flush()
                self._contents.discard(session, result.sha256)
            note_change(session, caller, "job.delete", job_id)
        shutil.rmtree(folder.path, ignore_errors=True)
