"""Routes of models and their answers."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, StreamingResponse

from distft.service.api import AnswerRoute, By, Parts
from distft.service.graders import (
    GraderResult,
    GraderRun,
    GraderValidation,
    ValidatedGrader,
    read_grader,
    run_grader,
)
from distft.service.wire import DeletedObject, ModelObject, Page
from distft.service.wire_answers import ChatAnswer, ChatRequest, CompletionRequest, TextAnswer

router = APIRouter(prefix="/v1", route_class=AnswerRoute)
_SSE = "text/event-stream"


@router.get("/models")
def list_models(parts: Parts, caller: By) -> Page:
    """List models."""
    return parts.models.page(caller)


@router.get("/models/{model}")
def retrieve_model(parts: Parts, caller: By, model: str) -> ModelObject:
    """Return a model."""
    return parts.models.retrieve(caller, model)


@router.delete("/models/{model}")
def delete_model(parts: Parts, caller: By, model: str) -> DeletedObject:
    """Delete a tuned model."""
    parts.models.delete(caller, model)
    return DeletedObject(id=model, object="model")


@router.post("/chat/completions", response_model=ChatAnswer)
def create_chat(parts: Parts, caller: By, request: ChatRequest) -> JSONResponse | StreamingResponse:
    """Answer a chat."""
    caller.require("member")
    if request.stream:
        return StreamingResponse(parts.completions.stream_chat(caller, request), media_type=_SSE)
    return JSONResponse(parts.completions.chat(caller, request).model_dump())


@router.post("/completions", response_model=TextAnswer)
def create_completion(parts: Parts, caller: By, request: CompletionRequest) -> JSONResponse | StreamingResponse:
    """Continue a text."""
    caller.require("member")
    if request.stream:
        return StreamingResponse(parts.completions.stream_complete(caller, request), media_type=_SSE)
    return JSONResponse(parts.completions.complete(caller, request).model_dump())


@router.post("/fine_tuning/alpha/graders/validate")
def validate_grader(caller: By, request: GraderValidation) -> ValidatedGrader:
    """Say whether a grader is understood."""
    caller.require("member")
    return ValidatedGrader(grader=read_grader(request.grader).model_dump())


@router.post("/fine_tuning/alpha/graders/run")
def grade_sample(caller: By, request: GraderRun) -> GraderResult:
    """Return what a sample is worth."""
    caller.require("member")
    return run_grader(request)
