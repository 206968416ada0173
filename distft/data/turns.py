"""Which characters of a rendered chat are trained: by the template's generation marks, else by verified prefixes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from distft.core.errors import DataError
from distft.data.samples import Conversation, Message, RowError

LossOn: TypeAlias = Literal["assistant", "completion", "last_turn", "all"]
Span: TypeAlias = tuple[int, int]
"""Half-open range of characters."""
Draw: TypeAlias = Callable[[Sequence[Message], Any, bool], tuple[str, list[Span]]]
"""(messages, tools, whether to open the assistant's next turn) -> text and what its generation marks enclose."""

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_WITH_TOOLS = ': chat_template = "chatml", "llama3" or "plain"'
_PROBE_ANSWER = "fine, thank you"
_PROBE: list[Message] = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": _PROBE_ANSWER}]


def has_marks(template: str) -> bool:
    """Whether a Jinja chat template carries `{% generation %}` marks."""
    return _MARK.search(template) is not None


def wanted_turns(chat: Conversation, loss_on: LossOn) -> set[int]:
    """Indices of the assistant messages to train.

    `assistant`: every one; `last_turn`: the last message; `completion`: those after the last user message, so a tool
    call and the answer that follows its result. In a row that separates prompt from completion only the completion's
    messages count, whatever the setting.
    """
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    first = chat.num_prompt
    if loss_on == "last_turn":
        first = turns[-1]
    elif loss_on == "completion" and not chat.num_prompt:
        first = max((index for index, message in enumerate(chat.messages) if message["role"] == "user"), default=0)
    return {index for index in turns if index >= first}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template bound to a tokenizer's special tokens."""

    label: str
    """How messages call it: `chat_template "chatml"`."""
    text: str
    draw: Draw
    tokens: tuple[str, ...]
    """Added tokens of the tokenizer, as text: a turn ends with one of them."""

    @cached_property
    def stop(self) -> str:
        """The token that ends an assistant turn, found by rendering a short chat.

        Raises:
            DataError: the template cannot render it, ends a turn with no token of the tokenizer, or leaves that token
                outside its generation marks.
        """
        try:
            text, marks = self.draw(_PROBE, None, False)
        except RowError as error:
            raise DataError(f"{self.label}: {error}") from None
        start = text.rfind(_PROBE_ANSWER)
        if start < 0:
            raise DataError(f"{self.label}: does not render what the assistant says")
        tail_at = start + len(_PROBE_ANSWER)
        found = self._any_token.search(text, tail_at)
        if found is None:
            tail = text[tail_at:].strip()
            raise DataError(
                f"{self.label}: ends an assistant turn with {tail!r}, which is no token of this tokenizer, so a model "
                'trained on it would not stop  use chat_template = "plain", or a tokenizer that has the token'
                if tail
                else f"{self.label}: writes nothing after an assistant turn, so a model trained on it would not stop  "
                "end the turn with {{ eos_token }}"
            )
        if self.marked and not any(begin <= start and found.end() <= end for begin, end in marks):
            raise DataError(
                f"{self.label}: its {{% generation %}} marks leave out {found.group()!r}, the token that ends the "
                "assistant's turn, so a model trained on it would not stop  move {% endgeneration %} behind the token"
            )
        return found.group()

    def refuse_without_stop(self) -> None:
        """Raise what `stop` raises."""
        _ = self.stop

    @cached_property
    def marked(self) -> bool:
        """Whether the template carries generation marks."""
        return has_marks(self.text)

    def trained(self, chat: Conversation, loss_on: LossOn) -> tuple[str, list[Span]]:
        """The chat as text, and the characters to train: each wanted turn from its header to its end token.

        Raises:
            RowError: the template refuses the chat.
            DataError: the template leaves out tools, or does not let the wanted turns be found.
        """
        if chat.tools and not re.search(r"\btools\b", self.text):
            raise DataError(f'{self.label}: does not render "tools"  name a template that does{_WITH_TOOLS}')
        for part in ("tool_calls", "reasoning_content"):
            if part not in self.text and any(part in message for message in chat.messages):
                raise DataError(
                    f"{self.label}: does not render {part}, so those turns would be trained without  "
                    f"name a template that does{_WITH_TOOLS if part == 'tool_calls' else ''}"
                )
        text, marks = self.draw(chat.messages, chat.tools, False)
        if loss_on == "all":
            return text, [(0, len(text))]
        wanted = wanted_turns(chat, loss_on)
        if self.marked:
            return text, self._marked_turns(chat, text, marks, wanted)
        return text, [self._prefix_turn(chat, text, index) for index in sorted(wanted)]

    @cached_property
    def _any_token(self) -> re.Pattern[str]:
        longest_first = sorted(self.tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _marked_turns(self, chat: Conversation, text: str, marks: list[Span], wanted: set[int]) -> list[Span]:
        spans: list[Span] = []
        for begin, end in marks:  # a turn may be marked in several adjoining parts
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            elif end > begin:
                spans.append((begin, end))
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise DataError(f"{self.label}: marks {len(spans)} of {len(turns)} assistant turns with {{% generation %}}")
        chosen = [span for span, index in zip(spans, turns, strict=True) if index in wanted]
        for begin, end in chosen:
            if not text[begin:end].rstrip().endswith(self.tokens):
                shown = text[max(begin, end - 40) : end]
                raise DataError(f"{self.label}: marks a turn without the token that ends it: …{shown!r}")
        return chosen

    def _prefix_turn(self, chat: Conversation, text: str, index: int) -> Span:
        """The turn at `index` is what its rendering adds to that of the messages before it."""
        before, _ = self.draw(chat.messages[:index], chat.tools, True)
        through, _ = self.draw(chat.messages[: index + 1], chat.tools, False)
        if not (through.startswith(before) and text.startswith(through)):
            raise DataError(
                f"{self.label}: has no {{% generation %}} marks, and renders messages up to {index + 1} differently "
                "when others follow, so the assistant's tokens cannot be told apart  "
                'put {% generation %} marks into a copy and name that file, use a built-in template, or loss_on = "all"'
            )
        ends = [found.end() for found in self._any_token.finditer(through, len(before))]
        if not ends:
            raise DataError(f"{self.label}: ends message {index + 1} without a token that would stop the model")
        return len(before), ends[-1]
