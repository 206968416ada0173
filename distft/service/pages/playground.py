"""Two models side by side: the same prompt, the same seed, answers as they are written."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from distft.service.api import By, Parts, ServiceParts
from distft.service.auth import Caller
from distft.service.errors import ApiError, refuse
from distft.service.pages.web import page
from distft.service.wire_answers import ChatRequest

router = APIRouter()
Text = Annotated[str, StringConstraints(max_length=20_000)]
Name = Annotated[str, StringConstraints(max_length=300)]
Number = Annotated[str, StringConstraints(max_length=32)]


class PlaygroundForm(BaseModel):
    """What the form asks, as it was typed; also in the address, so that a link says what was asked."""

    model_config = ConfigDict(frozen=True)

    a: Name = ""
    b: Name = ""
    prompt: Text = ""
    system: Text = ""
    seed: Number = "7"
    temperature: Number = "0"
    max_tokens: Number = "128"

    def chat(self, model: str, *, stream: bool) -> ChatRequest:
        """Return what one model is asked.

        Raises:
            ApiError: status 400; `param` is the field that is wrong.
        """
        if not self.prompt.strip():
            refuse("Write a prompt.", param="prompt")
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": self.prompt})
        numbers = {
            "seed": _number("seed", self.seed, int), "temperature": _number("temperature", self.temperature, float),
            "max_tokens": _number("max_tokens", self.max_tokens, int),
        }  # fmt: skip
        try:
            return ChatRequest.model_validate({"model": model, "messages": messages, "stream": stream, **numbers})
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else ""
            refuse(f"{first['msg']}.", param="prompt" if field == "messages" else field)


class AnswerForm(PlaygroundForm):
    """The form as the page's script sends it: for one model."""

    model: Name


@router.get("/playground")
def playground(request: Request, parts: Parts, caller: By, asked: Annotated[PlaygroundForm, Query()]) -> Response:
    """Show the form."""
    caller.require("member")
    return _page(request, parts, caller, asked)


@router.post("/playground")
def ask_both(request: Request, parts: Parts, caller: By, asked: Annotated[PlaygroundForm, Form()]) -> Response:
    """Ask both models and wait for their answers: what a browser without scripts does."""
    caller.require("member")
    answers: dict[str, tuple[str, str]] = {}
    for side, model in (("a", asked.a), ("b", asked.b)):
        if not model:
            continue
        try:
            chat = asked.chat(model, stream=False)
        except ApiError as error:
            return _page(request, parts, caller, asked, wrong=error)
        try:
            choice = parts.completions.chat(caller, chat).choices[0]
            answers[side] = (choice.message.content or "", choice.finish_reason)
        except ApiError as error:
            answers[side] = ("", error.message)
    return _page(request, parts, caller, asked, answers=answers)


@router.post("/playground/answer")
def stream_answer(parts: Parts, caller: By, asked: Annotated[AnswerForm, Form()]) -> Response:
    """Return one model's answer as server-sent events, those of the API."""
    caller.require("member")
    try:
        events = parts.completions.stream_chat(caller, asked.chat(asked.model, stream=True))
    except ApiError as error:  # the script of the page shows it
        return JSONResponse(error.body(), status_code=error.status)
    return StreamingResponse(events, media_type="text/event-stream")


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        refuse(f"'{text}' is no {'whole ' if kind is int else ''}number.", param=name)


def _page(
    request: Request, parts: ServiceParts, caller: Caller, asked: PlaygroundForm, *,
    answers: dict[str, tuple[str, str]] | None = None, wrong: ApiError | None = None,
) -> Response:  # fmt: skip
    models = _models(parts, caller)
    return page(
        request, "playground.html", code=200 if wrong is None else wrong.status, asked=asked, answers=answers or {},
        models=models, none=not any(group for _, group in models), wrong=wrong,
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
