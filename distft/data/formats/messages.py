"""`messages`: the chat form of most APIs and libraries, with tools."""

from typing import Any

from distft.data.chat import conversation, message_list
from distft.data.samples import Conversation, FormatSpec, Row, RowError, kind_of


def convert(row: Row) -> Conversation:
    """Return the row's chat; `tools` (OpenAI's old `functions`) may hold tool definitions, a list or its JSON text, and
    `system` the system message."""  # noqa: D205, D209
    messages = system_first(row, message_list(row.get("messages"), "messages"), role="role", content="content")
    return conversation(messages, tools_of(row))


def tools_of(row: Row) -> Any:
    """Return the tool definitions, under either name.

    Raises:
        RowError: both columns hold some.
    """
    if row.get("tools") and row.get("functions"):
        raise RowError('the row has both "tools" and "functions"; keep one of them')
    return row.get("tools") or row.get("functions")


def system_first(row: Row, messages: list[Any], *, role: str, content: str) -> list[Any]:
    """Return the messages with what the column `system` says in front.

    Raises:
        RowError: it is no text, or the first message is a system message that says something else.
    """
    system = row.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        raise RowError(f'"system" is {kind_of(system)}, expected a string')
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get(role) != "system":
        return [{role: "system", content: system}, *messages]
    if first.get(content) != system:
        raise RowError('the column "system" and the first message are two system messages; keep one of them')
    return messages


SPEC = FormatSpec(
    name="messages",
    needs='"messages": a list of {role, content}, optional "tools", "system"',
    matches=lambda row: "messages" in row,
    convert=convert,
    example={"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    reads=("messages", "tools", "functions", "system"),
)
