"""The tables of the database. Times are seconds since the epoch; ids are random: none tells of another."""

from __future__ import annotations

import secrets
import string
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_LETTERS = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """Return a fresh id of 143 random bits by default."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


class ServiceTable(DeclarativeBase):
    """Base of all tables."""


class ServerRow(ServiceTable):
    """Which data folder the database belongs to: one row."""

    __tablename__ = "server"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    folder_id: Mapped[str] = mapped_column(String(64))


class ProjectRow(ServiceTable):
    """Whose files, jobs and models these are."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[int] = mapped_column(BigInteger)


class KeyRow(ServiceTable):
    """An API key: its hash, never itself."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[int] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)


class FileRow(ServiceTable):
    """A file; its content lies under its hash, which several files may share."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    position: Mapped[int] = mapped_column(BigInteger, index=True)


class UploadRow(ServiceTable):
    """A file that comes in parts."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(128))
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger)
    file_expires_s: Mapped[int | None] = mapped_column(BigInteger)
    file_id: Mapped[str | None] = mapped_column(String(64))


class PartRow(ServiceTable):
    """A part of an upload."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)


class JobRow(ServiceTable):
    """A fine-tuning job: what was asked, and what its folder last said."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    position: Mapped[int] = mapped_column(BigInteger, unique=True)
    """Order of creation: pages are cut by it."""
    created_at: Mapped[int] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    model: Mapped[str] = mapped_column(String(64))
    method: Mapped[dict[str, Any]] = mapped_column(JSON)
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    training_sha256: Mapped[str] = mapped_column(String(64))
    validation_sha256: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    metadata_: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON(none_as_null=True))
    integrations: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    priority: Mapped[int] = mapped_column(Integer, default=0)
    status: Mapped[str] = mapped_column(String(20))
    wish: Mapped[str] = mapped_column(String(8), default="run")
    """run | pause | cancel: what people last asked of it."""
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """Starts of its process so far."""
    started: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether a process of the last attempt may be there."""
    started_at: Mapped[int | None] = mapped_column(BigInteger)
    stopping_since: Mapped[int | None] = mapped_column(BigInteger)
    runner_job: Mapped[str | None] = mapped_column(String(64))
    """What the runner calls it, such as a Slurm job's number."""
    runner_state: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Where a live run stands with its runner: key, waits, words. None: nothing is to be said."""
    lost: Mapped[int] = mapped_column(Integer, default=0)
    """Attempts in a row that vanished without having got further."""
    lost_step: Mapped[int] = mapped_column(Integer, default=-1)
    read_to: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes of metrics.jsonl that became events."""
    step: Mapped[int] = mapped_column(Integer, default=0)
    num_steps: Mapped[int | None] = mapped_column(Integer)
    estimated_finish: Mapped[int | None] = mapped_column(BigInteger)
    num_events: Mapped[int] = mapped_column(Integer, default=0)
    fine_tuned_model: Mapped[str] = mapped_column(String(255), unique=True)
    """The name that it has once the job has succeeded."""
    deleted_at: Mapped[int | None] = mapped_column(BigInteger)
    """When its model was deleted."""
    result_file: Mapped[str | None] = mapped_column(String(64))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    __table_args__ = (
        Index("jobs_by_project", "project_id", "position"),
        Index("jobs_by_status", "status", "priority", "position"),
    )


class EventRow(ServiceTable):
    """Something that happened to a job."""

    __tablename__ = "events"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[int] = mapped_column(BigInteger)
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    __table_args__ = (UniqueConstraint("job_id", "number"),)


class CheckpointRow(ServiceTable):
    """A state of a job's model that can be asked."""

    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    step: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str] = mapped_column(String(255), unique=True)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    __table_args__ = (UniqueConstraint("job_id", "step"),)


class PermissionRow(ServiceTable):
    """Another project may use a model or checkpoint."""

    __tablename__ = "checkpoint_permissions"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    checkpoint: Mapped[str] = mapped_column(String(255), index=True)
    """The model's name."""
    owner_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    position: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (UniqueConstraint("checkpoint", "project_id"),)


class IdempotencyRow(ServiceTable):
    """An answer that a repeated request gets again."""

    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    """Of the request."""
    object_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)


class WebhookRow(ServiceTable):
    """Where a project wants to be told, and the secret that signs it."""

    __tablename__ = "webhooks"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    url: Mapped[str] = mapped_column(String(2048))
    secret: Mapped[str] = mapped_column(String(128))
    events: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[int] = mapped_column(BigInteger)


class DeliveryRow(ServiceTable):
    """A message to a webhook; written with the change that it tells of, sent afterwards."""

    __tablename__ = "deliveries"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), index=True)
    body: Mapped[str] = mapped_column(Text)
    tries: Mapped[int] = mapped_column(Integer, default=0)
    due_at: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(12), default="waiting")
    """waiting | delivered | given_up."""
    last_answer: Mapped[str] = mapped_column(String(255), default="")
    __table_args__ = (Index("deliveries_due", "state", "due_at"),)


class AuditRow(ServiceTable):
    """Who changed what."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    project_id: Mapped[str] = mapped_column(String(64), index=True)
    key_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(255))
    request_id: Mapped[str] = mapped_column(String(64))


class PageSessionRow(ServiceTable):
    """A browser that has signed in with a key; of its cookie the hash alone."""

    __tablename__ = "page_sessions"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    seen_at: Mapped[int] = mapped_column(BigInteger)


class DraftRow(ServiceTable):
    """A job that is being put together on the pages."""

    __tablename__ = "drafts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    created_at: Mapped[int] = mapped_column(BigInteger)
    changed_at: Mapped[int] = mapped_column(BigInteger)
    content: Mapped[dict[str, Any]] = mapped_column(JSON)
    job_id: Mapped[str | None] = mapped_column(String(64))
    """The job that it became."""


class ArtifactRow(ServiceTable):
    """What is made, or was made, of tuned models: an export, a merged model, a combined adapter."""

    __tablename__ = "artifacts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    position: Mapped[int] = mapped_column(BigInteger, unique=True)
    """Order of creation: pages are cut by it, and the first that waits is made first."""
    created_at: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[int | None] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    kind: Mapped[str] = mapped_column(String(16))
    sources: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Of each model: its name, the job that made it, and the step of a checkpoint."""
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(String(16))
    """queued | running | succeeded | failed | cancelled."""
    started: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether a process that makes it, or files of one, may be there."""
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    proof: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What was found when it was compared with its source."""
    __table_args__ = (
        Index("artifacts_by_project", "project_id", "position"),
        Index("artifacts_by_status", "status", "position"),
    )


class CounterRow(ServiceTable):
    """The order of creation, of which pages are cut."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)
