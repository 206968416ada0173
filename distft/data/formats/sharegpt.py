"""`sharegpt`: turns from human, gpt, function_call, observation and system, with `tools` as JSON text."""

import json
from typing import Any

from distft.core.registry import nearest
from distft.data.chat import conversation, tool_call
from distft.data.samples import Conversation, FormatSpec, Message, Row, RowError, kind_of

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
    """The row's chat; a `system` column becomes the first message, `function_call` turns become tool calls."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowError(f'"conversations" is {kind_of(turns)}, expected a list of turns')
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    system = row.get("system")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return conversation(messages, row.get("tools"))


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "from" not in turn:
        raise RowError(f'turn {number} has no "from"; expected objects with "from" and "value"')
    speaker, value = turn["from"], turn.get("value")
    if speaker not in ROLE_OF:
        meant = nearest(str(speaker), ROLE_OF)
        hint = f', did you mean "{meant}"?' if meant else ""
        raise RowError(f"turn {number} is from {json.dumps(speaker)}{hint}  allowed: {', '.join(ROLE_OF)}")
    if speaker != "function_call":
        return {"role": ROLE_OF[speaker], "content": value}
    if not isinstance(value, str):
        raise RowError(f"turn {number}: a function_call's value is {kind_of(value)}, expected JSON text")
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"turn {number}: the function_call is not valid JSON ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": [tool_call(call, number) for call in calls]}


SPEC = FormatSpec(
    name="sharegpt",
    needs='"conversations": a list of {from, value}, optional "system" and "tools"',
    matches=lambda row: "conversations" in row,
    convert=convert,
    example={"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
)
