"""Routes of files and uploads."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import FileResponse

from distft.service.api import AnswerRoute, By, Parts, Repeatable
from distft.service.errors import refuse
from distft.service.wire import (
    DeletedObject,
    FileAnswer,
    Page,
    PartObject,
    UploadCompletion,
    UploadObject,
    UploadRequest,
)

router = APIRouter(prefix="/v1", route_class=AnswerRoute)
_EXPIRY = {"min": 3600, "max": 2592000}


@router.post("/files")
def create_file(
    parts: Parts,
    caller: By,
    once: Repeatable,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", lt=2**63)] = None,
) -> FileAnswer:
    """Upload a file."""
    if (anchor is None) != (seconds is None) or anchor not in (None, "created_at"):
        refuse("expires_after has anchor = created_at, and seconds.", param="expires_after")
    if seconds is not None and not _EXPIRY["min"] <= seconds <= _EXPIRY["max"]:
        refuse("expires_after.seconds is 3600 to 2592000.", param="expires_after.seconds")
    return parts.files.create(
        caller, file.file, filename=file.filename or "", purpose=purpose, expires_s=seconds, once=once
    )


@router.get("/files")
def list_files(
    parts: Parts,
    caller: By,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Page:
    """List files."""
    return parts.files.page(caller, purpose=purpose, order=order, after=after, limit=limit)


@router.get("/files/{file_id}")
def retrieve_file(parts: Parts, caller: By, file_id: str) -> FileAnswer:
    """Return a file's facts."""
    return parts.files.retrieve(caller, file_id)


@router.delete("/files/{file_id}")
def delete_file(parts: Parts, caller: By, file_id: str) -> DeletedObject:
    """Delete a file."""
    parts.files.delete(caller, file_id)
    return DeletedObject(id=file_id, object="file")


@router.get("/files/{file_id}/content", response_class=FileResponse)
def file_content(parts: Parts, caller: By, file_id: str) -> FileResponse:
    """Return a file's content."""
    path, name = parts.files.content(caller, file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=name)


@router.post("/uploads")
def create_upload(parts: Parts, caller: By, request: UploadRequest) -> UploadObject:
    """Begin a file that comes in parts."""
    return parts.uploads.create(caller, request)


@router.post("/uploads/{upload_id}/parts")
def add_part(parts: Parts, caller: By, upload_id: str, data: UploadFile) -> PartObject:
    """Add a part."""
    return parts.uploads.add_part(caller, upload_id, data.file)


@router.post("/uploads/{upload_id}/complete")
def complete_upload(parts: Parts, caller: By, upload_id: str, request: UploadCompletion) -> UploadObject:
    """Make the file of the parts."""
    return parts.uploads.complete(caller, upload_id, request)


@router.post("/uploads/{upload_id}/cancel")
def cancel_upload(parts: Parts, caller: By, upload_id: str) -> UploadObject:
    """Cancel an upload."""
    return parts.uploads.cancel(caller, upload_id)
