"""Which pages there are: one line each, in the order of the menu."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Depends, FastAPI

from distft.service.auth import Role
from distft.service.pages import job_pages, login
from distft.service.pages.web import check_form


@dataclass(frozen=True, kw_only=True)
class PageEntry:
    """A page, and its place in the menu."""

    path: str
    title: str
    """Empty: not in the menu."""
    router: APIRouter
    role: Role = "viewer"
    """Who sees it in the menu; what it does is refused by what it calls."""


PAGES: tuple[PageEntry, ...] = (PageEntry(path="/jobs", title="Jobs", router=job_pages.router),)


def add_pages(app: FastAPI) -> None:
    """Add the pages to the application. Each form of theirs is checked, whatever a page forgets."""
    app.state.pages = PAGES
    app.include_router(login.router)
    for entry in PAGES:
        app.include_router(entry.router, dependencies=[Depends(check_form)], include_in_schema=False)
