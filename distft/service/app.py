"""The application: services and routes."""

from __future__ import annotations

from fastapi import FastAPI

from distft.service import routes_admin, routes_artifacts, routes_files, routes_jobs, routes_models
from distft.service.api import build_parts, new_app
from distft.service.database import ServiceDatabase
from distft.service.pages.registry import add_pages
from distft.service.settings import ServiceSettings


def create_app(settings: ServiceSettings, database: ServiceDatabase) -> FastAPI:
    """Return the application of one server; its worker starts with it.

    Args:
        settings: of the server.
        database: with its tables.
    """
    app = new_app(build_parts(settings, database))
    for routes in (routes_files, routes_jobs, routes_models, routes_artifacts, routes_admin):
        app.include_router(routes.router)
    add_pages(app)
    return app
