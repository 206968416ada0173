"""Special tokens that somebody typed into a message: found, and kept text where only the chat template may write them.

A template's text marks who speaks by tokens such as `<|im_end|>`. The same characters inside a message would become the
same token: an answer that quotes one would teach the model to stop there, and a user could end his own turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from distft.data.samples import Conversation, Message, RowError

Typed: TypeAlias = Literal["escape", "error", "allow"]
"""What becomes of special tokens inside messages; see `[data] special_tokens_in_content`."""

TYPED = "special tokens typed inside a message, {}"
START, END = "\ufdd0", "\ufdd1"
"""Around a token that is to stay text; characters that no text has (Unicode's noncharacters)."""
MARKED = re.compile(f"{START}(.*?){END}|[{START}{END}]", re.DOTALL)
_INLINE = re.compile(r"</?(think|thinking|tool_\w+|tools|functions?|answer)>")
"""Tags that datasets write into what an assistant says, to be read as the tokens they are."""


def control_tokens(added: dict[str, bool], written: str) -> re.Pattern[str]:
    """Return a pattern that finds the tokens that only a template may write.

    Args:
        added: the tokenizer's added tokens, and whether each is special.
        written: the template's text, "" where there is none; what it spells out counts too.
    """
    names = [
        name for name, special in added.items() if name and (special or name in written) and not _INLINE.fullmatch(name)
    ]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def kept_text(chat: Conversation, control: re.Pattern[str], typed: Typed) -> tuple[Conversation, dict[str, str]]:
    """Return the chat with typed tokens between marks (`escape`) or as they are (`allow`), and notes on them.

    Raises:
        RowError: one was found, and it is to be an error.
    """
    matches: list[str] = []

    def mark(text: str) -> str:
        hits = control.findall(text)
        if not hits:
            return text
        if START in text or END in text:
            raise RowError("holds a special token and a character that is no text (U+FDD0 or U+FDD1)")
        matches.extend(hits)
        return control.sub(f"{START}\\g<0>{END}", text) if typed == "escape" else text

    messages: list[Message] = []
    where = ""
    for number, message in enumerate(chat.messages, 1):
        before = len(matches)
        messages.append({key: value if key == "role" else _mapped(value, mark) for key, value in message.items()})
        if len(matches) > before and not where:
            where = f"message {number}"
    tools = _mapped(chat.tools, mark)
    if not matches:
        return chat, {}
    where = where or "the tools"
    if typed == "error":
        raise RowError(
            f"{where}: the special token {matches[0]} is typed as text, and would become a control token  [data] "
            'special_tokens_in_content = "escape" keeps it text, "allow" lets it be the token'
        )
    kind = TYPED.format("kept as text" if typed == "escape" else "read as tokens")
    return replace(chat, messages=messages, tools=tools), {kind: f"{where}: {matches[0]}"}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def without_marks(text: str) -> str:
    """Return the text as it was."""
    return text.replace(START, "").replace(END, "")
