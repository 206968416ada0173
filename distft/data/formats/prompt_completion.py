"""`prompt_completion`: two strings (raw text, no chat template) or two lists of messages (a chat)."""

from typing import Any

from distft.data.chat import conversation
from distft.data.formats.messages import tools_of
from distft.data.samples import (
    Conversation,
    FormatSpec,
    PromptCompletion,
    Row,
    RowError,
    kind_of,
    parse_json,
    text_column,
)


def convert(row: Row) -> PromptCompletion | Conversation:
    """Return raw text of strings; of message lists one chat whose prompt messages are given, not learnt."""
    prompt, completion = parse_messages(row.get("prompt")), parse_messages(row.get("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise RowError('"completion" is an empty list')
        return conversation(prompt + completion, tools_of(row), num_prompt=len(prompt))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            f'"prompt" is {kind_of(prompt)} but "completion" is {kind_of(completion)}; '
            "both must be strings, or both lists of messages"
        )
    if tools_of(row):
        raise RowError('"tools" need a chat: "prompt" and "completion" are strings, which no chat template renders')
    return PromptCompletion(prompt=text_column(row, "prompt"), completion=text_column(row, "completion"))


def parse_messages(value: Any) -> Any:
    """Return a list of messages given as its JSON text; anything else as it is, raw text above all."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ ", "[\n") and '"role"' in value:
        try:
            parsed = parse_json(value)
        except ValueError:
            return value
        if isinstance(parsed, list) and all(isinstance(item, dict) and "role" in item for item in parsed):
            return parsed
    return value


SPEC = FormatSpec(
    name="prompt_completion",
    needs='"prompt" and "completion": two strings or two lists of messages',
    matches=lambda row: "prompt" in row and "completion" in row,
    convert=convert,
    reads=("prompt", "completion", "tools", "functions"),
    example={"prompt": "2 + 2 =", "completion": " 4"},
)
