"""Answers of a vLLM server while it writes them: token ids, a chunk at a time. Imports no torch."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from distft.generation.vllm_server import ServerGoneError, reason


class RefusedError(Exception):
    """The server does not take the request; says why."""


@dataclass(frozen=True, kw_only=True)
class StreamingServer:
    """A server that is asked by several threads, each request over a connection of its own."""

    url: str
    timeout_s: float
    """Without a byte of an answer."""
    key: str | None = None
    """Sent as a bearer token."""

    def stream(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of /v1/completions; closing the iterator breaks the answer off.

        Raises:
            ServerGoneError: it does not answer, broke off, or does not know the model.
            RefusedError: it does not take the request.
        """
        body = json.dumps({**request, "stream": True, "return_token_ids": True, "return_tokens_as_token_ids": True})
        with self._response(body) as response:
            for line in response:
                content = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if content == b"[DONE]":
                    return
                chunk = json.loads(content)
                if "error" in chunk:
                    raise ServerGoneError(f"an answer was broken off ({chunk['error']})")
                yield chunk
        raise ServerGoneError("an answer was broken off")

    @contextlib.contextmanager
    def _response(self, body: str) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=self.timeout_s)
        headers = {"Content-Type": "application/json"}
        headers |= {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status >= 400:
                self._refuse(response.status, response.read().decode(errors="replace"))
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise ServerGoneError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _refuse(self, status: int, text: str) -> None:
        message = reason(text)
        if status == 404 or status >= 500:  # it has forgotten an adapter; its engine has died
            raise ServerGoneError(f"HTTP {status}: {message}", status=status)
        raise RefusedError(message)
