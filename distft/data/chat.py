"""Messages of any dialect -> one normal form, with the order of roles checked in plain words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distft.core.registry import nearest
from distft.data.samples import Conversation, Message, RowError, kind_of

ROLES = ("system", "user", "assistant", "tool")


def conversation(messages: Sequence[Any], tools: Any = None, *, num_prompt: int = 0) -> Conversation:
    """Normalise and check a chat.

    Content given as text parts is joined, a missing content is "", tool-call arguments given as a JSON string are
    parsed, bare tool definitions are wrapped as functions: what chat templates expect.

    Raises:
        RowError: an unknown role, content that is not text, roles out of order, tools that are not definitions.
    """
    if not messages:
        raise RowError("the list of messages is empty")
    normal = [_message(message, number) for number, message in enumerate(messages, 1)]
    _check_order(normal)
    return Conversation(messages=normal, tools=tool_definitions(tools), num_prompt=num_prompt)


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {kind_of(message)}, expected an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        meant = nearest(str(role), ROLES) or ("system" if role == "developer" else "")
        hint = f', did you mean "{meant}"?' if meant else ""
        raise RowError(f"message {number} has role {json.dumps(role)}{hint}  allowed: {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    normal: Message = {"role": role, "content": _content(message.get("content"), number, optional=bool(calls))}
    if calls:
        if role != "assistant":
            raise RowError(f"message {number}: only an assistant makes tool_calls, this one is from {role}")
        if not isinstance(calls, list):
            raise RowError(f"message {number}: tool_calls is {kind_of(calls)}, expected a list")
        normal["tool_calls"] = [tool_call(call, number) for call in calls]
    for extra in ("name", "tool_call_id", "reasoning_content"):
        if message.get(extra) is not None:
            normal[extra] = message[extra]
    return normal


def _content(content: Any, number: int, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return ""
        raise RowError(f"message {number} has no content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                what = part.get("type", "unknown") if isinstance(part, dict) else kind_of(part)
                raise RowError(f"message {number} has a content part that is not text ({what}); only text is trained")
            texts.append(part["text"])
        return "".join(texts)
    raise RowError(f"message {number}: content is {kind_of(content)}, expected a string")


def tool_call(call: Any, number: int) -> dict[str, Any]:
    """One call as `{"type": "function", "function": {"name", "arguments": object}}`; `id` is kept.

    Raises:
        RowError: no name, or arguments that are neither an object nor a JSON object in a string.
    """
    if not isinstance(call, dict):
        raise RowError(f"message {number}: a tool call is {kind_of(call)}, expected an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {number}: a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise RowError(f"message {number}: arguments of {function['name']} are not valid JSON ({error})") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(
            f"message {number}: arguments of {function['name']} are {kind_of(arguments)}, expected an object"
        )
    normal: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **normal} if call.get("id") is not None else normal


def tool_definitions(tools: Any) -> list[dict[str, Any]] | None:
    """The `tools` column (a list, or its JSON text) as function definitions; None when empty.

    Raises:
        RowError: not JSON, not a list, or a definition without a name.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f'"tools" is not valid JSON ({error})') from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError(f'"tools" is {kind_of(tools)}, expected a list of tool definitions')
    wrapped = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f'"tools": definition {number} has no function name')
        wrapped.append({"type": "function", "function": function})
    return wrapped


def _check_order(messages: list[Message]) -> None:
    """Optional system, then user and assistant in turn; tool results only after a call, then the assistant again."""
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system":
            if number != 1:
                raise RowError(f"message {number} is a system message; only the first may be")
        elif role == "user":
            if before not in ("start", "system", "assistant"):
                raise RowError(f"message {number} (user) follows a {before} message; expected the assistant's turn")
        elif role == "assistant":
            if before not in ("user", "tool"):
                what = "a" + ("n assistant" if before == "assistant" else f" {before}") + " message"
                where = f"follows {what}" if before != "start" else "opens the conversation"
                raise RowError(f"message {number} (assistant) {where}; expected a user or tool message before it")
        elif before != "tool" and not (before == "assistant" and messages[number - 2].get("tool_calls")):
            raise RowError(f"message {number} (tool) does not follow an assistant message with tool_calls")
        before = role
    if before != "assistant":
        raise RowError(f"the last message is from {before}; it must be the assistant's, or there is nothing to learn")
