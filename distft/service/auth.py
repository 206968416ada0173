"""API keys: who asks, for which project, and what they may do. A key is shown once; its hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from distft.service.database import ServiceDatabase
from distft.service.errors import ApiError
from distft.service.tables import AuditRow, KeyRow, ProjectRow, new_id

Role = Literal["admin", "member", "viewer"]
RANKS = {"viewer": 0, "member": 1, "admin": 2}
FIRST_PROJECT = "default"
KEY_VARIABLE = "DISTFT_API_KEY"
SHORTEST_KEY = 16
"""Characters of a key that people choose: shorter ones can be guessed."""
KNOWN_S, MOST_KNOWN = 1.0, 10_000


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks."""

    key_id: str
    project_id: str
    role: Role
    request_id: str = ""

    def may(self, role: Role) -> bool:
        """Return whether the caller's role is this one, or one that may do more."""
        return RANKS[self.role] >= RANKS[role]

    def require(self, role: Role) -> None:
        """Refuse what the role may not do.

        Raises:
            ApiError: status 403.
        """
        if not self.may(role):
            message = f"This key has the role {self.role}; this needs the role {role}."
            raise ApiError(403, message, code="insufficient_permissions")


def digest_of(key: str) -> str:
    """Return what is kept of a key: keys have 256 random bits, so a plain hash cannot be turned back."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_caller(database: ServiceDatabase, header: str | None, request_id: str) -> Caller:
    """Return who an Authorization header speaks for.

    Raises:
        ApiError: status 401.
    """
    scheme, _, key = (header or "").partition(" ")
    if not header or scheme.lower() != "bearer" or not key.strip():
        message = "You didn't provide an API key. Send it in the Authorization header: Authorization: Bearer KEY"
        raise ApiError(401, message, type="invalid_request_error")
    digest = digest_of(key.strip())
    with database.reading() as session:
        row = session.scalar(select(KeyRow).where(KeyRow.digest == digest))
    if row is None or row.revoked_at is not None or not hmac.compare_digest(row.digest, digest):
        raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", type="invalid_request_error")
    role: Role = row.role  # pyright: ignore[reportAssignmentType]
    return Caller(key_id=row.id, project_id=row.project_id, role=role, request_id=request_id)


class KnownCallers:
    """Remembers for a moment whose key a hash is, so that not each request of a busy client asks the database.

    A key that is revoked here is forgotten at once; one that is revoked otherwise, within `KNOWN_S`.
    """

    def __init__(self, database: ServiceDatabase) -> None:
        self._database = database
        self._known: dict[str, tuple[Caller, float]] = {}
        self._lock, self._times_forgotten = threading.Lock(), 0

    def remembered(self, header: str | None) -> Caller | None:
        """Return who was found for this header a moment ago; None: look."""
        caller, until = self._known.get(digest_of(header or ""), (None, 0.0))
        return caller if time.monotonic() < until else None

    def find(self, header: str | None, request_id: str) -> Caller:
        """Return who an Authorization header speaks for, and remember it.

        Raises:
            ApiError: status 401; who is refused is not remembered.
        """
        until = time.monotonic() + KNOWN_S  # from before the look: what is read is no older
        times_forgotten = self._times_forgotten
        caller = find_caller(self._database, header, request_id)
        with self._lock:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            if times_forgotten == self._times_forgotten:  # else the key may have been revoked since the look
                self._known[digest_of(header or "")] = caller, until
        return caller

    def forget(self) -> None:
        """Forget everybody."""
        with self._lock:
            self._times_forgotten += 1
            self._known.clear()


def make_key(session: Session, project_id: str, *, name: str, role: Role, key: str | None = None) -> tuple[KeyRow, str]:
    """Add a key to a project; return its row and the key itself, which is nowhere else.

    Args:
        session: that writes.
        project_id: whose key it is.
        name: for people.
        role: what it may do.
        key: the key, where somebody has chosen it.
    """
    key = key or "sk-distft-" + secrets.token_urlsafe(32)
    row = KeyRow(
        id=new_id("key_"), project_id=project_id, name=name, role=role, digest=digest_of(key), hint=f"…{key[-4:]}",
        created_at=int(time.time()),
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row, key


def make_project(session: Session, name: str) -> ProjectRow:
    """Add a project."""
    row = ProjectRow(id=new_id("proj_"), name=name, created_at=int(time.time()))
    session.add(row)
    session.flush()
    return row


def first_key(database: ServiceDatabase) -> str | None:
    """Make sure that there is an admin key: the environment's, or one that is made. Return one that was made.

    Raises:
        ApiError: the environment's is too short, or was revoked.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given is not None and len(given) < SHORTEST_KEY:
        raise ApiError(400, f"{KEY_VARIABLE}: has {len(given)} characters, and must have {SHORTEST_KEY} at least")
    with database.writing() as session:
        project = session.scalar(select(ProjectRow).where(ProjectRow.name == FIRST_PROJECT))
        project = project or make_project(session, FIRST_PROJECT)
        if given is not None:
            row = session.scalar(select(KeyRow).where(KeyRow.digest == digest_of(given)))
            if row is not None and row.revoked_at is not None:
                raise ApiError(400, f"{KEY_VARIABLE}: this key was revoked; choose another")
            if row is None:
                make_key(session, project.id, name=KEY_VARIABLE, role="admin", key=given)
            return None
        if has_admin_key(session):
            return None
        return make_key(session, project.id, name="first key", role="admin")[1]


def has_admin_key(session: Session) -> bool:
    """Return whether anybody can administer this server."""
    admin = select(KeyRow.id).where(KeyRow.role == "admin", KeyRow.revoked_at.is_(None)).limit(1)
    return session.scalar(admin) is not None


def note_change(session: Session, caller: Caller, action: str, target: str) -> None:
    """Write down who changed what, with the change itself."""
    session.add(
        AuditRow(
            created_at=int(time.time()), project_id=caller.project_id, key_id=caller.key_id, action=action,
            target=target[:255], request_id=caller.request_id,
        )
    )  # fmt: skip
