"""Two models side by side: the same prompt, the same seed, answers as they are written."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from distft.service.api import By, Parts, ServiceParts
from distft.service.auth import Caller
from distft.service.errors import ApiError
from distft.service.pages.web import page, read
from distft.service.wire_answers import ChatRequest

router = APIRouter()
DEFAULTS = {"a": "", "b": "", "prompt": "", "system": "", "seed": "7", "temperature": "0", "max_tokens": "128"}
Text = Annotated[str, Query(max_length=20_000)]
Short = Annotated[str, Query(max_length=300)]


@router.get("/playground")
def playground(
    request: Request, parts: Parts, caller: By, a: Short = "", b: Short = "", prompt: Text = "", system: Text = "",
    seed: Short = DEFAULTS["seed"], temperature: Short = DEFAULTS["temperature"],
    max_tokens: Short = DEFAULTS["max_tokens"],
) -> Response:  # fmt: skip
    """Show the form; its fields are in the address, so that a link says what was asked."""
    caller.require("member")
    asked = {"a": a, "b": b, "prompt": prompt, "system": system, "seed": seed, "temperature": temperature}
    return _page(request, parts, caller, asked | {"max_tokens": max_tokens}, {})


@router.post("/playground")
def ask_both(
    request: Request,
    parts: Parts,
    caller: By,
    a: Annotated[str, Form(max_length=300)] = "",
    b: Annotated[str, Form(max_length=300)] = "",
    prompt: Annotated[str, Form(max_length=20_000)] = "",
    system: Annotated[str, Form(max_length=20_000)] = "",
    seed: Annotated[str, Form(max_length=32)] = DEFAULTS["seed"],
    temperature: Annotated[str, Form(max_length=32)] = DEFAULTS["temperature"],
    max_tokens: Annotated[str, Form(max_length=32)] = DEFAULTS["max_tokens"],
) -> Response:
    """Ask both models and wait for their answers: what a browser without scripts does."""
    caller.require("member")
    asked = {"a": a, "b": b, "prompt": prompt, "system": system, "seed": seed, "temperature": temperature}
    asked |= {"max_tokens": max_tokens}
    answers: dict[str, tuple[str, str]] = {}
    for side in ("a", "b"):
        if not asked[side]:
            continue
        try:
            choice = parts.completions.chat(caller, _chat(asked[side], asked, stream=False)).choices[0]
            answers[side] = (choice.message.content or "", choice.finish_reason)
        except ApiError as error:
            answers[side] = ("", error.message)
    return _page(request, parts, caller, asked, answers)


@router.post("/playground/answer")
def stream_answer(
    parts: Parts,
    caller: By,
    model: Annotated[str, Form(max_length=300)],
    prompt: Annotated[str, Form(max_length=20_000)] = "",
    system: Annotated[str, Form(max_length=20_000)] = "",
    seed: Annotated[str, Form(max_length=32)] = DEFAULTS["seed"],
    temperature: Annotated[str, Form(max_length=32)] = DEFAULTS["temperature"],
    max_tokens: Annotated[str, Form(max_length=32)] = DEFAULTS["max_tokens"],
) -> Response:
    """Return one model's answer as server-sent events, those of the API."""
    caller.require("member")
    asked = {"prompt": prompt, "system": system, "seed": seed, "temperature": temperature, "max_tokens": max_tokens}
    try:
        events = parts.completions.stream_chat(caller, _chat(model, asked, stream=True))
    except ApiError as error:  # the script of the page shows it
        return JSONResponse(error.body(), status_code=error.status)
    return StreamingResponse(events, media_type="text/event-stream")


def _chat(model: str, asked: dict[str, str], *, stream: bool) -> ChatRequest:
    try:
        numbers: dict[str, Any] = {
            "seed": int(asked["seed"]), "temperature": float(asked["temperature"]),
            "max_tokens": int(asked["max_tokens"]),
        }  # fmt: skip
    except ValueError:
        raise ApiError(400, "Seed, temperature and the most tokens are numbers.", param="seed") from None
    messages = [{"role": "system", "content": asked["system"]}] if asked["system"] else []
    messages.append({"role": "user", "content": asked["prompt"]})
    return read(ChatRequest, {"model": model, "messages": messages, "stream": stream, **numbers})


def _page(
    request: Request, parts: ServiceParts, caller: Caller, asked: dict[str, str], answers: dict[str, tuple[str, str]]
) -> Response:
    return page(
        request, "playground.html", asked=asked, answers=answers, models=_models(parts, caller),
        none=not any(group for _, group in _models(parts, caller)),
    )  # fmt: skip


def _models(parts: ServiceParts, caller: Caller) -> list[tuple[str, list[str]]]:
    """Return (kind, names) of what can be asked: tuned models with their last checkpoints, and models of the server."""
    ours: list[str] = []
    bases: list[str] = []
    for model in parts.models.page(caller).data:
        try:
            found = parts.models.find(caller, model.id)
        except ApiError:  # it has no weights of its own
            continue
        (bases if found.name in parts.settings.models else ours).append(model.id)
    done, _ = parts.jobs.cards(caller, after=None, limit=20, status="succeeded")
    points = [
        point.fine_tuned_model_checkpoint
        for card in done
        if card.fine_tuned_model
        for point in parts.jobs.checkpoints(caller, card.id, after=None, limit=10).data
    ]
    return [("Tuned here", ours[::-1]), ("Checkpoints", points), ("Models of this server", bases)]
