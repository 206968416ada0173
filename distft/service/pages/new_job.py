"""A new job in steps: data, model and method, recipe, start. What is chosen is on the server; every step is a link."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import Response

from distft.advise.situation import GOALS
from distft.core.accelerators import GIB
from distft.service.api import By, Parts, ServiceParts
from distft.service.auth import Caller
from distft.service.errors import ApiError
from distft.service.idempotency import Once
from distft.service.pages.draft_form import (
    GRADERS,
    METHODS,
    OPERATIONS,
    SETTINGS,
    SIMILARITIES,
    ModelForm,
    shown_grader,
)
from distft.service.pages.web import go, page

router = APIRouter()
STEPS = (("", "Data"), ("/model", "Model and method"), ("/recipe", "Recipe"), ("/start", "Start"))
Upload = Annotated[UploadFile | None, File()]


@router.get("/new")
def begin_page(request: Request, parts: Parts, caller: By) -> Response:
    """Show where data is dropped, and drafts that were begun."""
    caller.require("member")
    files = parts.files.page(caller, purpose="fine-tune", order="desc", after=None, limit=50).data
    return page(request, "new.html", drafts=parts.drafts.page(caller), files=files)


@router.post("/new")
def begin(
    parts: Parts, caller: By, file: Upload = None, file_id: Annotated[str | None, Form(max_length=64)] = None
) -> Response:
    """Begin a draft with a file that is uploaded, or is here already."""
    caller.require("member")
    draft = parts.drafts.create(caller, training_file=_file(parts, caller, file, file_id))
    return go(f"/new/{draft.id}")


@router.get("/new/{draft_id}")
def data_page(request: Request, parts: Parts, caller: By, draft_id: str) -> Response:
    """Show the files, and what was found in them."""
    return _show(request, parts, caller, draft_id, "draft_data.html", "")


@router.get("/new/{draft_id}/model")
def model_page(request: Request, parts: Parts, caller: By, draft_id: str) -> Response:
    """Show model, method and settings, and what the plan says of them."""
    return _show(request, parts, caller, draft_id, "draft_model.html", "/model")


@router.get("/new/{draft_id}/recipe")
def recipe_page(request: Request, parts: Parts, caller: By, draft_id: str) -> Response:
    """Show the recipe, to be edited."""
    return _show(request, parts, caller, draft_id, "draft_recipe.html", "/recipe")


@router.get("/new/{draft_id}/start")
def start_page(request: Request, parts: Parts, caller: By, draft_id: str) -> Response:
    """Show all that was chosen, and the button that starts it."""
    return _show(request, parts, caller, draft_id, "draft_start.html", "/start")


@router.post("/new/{draft_id}/model")
def change_model(
    request: Request, parts: Parts, caller: By, draft_id: str, form: Annotated[ModelForm, Form()]
) -> Response:
    """Change model, method and settings of a draft."""
    caller.require("member")
    draft = parts.drafts.retrieve(caller, draft_id)
    try:
        changes = form.changes(parts.jobs, draft)
    except ApiError as error:
        wrong = {"param": error.param or "", "message": error.message}
        return _show(
            request, parts, caller, draft_id, "draft_model.html", "/model", typed=form.model_dump(), wrong=wrong,
            code=error.status,
        )  # fmt: skip
    parts.drafts.change(caller, draft_id, changes)
    return go(f"/new/{draft_id}/model")


@router.post("/new/{draft_id}/{which}")
def change_draft(
    request: Request,
    parts: Parts,
    caller: By,
    draft_id: str,
    which: Literal["training", "validation", "recipe", "start", "delete"],
    file: Upload = None,
    file_id: Annotated[str | None, Form(max_length=64)] = None,
    recipe: Annotated[str, Form(max_length=65536)] = "",
    priority: Annotated[int, Form(ge=-100, le=100)] = 0,
) -> Response:
    """Change one thing of a draft, start it, or delete it."""
    caller.require("member")
    draft, path = parts.drafts.retrieve(caller, draft_id), f"/new/{draft_id}"
    match which:
        case "delete":
            parts.drafts.delete(caller, draft_id)
            return go("/new")
        case "start":
            parts.drafts.change(caller, draft_id, {"priority": priority, "recipe": draft.content.get("recipe")})
            return go(f"/jobs/{parts.drafts.start(caller, draft_id).id}")
        case "training" | "validation":
            given = _file(parts, caller, file, file_id) if file_id != "none" else None
            if given is not None or file_id == "none":
                parts.drafts.change(caller, draft_id, {f"{which}_file": given})
            return go(path)
        case "recipe":
            parts.drafts.change(caller, draft_id, {"recipe": recipe.replace("\r\n", "\n") or None})
            return go(f"{path}/recipe")


def _file(parts: ServiceParts, caller: Caller, file: UploadFile | None, file_id: str | None) -> str | None:
    """Return the id of a file that is sent, or of one that is here; None: neither."""
    if file is None or not file.filename:
        return parts.files.retrieve(caller, file_id).id if file_id else None
    once = Once(project_id=caller.project_id, key=None)
    return parts.files.create(
        caller, file.file, filename=file.filename, purpose="fine-tune", expires_s=None, once=once
    ).id


def _show(
    request: Request, parts: ServiceParts, caller: Caller, draft_id: str, template: str, step: str, *, code: int = 200,
    typed: dict[str, str] | None = None, wrong: dict[str, str] | None = None,
) -> Response:  # fmt: skip
    draft = parts.drafts.retrieve(caller, draft_id)
    if draft.job_id is not None:
        return go(f"/jobs/{draft.job_id}")
    refusal, found = None, None
    try:
        found = parts.drafts.preview(caller, draft)
    except ApiError as error:  # a file or a model went since it was chosen
        refusal = error.message
    content = draft.content
    named = {
        which: parts.files.retrieve(caller, file_id)
        for which in ("training_file", "validation_file")
        if refusal is None and (file_id := content.get(which))
    }
    hyperparameters = content.get("hyperparameters") or {}
    chosen = {field.name: str(hyperparameters.get(field.name, "auto")) for field in SETTINGS}
    chosen |= shown_grader(content.get("grader"))
    chosen |= {name: str(content.get(name) or "") for name in ("model", "method", "goal", "suffix")}
    advice = {entry["what"]: entry for entry in (found or {}).get("advice", ())}
    files = parts.files.page(caller, purpose="fine-tune", order="desc", after=None, limit=50).data
    return page(
        request, template, code=code, draft=draft, found=found, refusal=refusal, named=named, files=files,
        steps=[(f"/new/{draft.id}{path}", title, path == step) for path, title in STEPS], goals=GOALS,
        settings=SETTINGS, methods=METHODS, graders=GRADERS, operations=OPERATIONS, similarities=SIMILARITIES,
        models={name: base for name, base in parts.settings.models.items() if base.methods}, advice=advice,
        chosen=chosen | (typed or {}), wrong=wrong, bar=_bar(found), gib_bytes=GIB,
    )  # fmt: skip


def _bar(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the memory bar: shares of its width, of the larger of what is needed and what there is."""
    case = ((found or {}).get("plan") or {}).get("case")
    if case is None:
        return None
    whole, at, segments = max(case["peak_bytes"], case["gpu_bytes"]) * 1.02, 0.0, []
    for style, (name, num_bytes) in enumerate(case["parts"].items(), start=1):
        segments.append({"name": name, "bytes": num_bytes, "x": at, "width": 100 * num_bytes / whole, "style": style})
        at += 100 * num_bytes / whole
    return {"segments": segments, "room": 100 * case["gpu_bytes"] / whole}
