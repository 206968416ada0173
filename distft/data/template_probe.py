"""A chat template asked about short chats: which token ends a turn, and what begins the next one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from distft.core.errors import DataError
from distft.data.drafts import Span
from distft.data.samples import Conversation, Message, RowError

Draw: TypeAlias = Callable[[Sequence[Message], Any, bool], tuple[str, list[Span]]]
"""(messages, tools, whether to open the assistant's next turn) -> text and what its generation marks enclose."""

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE_ANSWER = "fine, thank you"
_PROBE: list[Message] = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": _PROBE_ANSWER}]
NEXT: Message = {"role": "user", "content": "and you"}
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}


def has_marks(template: str) -> bool:
    """Return whether a Jinja chat template carries `{% generation %}` marks."""
    return _MARK.search(template) is not None


@dataclass(frozen=True)
class TemplateProbe:
    """A chat template bound to a tokenizer's special tokens."""

    label: str
    """How messages call it: `chat_template "chatml"`."""
    text: str
    draw: Draw
    tokens: tuple[str, ...]
    """Added tokens of the tokenizer, as text: a turn ends with one of them."""

    @cached_property
    def stop(self) -> str:
        """Return the token that ends an assistant turn, found by rendering a short chat.

        It may begin the next turn's header.

        Raises:
            DataError: the template cannot render it, ends a turn with no token of the tokenizer, or leaves that token
                outside its generation marks.
        """
        try:
            text, marks = self.draw(_PROBE, self._probe_tools, False)
        except RowError as error:
            raise DataError(f"{self.label}: {error}") from None
        start = text.rfind(_PROBE_ANSWER)
        if start < 0:
            raise DataError(f"{self.label}: does not render what the assistant says")
        tail_at = start + len(_PROBE_ANSWER)
        match = self.any_token.search(text, tail_at)
        if (
            match is None
            and not text[tail_at:].strip()
            and (header := self._header_after(_PROBE, self._probe_tools, text))
        ):
            return header.strip()
        if match is None:
            tail = text[tail_at:].strip()
            raise DataError(
                f"{self.label}: ends an assistant turn with {tail!r}, which is no token of this tokenizer, so a model "
                'trained on it would not stop  use chat_template = "plain", or a tokenizer that has the token'
                if tail
                else f"{self.label}: writes nothing after an assistant turn, so a model trained on it would not stop  "
                "end the turn with {{ eos_token }}"
            )
        if self.marked and not any(begin <= start and match.end() <= end for begin, end in marks):
            raise DataError(
                f"{self.label}: its {{% generation %}} marks leave out {match.group()!r}, the token that ends the "
                "assistant's turn, so a model trained on it would not stop  move {% endgeneration %} behind the token"
            )
        return match.group()

    @cached_property
    def _probe_tools(self) -> list[dict[str, Any]] | None:
        """Tools for the short chat, where the template renders no chat without, as those named "tool_use" do."""
        for tools in (None, [_PROBE_TOOL]):
            try:
                self.draw(_PROBE, tools, False)
            except RowError:
                continue
            return tools
        return None

    def refuse_without_stop(self) -> None:
        """Raise what `stop` raises."""
        _ = self.stop

    @cached_property
    def marked(self) -> bool:
        """Whether the template carries generation marks."""
        return has_marks(self.text)

    @cached_property
    def any_token(self) -> re.Pattern[str]:
        """Finds added tokens of the tokenizer in a text."""
        longest_first = sorted(self.tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _stops_at_header(self) -> bool:
        """Whether nothing but the next turn's header ends an assistant's turn."""
        text, _ = self.draw(_PROBE, self._probe_tools, False)
        return self.any_token.search(text, text.rfind(_PROBE_ANSWER)) is None

    def _header_after(self, messages: Sequence[Message], tools: Any, text: str) -> str:
        """Return what the template writes between these messages and the next one's first token, "" if nothing."""
        following: Message = {"role": "tool", "content": "done"} if messages[-1].get("tool_calls") else NEXT
        try:
            followed, _ = self.draw([*messages, following], tools, False)
        except RowError:
            return ""
        token = self.any_token.search(followed, len(text)) if followed.startswith(text) else None
        return followed[len(text) : token.end()] if token and not followed[len(text) : token.start()].strip() else ""

    def _with_header(self, chat: Conversation, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Add the next turn's header token to text and last span, where that is what stops the model."""
        if self.marked or not self._stops_at_header:
            return text, spans
        calls = [call for message in chat.messages[-1:] for call in message.get("tool_calls", ())]
        plain = [_PROBE[0], {**_PROBE[1], "tool_calls": calls}] if calls else _PROBE
        header = self._header_after(plain, self._probe_tools, self.draw(plain, self._probe_tools, False)[0])
        if not header:
            raise DataError(f"{self.label}: the token that ends the last turn cannot be found")
        text = text + header
        return text, [*spans[:-1], (spans[-1][0], len(text))]
