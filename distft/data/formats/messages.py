"""`messages`: the chat form of most APIs and libraries, with tools."""

from distft.data.chat import conversation
from distft.data.samples import Conversation, FormatSpec, Row, RowError, kind_of


def convert(row: Row) -> Conversation:
    """The row's chat; `tools` may hold tool definitions (a list or its JSON text)."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise RowError(f'"messages" is {kind_of(messages)}, expected a list of messages')
    return conversation(messages, row.get("tools"))


SPEC = FormatSpec(
    name="messages",
    needs='"messages": a list of {role, content}, optional "tools"',
    matches=lambda row: "messages" in row,
    convert=convert,
    example={"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
)
