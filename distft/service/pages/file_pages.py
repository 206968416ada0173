"""Files of the project."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Query, Request, UploadFile
from fastapi.responses import FileResponse, Response

from distft.service.api import By, Parts
from distft.service.idempotency import Once
from distft.service.pages.web import go, page

router = APIRouter()
EACH = 50
_SHOWN = 4000
"""Bytes of a file that are shown."""


@router.get("/files")
def list_files(
    request: Request, parts: Parts, caller: By, after: Annotated[str | None, Query(max_length=64)] = None
) -> Response:
    """Show the files, newest first."""
    files = parts.files.page(caller, purpose=None, order="desc", after=after, limit=EACH)
    return page(request, "files.html", files=files.data, more=files.has_more, last=files.last_id, after=after)


@router.post("/files")
def upload_file(parts: Parts, caller: By, file: Annotated[UploadFile, File()]) -> Response:
    """Keep a file that is uploaded."""
    once = Once(project_id=caller.project_id, key=None)
    made = parts.files.create(
        caller, file.file, filename=file.filename or "", purpose="fine-tune", expires_s=None, once=once
    )
    return go(f"/files/{made.id}")


@router.get("/files/{file_id}")
def show_file(request: Request, parts: Parts, caller: By, file_id: str) -> Response:
    """Show what a file is, and its first lines."""
    file = parts.files.retrieve(caller, file_id)
    path, _ = parts.files.content(caller, file_id)
    with path.open("rb") as content:
        head = content.read(_SHOWN).decode("utf-8", errors="replace")
    return page(request, "file.html", file=file, head=head, cut=file.bytes > _SHOWN)


@router.get("/files/{file_id}/content")
def download_file(parts: Parts, caller: By, file_id: str) -> Response:
    """Return a file's content, to be kept and never shown."""
    path, name = parts.files.content(caller, file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=name)


@router.post("/files/{file_id}/delete")
def delete_file(parts: Parts, caller: By, file_id: str) -> Response:
    """Delete a file."""
    parts.files.delete(caller, file_id)
    return go("/files")
