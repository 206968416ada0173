"""What admins look after: projects and their keys, webhooks, who changed what. The API's own routes do the work."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response

from distft.service import routes_admin
from distft.service.api import By, Parts, ServiceParts
from distft.service.auth import Caller
from distft.service.pages.web import go, page, read
from distft.service.webhooks import EVENTS

keys, webhooks, audit = APIRouter(), APIRouter(), APIRouter()
Name = Annotated[str, Form(max_length=128)]


@keys.get("/keys")
def list_keys(request: Request, parts: Parts, caller: By) -> Response:
    """Show projects, and the keys of each."""
    return _keys_page(request, parts, caller, None)


@keys.post("/keys")
def create_key(request: Request, parts: Parts, caller: By, project_id: Name, name: Name, role: Name) -> Response:
    """Make a key, and show it this once."""
    asked = read(routes_admin.KeyRequest, {"name": name, "role": role})
    return _keys_page(request, parts, caller, routes_admin.create_key(parts, caller, project_id, asked))


@keys.post("/keys/projects")
def create_project(parts: Parts, caller: By, name: Name) -> Response:
    """Make a project."""
    routes_admin.create_project(parts, caller, read(routes_admin.ProjectRequest, {"name": name}))
    return go("/keys")


@keys.post("/keys/{project_id}/{key_id}/revoke")
def revoke_key(parts: Parts, caller: By, project_id: str, key_id: str) -> Response:
    """Revoke a key; the sessions that were begun with it end."""
    routes_admin.revoke_key(parts, caller, project_id, key_id)
    return go("/keys")


@webhooks.get("/webhooks")
def list_webhooks(request: Request, parts: Parts, caller: By) -> Response:
    """Show the project's webhooks."""
    return _webhooks_page(request, parts, caller, None)


@webhooks.post("/webhooks")
def create_webhook(
    request: Request, parts: Parts, caller: By, url: Annotated[str, Form(max_length=2048)],
    events: Annotated[list[str] | None, Form()] = None,
) -> Response:  # fmt: skip
    """Make a webhook, and show its secret this once."""
    asked = read(routes_admin.WebhookRequest, {"url": url, "events": events or []})
    return _webhooks_page(request, parts, caller, routes_admin.create_webhook(parts, caller, asked))


@webhooks.post("/webhooks/{webhook_id}/delete")
def delete_webhook(parts: Parts, caller: By, webhook_id: str) -> Response:
    """Delete a webhook."""
    routes_admin.delete_webhook(parts, caller, webhook_id)
    return go("/webhooks")


@audit.get("/audit")
def list_audit(
    request: Request, parts: Parts, caller: By, after: Annotated[int, Query(ge=0, lt=2**63)] = 0
) -> Response:
    """Show who changed what, oldest first."""
    log = routes_admin.list_audit(parts, caller, after=after, limit=100)
    names = {key["id"]: key["name"] for key in _keys(parts, caller, caller.project_id)}
    return page(request, "audit.html", entries=log.data, more=log.has_more, after=after, names=names)


def _keys(parts: ServiceParts, caller: Caller, project_id: str) -> list[dict[str, Any]]:
    return routes_admin.list_keys(parts, caller, project_id).data


def _keys_page(request: Request, parts: ServiceParts, caller: Caller, made: dict[str, Any] | None) -> Response:
    projects = [
        {**project, "keys": _keys(parts, caller, project["id"])}
        for project in routes_admin.list_projects(parts, caller).data
    ]
    return page(request, "keys.html", projects=projects, made=made)


def _webhooks_page(request: Request, parts: ServiceParts, caller: Caller, made: dict[str, Any] | None) -> Response:
    hooks = routes_admin.list_webhooks(parts, caller).data
    return page(request, "webhooks.html", hooks=hooks, made=made, events=EVENTS)
