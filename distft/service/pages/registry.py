"""Which pages there are: one line each, in the order of the menu."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Depends, FastAPI

from distft.service.auth import Role
from distft.service.pages import (
    admin_pages,
    artifact_pages,
    file_pages,
    job_pages,
    login,
    model_pages,
    new_job,
    playground,
    settings_page,
)
from distft.service.pages.web import check_form


@dataclass(frozen=True, kw_only=True)
class PageEntry:
    """A page, and its place in the menu."""

    path: str
    title: str
    router: APIRouter
    role: Role = "viewer"
    """Who sees it in the menu; what it does is refused by what it calls."""


PAGES = (
    PageEntry(path="/jobs", title="Jobs", router=job_pages.router),
    PageEntry(path="/new", title="New job", router=new_job.router, role="member"),
    PageEntry(path="/playground", title="Playground", router=playground.router, role="member"),
    PageEntry(path="/files", title="Files", router=file_pages.router),
    PageEntry(path="/models", title="Models", router=model_pages.router),
    PageEntry(path="/artifacts", title="Artifacts", router=artifact_pages.router),
    PageEntry(path="/keys", title="Keys", router=admin_pages.keys, role="admin"),
    PageEntry(path="/webhooks", title="Webhooks", router=admin_pages.webhooks, role="admin"),
    PageEntry(path="/audit", title="Audit", router=admin_pages.audit, role="admin"),
    PageEntry(path="/settings", title="Settings", router=settings_page.router),
)


def add_pages(app: FastAPI) -> None:
    """Add the pages to the application. Each form of theirs is checked, whatever a page forgets."""
    app.state.pages = PAGES
    app.include_router(login.router)
    for entry in PAGES:
        app.include_router(entry.router, dependencies=[Depends(check_form)], include_in_schema=False)
