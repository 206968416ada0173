"""Artifacts: what was made of tuned models, with its proof, and the form that has one made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response

from distft.report.formatting import count, figure, noun
from distft.service.api import By, Parts, ServiceParts
from distft.service.artifacts import UNFINISHED, is_adapter
from distft.service.auth import Caller
from distft.service.errors import ApiError
from distft.service.idempotency import Once
from distft.service.pages.artifact_form import ArtifactForm, choices, field_of
from distft.service.pages.web import go, page
from distft.service.routes_artifacts import as_tar
from distft.service.wire_artifacts import ArtifactObject

router = APIRouter()
EACH = 25
"""Artifacts on one page."""


@router.get("/artifacts")
def list_artifacts(
    request: Request, parts: Parts, caller: By, after: Annotated[str | None, Query(max_length=64)] = None
) -> Response:
    """Show the artifacts, newest first."""
    made = parts.artifacts.page(caller, after=after, limit=EACH)
    return page(
        request, "artifacts.html", artifacts=[(entry, title_of(entry), proof_of(entry)) for entry in made.data],
        more=made.has_more, last=made.last_id, after=after,
        is_waiting=any(entry.status in UNFINISHED for entry in made.data),
    )  # fmt: skip


@router.get("/artifacts/new")
def form_page(request: Request, parts: Parts, caller: By, model: Annotated[str, Query(max_length=300)]) -> Response:
    """Show what can be made of a tuned model."""
    caller.require("member")
    return _form(request, parts, caller, model, {}, None)


@router.post("/artifacts/new")
def create_artifact(request: Request, parts: Parts, caller: By, form: Annotated[ArtifactForm, Form()]) -> Response:
    """Have an artifact made; a form with a mistake is shown again, with what was typed."""
    caller.require("member")
    parts.models.tuned(caller, form.model)  # of a model that is not there no form can be shown
    try:
        parts.artifacts.create(caller, form.request(), Once(project_id=caller.project_id, key=None))
    except ApiError as error:
        return _form(request, parts, caller, form.model, form.typed(), error, kind=form.kind)
    return go("/artifacts")


@router.get("/artifacts/{artifact_id}/content")
def download_artifact(parts: Parts, caller: By, artifact_id: str) -> Response:
    """Return an artifact's files as one tar."""
    return as_tar(parts.artifacts.archive(caller, artifact_id), artifact_id)


@router.post("/artifacts/{artifact_id}/{verb}")
def act(parts: Parts, caller: By, artifact_id: str, verb: Literal["cancel", "delete"]) -> Response:
    """Cancel or delete an artifact."""
    {"cancel": parts.artifacts.cancel, "delete": parts.artifacts.delete}[verb](caller, artifact_id)
    return go("/artifacts")


def _form(
    request: Request, parts: ServiceParts, caller: Caller, model: str, typed: Mapping[str, Any],
    error: ApiError | None, *, kind: str = "",
) -> Response:  # fmt: skip
    source = parts.models.tuned(caller, model)
    wrong = None if error is None else {"kind": kind, "param": field_of(error.param), "message": error.message}
    return page(
        request, "artifact.html", code=error.status if error is not None else 200, model=model,
        is_adapter=is_adapter(source.run) is not False, others=parts.artifacts.others(caller, model), wrong=wrong,
        **choices(typed),
    )  # fmt: skip


def title_of(artifact: ArtifactObject) -> str:
    """Return what an artifact is, in a few words."""
    settings = artifact.settings
    match artifact.kind:
        case "export":
            return f"{settings['format']} {settings['level'] or ''}".rstrip()
        case "merge":
            return f"merged, {settings['dtype']}" if settings["dtype"] else "merged"
        case "combine":
            return f"{settings['how']} of {len(artifact.models)}"


def proof_of(artifact: ArtifactObject) -> tuple[str, list[str]]:
    """Return what the proof of an artifact says in one line, and every comparison behind it."""
    proof = artifact.proof
    if proof is None:
        return "", []
    match artifact.kind:
        case "export":
            checks = [check for level in proof["levels"] for check in level["checks"]]
            unproven = [level["unproven"] for level in proof["levels"] if level["unproven"]]
            runtimes = ", ".join(dict.fromkeys(level["runtime"] for level in proof["levels"] if level["runtime"]))
            hold = sum(check["ok"] for check in checks)
            all_hold = "all" if hold == len(checks) else f"{hold} of them"
            line = f"{noun(len(checks), 'comparison')} in {runtimes}, {all_hold} as allowed"
            line = line if checks else "Not compared"
            asked = f"On {proof['rows']['prompts']} prompts: {proof['rows']['from']}." if checks else ""
            return line, [text for text in (asked, *unproven, *map(_check, checks)) if text]
        case "merge":
            found = proof["comparison"]
            if found is None:
                return "Not compared", []
            line = f"KL(adapter || merged) {figure(found['kl'])} nats a token, allowed {figure(proof['max_kl'])}"
            same = f"{found['agreement']:.2%} of {count(found['num_tokens'])} positions"
            return line, [f"The same likeliest token at {same} of {noun(found['num_rows'], 'row')}.",
                          f"Largest divergence at one token: {figure(found['largest_kl'])} nats."]  # fmt: skip
        case "combine":
            lost = f"relative error {figure(proof['relative_error'])}" if proof["relative_error"] else "nothing lost"
            return f"Rank {proof['rank']}, {lost}", [
                f"Changes of {noun(proof['tensors'], 'tensor')} were combined; the error is what the rank left out."
            ]


def _check(check: Mapping[str, Any]) -> str:
    value = check["value"] if isinstance(check["value"], int) else figure(check["value"])
    detail = f" ({check['detail']})" if check["detail"] else ""
    return f"{check['name']}: {check['compared']}: {value} of {count(check['count'])}, allowed {check['bound']}{detail}"
