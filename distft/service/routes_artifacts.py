"""Routes of artifacts: exports, merged models and combined adapters. None of them is OpenAI's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from distft.service.api import AnswerRoute, By, Parts, Repeatable
from distft.service.artifact_archive import FolderArchive
from distft.service.wire import DeletedObject, Page
from distft.service.wire_artifacts import ArtifactObject, ArtifactRequest

router = APIRouter(prefix="/v1", route_class=AnswerRoute)


@router.post("/artifacts")
def create_artifact(parts: Parts, caller: By, once: Repeatable, request: ArtifactRequest) -> ArtifactObject:
    """Have an export, a merged model or a combined adapter made of tuned models. Not OpenAI's."""
    return parts.artifacts.create(caller, request, once)


@router.get("/artifacts")
def list_artifacts(
    parts: Parts,
    caller: By,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page:
    """List artifacts, newest first. Not OpenAI's."""
    return parts.artifacts.page(caller, after=after, limit=limit)


@router.get("/artifacts/{artifact_id}")
def retrieve_artifact(parts: Parts, caller: By, artifact_id: str) -> ArtifactObject:
    """Return an artifact. Not OpenAI's."""
    return parts.artifacts.retrieve(caller, artifact_id)


@router.post("/artifacts/{artifact_id}/cancel")
def cancel_artifact(parts: Parts, caller: By, artifact_id: str) -> ArtifactObject:
    """Cancel an artifact that is not made yet. Not OpenAI's."""
    return parts.artifacts.cancel(caller, artifact_id)


@router.delete("/artifacts/{artifact_id}")
def delete_artifact(parts: Parts, caller: By, artifact_id: str) -> DeletedObject:
    """Delete an artifact and its files. Not OpenAI's."""
    parts.artifacts.delete(caller, artifact_id)
    return DeletedObject(id=artifact_id, object="artifact")


@router.get("/artifacts/{artifact_id}/content", response_class=StreamingResponse)
def artifact_content(parts: Parts, caller: By, artifact_id: str) -> StreamingResponse:
    """Return an artifact's files as one tar. Not OpenAI's."""
    return as_tar(parts.artifacts.archive(caller, artifact_id), artifact_id)


def as_tar(archive: FolderArchive, name: str) -> StreamingResponse:
    """Return the answer that streams an archive; its length tells the client whether it has all of it."""
    headers = {"content-disposition": f'attachment; filename="{name}.tar"', "content-length": str(archive.num_bytes)}
    return StreamingResponse(archive.chunks(), media_type="application/x-tar", headers=headers)
