"""Signing in with an API key, and out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import Response

from distft.service.api import Parts
from distft.service.errors import ApiError
from distft.service.pages.door import COOKIE, local_path
from distft.service.pages.sessions import LASTS_S
from distft.service.pages.web import check_form, go, page, static_file

router = APIRouter(include_in_schema=False)


@router.get("/login")
def login_page(request: Request, back: Annotated[str, Query(max_length=2000)] = "/") -> Response:
    """Show the form that takes a key."""
    return page(request, "login.html", back=local_path(back), message="")


@router.post("/login")
def login(
    request: Request,
    parts: Parts,
    key: Annotated[str, Form(max_length=512)],
    back: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Begin a session; an earlier one of this browser ends."""
    try:
        token = parts.sessions.begin(key.strip(), request.state.request_id)
    except ApiError as error:
        message = "No such key. It may be mistyped, or revoked."
        return page(request, "login.html", code=error.status, back=local_path(back), message=message)
    if earlier := request.cookies.get(COOKIE):
        parts.sessions.end(earlier)
    answer = go(local_path(back))
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, token, max_age=LASTS_S, httponly=True, samesite="strict", secure=secure, path="/")
    return answer


@router.post("/logout", dependencies=[Depends(check_form)])
def logout(request: Request, parts: Parts) -> Response:
    """End the session."""
    parts.sessions.end(request.cookies.get(COOKIE, ""))
    answer = go("/login")
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/static/{name}")
def static(name: str) -> Response:
    """Return a file that the pages are made with; its address changes with its content."""
    content = static_file(name)
    if content is None:
        raise ApiError(404, "No such file.", code="not_found")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(content[0], media_type=content[1], headers=headers)
