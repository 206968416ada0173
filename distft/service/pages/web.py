"""What every page is made with: templates that escape, the form token, errors as pages."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import jinja2
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup
from pydantic import BaseModel, ValidationError

from distft.core.duration import duration
from distft.report import formatting
from distft.service.errors import ApiError

ModelT = TypeVar("ModelT", bound=BaseModel)
MEDIA = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "txt": "text/plain; charset=utf-8"}
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    ),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
_TITLES = {400: "That did not work", 401: "Sign in first", 403: "Not allowed", 404: "Not here", 405: "Not here",
           409: "It changed meanwhile", 413: "Too large", 429: "No room", 503: "Not now"}  # fmt: skip


def page(request: Request, template: str, *, code: int = 200, **context: Any) -> HTMLResponse:
    """Return a template as an answer; texts in it are escaped."""
    caller = getattr(request.state, "caller", None)
    places = [entry for entry in request.app.state.pages if caller and caller.may(entry.role)]
    form_token = getattr(request.state, "form_token", "")
    shared = {
        "caller": caller,
        "places": places,
        "here": request.url.path,
        "form_token": form_token,
        "token": Markup('<input type="hidden" name="csrf" value="{}">').format(form_token),
        "asset": asset,
        "now": time.time(),
    }
    return HTMLResponse(
        _environment().get_template(template).render(shared | context),
        status_code=code,
        headers={name.decode(): value.decode() for name, value in HEADERS},
    )


def error_page(request: Request, error: ApiError) -> HTMLResponse:
    """Return a refusal as a page."""
    return page(
        request, "error.html", code=error.status, title=_TITLES.get(error.status, "Something went wrong"),
        message=error.message, param=error.param, request_id=request.state.request_id,
    )  # fmt: skip


def go(path: str) -> RedirectResponse:
    """Return the answer to a form that has done its work: look there."""
    return RedirectResponse(path, status_code=303)


async def check_form(request: Request) -> None:
    """Refuse a form that does not carry the session's token, in the field `csrf` or the header `x-csrf-token`.

    Raises:
        ApiError: status 403.
    """
    if request.method in ("GET", "HEAD"):
        return
    given: object = request.headers.get("x-csrf-token") or (await request.form()).get("csrf")
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), request.state.form_token.encode()):
        raise ApiError(403, "This form is no longer valid: load the page again and repeat it.", code="bad_form_token")


def read(kind: type[ModelT], values: Mapping[str, Any]) -> ModelT:
    """Return a request of the API, made of a form's fields; empty ones are left out.

    Raises:
        RequestValidationError: as if it had come to the API.
    """
    try:
        return kind.model_validate({name: value for name, value in values.items() if value not in ("", None)})
    except ValidationError as error:
        problems = [dict(problem) | {"loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from None


@cache
def static_file(name: str) -> tuple[bytes, str] | None:
    """Return a file that comes with the pages, and what kind it is; None: there is none."""
    where = {"report.css": ("distft.report", "style.css")}.get(name, ("distft.service.pages", f"static/{name}"))
    kind = MEDIA.get(name.rpartition(".")[2])
    place = files(where[0]).joinpath(where[1])
    return (place.read_bytes(), kind) if kind and "/" not in name and place.is_file() else None


@cache
def asset(name: str) -> str:
    """Return the address of a file of the pages, which changes with its content."""
    content = static_file(name)
    assert content is not None, name
    return f"/static/{name}?v={hashlib.sha256(content[0]).hexdigest()[:12]}"


def ago(moment: float) -> str:
    """Return how long ago something was, in words."""
    seconds = max(0.0, time.time() - moment)
    return "just now" if seconds < 5 else f"{_roughly(seconds)} ago"


def _roughly(seconds: float) -> str:
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size:
            return formatting.noun(int(seconds // size), unit)
    return "a moment"


def size(num_bytes: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("distft.service.pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "ago": ago, "size": size, "moment": formatting.moment, "count": formatting.count, "figure": formatting.figure,
        "gib": formatting.gib, "duration": lambda seconds: duration(seconds), "noun": formatting.noun,
        "percent": formatting.percent,
    }  # fmt: skip
    return made
