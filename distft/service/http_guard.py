"""What every request goes through before the API sees it: an id, a key, a limit on its body, a line in the log.

Plain ASGI. A key is looked at before a body is read: who has none sends no bytes here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any, Protocol

from distft.service.auth import Caller
from distft.service.errors import ApiError
from distft.service.tables import new_id

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger("distft.service.requests")
_OPEN = ("/healthz", "/openapi.json")
"""Paths that need no key."""
_UPLOADS = re.compile(r"/v1/(?:files|uploads/[^/]+/parts)/?")
PATIENCE, SLOWEST_BYTES_S = 10, 4096
"""A body may pause so many times, and has to come with so many bytes a second besides: a byte a minute is no upload."""
LINGER_S, LINGER_BYTES = 2.0, 64 << 20
"""What is still taken of a body that is refused."""
_SLACK = 1 << 20
"""Bytes that a form has around its file."""


class GuardedPages(Protocol):
    """The pages of the server, which are opened by a session in the place of a key."""

    headers: tuple[tuple[bytes, bytes], ...]
    """That every page has, unless it sets them itself."""

    def owns(self, path: str) -> bool:
        """Return whether a path is a page's."""
        ...

    def takes_file(self, method: str, path: str) -> bool:
        """Return whether a request may be as large as a file."""
        ...

    async def admit(self, scope: Scope, request_id: str) -> Caller | None:
        """Return who asks; None on the pages that anybody may see."""
        ...

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that was not let in."""
        ...


class RequestCounts:
    """How many requests came, by method, route and status, and how long they took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.seconds: Counter[tuple[str, str]] = Counter()

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests[method, route, status] += 1
        self.seconds[method, route] += seconds  # pyright: ignore[reportArgumentType]


class HttpGuard:
    """Wraps the API."""

    def __init__(
        self,
        app: App,
        *,
        find_caller: Callable[[str | None, str], Awaitable[Caller]],
        pages: GuardedPages,
        counts: RequestCounts,
        request_bytes: int,
        file_bytes: int,
        idle_s: float,
    ) -> None:
        self._app, self._find_caller, self._pages, self._counts = app, find_caller, pages, counts
        self._request_bytes, self._file_bytes, self._idle_s = request_bytes, file_bytes, idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, began, status = new_id("req_"), time.monotonic(), 500
        scope.setdefault("state", {})["request_id"] = request_id
        is_page = self._pages.owns(scope["path"])

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"{(time.monotonic() - began) * 1000:.0f}".encode()
                added = [(b"x-request-id", request_id.encode()), (b"openai-processing-ms", took)]
                added += [(b"x-content-type-options", b"nosniff")]
                given = [(name.lower(), value) for name, value in message.get("headers", ())]
                defaults = [(b"cache-control", b"no-store"), *(self._pages.headers if is_page else ())]
                added += [pair for pair in defaults if pair[0] not in dict(given)]
                message = {**message, "headers": [*given, *added]}
            await send(message)

        key = ""
        try:
            caller = None
            if is_page:
                caller = await self._pages.admit(scope, request_id)
            elif scope["path"] not in _OPEN:
                caller = await self._find_caller(_header(scope, b"authorization"), request_id)
            if caller is not None:
                scope["state"]["caller"], key = replace(caller, request_id=request_id), caller.key_id
            await self._app(scope, self._limited(scope, receive), send_with_id)
        except ApiError as error:
            unread = error.status in (413, 415) or (is_page and error.status != 408 and scope["method"] == "POST")
            answer = _lingering(send_with_id, receive) if unread else send_with_id
            if is_page:
                await self._pages.refuse(error, scope, receive, answer)
            else:
                await refuse_request(error, answer)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.monotonic() - began
            self._counts.add(scope["method"], route, status, seconds)
            _LOG.info(
                "request", extra={"request_id": request_id, "key": key, "method": scope["method"], "route": route,
                                  "status": status, "ms": round(seconds * 1000, 1)},
            )  # fmt: skip

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive` with a limit on the body's bytes, and on the time without any."""
        method, path = scope["method"], scope["path"]
        upload = (method == "POST" and _UPLOADS.fullmatch(path) is not None) or self._pages.takes_file(method, path)
        most, size, done = (self._file_bytes + _SLACK if upload else self._request_bytes), 0, False
        if (_header(scope, b"content-encoding") or "identity").lower() != "identity":
            message = "The request's body is compressed, and is not unpacked here: send it as it is."
            raise ApiError(415, message, code="unsupported_encoding", type="invalid_request_error")
        told = _header(scope, b"content-length") or "0"
        if not told.isdecimal() or int(told) > most:
            raise ApiError(413, f"The request's body is larger than {most} bytes.", code="request_too_large")

        began = time.monotonic()

        async def next_message() -> Message:
            nonlocal size, done
            if done:
                return await receive()
            left = began + PATIENCE * self._idle_s + size / SLOWEST_BYTES_S - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), min(self._idle_s, left))
            except TimeoutError:
                raise ApiError(408, "The request's body did not come.", code="request_timeout") from None
            size += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if size > most:
                raise ApiError(413, f"The request's body is larger than {most} bytes.", code="request_too_large")
            return message

        return next_message


async def refuse_request(error: ApiError, send: Send) -> None:
    """Answer with an error's body, and close the connection where the rest of a request's body is not wanted."""
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 413, 415):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _lingering(send: Send, receive: Receive) -> Send:
    """Return a `send` that takes what is still coming of the request's body before it ends the answer.

    A client that is still sending reads the answer only if its bytes are taken meanwhile: a connection that is closed
    on them is reset, and the answer lost.
    """

    async def held(message: Message) -> None:
        if message["type"] != "http.response.body" or message.get("more_body", False):
            await send(message)
            return
        await send({**message, "more_body": True})
        await _drain(receive)
        await send({"type": "http.response.body", "body": b""})

    return held


async def _drain(receive: Receive) -> None:
    """Take what still comes of a body, for a moment and up to a limit, and forget it."""
    taken, more, until = 0, True, time.monotonic() + LINGER_S
    while more and taken < LINGER_BYTES and (left := until - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), left)
        except TimeoutError:
            return
        taken += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
