"""Files that come in parts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from distft.service.auth import Caller, note_change
from distft.service.database import ServiceDatabase
from distft.service.errors import ApiError, missing, refuse
from distft.service.files import FileService, checked_name, file_answer, too_large
from distft.service.tables import FileRow, PartRow, UploadRow, new_id
from distft.service.wire import PartObject, UploadCompletion, UploadObject, UploadRequest

LIVES_S = 3600
"""Seconds that an upload may take."""
PART_BYTES = 64 << 20
MOST_PARTS = 1000


class UploadService:
    """What the API does with uploads."""

    def __init__(self, database: ServiceDatabase, files: FileService) -> None:
        self._database, self._files = database, files

    def create(self, caller: Caller, request: UploadRequest) -> UploadObject:
        """Begin an upload."""
        caller.require("member")
        if request.bytes > self._files.most_bytes:
            raise too_large(self._files.most_bytes)
        now = int(time.time())
        with self._database.writing() as session:
            self._files.refuse_without_room(session, caller.project_id, request.bytes)
            row = UploadRow(
                id=new_id("upload_"), project_id=caller.project_id, filename=checked_name(request.filename),
                purpose=request.purpose, mime_type=request.mime_type, bytes=request.bytes, status="pending",
                created_at=now, expires_at=now + LIVES_S,
                file_expires_s=request.expires_after.seconds if request.expires_after else None,
            )  # fmt: skip
            session.add(row)
            note_change(session, caller, "upload.create", row.id)
            return _answer(session, row)

    def add_part(self, caller: Caller, upload_id: str, source: BinaryIO) -> PartObject:
        """Keep a part."""
        caller.require("member")
        with self._database.reading() as session:
            _pending(session, caller, upload_id)
        stored = self._files.contents.keep(iter([source]), most=PART_BYTES)
        with self._database.writing() as session:
            upload = _pending(session, caller, upload_id)
            query = select(func.count(PartRow.id), func.coalesce(func.sum(PartRow.bytes), 0))
            count, total = session.execute(query.where(PartRow.upload_id == upload_id)).one()
            if count >= MOST_PARTS or total + stored.bytes > upload.bytes:
                raise ApiError(
                    400, "The parts hold more than the upload was made for.", param="data", code="upload_too_large"
                )
            row = PartRow(
                id=new_id("part_"), upload_id=upload_id, bytes=stored.bytes, sha256=stored.sha256,
                created_at=int(time.time()),
            )  # fmt: skip
            session.add(row)
            return PartObject(id=row.id, created_at=row.created_at, upload_id=upload_id)

    def complete(self, caller: Caller, upload_id: str, request: UploadCompletion) -> UploadObject:
        """Make the file of the parts, in the order that is named."""
        caller.require("member")
        with self._database.reading() as session:
            upload = _pending(session, caller, upload_id)
            parts = {row.id: row for row in session.scalars(select(PartRow).where(PartRow.upload_id == upload_id))}
        for part_id in request.part_ids:
            if part_id not in parts:
                raise missing("part", part_id, param="part_ids")
        if len(set(request.part_ids)) < len(request.part_ids):
            refuse("A part is named twice.", param="part_ids")
        named = [parts[part_id] for part_id in request.part_ids]
        if sum(part.bytes for part in named) != upload.bytes:
            message = (
                f"The parts have {sum(part.bytes for part in named)} bytes, the upload was made for {upload.bytes}."
            )
            raise ApiError(400, message, param="part_ids", code="bytes_mismatch")
        digest = hashlib.md5(usedforsecurity=False)
        with ExitStack() as opened:

            def sources() -> Iterator[BinaryIO]:
                for part in named:
                    yield opened.enter_context(_Hashed(self._files.contents.path(part.sha256).open("rb"), digest))

            stored = self._files.contents.keep(sources(), most=upload.bytes)
        if request.md5 is not None and request.md5.lower() != digest.hexdigest():
            raise ApiError(400, "The md5 is another one than that of the parts.", param="md5", code="md5_mismatch")
        with self._database.writing() as session:
            upload = _pending(session, caller, upload_id)
            row = self._files.add(
                session, caller.project_id, stored, filename=upload.filename, purpose=upload.purpose,
                expires_s=upload.file_expires_s, of_upload=upload_id,
            )  # fmt: skip
            upload.status, upload.file_id = "completed", row.id
            self._forget_parts(session, upload_id)
            note_change(session, caller, "upload.complete", upload_id)
            return _answer(session, upload)

    def cancel(self, caller: Caller, upload_id: str) -> UploadObject:
        """Cancel an upload, and forget its parts."""
        caller.require("member")
        with self._database.writing() as session:
            upload = _pending(session, caller, upload_id)
            upload.status = "cancelled"
            self._forget_parts(session, upload_id)
            note_change(session, caller, "upload.cancel", upload_id)
            return _answer(session, upload)

    def expire(self) -> None:
        """Forget the parts of uploads whose time is over."""
        over = UploadRow.status == "pending", UploadRow.expires_at <= int(time.time())
        with self._database.reading() as session:
            if session.scalar(select(UploadRow.id).where(*over).limit(1)) is None:
                return
        with self._database.writing() as session:
            for upload in session.scalars(select(UploadRow).where(*over)):
                upload.status = "expired"
                self._forget_parts(session, upload.id)

    def _forget_parts(self, session: Session, upload_id: str) -> None:
        for part in session.scalars(select(PartRow).where(PartRow.upload_id == upload_id)).all():
            session.delete(part)
            session.flush()
            self._files.contents.discard(session, part.sha256)


class _Hashed:
    """A file whose bytes go through a hash as they are read."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        self._file, self._digest = file, digest

    def __enter__(self) -> BinaryIO:
        return self  # pyright: ignore[reportReturnType]

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._digest.update(chunk)
        return chunk


def _pending(session: Session, caller: Caller, upload_id: str) -> UploadRow:
    row = session.get(UploadRow, upload_id, with_for_update=True)
    if row is None or row.project_id != caller.project_id:
        raise missing("upload", upload_id, param="upload_id")
    if row.status == "pending" and row.expires_at <= time.time():
        raise ApiError(400, f"Upload {upload_id} has expired.", param="upload_id", code="upload_expired")
    if row.status != "pending":
        raise ApiError(400, f"Upload {upload_id} is {row.status}.", param="upload_id", code=f"upload_{row.status}")
    return row


def _answer(session: Session, row: UploadRow) -> UploadObject:
    file = session.get(FileRow, row.file_id) if row.file_id else None
    return UploadObject(
        id=row.id, bytes=row.bytes, created_at=row.created_at, expires_at=row.expires_at, filename=row.filename,
        purpose=row.purpose, status=row.status,  # pyright: ignore[reportArgumentType]
        file=file_answer(file) if file else None,
    )  # fmt: skip
