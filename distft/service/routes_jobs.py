"""Routes of fine-tuning jobs, their checkpoints and permissions."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse

from distft.service.api import AnswerRoute, By, Parts, Repeatable
from distft.service.errors import refuse
from distft.service.wire import DeletedObject, JobObject, JobRequest, Page, PermissionRequest, PriorityRequest

router = APIRouter(prefix="/v1/fine_tuning", route_class=AnswerRoute)
After = Annotated[str | None, Query(max_length=64)]


@router.post("/jobs")
def create_job(parts: Parts, caller: By, once: Repeatable, request: JobRequest) -> JobObject:
    """Make a job."""
    return parts.jobs.create(caller, request, once)


@router.get("/jobs")
def list_jobs(
    parts: Parts,
    caller: By,
    http: Request,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    metadata: Annotated[str | None, Query(max_length=16)] = None,
) -> Page:
    """List jobs, newest first."""
    pairs = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in http.query_params.items()
        if name.startswith("metadata[")
    }
    if metadata not in (None, "null", "") or (metadata == "null" and pairs):
        refuse("metadata is null, or metadata[key]=value.", param="metadata")
    null = metadata == "null"
    return parts.jobs.page(caller, after=after, limit=limit, metadata=pairs, null_metadata=null)


@router.get("/jobs/{fine_tuning_job_id}")
def retrieve_job(parts: Parts, caller: By, fine_tuning_job_id: str) -> JobObject:
    """Return a job."""
    return parts.jobs.retrieve(caller, fine_tuning_job_id)


@router.delete("/jobs/{fine_tuning_job_id}")
def delete_job(parts: Parts, caller: By, fine_tuning_job_id: str) -> DeletedObject:
    """Delete a job that has ended, with its model, checkpoints and result file. Not OpenAI's."""
    parts.removal.remove(caller, fine_tuning_job_id)
    return DeletedObject(id=fine_tuning_job_id, object="fine_tuning.job")


@router.get("/jobs/{fine_tuning_job_id}/recipe", response_class=PlainTextResponse)
def job_recipe(parts: Parts, caller: By, fine_tuning_job_id: str) -> PlainTextResponse:
    """Return a job's recipe. Not OpenAI's."""
    return PlainTextResponse(parts.jobs.recipe(caller, fine_tuning_job_id), media_type="application/toml")


@router.post("/jobs/{fine_tuning_job_id}/cancel")
def cancel_job(parts: Parts, caller: By, fine_tuning_job_id: str) -> JobObject:
    """Cancel a job."""
    return parts.jobs.cancel(caller, fine_tuning_job_id)


@router.post("/jobs/{fine_tuning_job_id}/pause")
def pause_job(parts: Parts, caller: By, fine_tuning_job_id: str) -> JobObject:
    """Ask a job to save and stop."""
    return parts.jobs.pause(caller, fine_tuning_job_id)


@router.post("/jobs/{fine_tuning_job_id}/resume")
def resume_job(parts: Parts, caller: By, fine_tuning_job_id: str) -> JobObject:
    """Let a paused job go on."""
    return parts.jobs.resume(caller, fine_tuning_job_id)


@router.post("/jobs/{fine_tuning_job_id}/priority")
def prioritize_job(parts: Parts, caller: By, fine_tuning_job_id: str, request: PriorityRequest) -> JobObject:
    """Change a job's place in the queue. Not OpenAI's."""
    return parts.jobs.prioritize(caller, fine_tuning_job_id, request.priority)


@router.get("/jobs/{fine_tuning_job_id}/events")
def list_events(
    parts: Parts, caller: By, fine_tuning_job_id: str, after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Page:  # fmt: skip
    """List a job's events, newest first."""
    return parts.jobs.events(caller, fine_tuning_job_id, after=after, limit=limit)


@router.get("/jobs/{fine_tuning_job_id}/checkpoints")
def list_checkpoints(
    parts: Parts, caller: By, fine_tuning_job_id: str, after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Page:  # fmt: skip
    """List a job's checkpoints, newest first."""
    return parts.jobs.checkpoints(caller, fine_tuning_job_id, after=after, limit=limit)


@router.get("/checkpoints/{checkpoint}/permissions")
def list_permissions(
    parts: Parts,
    caller: By,
    checkpoint: str,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    order: Literal["ascending", "descending"] = "descending",
    project_id: Annotated[str | None, Query(max_length=64)] = None,
) -> Page:
    """List the projects that may use a checkpoint."""
    return parts.models.permissions(
        caller, checkpoint, after=after, limit=limit, project_id=project_id, ascending=order == "ascending"
    )


@router.post("/checkpoints/{checkpoint}/permissions")
def create_permissions(parts: Parts, caller: By, checkpoint: str, request: PermissionRequest) -> Page:
    """Let projects use a checkpoint."""
    return parts.models.permit(caller, checkpoint, request.project_ids)


@router.delete("/checkpoints/{checkpoint}/permissions/{permission_id}")
def delete_permission(parts: Parts, caller: By, checkpoint: str, permission_id: str) -> DeletedObject:
    """Take a permission back."""
    parts.models.forbid(caller, checkpoint, permission_id)
    return DeletedObject(id=permission_id, object="checkpoint.permission")
