"""`prompt`: what is asked and no answer, for objectives whose model writes the answers itself.

Prepared rows need an end: a chat gets a turn of one placeholder, raw text the end-of-sequence token alone. Neither is
read by anybody: the model is asked with what comes before, and there is no right answer.
"""

from __future__ import annotations

from typing import Any

from distft.data.chat import conversation, message_list
from distft.data.formats.messages import system_first, tools_of
from distft.data.formats.prompt_completion import parse_messages
from distft.data.samples import (
    Conversation,
    FormatSpec,
    PromptCompletion,
    Row,
    RowError,
    text_column,
)

PLACEHOLDER = "..."
_ANSWERS = ("completion", "chosen", "rejected")
"""Columns beside "prompt" by which rows are of another format."""


class OpenChat(Conversation):
    """A chat that waits for an answer; its last message is the placeholder."""

    @property
    def answer(self) -> str:
        """None."""
        return ""

    @property
    def reference(self) -> str:
        """None."""
        return ""


class OpenText(PromptCompletion):
    """Raw text that waits for an answer."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not self.prompt.strip()


def convert(row: Row) -> OpenChat | OpenText:
    """Return what is asked: `prompt`, a text or a list of messages, or `messages` that end with the user's."""
    if "prompt" in row and "messages" in row:
        raise RowError('the row has both "prompt" and "messages"; keep one of them')
    if "completion" in row:
        raise RowError('the row has an answer ("completion"), and the format prompt has none: use format = "auto"')
    name = "messages" if "messages" in row else "prompt"
    asked: Any = row.get(name) if name == "messages" else parse_messages(row.get(name))
    if name == "prompt" and not isinstance(asked, list):
        text = text_column(row, name)
        if tools_of(row):
            raise RowError('"tools" need a chat: "prompt" is a string, which no chat template renders')
        return OpenText(prompt=text, completion="")
    listed = system_first(row, message_list(asked, name), role="role", content="content")
    if isinstance(listed[-1], dict) and listed[-1].get("role") == "assistant":
        raise RowError('the last message is the assistant\'s, an answer: the format is "messages"')
    chat = conversation([*listed, {"role": "assistant", "content": PLACEHOLDER}], tools_of(row))
    return OpenChat(messages=chat.messages, tools=chat.tools, num_prompt=len(chat.messages) - 1)


SPEC = FormatSpec(
    name="prompt",
    needs='"prompt": a string or a list of {role, content}, and no answer; or "messages" that end with the user\'s',
    matches=lambda row: "prompt" in row and "messages" not in row and not any(name in row for name in _ANSWERS),
    convert=convert,
    example={"prompt": "2 + 2 ="},
    reads=("prompt", "messages", "tools", "functions", "system"),
    answered=False,
)
