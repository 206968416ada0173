"""Who may open a page: asked before a body is read, as keys are for the API."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote, urlsplit

import anyio.to_thread
from sqlalchemy.exc import DBAPIError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from distft.service.auth import Caller
from distft.service.errors import ApiError
from distft.service.pages.sessions import SessionService, form_token
from distft.service.pages.web import HEADERS, error_page

COOKIE = "distft_session"
SAFE = ("GET", "HEAD")
_API = ("/v1", "/healthz", "/openapi.json", "/metrics")
"""Paths that are no pages."""
_OPEN = re.compile(r"/login|/static/[A-Za-z0-9._-]+")
"""Pages without a session."""
_UPLOADS = re.compile(r"/files|/new|/new/[A-Za-z0-9-]+/(?:training|validation)")


class PageDoor:
    """Lets requests in to the pages."""

    headers = HEADERS

    def __init__(self, sessions: SessionService) -> None:
        self._sessions = sessions

    def owns(self, path: str) -> bool:
        """Return whether a path is a page's: every one that is not the API's."""
        return path not in _API and not path.startswith("/v1/")

    def takes_file(self, method: str, path: str) -> bool:
        """Return whether a request may be as large as a file."""
        return method == "POST" and _UPLOADS.fullmatch(path) is not None

    async def admit(self, scope: MutableMapping[str, Any], request_id: str) -> Caller | None:
        """Return who asks; None on the pages that need no session.

        Raises:
            ApiError: status 401 without a session, 403 where another site sent the request.
        """
        request, state = Request(scope), scope["state"]
        state["page_error"] = error_page
        if request.method not in SAFE:
            _refuse_other_sites(request)
        if _OPEN.fullmatch(request.url.path):
            return None
        token = request.cookies.get(COOKIE, "")
        try:
            caller = await anyio.to_thread.run_sync(functools.partial(self._sessions.caller, token, request_id))
        except DBAPIError:
            raise ApiError(503, "The database is away; try again.", code="database_unavailable") from None
        if caller is None:
            raise ApiError(401, "Sign in first.", code="signed_out")
        state["form_token"] = form_token(token)
        return caller

    async def refuse(
        self,
        error: ApiError,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Answer a request that was not let in: who has no session is sent to sign in, and comes back."""
        request = Request(scope)
        answer: Response = error_page(request, error)
        if error.code == "signed_out":
            back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            sign_in = "/login" if request.method not in SAFE or back == "/" else f"/login?back={quote(back, safe='/')}"
            if "hx-request" in request.headers:
                answer = Response(status_code=401, headers={"HX-Redirect": "/login"})
            elif "x-csrf-token" not in request.headers:
                answer = RedirectResponse(sign_in, status_code=303)
        if error.status in (408, 413) or request.method not in SAFE:
            answer.headers["connection"] = "close"  # what is left of the body is not read
        await answer(scope, receive, send)


def local_path(path: str) -> str:
    """Return a path of this server to go on at; `/` for anything else, which would lead to another server."""
    parts = urlsplit(path)
    safe = path.startswith("/") and path[1:2] not in ("/", "\\") and path.isprintable() and not parts.netloc
    return path if safe and "\\" not in path else "/"


def _refuse_other_sites(request: Request) -> None:
    """Refuse what a page of another site makes a browser send; every browser says where a form was."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if origin is not None and origin != "null":
        same = urlsplit(origin).netloc == request.headers.get("host")
    else:
        same = origin is None and site == "same-origin"
    if not same or site not in (None, "same-origin"):
        raise ApiError(403, "This form was sent from another site.", code="wrong_origin")
