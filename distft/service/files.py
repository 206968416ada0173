"""Files: contents under their hashes on the disk, streamed there, and rows that say whose they are."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from distft.core.files import sync_folder
from distft.service.auth import Caller, note_change
from distft.service.database import ServiceDatabase, afterwards, next_position
from distft.service.errors import ApiError, missing, refuse
from distft.service.idempotency import Once
from distft.service.settings import ServiceSettings
from distft.service.tables import ArtifactRow, FileRow, PartRow, UploadRow, new_id
from distft.service.wire import PURPOSES, FileAnswer, Page, page_of

CHUNK = 1 << 20
MIB, GIB = 1 << 20, 1 << 30
RESULTS = "fine-tune-results"


@dataclass(frozen=True, kw_only=True)
class StoredContent:
    """A content that lies on the disk."""

    sha256: str
    bytes: int


class ContentStore:
    """Contents by hash: `files/ab/cdef…`. A content is whole once it has its name."""

    def __init__(self, folder: Path, database: ServiceDatabase) -> None:
        self._folder, self._database = folder, database
        (folder / "incoming").mkdir(parents=True, exist_ok=True)
        for torn in (folder / "incoming").iterdir():  # of a server that was killed
            torn.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Return where a content lies."""
        return self._folder / sha256[:2] / sha256[2:]

    def keep(self, sources: Iterator[BinaryIO], *, most: int) -> StoredContent:
        """Write what the sources hold, one after another, and name it by its hash.

        Raises:
            ApiError: it has more than `most` bytes: status 413.
        """
        aside, digest, size = self._folder / "incoming" / uuid4().hex, hashlib.sha256(), 0
        try:
            with aside.open("xb") as file:
                for source in sources:
                    while chunk := source.read(CHUNK):
                        size += len(chunk)
                        if size > most:
                            raise too_large(most)
                        digest.update(chunk)
                        file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            path = self.path(digest.hexdigest())
            path.parent.mkdir(exist_ok=True)
            os.replace(aside, path)
            sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)
        return StoredContent(sha256=digest.hexdigest(), bytes=size)

    def discard(self, session: Session, sha256: str) -> None:
        """Remove a content that no file or part needs, once it is certain that none does.

        Jobs have links of their own to theirs.

        Args:
            session: that writes, and has deleted the row: nothing is removed before it is committed.
            sha256: of the content.
        """
        afterwards(session, lambda: self._discard(sha256))

    def _discard(self, sha256: str) -> None:
        with self._database.writing() as session:  # nobody adds the same content meanwhile
            if not self._needed(session, sha256):
                self.path(sha256).unlink(missing_ok=True)

    def remove_orphans(self) -> None:
        """Remove contents that no row speaks of: of a server that was killed behind an upload or before a removal."""
        with self._database.reading() as session:
            needed = {*session.scalars(select(FileRow.sha256)), *session.scalars(select(PartRow.sha256))}
        for path in self._folder.glob("??/*"):
            if path.parent.name + path.name not in needed:
                path.unlink(missing_ok=True)

    def _needed(self, session: Session, sha256: str) -> bool:
        used = (
            select(FileRow.id).where(FileRow.sha256 == sha256),
            select(PartRow.id).where(PartRow.sha256 == sha256),
        )
        return any(session.scalar(query.limit(1)) for query in used)


class FileService:
    """What the API does with files."""

    def __init__(self, database: ServiceDatabase, settings: ServiceSettings) -> None:
        self._database, self._limits = database, settings.limits
        self.contents = ContentStore(settings.blobs, database)

    @property
    def most_bytes(self) -> int:
        """Of one file."""
        return int(self._limits.file_mib * MIB)

    def create(
        self, caller: Caller, source: BinaryIO, *, filename: str, purpose: str, expires_s: int | None, once: Once
    ) -> FileAnswer:
        """Keep an uploaded file.

        Raises:
            ApiError: its name or purpose is none, or the project has no room.
        """
        caller.require("member")
        filename = checked_name(filename)
        if purpose not in PURPOSES:
            refuse(f"'{purpose[:64]}' is not one of {list(PURPOSES)}", param="purpose")
        stored = self.contents.keep(iter([source]), most=self.most_bytes)
        if stored.bytes == 0:
            refuse("The file is empty.", param="file", code="empty_file")
        with self._database.writing() as session:
            digest = f"file {stored.sha256} {filename} {purpose} {expires_s}"
            if (earlier := once.earlier(session, digest)) is not None:
                return file_answer(_own(session, caller, earlier))
            row = self.add(session, caller.project_id, stored, filename=filename, purpose=purpose, expires_s=expires_s)
            once.note(session, digest, row.id)
            note_change(session, caller, "file.create", row.id)
            return file_answer(row)

    def add(
        self, session: Session, project_id: str, stored: StoredContent, *, filename: str, purpose: str,
        expires_s: int | None = None, of_upload: str | None = None,
    ) -> FileRow:  # fmt: skip
        """Add a file's row.

        Raises:
            ApiError: the project has as many files or bytes as it may have: status 429.
        """
        if purpose != RESULTS:
            self.refuse_without_room(session, project_id, stored.bytes, of_upload=of_upload)
        if not self.contents.path(stored.sha256).is_file():  # the same content's last other file went meanwhile
            raise ApiError(503, "The content was removed at this moment; send it again.")
        now = int(time.time())
        row = FileRow(
            id=new_id("file-"), project_id=project_id, filename=filename, purpose=purpose, bytes=stored.bytes,
            sha256=stored.sha256, created_at=now, expires_at=now + expires_s if expires_s else None,
            position=next_position(session, "files"),
        )  # fmt: skip
        session.add(row)
        session.flush()
        return row

    def refuse_without_room(
        self, session: Session, project_id: str, more: int, *, of_upload: str | None = None
    ) -> None:
        """Refuse another file where a project has as many, or as many bytes, as it may have.

        Uploads that are not complete count as the files that they are to be.

        Args:
            session: of the transaction that adds the file.
            project_id: whose file it is to be.
            more: bytes of the file.
            of_upload: the upload that becomes this file, and counts no second time.

        Raises:
            ApiError: status 429.
        """
        count, room = self._taken(session, project_id, of_upload=of_upload)
        if count >= self._limits.files_per_project:
            raise ApiError(429, f"The project has {count} files, and may have no more.", code="quota_exceeded")
        if more > room:
            raise ApiError(429, "The project's files would take more bytes than it may have.", code="quota_exceeded")

    def room(self, session: Session, project_id: str) -> float:
        """Return the bytes that a project's files and artifacts may still take; below 0: they take too many."""
        return self._taken(session, project_id, of_upload=None)[1]

    def _taken(self, session: Session, project_id: str, *, of_upload: str | None) -> tuple[int, float]:
        """Return how many files a project has, and the bytes that are left of those that it may have."""
        query = select(func.count(FileRow.id), func.coalesce(func.sum(FileRow.bytes), 0))
        count, total = session.execute(query.where(FileRow.project_id == project_id)).one()
        query = select(func.count(UploadRow.id), func.coalesce(func.sum(UploadRow.bytes), 0))
        pending = UploadRow.project_id == project_id, UploadRow.status == "pending", UploadRow.id != (of_upload or "")
        begun, promised = session.execute(query.where(*pending, UploadRow.expires_at > int(time.time()))).one()
        query = select(func.coalesce(func.sum(ArtifactRow.bytes), 0))
        made = session.scalar(query.where(ArtifactRow.project_id == project_id)) or 0
        return count + begun, self._limits.project_gib * GIB - float(total + promised + made)

    def page(self, caller: Caller, *, purpose: str | None, order: str, after: str | None, limit: int) -> Page:
        """Return a page of the project's files."""
        with self._database.reading() as session:
            there = or_(FileRow.expires_at.is_(None), FileRow.expires_at > int(time.time()))
            query = select(FileRow).where(FileRow.project_id == caller.project_id, there)
            if purpose is not None:
                query = query.where(FileRow.purpose == purpose)
            if after is not None:
                position = _own(session, caller, after, param="after").position
                query = query.where(FileRow.position < position if order == "desc" else FileRow.position > position)
            query = query.order_by(FileRow.position.desc() if order == "desc" else FileRow.position)
            rows = session.scalars(query.limit(limit + 1)).all()
        return page_of([file_answer(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def retrieve(self, caller: Caller, file_id: str) -> FileAnswer:
        """Return a file's row."""
        with self._database.reading() as session:
            return file_answer(_own(session, caller, file_id))

    def content(self, caller: Caller, file_id: str) -> tuple[Path, str]:
        """Return where a file's content lies, and the file's name."""
        with self._database.reading() as session:
            row = _own(session, caller, file_id)
        return self.contents.path(row.sha256), row.filename

    def delete(self, caller: Caller, file_id: str) -> None:
        """Delete a file; jobs that were made of it keep its content."""
        caller.require("member")
        with self._database.writing() as session:
            row = _own(session, caller, file_id)
            session.delete(row)
            session.flush()
            self.contents.discard(session, row.sha256)
            note_change(session, caller, "file.delete", file_id)

    def expire(self) -> None:
        """Delete the files whose time is over."""
        with self._database.reading() as session:
            if session.scalar(select(FileRow.id).where(FileRow.expires_at <= int(time.time())).limit(1)) is None:
                return
        with self._database.writing() as session:
            for row in session.scalars(select(FileRow).where(FileRow.expires_at <= int(time.time()))):
                session.delete(row)
                session.flush()
                self.contents.discard(session, row.sha256)


def training_file(session: Session, caller: Caller, file_id: str, *, param: str) -> FileRow:
    """Return a file that a job is to be made of.

    Raises:
        ApiError: there is none, or it was uploaded for something else.
    """
    row = session.get(FileRow, file_id)
    if row is None or row.project_id != caller.project_id or _is_over(row):
        message = f"invalid {param}: {file_id} — no such file in this project"
        raise ApiError(400, message, param=param, code="invalid_file_id")
    if row.purpose != "fine-tune":
        message = f"invalid {param}: {file_id} has the purpose {row.purpose}, and must have fine-tune"
        raise ApiError(400, message, param=param, code="invalid_file_purpose")
    return row


def checked_name(filename: str) -> str:
    """Return a file's name as it is kept and shown.

    Raises:
        ApiError: it is longer than a name, or holds what can mean a path or a header.
    """
    bad = any(char in '/\\"' or not char.isprintable() for char in filename)
    if not 1 <= len(filename) <= 255 or bad or filename in (".", ".."):
        refuse("A file's name is 1 to 255 printable characters without slashes and quotes.", param="filename")
    return filename


def too_large(most: int) -> ApiError:
    """Return the refusal of a file with more bytes than one may have."""
    return ApiError(413, f"The file is larger than {most} bytes.", param="file", code="file_too_large")


def _own(session: Session, caller: Caller, file_id: str, *, param: str = "file_id") -> FileRow:
    row = session.get(FileRow, file_id)
    if row is None or row.project_id != caller.project_id or _is_over(row):
        raise missing("File object", file_id, param=param)
    return row


def _is_over(row: FileRow) -> bool:
    return row.expires_at is not None and row.expires_at <= time.time()


def file_answer(row: FileRow) -> FileAnswer:
    """Return a file as the API has it."""
    return FileAnswer(
        id=row.id, bytes=row.bytes, created_at=row.created_at, expires_at=row.expires_at, filename=row.filename,
        purpose=row.purpose,
    )  # fmt: skip
