"""What routes work with, put together once: FastAPI's application, its errors in OpenAI's form, and the services."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from starlette.exceptions import HTTPException

from distft.service.artifact_worker import ArtifactWorker
from distft.service.artifacts import ArtifactService
from distft.service.auth import Caller, KnownCallers
from distft.service.completions import CompletionService
from distft.service.database import ServiceDatabase
from distft.service.drafts import DraftService
from distft.service.errors import ApiError
from distft.service.files import FileService
from distft.service.http_guard import HttpGuard, RequestCounts
from distft.service.idempotency import Once
from distft.service.job_removal import JobRemoval
from distft.service.jobs import JobService
from distft.service.models import ModelService
from distft.service.pages.door import PageDoor
from distft.service.pages.sessions import SessionService
from distft.service.run_pages import RunPages
from distft.service.runners import RUNNERS
from distft.service.serving import AnswerService
from distft.service.settings import ServiceSettings
from distft.service.uploads import UploadService
from distft.service.worker import Worker

THREADS = 160
"""Requests that are worked on at a time, besides those that wait for a model's answer."""
_LOG = logging.getLogger("distft.service")
_METADATA = re.compile(r"metadata\[[^\]]*\]")


@dataclass(frozen=True, kw_only=True)
class ServiceParts:
    """The services of one server."""

    settings: ServiceSettings
    database: ServiceDatabase
    files: FileService
    uploads: UploadService
    jobs: JobService
    removal: JobRemoval
    models: ModelService
    completions: CompletionService
    answers: AnswerService
    worker: Worker
    callers: KnownCallers
    sessions: SessionService
    run_pages: RunPages
    drafts: DraftService
    artifacts: ArtifactService
    artifact_worker: ArtifactWorker
    counts: RequestCounts = field(default_factory=RequestCounts)


def build_parts(settings: ServiceSettings, database: ServiceDatabase) -> ServiceParts:
    """Return the services over a database that has its tables."""
    files = FileService(database, settings)
    jobs = JobService(database, settings, files.contents)
    models = ModelService(database, settings)
    answers = AnswerService(settings.data / "served", most_waiting=settings.limits.waiting_answers)
    uploads = UploadService(database, files)
    worker = Worker(database, settings, jobs, files, uploads, RUNNERS[settings.runner].build(settings))
    return ServiceParts(
        settings=settings, database=database, files=files, uploads=uploads, jobs=jobs, models=models, answers=answers,
        completions=CompletionService(models, answers), worker=worker, sessions=SessionService(database),
        callers=KnownCallers(database), removal=JobRemoval(database, jobs, files.contents),
        run_pages=RunPages(settings.data / "pages"), drafts=DraftService(database, settings, jobs, files),
        artifacts=ArtifactService(database, settings, models, files),
        artifact_worker=ArtifactWorker(database, settings, files),
    )  # fmt: skip


# What routes depend on is async, though it waits for nothing: FastAPI runs other functions in threads, each of which
# waits for its turn in the interpreter.


async def parts_of(request: Request) -> ServiceParts:
    """Return the services."""
    return request.app.state.parts


async def caller_of(request: Request) -> Caller:
    """Return who asks, and refuse query parameters that the route does not know.

    Raises:
        ApiError: status 400, naming the parameter.
    """
    known: set[str] = set()
    for parameter in request.scope["route"].dependant.query_params:  # codespell:ignore dependant
        kind = parameter.field_info.annotation
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else (parameter.alias,)
        known.update(fields)
    for name in request.query_params:
        if name not in known and not (_METADATA.fullmatch(name) and "metadata" in known):
            raise ApiError(400, f"Unknown query parameter: '{name[:100]}'.", param=name[:100], code="unknown_parameter")
    return request.state.caller


async def once_of(
    request: Request, key: Annotated[str | None, Header(alias="Idempotency-Key", max_length=255)] = None
) -> Once:
    """Return the request's Idempotency-Key."""
    return Once(project_id=request.state.caller.project_id, key=key)


Parts = Annotated[ServiceParts, Depends(parts_of)]
By = Annotated[Caller, Depends(caller_of)]
Repeatable = Annotated[Once, Depends(once_of)]


class AnswerRoute(APIRoute):
    """A route whose answer is written as JSON in the thread that made it.

    FastAPI would hand an answer, whose fields were validated when it was made, to a second thread to validate it again.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **settings: Any) -> None:
        """Make the route of a function that returns an object of the wire, or a response."""

        @functools.wraps(endpoint)  # parameters and the schema of the answer are read from the function itself
        def respond(*args: Any, **kwargs: Any) -> Any:
            answer = endpoint(*args, **kwargs)
            if isinstance(answer, BaseModel):
                return Response(answer.model_dump_json(by_alias=True), media_type="application/json")
            return answer

        super().__init__(path, respond, **settings)


def new_app(parts: ServiceParts) -> FastAPI:
    """Return the application without its routes."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS + parts.settings.limits.waiting_answers
        parts.worker.start()
        parts.artifact_worker.start()
        yield
        await anyio.to_thread.run_sync(parts.artifact_worker.stop)
        await anyio.to_thread.run_sync(parts.worker.stop)
        parts.answers.close()
        parts.drafts.close()
        parts.database.close()

    app = FastAPI(title="distft", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.parts = parts
    app.add_exception_handler(ApiError, _refused)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(RequestValidationError, _invalid)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(HTTPException, _http)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(DBAPIError, _database)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(Exception, _failed)

    async def caller(header: str | None, request_id: str) -> Caller:
        if (known := parts.callers.remembered(header)) is not None:
            return known
        try:
            return await anyio.to_thread.run_sync(parts.callers.find, header, request_id)
        except DBAPIError:
            raise ApiError(503, "The database is away; try again.", code="database_unavailable") from None

    limits = parts.settings.limits
    app.add_middleware(
        HttpGuard,  # pyright: ignore[reportArgumentType]
        find_caller=caller,
        pages=PageDoor(parts.sessions),
        counts=parts.counts,
        request_bytes=int(limits.request_mib * (1 << 20)),
        file_bytes=parts.files.most_bytes,
        idle_s=limits.slowest_upload_s,
    )
    return app


def _answer(request: Request, error: ApiError) -> Response:
    """Return a refusal: OpenAI's body, and on the pages of the server a page."""
    as_page = getattr(request.state, "page_error", None)
    return JSONResponse(error.body(), status_code=error.status) if as_page is None else as_page(request, error)


def _refused(request: Request, error: ApiError) -> Response:
    return _answer(request, error)


def _invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer the first thing that is wrong with a request, as OpenAI words it."""
    first: dict[str, Any] = dict(error.errors()[0])
    location = [str(step) for step in first["loc"]]
    param = ".".join(step for step in location[1:] if not step.startswith(("function-", "constrained-"))) or None
    match first["type"]:
        case "extra_forbidden":
            refusal = ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        case "missing":
            message = f"Missing required parameter: '{param}'." if param else "The request has no body."
            refusal = ApiError(400, message, param=param, code="missing_required_parameter")
        case "json_invalid":
            refusal = ApiError(400, "We could not parse the JSON body of your request.", code="invalid_json")
        case _:
            message = f"Invalid value for '{param}': {first['msg']}." if param else f"{first['msg']}."
            refusal = ApiError(400, message[:1000], param=param, code="invalid_value")
    return _answer(request, refusal)


def _http(request: Request, error: HTTPException) -> Response:
    if isinstance(error.__cause__, ApiError):  # a body that was too large, or too slow
        return _answer(request, error.__cause__)
    if error.status_code == 404:
        return _answer(
            request, ApiError(404, f"Invalid URL ({request.method} {request.url.path[:200]})", code="unknown_url")
        )
    if error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path[:200]}."
        return _answer(request, ApiError(405, message, type="invalid_request_error", code="method_not_allowed"))
    return _answer(request, ApiError(error.status_code, str(error.detail)[:1000], type="invalid_request_error"))


def _database(request: Request, error: DBAPIError) -> Response:
    if isinstance(error, IntegrityError):  # two requests made the same thing at once: one of them did
        return _answer(request, ApiError(409, "Another request did this at the same time; try again.", code="conflict"))
    if isinstance(error, DataError):  # such as a NUL in a text, which PostgreSQL has none of
        return _answer(request, ApiError(400, "The request holds a value that cannot be kept.", code="invalid_value"))
    _LOG.error("the database refused", extra={"request_id": request.state.request_id, "error": str(error.orig)[:500]})
    return _answer(request, ApiError(503, "The database is away; try again.", code="database_unavailable"))


def _failed(request: Request, error: Exception) -> Response:
    _LOG.error("a request failed", exc_info=error, extra={"request_id": request.state.request_id})
    return _answer(
        request, ApiError(500, "The server had an error while processing your request.", code="internal_error")
    )
