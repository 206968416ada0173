"""Sessions of browsers: a key is given once, a random cookie stands for it until it is over or the key is revoked."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from sqlalchemy import delete

from distft.service.auth import Caller, Role, find_caller, note_change
from distft.service.database import ServiceDatabase
from distft.service.tables import KeyRow, PageSessionRow

LASTS_S = 7 * 24 * 3600
"""Seconds after which a session is over, whatever is done in it."""
IDLE_S = 12 * 3600
"""Seconds without a request after which a session is over."""
_NOTES_S = 60
"""Between two notes of when a session was last used: not every request is a write."""


class SessionService:
    """Begins, finds and ends the sessions of browsers."""

    def __init__(self, database: ServiceDatabase) -> None:
        self._database = database

    def begin(self, key: str, request_id: str) -> str:
        """Return the token of a new session; the token itself is kept nowhere here.

        Raises:
            ApiError: the key is none: status 401.
        """
        caller = find_caller(self._database, f"Bearer {key}", request_id)
        token, now = secrets.token_urlsafe(32), int(time.time())
        with self._database.writing() as session:
            over = (PageSessionRow.created_at < now - LASTS_S) | (PageSessionRow.seen_at < now - IDLE_S)
            session.execute(delete(PageSessionRow).where(over))
            session.add(PageSessionRow(digest=_digest(token), key_id=caller.key_id, created_at=now, seen_at=now))
            note_change(session, caller, "session.begin", caller.key_id)
        return token

    def caller(self, token: str, request_id: str) -> Caller | None:
        """Return who a token speaks for; None: the session is over, or its key was revoked."""
        now = int(time.time())
        with self._database.reading() as session:
            row = session.get(PageSessionRow, _digest(token))
            if row is None or row.created_at < now - LASTS_S or row.seen_at < now - IDLE_S:
                return None
            key = session.get(KeyRow, row.key_id)
        if key is None or key.revoked_at is not None:
            return None
        if row.seen_at < now - _NOTES_S:
            with self._database.writing() as session:
                if (held := session.get(PageSessionRow, row.digest)) is not None:
                    held.seen_at = now
        role: Role = key.role  # pyright: ignore[reportAssignmentType]
        return Caller(key_id=key.id, project_id=key.project_id, role=role, request_id=request_id)

    def end(self, token: str) -> None:
        """End a session."""
        with self._database.writing() as session:
            session.execute(delete(PageSessionRow).where(PageSessionRow.digest == _digest(token)))


def form_token(token: str) -> str:
    """Return what the forms of a session carry: another site can make a browser send the cookie, but not know this."""
    return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
