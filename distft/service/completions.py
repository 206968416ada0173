"""Answers in OpenAI's forms: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from distft.demo.files import locate_path
from distft.service.auth import Caller
from distft.service.models import ModelService, ModelToAsk
from distft.service.serving import AnswerService
from distft.service.tables import new_id
from distft.service.wire_answers import (
    AnswerRequest,
    CalledFunction,
    ChatAnswer,
    ChatChoice,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    TextAnswer,
    TextChoice,
    ToolCall,
    Usage,
)

COMPLETION_TOKENS = 16
"""Tokens of a completion where a request names no limit: OpenAI's default."""


class CompletionService:
    """Asks models, and writes what they answer as the API has it."""

    def __init__(self, models: ModelService, answers: AnswerService) -> None:
        self._models, self._answers = models, answers

    def chat(self, caller: Caller, request: ChatRequest) -> ChatAnswer:
        """Return the answers to a chat."""
        events = self._chat_events(caller, request)
        choices: list[ChatChoice] = []
        usage = _Usage()
        for event in events:
            usage.take(event)
            if event["event"] == "end":
                choices.append(
                    ChatChoice(
                        index=event["index"], message=_message(event),
                        finish_reason=event["finish_reason"], logprobs=_chat_logprobs(event),
                    )
                )  # fmt: skip
        choices.sort(key=lambda choice: choice.index)
        return ChatAnswer(
            id=new_id("chatcmpl-"), created=int(time.time()), model=request.model, choices=choices, usage=usage.total()
        )

    def stream_chat(self, caller: Caller, request: ChatRequest) -> Iterator[str]:
        """Return server-sent events of a chat; what is refused is refused before the first of them."""
        events = _begun(self._chat_events(caller, request))
        head = {"id": new_id("chatcmpl-"), "object": "chat.completion.chunk", "created": int(time.time())}
        head |= {"model": request.model, "system_fingerprint": None}
        with_usage = request.stream_options is not None and request.stream_options.include_usage

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _sse({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

        def chunks() -> Iterator[str]:
            usage = _Usage()
            for index in range(request.n or 1):
                yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
            for event in events:
                usage.take(event)
                if event["event"] == "piece" and not request.logprobs:
                    yield chunk(event["index"], {"content": event["text"]})
                elif event["event"] == "end":
                    message = _message(event)
                    if "calls" in event and message.content and not request.logprobs:
                        yield chunk(event["index"], {"content": message.content})
                    for token in event["logprobs"] or ():  # known once the answer is whole
                        delta = {} if message.tool_calls else {"content": token["token"]}
                        yield chunk(event["index"], delta, logprobs={"content": [token], "refusal": None})
                    for place, call in enumerate(message.tool_calls or ()):
                        yield chunk(event["index"], {"tool_calls": [{"index": place, **call.model_dump()}]})
                    yield chunk(event["index"], {}, event["finish_reason"])
            if with_usage:
                yield _sse({**head, "choices": [], "usage": usage.total().model_dump()})
            yield "data: [DONE]\n\n"

        return chunks()

    def complete(self, caller: Caller, request: CompletionRequest) -> TextAnswer:
        """Return the texts that continue each prompt."""
        choices: list[TextChoice] = []
        usage = _Usage()
        for place, events in enumerate(self._text_events(caller, request)):
            for event in events:
                usage.take(event)
                if event["event"] == "end":
                    choices.append(
                        TextChoice(
                            index=place * (request.n or 1) + event["index"], text=event["text"],
                            finish_reason=event["finish_reason"], logprobs=_text_logprobs(event),
                        )
                    )  # fmt: skip
        choices.sort(key=lambda choice: choice.index)
        return TextAnswer(
            id=new_id("cmpl-"), created=int(time.time()), model=request.model, choices=choices, usage=usage.total()
        )

    def stream_complete(self, caller: Caller, request: CompletionRequest) -> Iterator[str]:
        """Return server-sent events of a completion."""
        answers = self._text_events(caller, request)
        first = _begun(next(answers))
        head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": request.model}
        with_usage = request.stream_options is not None and request.stream_options.include_usage

        def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
            return _sse({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

        def chunks() -> Iterator[str]:
            usage, place = _Usage(), 0
            events: Iterator[dict[str, Any]] | None = first
            while events is not None:
                for event in events:
                    usage.take(event)
                    index = place * (request.n or 1) + event.get("index", 0)
                    if event["event"] == "piece" and request.logprobs is None:
                        yield chunk(index, event["text"])
                    elif event["event"] == "end":
                        text = event["text"] if request.logprobs is not None else ""
                        yield chunk(index, text, event["finish_reason"], _text_logprobs(event))
                events, place = next(answers, None), place + 1
            if with_usage:
                yield _sse({**head, "choices": [], "usage": usage.total().model_dump()})
            yield "data: [DONE]\n\n"

        return chunks()

    def _chat_events(self, caller: Caller, request: ChatRequest) -> Iterator[dict[str, Any]]:
        request.refuse_unserved()
        model = self._models.find(caller, request.model)
        messages = [message.for_template() for message in request.messages]
        tools, schema = request.offered_tools(), request.answer_schema()
        of_tools = {"tools": tools, "speaks_of_tools": True} if tools else {}
        if any(message.speaks_of_tools for message in request.messages):
            of_tools["speaks_of_tools"] = True
        most = request.max_completion_tokens or request.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        asked = {
            "messages": messages,
            "schema": schema,
            **of_tools,
            **_sampling(model, request, most, top, model.base.max_tokens),
        }
        return self._answers.answer(asked)

    def _text_events(self, caller: Caller, request: CompletionRequest) -> Iterator[Iterator[dict[str, Any]]]:
        request.refuse_unserved()
        prompts = request.prompts()
        model = self._models.find(caller, request.model)
        shared = _sampling(model, request, request.max_tokens, request.logprobs, COMPLETION_TOKENS)
        return (self._answers.answer({**prompt, **shared}) for prompt in prompts)


def _sampling(
    model: ModelToAsk, request: AnswerRequest, most: int | None, top: int | None, default_tokens: int
) -> dict[str, Any]:
    vllm = None
    if model.base.vllm is not None:
        vllm = {**model.base.vllm.model_dump(), "base": locate_path(model.base.path)}
    return {
        "given": model.given,
        "vllm": vllm,
        "chat_template": model.base.chat_template,
        "n": request.n or 1,
        "max_tokens": most,
        "default_tokens": default_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "stop": request.stops,
        "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
        "logprobs": top,
    }


def _message(event: Mapping[str, Any]) -> ChatMessage:
    """Return the message of an answer that has ended; `calls` are there where tools were offered."""
    calls = [
        ToolCall(id=new_id("call_"), type="function", function=CalledFunction(**call))
        for call in event.get("calls", ())
    ]
    return ChatMessage(content=(event["text"] or None) if calls else event["text"], tool_calls=calls or None)


def _begun(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return the events once the first is there: a refusal is a status, not an event in a stream that has begun."""
    first = next(events, None)

    def rest() -> Iterator[dict[str, Any]]:
        if first is not None:
            yield first
        yield from events

    return rest()


def _sse(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _chat_logprobs(event: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if event["logprobs"] is None else {"content": event["logprobs"], "refusal": None}


def _text_logprobs(event: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens = event["logprobs"]
    if tokens is None:
        return None
    offsets, place = [], 0
    for token in tokens:
        offsets.append(place)
        place += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }


class _Usage:
    """Counts the tokens of a request."""

    def __init__(self) -> None:
        self._read = self._written = 0

    def take(self, event: Mapping[str, Any]) -> None:
        self._written += event.get("num_tokens", 0)
        self._read += event.get("prompt_tokens", 0)

    def total(self) -> Usage:
        return Usage(prompt_tokens=self._read, completion_tokens=self._written, total_tokens=self._read + self._written)
