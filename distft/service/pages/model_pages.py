"""Models: those of the server, those that jobs made, and who may use their checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response

from distft.service.api import By, Parts
from distft.service.pages.web import go, page

router = APIRouter()
Name = Annotated[str, Form(max_length=300)]


@router.get("/models")
def list_models(request: Request, parts: Parts, caller: By) -> Response:
    """Show the models."""
    models = parts.models.page(caller).data
    bases = {name: base for name, base in parts.settings.models.items()}
    return page(
        request, "models.html", bases=bases, tuned=[model for model in reversed(models) if model.id not in bases]
    )


@router.get("/models/permissions")
def list_permissions(
    request: Request, parts: Parts, caller: By, checkpoint: Annotated[str, Query(max_length=300)]
) -> Response:
    """Show which projects may use a model or a checkpoint."""
    made = parts.models.permissions(caller, checkpoint, after=None, limit=100, project_id=None, ascending=True)
    return page(request, "permissions.html", checkpoint=checkpoint, permissions=made.data)


@router.post("/models/permissions")
def permit(parts: Parts, caller: By, checkpoint: Name, project_id: Annotated[str, Form(max_length=64)]) -> Response:
    """Let a project use a model or a checkpoint."""
    parts.models.permit(caller, checkpoint, [project_id])
    return go("/models")


@router.post("/models/permissions/delete")
def forbid(parts: Parts, caller: By, checkpoint: Name, permission_id: Annotated[str, Form(max_length=64)]) -> Response:
    """Take a permission back."""
    parts.models.forbid(caller, checkpoint, permission_id)
    return go("/models")


@router.post("/models/delete")
def delete_model(parts: Parts, caller: By, model: Name) -> Response:
    """Delete a tuned model."""
    parts.models.delete(caller, model)
    return go("/models")
