"""What this server was started with: models and limits. They are changed in its file, not here."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from distft.service.api import By, Parts
from distft.service.pages.web import page

router = APIRouter()


@router.get("/settings")
def show_settings(request: Request, parts: Parts, caller: By) -> Response:
    """Show the settings; no path of the server is among them."""
    settings = parts.settings
    return page(
        request, "settings.html", models=settings.models, limits=settings.limits.model_dump(), runner=settings.runner
    )
