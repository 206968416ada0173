"""A chat model behind an OpenAI-compatible HTTP endpoint: asked with patience, its answers kept, its key never shown.

Standard library only. What may pass (429, 5xx, time-outs, refused connections, an answer that is cut or no JSON) is
tried again with growing waits; what cannot (a wrong key, model or address) ends the run at once, in words.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.core.errors import FileSystemError, MachineError
from distft.core.files import replace_json

MAX_BYTES = 4 << 20
"""Largest size of a response; no answer to a judge's prompt is longer."""
MAX_WAIT_S = 60.0
_PASSING = {408, 409, 425, 429}
"""Client errors that are worth another try; every 5xx is too."""


class Unanswered(Exception):
    """No usable answer after every try: why, in words."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key to wherever a redirect points."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how to ask."""

    url: str
    """Base, with its version: https://api.openai.com/v1; `/chat/completions` is added."""
    model: str
    key: str | None = field(repr=False)
    """Sent as a bearer token; no message and no cached answer holds it."""
    max_tokens: int
    timeout_s: float
    """Seconds of one try."""
    retries: int
    """Tries after the first."""
    cache: Path | None
    """Folder of answers by hash of the question; None: ask every time."""
    first_wait_s: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def ask(self, prompt: str) -> str:
        """Return the model's answer to one user message, at temperature 0; from the cache where it was asked before.

        Raises:
            Unanswered: every try failed for a reason that may pass.
            MachineError: the endpoint will not answer however often it is asked.
            FileSystemError: the cache cannot be written.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        note = None if self.cache is None else self.cache / f"{self._hash(body)}.json"
        if note is not None and (cached := _read(note)) is not None:
            return cached
        answer = self._ask_until_answered(json.dumps(body).encode())
        if note is not None:
            _write(note, {"url": self.url, **body, "answer": answer})
        return answer

    def _hash(self, body: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()

    def _ask_until_answered(self, body: bytes) -> str:
        why = ""
        for attempt in range(self.retries + 1):
            try:
                return self._try(body)
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {self._excerpt(error)}".rstrip()
                if error.code < 500 and error.code not in _PASSING:
                    raise MachineError(
                        f"{self.url}: the judge {self.model!r} cannot be asked: {why}{_hint(error.code)}"
                    ) from None
                requested_wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, a broken answer
                why, requested_wait = self._masked(f"{type(error).__name__}: {error}"), None
            except ValueError as error:  # an answer, but not one of a chat model
                why, requested_wait = self._masked(str(error)), None
            if attempt < self.retries:
                grown = self.first_wait_s * 2**attempt * random.uniform(0.75, 1.25)  # spread, or all come back at once
                self.sleep(min(MAX_WAIT_S, max(grown, requested_wait or 0.0)))
        raise Unanswered(f"{self.retries + 1} tries, the last: {why}")

    def _try(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data=body, headers=headers)
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as response:
            raw = response.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"an answer of more than {MAX_BYTES >> 20} MiB")
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"no chat completion: {raw[:80]!r}") from None
        if not isinstance(content, str):
            raise ValueError(f"a chat completion without text: {raw[:80]!r}")
        return content

    def _excerpt(self, error: urllib.error.HTTPError) -> str:
        """Return the start of what the server says; some repeat the key they refuse."""
        try:
            text = error.read(2000).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            return ""
        return self._masked(" ".join(text.split()))[:200]

    def _masked(self, text: str) -> str:
        text = text.replace(self.key, "***") if self.key else text
        return re.sub(r"(?i)\b(bearer\s+|sk-)[\w.-]{4,}", r"\1***", text)


def read_key(variable: str | None) -> str | None:
    """Return the key in the environment variable of that name.

    Raises:
        MachineError: it is not set, or cannot be sent as a header.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise MachineError(f"the judge's key is expected in the environment variable {variable}, which is not set")
    if not (key.isascii() and key.isprintable()):
        raise MachineError(f"the environment variable {variable} holds characters that no key has")
    return key


def _hint(code: int) -> str:
    if code in (401, 403):
        return "  is the key in the variable that api_key_env names?"
    if code == 404:
        return "  is the address right, with its version (…/v1), and the model's name?"
    return "  redirects are not followed: name the final address" if 300 <= code < 400 else ""


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date
        return None


def _read(note: Path) -> str | None:
    try:
        answer = json.loads(note.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # not asked yet, or a torn note: ask
    return answer if isinstance(answer, str) else None


def _write(note: Path, content: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_json(note, content)
    except OSError as error:
        raise FileSystemError(f"{note.parent}: a judge's answer cannot be kept: {error.strerror}") from None
