"""Requests that may be sent twice: the same Idempotency-Key gets the first answer again, and changes nothing."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from sqlalchemy.orm import Session

from distft.service.errors import ApiError, refuse
from distft.service.tables import IdempotencyRow


@dataclass(frozen=True, kw_only=True)
class Once:
    """The key of one request; without a key every request counts."""

    project_id: str
    key: str | None

    def earlier(self, session: Session, request: str) -> str | None:
        """Return the id of what the first request with this key made; None: this is the first.

        Args:
            session: that writes.
            request: the request as text; another one under the same key is refused.

        Raises:
            ApiError: the key was used for another request: status 409.
        """
        if self.key is None:
            return None
        if not 1 <= len(self.key) <= 255 or not self.key.isprintable():
            refuse("Idempotency-Key: 1 to 255 printable characters", param="Idempotency-Key")
        row = session.get(IdempotencyRow, (self.project_id, self.key))
        if row is None:
            return None
        if row.digest != _digest(request):
            message = "This Idempotency-Key was used for another request."
            raise ApiError(409, message, param="Idempotency-Key", code="idempotency_key_reused")
        return row.object_id

    def note(self, session: Session, request: str, object_id: str) -> None:
        """Remember what the request made: in the same transaction, so a second one that comes at once fails there."""
        if self.key is not None:
            session.add(
                IdempotencyRow(
                    project_id=self.project_id, key=self.key, digest=_digest(request), object_id=object_id,
                    created_at=int(time.time()),
                )
            )  # fmt: skip
            session.flush()


def _digest(request: str) -> str:
    return hashlib.sha256(request.encode()).hexdigest()
