"""Routes that are not OpenAI's fine-tuning API: projects, keys, webhooks, the audit log, health and figures.

Projects and keys have the paths of OpenAI's administration API, as far as they are here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field, StringConstraints
from sqlalchemy import select, text

from distft.service.api import AnswerRoute, By, Parts, ServiceParts
from distft.service.auth import has_admin_key, make_key, make_project, note_change
from distft.service.errors import ApiError, missing
from distft.service.tables import AuditRow, DeliveryRow, KeyRow, ProjectRow, WebhookRow, new_id
from distft.service.webhooks import EVENTS, checked_url, new_secret
from distft.service.wire import DeletedObject, Page, WireRequest

router = APIRouter(route_class=AnswerRoute)
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]


class ProjectRequest(WireRequest):
    """POST /v1/organization/projects."""

    name: Name


class KeyRequest(WireRequest):
    """POST …/api_keys."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    role: Literal["admin", "member", "viewer"] = "member"


class WebhookRequest(WireRequest):
    """POST /v1/webhooks."""

    url: Annotated[str, StringConstraints(min_length=8, max_length=2048)]
    events: Annotated[
        list[Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]],
        Field(min_length=1, max_length=3),
    ] = Field(default=list(EVENTS))


@router.get("/healthz")
def health(request: Request) -> dict[str, str]:
    """Say that the server works, and reaches its database."""
    parts: ServiceParts = request.app.state.parts
    with parts.database.reading() as session:
        session.execute(text("SELECT 1"))
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(parts: Parts, caller: By) -> PlainTextResponse:
    """Return figures in Prometheus' text form."""
    caller.require("admin")
    return PlainTextResponse("\n".join([*_figures(parts), ""]), media_type="text/plain; version=0.0.4")


def _figures(parts: ServiceParts) -> Iterator[str]:
    yield "# TYPE distft_jobs gauge"
    for status, count in sorted(parts.worker.counts().items()):
        yield f'distft_jobs{{status="{status}"}} {count}'
    yield "# TYPE distft_http_requests_total counter"
    for (method, route, status), count in sorted(parts.counts.requests.items()):
        yield f'distft_http_requests_total{{method="{method}",route="{route}",status="{status}"}} {count}'
    yield "# TYPE distft_http_request_seconds_total counter"
    for (method, route), seconds in sorted(parts.counts.seconds.items()):
        yield f'distft_http_request_seconds_total{{method="{method}",route="{route}"}} {seconds:.6f}'


@router.get("/v1/organization/projects")
def list_projects(parts: Parts, caller: By) -> Page:
    """List projects."""
    caller.require("admin")
    with parts.database.reading() as session:
        return Page(data=[_project(row) for row in session.scalars(select(ProjectRow).order_by(ProjectRow.created_at))])


@router.post("/v1/organization/projects")
def create_project(parts: Parts, caller: By, request: ProjectRequest) -> dict[str, Any]:
    """Make a project."""
    caller.require("admin")
    with parts.database.writing() as session:
        if session.scalar(select(ProjectRow.id).where(ProjectRow.name == request.name)) is not None:
            raise ApiError(409, f"There is a project {request.name}.", param="name", code="name_taken")
        row = make_project(session, request.name)
        note_change(session, caller, "project.create", row.id)
        return _project(row)


@router.get("/v1/organization/projects/{project_id}/api_keys")
def list_keys(parts: Parts, caller: By, project_id: str) -> Page:
    """List a project's keys, without themselves."""
    caller.require("admin")
    with parts.database.reading() as session:
        rows = session.scalars(select(KeyRow).where(KeyRow.project_id == project_id).order_by(KeyRow.created_at))
        return Page(data=[_key(row) for row in rows])


@router.post("/v1/organization/projects/{project_id}/api_keys")
def create_key(parts: Parts, caller: By, project_id: str, request: KeyRequest) -> dict[str, Any]:
    """Make a key; `value` is the key, which is shown this once."""
    caller.require("admin")
    with parts.database.writing() as session:
        if session.get(ProjectRow, project_id) is None:
            raise missing("project", project_id, param="project_id")
        row, key = make_key(session, project_id, name=request.name, role=request.role)
        note_change(session, caller, "key.create", row.id)
        return {**_key(row), "value": key}


@router.delete("/v1/organization/projects/{project_id}/api_keys/{key_id}")
def revoke_key(parts: Parts, caller: By, project_id: str, key_id: str) -> DeletedObject:
    """Revoke a key."""
    caller.require("admin")
    with parts.database.writing() as session:
        row = session.get(KeyRow, key_id, with_for_update=True)
        if row is None or row.project_id != project_id or row.revoked_at is not None:
            raise missing("key", key_id, param="key_id")
        row.revoked_at = int(time.time())
        session.flush()
        if not has_admin_key(session):
            raise ApiError(409, "This is the last admin key: make another one first.", code="last_admin_key")
        note_change(session, caller, "key.revoke", key_id)
    parts.callers.forget()
    return DeletedObject(id=key_id, object="organization.project.api_key")


@router.get("/v1/webhooks")
def list_webhooks(parts: Parts, caller: By) -> Page:
    """List the project's webhooks, without their secrets."""
    caller.require("admin")
    with parts.database.reading() as session:
        rows = session.scalars(select(WebhookRow).where(WebhookRow.project_id == caller.project_id))
        return Page(data=[_webhook(row) for row in rows])


@router.post("/v1/webhooks")
def create_webhook(parts: Parts, caller: By, request: WebhookRequest) -> dict[str, Any]:
    """Make a webhook; `secret` is shown this once."""
    caller.require("admin")
    with parts.database.writing() as session:
        row = WebhookRow(
            id=new_id("wh_"), project_id=caller.project_id, url=checked_url(request.url), secret=new_secret(),
            events=list(dict.fromkeys(request.events)), created_at=int(time.time()),
        )  # fmt: skip
        session.add(row)
        note_change(session, caller, "webhook.create", row.id)
        return {**_webhook(row), "secret": row.secret}


@router.delete("/v1/webhooks/{webhook_id}")
def delete_webhook(parts: Parts, caller: By, webhook_id: str) -> DeletedObject:
    """Delete a webhook; what waits for it is not sent."""
    caller.require("admin")
    with parts.database.writing() as session:
        row = session.get(WebhookRow, webhook_id)
        if row is None or row.project_id != caller.project_id:
            raise missing("webhook", webhook_id, param="webhook_id")
        for delivery in session.scalars(select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)):
            session.delete(delivery)
        session.flush()
        session.delete(row)
        note_change(session, caller, "webhook.delete", webhook_id)
    return DeletedObject(id=webhook_id, object="webhook")


@router.get("/v1/audit")
def list_audit(
    parts: Parts,
    caller: By,
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page:
    """List who changed what in the project, oldest first."""
    caller.require("admin")
    with parts.database.reading() as session:
        query = select(AuditRow).where(AuditRow.project_id == caller.project_id, AuditRow.id > after)
        rows = session.scalars(query.order_by(AuditRow.id).limit(limit + 1)).all()
    return Page(data=[_audit(row) for row in rows[:limit]], has_more=len(rows) > limit)


def _project(row: ProjectRow) -> dict[str, Any]:
    return {"id": row.id, "object": "organization.project", "name": row.name, "created_at": row.created_at}


def _key(row: KeyRow) -> dict[str, Any]:
    facts = {"id": row.id, "object": "organization.project.api_key", "name": row.name, "role": row.role}
    return {**facts, "redacted_value": row.hint, "created_at": row.created_at, "revoked_at": row.revoked_at}


def _webhook(row: WebhookRow) -> dict[str, Any]:
    return {"id": row.id, "object": "webhook", "url": row.url, "events": row.events, "created_at": row.created_at}


def _audit(row: AuditRow) -> dict[str, Any]:
    names = ("id", "created_at", "key_id", "action", "target", "request_id")
    return {"object": "audit_log", **{name: getattr(row, name) for name in names}}
