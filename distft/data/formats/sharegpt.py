"""`sharegpt`: turns from human, gpt, function_call, observation and system, with `tools` as JSON text."""

import json
from typing import Any

from distft.core.registry import nearest
from distft.data.chat import conversation, message_list, tool_call
from distft.data.formats.messages import system_first, tools_of
from distft.data.samples import Conversation, FormatSpec, Message, Row, RowError, kind_of, parse_json

ROLE_OF = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def convert(row: Row) -> Conversation:
    """Return the row's chat; a `system` column becomes the first message, `function_call` turns become tool calls."""
    return conversation(turns_of(row), tools_of(row))


def turns_of(row: Row) -> list[Message]:
    """Return the row's turns as messages, what the column `system` says in front.

    Raises:
        RowError: a turn is none.
    """
    turns = message_list(row.get("conversations"), "conversations")
    messages = [message(turn, number) for number, turn in enumerate(turns, 1)]
    return system_first(row, messages, role="role", content="content")


def message(turn: Any, number: int) -> Message:
    """Return a turn as a message.

    Raises:
        RowError: it is none of ShareGPT's form.
    """
    if isinstance(turn, dict) and "from" not in turn and "role" in turn:
        raise RowError(
            f'turn {number} has "role" instead of "from": the row is of format messages  write format = "messages", '
            'columns = { conversations = "messages" } in the source\'s table'
        )
    if not isinstance(turn, dict) or "from" not in turn:
        raise RowError(f'turn {number} has no "from"; expected objects with "from" and "value"')
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLE_OF:
        meant = nearest(str(speaker), ROLE_OF)
        hint = f', did you mean "{meant}"?' if meant else ""
        raise RowError(f"turn {number} is from {json.dumps(speaker)}{hint}  allowed: {', '.join(ROLE_OF)}")
    if "role" in turn or "content" in turn:
        raise RowError(f'turn {number} has "role" or "content" beside "from"; expected "from" and "value"')
    more = {key: extra for key, extra in turn.items() if key not in ("from", "value")}  # weight, reasoning, ...
    if speaker != "function_call":
        return {"role": ROLE_OF[speaker], "content": value, **more}
    if not isinstance(value, str | dict | list):
        raise RowError(f"turn {number}: a function_call's value is {kind_of(value)}, expected an object or JSON text")
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"turn {number}: the function_call is not valid JSON ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": [tool_call(call, number) for call in calls], **more}


SPEC = FormatSpec(
    name="sharegpt",
    needs='"conversations": a list of {from, value}, optional "system" and "tools"',
    matches=lambda row: "conversations" in row,
    convert=convert,
    reads=("conversations", "tools", "functions", "system"),
    example={"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
)
