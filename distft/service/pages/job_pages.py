"""Jobs: the queue, one job while it goes on and afterwards, and what may be done with it."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, Response

from distft.service.api import By, Parts
from distft.service.jobs import FINISHED, UNFINISHED
from distft.service.pages.live_run import live_run
from distft.service.pages.web import go, page
from distft.service.run_pages import SANDBOX

router = APIRouter()
STATUSES = (*UNFINISHED, *FINISHED)
EACH = 25
"""Jobs on one page."""
EVENTS = 12
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
After = Annotated[str | None, Query(max_length=64)]


@router.get("/")
def start() -> Response:
    """Go to the jobs."""
    return go("/jobs")


@router.get("/jobs")
def list_jobs(
    request: Request, parts: Parts, caller: By, status: Status | None = None, after: After = None
) -> Response:
    """Show jobs, newest first."""
    cards, more = parts.jobs.cards(caller, after=after, limit=EACH, status=status)
    return page(request, "jobs.html", cards=cards, more=more, status=status, after=after, statuses=STATUSES)


@router.get("/jobs/{job_id}")
def show_job(request: Request, parts: Parts, caller: By, job_id: str) -> Response:
    """Show one job."""
    card = parts.jobs.card(caller, job_id)
    events = parts.jobs.events(caller, job_id, after=None, limit=EVENTS)
    points = parts.jobs.checkpoints(caller, job_id, after=None, limit=10)
    folder = parts.jobs.folder(job_id)
    return page(
        request, "job.html", card=card, events=events.data, more_events=events.has_more, points=points.data,
        more_points=points.has_more, run=live_run(folder), has_recipe=folder.recipe.exists(),
    )  # fmt: skip


@router.get("/jobs/{job_id}/events")
def list_events(request: Request, parts: Parts, caller: By, job_id: str, after: After = None) -> Response:
    """Show all events of a job."""
    card = parts.jobs.card(caller, job_id)
    events = parts.jobs.events(caller, job_id, after=after, limit=200)
    return page(request, "events.html", card=card, events=events.data, more=events.has_more, last=events.last_id)


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(request: Request, parts: Parts, caller: By, job_id: str, after: After = None) -> Response:
    """Show all checkpoints of a job."""
    card = parts.jobs.card(caller, job_id)
    points = parts.jobs.checkpoints(caller, job_id, after=after, limit=100)
    return page(request, "checkpoints.html", card=card, points=points.data, more=points.has_more, last=points.last_id)


@router.get("/jobs/{job_id}/recipe.toml")
def download_recipe(parts: Parts, caller: By, job_id: str) -> Response:
    """Return the recipe as a file."""
    headers = {"content-disposition": f'attachment; filename="{job_id}.toml"'}
    return Response(parts.jobs.recipe(caller, job_id), media_type="application/toml", headers=headers)


@router.get("/jobs/{job_id}/report")
def show_report(parts: Parts, caller: By, job_id: str) -> Response:
    """Return the run's report, in a sandbox."""
    parts.jobs.card(caller, job_id)
    text = parts.run_pages.report(parts.jobs.folder(job_id))
    return HTMLResponse(text, headers={"content-security-policy": SANDBOX})


@router.post("/jobs/{job_id}/priority")
def set_priority(parts: Parts, caller: By, job_id: str, priority: Annotated[int, Form(ge=-100, le=100)]) -> Response:
    """Change a job's place in the queue."""
    parts.jobs.prioritize(caller, job_id, priority)
    return go(f"/jobs/{job_id}")


@router.post("/jobs/{job_id}/{verb}")
def act(parts: Parts, caller: By, job_id: str, verb: Literal["pause", "resume", "cancel"]) -> Response:
    """Pause, resume or cancel a job."""
    {"pause": parts.jobs.pause, "resume": parts.jobs.resume, "cancel": parts.jobs.cancel}[verb](caller, job_id)
    return go(f"/jobs/{job_id}")


@router.get("/compare")
def compare_jobs(
    request: Request, parts: Parts, caller: By, job: Annotated[list[str] | None, Query(max_length=8)] = None
) -> Response:
    """Show which jobs can be compared, or those that were chosen side by side."""
    chosen = [parts.jobs.card(caller, job_id) for job_id in dict.fromkeys(job or ())]
    if len(chosen) > 1:
        text = parts.run_pages.comparison([parts.jobs.folder(card.id) for card in chosen])
        return HTMLResponse(text, headers={"content-security-policy": SANDBOX})
    cards, _ = parts.jobs.cards(caller, after=None, limit=100, status=None)
    ready = [card for card in cards if (parts.jobs.folder(card.id).run / "metrics.jsonl").exists()]
    return page(request, "compare.html", cards=ready, chosen={card.id for card in chosen})
