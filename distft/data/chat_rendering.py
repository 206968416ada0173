"""Renders the messages of a chat with a Jinja template: dialects of messages, special tokens, dates."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from distft.data.drafts import Span
from distft.data.samples import Message, RowError
from distft.data.template_probe import has_marks


class TemplateDrawing:
    """Renders a Jinja chat template with a tokenizer's special tokens, as `apply_chat_template` does."""

    def __init__(self, tokenizer: Any, text: str, date: str | None) -> None:
        self.text = text
        self.marked = has_marks(text)
        self.special = dict(tokenizer.special_tokens_map)
        self._thoughts = tuple(name for name in ("thinking", "reasoning") if re.search(rf"\b{name}\b", text))
        self._date = None if date is None else datetime.datetime.fromisoformat(date)

    def __call__(self, messages: Sequence[Message], tools: Any, open_turn: bool) -> tuple[str, list[Span]]:
        """Return a chat's text and what its generation marks enclose.

        Raises:
            RowError: the template refuses it.
        """
        written = [self._written(message) for message in messages]
        return self._draw(written, tools, open_turn)

    def _written(self, message: Message) -> Message:
        """Return a message as templates read it: reasoning under every name they know, arguments as they want them."""
        if message.keys() <= {"role", "content"}:
            return message
        written = {key: value for key, value in message.items() if key != "trained"}
        if "reasoning_content" in message:
            written |= dict.fromkeys(self._thoughts, message["reasoning_content"])
        if "tool_calls" in message:
            if self._wants_text:
                written["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if not message["content"] and self._takes_null:
                written["content"] = None
        return written

    @cached_property
    def _wants_text(self) -> bool:
        """Whether arguments must be JSON text: as an object the template refuses them, or prints Python's notation."""
        as_object = self._called("", _CALL)
        if "Oslo" in as_object and "{'place'" not in as_object:
            return False
        return '"place": "Oslo"' in self._called("", _with_text_arguments(_CALL))

    @cached_property
    def _takes_null(self) -> bool:
        """Whether a call without text has no content, as APIs have it: for "" R1's template writes one turn more."""
        drawn = self._called(None, _with_text_arguments(_CALL) if self._wants_text else _CALL)
        return "Oslo" in drawn and "None" not in drawn

    def _called(self, content: str | None, call: dict[str, Any]) -> str:
        """Render a chat that ends with a call; "" if the template refuses it."""
        question: Message = {"role": "user", "content": "where"}
        try:
            return self._draw([question, {"role": "assistant", "content": content, "tool_calls": [call]}], None, False)[
                0
            ]
        except RowError:
            return ""

    def _draw(self, messages: list[Message], tools: Any, open_turn: bool) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            self._freeze_date()
            drawn: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=open_turn,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses it: {error}") from None
        (text,), (marks,) = drawn if self.marked else (drawn[0], [[]])
        return text, marks

    def _freeze_date(self) -> None:
        """Let the template's `strftime_now` give one date, or a run would train on other rows every day.

        transformers takes no clock (5.23): its compiled template, kept by its text, is given another one.
        """
        if "strftime_now" not in self.text:
            return
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(self.text).environment.globals["strftime_now"] = (
            self._date or datetime.datetime.now()
        ).strftime


_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "find", "arguments": {"place": "Oslo"}}}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
