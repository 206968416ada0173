"""What is asked of a model, read from a request, and the events that its answers become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.data.templates import read_template
from distft.generation.completion import Completion
from distft.service.loaded_models import Served, prompt_ids
from distft.service.tool_calls import CallForm, ReadAnswer, ToolChats, read_answer


class RequestError(Exception):
    """A request that cannot be answered, by its own fault."""

    def __init__(self, message: str, code: str) -> None:
        self.code = code
        super().__init__(message)


class StreamedAnswer:
    """Turns tokens into pieces of text; what may be the start of a stop text waits until it is known."""

    def __init__(self, served: Served, stop: Sequence[str]) -> None:
        self._served, self._stop = served, stop
        self._ids: list[int] = []
        self._sent = ""

    def take(self, token: int) -> str:
        """Take the next token; return what may be shown."""
        if token in self._served.stop_ids:
            return ""
        self._ids.append(token)
        return self._show(self._served.tokenizer.decode(self._ids, skip_special_tokens=True), whole=False)

    def finish(self, text: str) -> str:
        """Return what is left of the whole text."""
        return self._show(text, whole=True)

    def _show(self, text: str, *, whole: bool) -> str:
        if not whole:
            ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
            text = text[: min(ends)] if ends else text
            if text.endswith("\ufffd"):  # half a character
                return ""
            held = max(
                (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
            )
            text = text[: len(text) - held]
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text if len(text) > len(self._sent) else self._sent
        return piece


@dataclass(frozen=True, kw_only=True)
class TokenizedRequest:
    """A request with its prompt as tokens."""

    request: Mapping[str, Any]
    ids: list[int]
    stop: tuple[str, ...]
    schema: Mapping[str, Any] | None
    """JSON schema that answers keep to."""
    form: CallForm | None
    """How the template writes calls, where tools are offered."""
    streams: tuple[StreamedAnswer, ...]
    """One for each answer."""

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each token; None: no log-probabilities at all."""
        return self.request["logprobs"]

    def room(self, longest: int | None) -> int:
        """Return the most tokens of an answer of a model that reads so many positions; None: not known.

        Raises:
            RequestError: the prompt leaves too few.
        """
        most: int | None = self.request["max_tokens"]
        room = most or self.request["default_tokens"]
        if longest is None:
            return room
        left = longest - len(self.ids)
        if left < 1 or (most and most > left):
            message = f"This model's context has {longest} tokens; the prompt has {len(self.ids)}, and {room} were "
            raise RequestError(f"{message}asked for.", "context_length_exceeded")
        return min(room, left)

    def piece(self, index: int, token: int) -> list[dict[str, Any]]:
        """Return the event of a token; none where nothing of it may be shown yet."""
        if self.form is not None:  # a call is known once the answer is whole
            return []
        text = self.streams[index].take(token)
        return [{"event": "piece", "index": index, "text": text}] if text else []

    def end(self, index: int, made: Completion, logprobs: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        """Return the events of an answer that has ended."""
        reason = "stop" if made.ended else "length"
        end = {"event": "end", "index": index, "num_tokens": made.num_tokens, "logprobs": logprobs}
        if self.form is None:
            rest = self.streams[index].finish(made.text)
            pieces = [{"event": "piece", "index": index, "text": rest}] if rest else []
            return [*pieces, {**end, "text": made.text, "finish_reason": reason}]
        names = [tool["function"]["name"] for tool in self.request["tools"]]
        answer = read_answer(made.text, self.form, names) if made.ended else ReadAnswer(content=made.text)
        reason = "tool_calls" if made.ended and answer.calls else reason
        return [{**end, "text": answer.content, "calls": answer.calls, "finish_reason": reason}]


def tokenize_request(served: Served, request: Mapping[str, Any]) -> TokenizedRequest:
    """Return what a request asks of a model.

    Raises:
        RecipeError: the model has no chat template, or the template refuses the messages or the tools.
        RequestError: the prompt is empty.
    """
    template = read_template(request.get("chat_template", "auto"))
    form = None
    if request.get("tools"):
        form = ToolChats(served.tokenizer, template or served.tokenizer.chat_template or "").form()
    ids = prompt_ids(served, {**request, "template": template})
    if not ids:
        raise RequestError("The prompt is empty.", "invalid_value")
    stop = tuple(request["stop"])
    streams = tuple(StreamedAnswer(served, stop) for _ in range(request["n"]))
    return TokenizedRequest(
        request=request, ids=ids, stop=stop, schema=request.get("schema"), form=form, streams=streams
    )


def token_entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    """Return a token of an answer as the API tells it."""
    text = tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
