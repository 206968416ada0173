"""The thread that moves jobs on: examined, queued, started, followed, ended. Its memory is the database and folders.

Each look at a job is one transaction, so a server that dies between two leaves a job that the next one finds.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections import Counter
from io import BytesIO

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from distft.core.errors import DONE, PREEMPTED_AND_SAVED, BusyError, DistftError
from distft.service.background import start_behind
from distft.service.database import ServiceDatabase
from distft.service.examine import plain
from distft.service.files import MIB, RESULTS, FileService
from distft.service.job_folder import JobFolder
from distft.service.jobs import JobService, add_event
from distft.service.progress import read_progress, result_csv, trained_tokens
from distft.service.runner import JobRunner, RunnerState
from distft.service.settings import ServiceSettings
from distft.service.tables import JobRow
from distft.service.uploads import UploadService
from distft.service.webhooks import deliver_due, queue_webhooks

LOOKS_S = 0.25
"""Between two looks at the jobs."""
TIDIES_S = 30.0
_LOG = logging.getLogger("distft.service")
_ERRORS = {2: "invalid_job", 3: "invalid_training_file", 4: "checkpoint_error", 5: "numeric_error", 6: "hang",
           7: "busy", 8: "file_system_error", 9: "machine_error"}  # fmt: skip


class Worker:
    """Moves the jobs of one server on."""

    def __init__(
        self, database: ServiceDatabase, settings: ServiceSettings, jobs: JobService, files: FileService,
        uploads: UploadService, runner: JobRunner,
    ) -> None:  # fmt: skip
        self._database, self._settings, self._jobs = database, settings, jobs
        self._files, self._uploads = files, uploads
        self._runner = runner
        self._examining: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._killed = Counter[str]()
        """Times that the process which looked at a job's files was killed, in this server's life."""
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work, every), name=work.__name__, daemon=True)
            for work, every in ((self.look, LOOKS_S), (self._deliver, 1.0), (self._tidy, TIDIES_S))
        ]

    def start(self) -> None:
        """Adopt what an earlier server left, and begin."""
        self._remove_orphans()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop looking; jobs go on, and the next server finds them."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=10)
        for child, _ in self._examining.values():
            child.kill()
            child.wait()

    def look(self) -> None:
        """Look at every job that has not ended once."""
        with self._database.reading() as session:
            examined = JobRow.status == "validating_files"
            waits = session.scalars(select(JobRow.id).where(examined).order_by(JobRow.position)).all()
            lives = session.scalars(select(JobRow.id).where(JobRow.started.is_(True))).all()
        for job_id in lives:
            self._guarded(self._follow, job_id)
        for job_id in {*self._examining} - set(waits):
            self._examining.pop(job_id)[0].kill()  # paused or cancelled
        for job_id in waits:
            if job_id in self._examining or len(self._examining) < 1:
                self._guarded(self._examine, job_id)
        self._admit()

    # Examining.

    def _examine(self, job_id: str) -> None:
        """Start to look at a job's files, or take in what was found."""
        folder = self._jobs.folder(job_id)
        found = folder.examined()
        if found is None:
            child, began = self._examining.get(job_id, (None, 0.0))
            if child is None:
                with folder.log.open("ab") as log:
                    command = [*self._settings.examine, str(folder.path)]
                    child = start_behind(command, log, niceness=self._settings.limits.niceness)
                self._examining[job_id] = (child, time.monotonic())
                return
            late = time.monotonic() - began > self._settings.limits.examine_s
            if child.poll() is None and not late:
                return
            child.kill()
            code = child.wait()
            found = folder.examined()
            if found is None and code < 0 and not late and self._killed[job_id] < self._settings.limits.lost_starts:
                self._killed[job_id] += 1  # by the machine, not by what it has read: it may look again
                del self._examining[job_id]
                return
            found = found or {
                "error": {"code": "validation_failed", "message": "The files could not be looked at.", "param": None}
            }
        self._examining.pop(job_id, None)
        self._killed.pop(job_id, None)
        with self._database.writing() as session:
            row = session.get_one(JobRow, job_id, with_for_update=True)
            if row.status != "validating_files":
                return
            for event in found.get("events", ()):
                add_event(session, row, event["message"], level=event["level"], data=event["data"])
            if "error" in found:
                self._fail(session, row, **found["error"])
                return
            kind = row.method["type"]
            row.hyperparameters = found["hyperparameters"]
            row.method = {"type": kind, kind: {**row.method[kind], "hyperparameters": found["hyperparameters"]}}
            row.num_steps, row.status = found["num_steps"], "queued"
            add_event(session, row, "Files validated, moving job to queued state")

    # Starting.

    def _admit(self) -> None:
        """Start the jobs whose turn it is: higher priority first, then the one that came first."""
        limits = self._settings.limits
        with self._database.reading() as session:
            running = Counter(session.scalars(select(JobRow.project_id).where(JobRow.started.is_(True))).all())
            free = limits.jobs_side_by_side - running.total()
            if free < 1:  # a long queue is not read at each look
                return
            order = (JobRow.priority.desc(), JobRow.position)
            query = select(JobRow.id, JobRow.project_id).where(JobRow.status == "queued", JobRow.started.is_(False))
            queued = session.execute(query.order_by(*order).limit(1000)).all()
        for job_id, project_id in queued:
            if free < 1:
                return
            if running[project_id] >= limits.running_per_project:
                continue
            running[project_id] += 1
            free -= 1
            self._guarded(self._start, job_id)

    def _start(self, job_id: str) -> None:
        """Start a job's run: first it is written down that there may be a process, then there is one."""
        folder = self._jobs.folder(job_id)
        with self._database.writing() as session:
            row = session.get_one(JobRow, job_id, with_for_update=True)
            if row.status != "queued" or row.started:
                return
            row.started, row.status, row.started_at = True, "running", int(time.time())
            row.attempt, row.read_to, row.stopping_since, row.runner_job = row.attempt + 1, 0, None, None
            add_event(session, row, "Fine-tuning job started" if row.attempt == 1 else "Fine-tuning job started again")
            base, attempt = self._settings.models.get(row.model), row.attempt
        if base is None:
            with self._database.writing() as session:
                row = session.get_one(JobRow, job_id, with_for_update=True)
                row.started = False
                self._fail(
                    session, row, code="model_not_available", message="The model is no longer here.", param="model"
                )
            return
        folder.let_run()
        try:
            name = self._runner.start(folder, base, attempt)
        except DistftError as error:
            folder.write_ended(attempt=attempt, code=error.exit_code, reason=f"{error.kind}: {error}")
            return
        if name is not None:
            with self._database.writing() as session:
                row = session.get_one(JobRow, job_id, with_for_update=True)
                row.runner_job = name
                _take_state(session, row, self._runner.state(folder, name))

    # Following.

    def _follow(self, job_id: str) -> None:
        """Take in what a run says, pass wishes on to it, and end the job when it has ended."""
        folder = self._jobs.folder(job_id)
        with self._database.reading() as session:
            row = session.get_one(JobRow, job_id)
        if row.wish == "cancel":
            if self._runner.is_alive(folder, row.runner_job):
                self._runner.kill(folder, row.runner_job)
                return
        elif row.wish == "pause" and folder.exit().get("code") == PREEMPTED_AND_SAVED:
            self._runner.release(folder, row.runner_job)
        elif row.wish == "pause" and not folder.stop_file.exists():
            folder.ask_to_stop()
        elif row.wish == "run" and folder.stop_file.exists():
            folder.let_run()
        alive = self._runner.is_alive(folder, row.runner_job)  # before reading: what it writes last is read below
        state = self._runner.state(folder, row.runner_job) if alive else None
        with self._database.writing() as session:
            row = session.get_one(JobRow, job_id, with_for_update=True)
            _take_state(session, row, state)
            while read_progress(session, row, folder):
                pass
            if not alive:
                self._end(session, row, folder)

    def _end(self, session: Session, row: JobRow, folder: JobFolder) -> None:
        """Decide what becomes of a job whose process has ended."""
        row.started, row.estimated_finish, row.stopping_since = False, None, None
        if row.status != "running":  # cancelled
            row.trained_tokens = trained_tokens(folder)
            return
        ended = folder.ended() or folder.exit()
        code, reason = ended.get("code"), plain(str(ended.get("reason", "")), folder)
        if code == DONE:
            self._succeed(session, row, folder)
        elif code == PREEMPTED_AND_SAVED:
            row.lost = 0
            if row.wish == "pause":
                row.status = "paused"
                folder.let_run()
                add_event(session, row, f"The job is paused at step {row.step}.")
            else:
                row.status = "queued"
                add_event(
                    session, row, f"The job was stopped at step {row.step} and saved; it waits again.", level="warn"
                )
        elif code is None or code > 128 or code == BusyError.exit_code:
            self._lost(session, row, folder)
        else:
            row.trained_tokens = trained_tokens(folder)
            self._fail(session, row, code=_ERRORS.get(code, "internal_error"), message=reason, param=None)

    def _lost(self, session: Session, row: JobRow, folder: JobFolder) -> None:
        """Start a run again whose process vanished: killed, out of memory, or its machine was restarted."""
        row.lost = row.lost + 1 if row.step <= row.lost_step else 1
        row.lost_step = row.step
        if row.lost > self._settings.limits.lost_starts:
            message = f"The job's process vanished {row.lost} times without having got further than step {row.step}."
            row.trained_tokens = trained_tokens(folder)
            self._fail(session, row, code="process_lost", message=message, param=None)
            return
        paused = row.wish == "pause"
        row.status = "paused" if paused else "queued"
        then = "it is paused, as it was asked" if paused else "it is started again from its last checkpoint"
        add_event(session, row, f"The job's process vanished at step {row.step}; {then}.", level="warn")

    def _succeed(self, session: Session, row: JobRow, folder: JobFolder) -> None:
        stored = self._files.contents.keep(iter([BytesIO(result_csv(folder))]), most=1024 * MIB)
        name = f"{row.id}-step-metrics.csv"
        result = self._files.add(session, row.project_id, stored, filename=name, purpose=RESULTS)
        row.result_file, row.trained_tokens = result.id, trained_tokens(folder)
        row.status, row.finished_at, row.lost = "succeeded", int(time.time()), 0
        add_event(session, row, f"New fine-tuned model created: {row.fine_tuned_model}")
        add_event(session, row, "The job has successfully completed")
        queue_webhooks(session, row, "succeeded")

    def _fail(self, session: Session, row: JobRow, *, code: str, message: str, param: str | None) -> None:
        row.status, row.finished_at, row.estimated_finish = "failed", int(time.time()), None
        row.error = {"code": code, "message": message[:4000], "param": param}
        add_event(session, row, f"The job failed: {message[:4000]}", level="error", data={"code": code})
        queue_webhooks(session, row, "failed")

    # Around it.

    def _remove_orphans(self) -> None:
        """Remove what no row speaks of: folders of jobs that a killed server made or was removing, and contents."""
        self._settings.jobs.mkdir(parents=True, exist_ok=True)
        with self._database.reading() as session:
            known = set(session.scalars(select(JobRow.id)))
        for path in self._settings.jobs.iterdir():
            if path.name.startswith("ftjob-") and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        self._files.contents.remove_orphans()

    def _deliver(self) -> None:
        deliver_due(self._database)

    def _tidy(self) -> None:
        self._files.expire()
        self._uploads.expire()

    def _guarded(self, work: object, job_id: str) -> None:
        """Do a piece of work on one job; what goes wrong there is logged, tried again, and no other job's business."""
        try:
            work(job_id)  # pyright: ignore[reportCallIssue]
        except DBAPIError:
            raise
        except Exception:
            _LOG.exception("a look at a job failed", extra={"job": job_id})

    def _run(self, work: object, every_s: float) -> None:
        while not self._stop.is_set():
            try:
                work()  # pyright: ignore[reportCallIssue]
            except Exception:  # the database may be away for a while: jobs go on, and are looked at again
                _LOG.exception("the worker could not look")
                self._stop.wait(1.0)
            self._stop.wait(every_s)

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        with self._database.reading() as session:
            return dict(session.execute(select(JobRow.status, func.count()).group_by(JobRow.status)).tuples().all())


def _take_state(session: Session, row: JobRow, state: RunnerState | None) -> None:
    """Keep where a run stands with its runner for the pages; another state than before is an event."""
    told = None if state is None else {"key": state.key, "waits": state.waits, "words": state.words}
    before = row.runner_state
    if told == before:
        return
    row.runner_state = told
    if state is not None and state.key != (before or {}).get("key"):
        add_event(session, row, state.event, level="warn" if state.is_setback else "info")
