"""Webhooks as OpenAI signs them (Standard Webhooks, https://www.standardwebhooks.com): an outbox that is sent from.

A message is written in the transaction of the change that it tells of, so none is lost, and sent until it is taken.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from distft.service.database import ServiceDatabase
from distft.service.errors import refuse
from distft.service.tables import DeliveryRow, JobRow, WebhookRow, new_id

EVENTS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
WAITS_S = (5, 30, 120, 600, 3600, 6 * 3600, 24 * 3600)
"""Between tries; after the last one a message is given up."""
ANSWER_S = 10.0
_AT_ONCE = 20


def new_secret() -> str:
    """Return a secret to sign with."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def checked_url(url: str) -> str:
    """Return a webhook's address.

    Raises:
        ApiError: it is none that may be called.
    """
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or not url.isprintable():
        refuse("A webhook's url starts with https:// and names a host, without user and password.", param="url")
    if parts.scheme == "http" and not local:
        refuse("A webhook's url starts with https://: http is for this machine alone.", param="url")
    return url


def signature(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """Return the header `webhook-signature`: HMAC-SHA256 of id, time and body."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp}.{body}".encode()
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def queue_webhooks(session: Session, job: JobRow, word: str) -> None:
    """Write the messages that tell a project's webhooks of a job's end.

    Args:
        session: of the transaction that ends the job.
        job: the job.
        word: succeeded, failed or cancelled.
    """
    type, now = f"fine_tuning.job.{word}", int(time.time())
    for hook in session.scalars(select(WebhookRow).where(WebhookRow.project_id == job.project_id)):
        if type in hook.events:
            message_id = new_id("evt_")
            content: dict[str, Any] = {"id": message_id, "object": "event", "created_at": now, "type": type}
            body = json.dumps(content | {"data": {"id": job.id}}, separators=(",", ":"))
            session.add(DeliveryRow(id=message_id, webhook_id=hook.id, body=body, due_at=now))


def deliver_due(database: ServiceDatabase) -> int:
    """Send the messages whose time has come; return how many were tried."""
    now = int(time.time())
    with database.reading() as session:
        waiting = DeliveryRow.state == "waiting"
        query = select(DeliveryRow, WebhookRow).join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
        due = session.execute(query.where(waiting, DeliveryRow.due_at <= now).limit(_AT_ONCE)).all()
    for delivery, hook in due:
        taken, answer = _post(hook, delivery)
        with database.writing() as session:
            row = session.get(DeliveryRow, delivery.id)
            if row is None:  # its webhook was deleted meanwhile
                continue
            row.tries, row.last_answer = row.tries + 1, answer[:255]
            if taken:
                row.state = "delivered"
            elif row.tries > len(WAITS_S):
                row.state = "given_up"
            else:
                row.due_at = int(time.time()) + WAITS_S[row.tries - 1]
    return len(due)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A webhook that points elsewhere is not followed: its address was checked, the other one was not."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _post(hook: WebhookRow, delivery: DeliveryRow) -> tuple[bool, str]:
    now = int(time.time())
    request = urllib.request.Request(
        hook.url,
        data=delivery.body.encode(),
        method="POST",
        headers={
            "content-type": "application/json",
            "user-agent": "distft",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(hook.secret, delivery.id, now, delivery.body),
        },
    )
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ANSWER_S) as answer:
            return 200 <= answer.status < 300, f"status {answer.status}"
    except urllib.error.HTTPError as error:
        return False, f"status {error.code}"
    except (OSError, ValueError) as error:
        return False, f"{type(error).__name__}: {error}"
