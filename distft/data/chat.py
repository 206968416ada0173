"""Messages of any dialect -> one normal form, with the order of roles checked in plain words.

Nothing that a message says is dropped: each key is taken over, or refused by name. A null is a key that is not there,
as tables of fixed columns (Arrow) write every key of every row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distft.core.registry import nearest
from distft.data.samples import Conversation, Message, RowError, kind_of, parse_json

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which datasets keep what an assistant thought before it answered; the first is the normal form's."""
FLAGS = ("weight", "train", "training", "trained", "trainable", "loss")
"""Keys that say whether a turn is trained."""
EMPTY_OF_APIS = ("refusal", "audio", "annotations", "images", "videos", "audios")
"""Keys that chat APIs write empty into every message; with something in them they are refused."""
KNOWN = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", *REASONING, *FLAGS)
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_IGNORE = '  ignore = ["{}"] in the source\'s table leaves it out on purpose'


def conversation(messages: Sequence[Any], tools: Any = None, *, num_prompt: int = 0) -> Conversation:
    """Normalise and check a chat.

    Content given as text parts is joined, a missing content is "", tool-call arguments given as a JSON string are
    parsed, bare tool definitions are wrapped as functions: what chat templates expect. OpenAI's old `function_call`
    and the role `function` become a tool call and its result.

    Raises:
        RowError: an unknown role or key, content that is not text, roles out of order, tools that are not definitions.
    """
    if not messages:
        raise RowError("the list of messages is empty")
    normal = [_message(message, number) for number, message in enumerate(messages, 1)]
    _check_order(normal)
    return Conversation(messages=normal, tools=tool_definitions(tools), num_prompt=num_prompt)


def message_list(value: Any, column: str) -> list[Any]:
    """Return the messages in a column, which holds a list or the JSON text of one.

    Raises:
        RowError: it is neither.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, column)
    if isinstance(value, dict) and value and all(isinstance(values, list) for values in value.values()):
        value = _rows(value, column)
    if not isinstance(value, list):
        raise RowError(f'"{column}" is {kind_of(value)}, expected a list of messages')
    return value


def _rows(columns: dict[str, list[Any]], column: str) -> list[dict[str, Any]]:
    """Return the messages of a table that keeps them key by key, as `datasets` did with sequences of objects."""
    if len({len(values) for values in columns.values()}) != 1:
        raise RowError(f'"{column}" keeps its messages key by key, and not as many of each key')
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _parsed(text: str, column: str) -> Any:
    """Return text that may be a list's JSON; other text as it is."""
    if text.lstrip()[:1] != "[":
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        if text.lstrip()[:3] in ("[{'", "[\"{'"):
            raise RowError(
                f'"{column}" holds Python\'s notation of a list, not JSON  write it with json.dumps, or save the table '
                "as Parquet"
            ) from None
        raise RowError(f'"{column}" is a string that is not valid JSON ({error})') from None


def merge_turns(messages: Any) -> Any:
    """Merge consecutive system, user or assistant messages of one role, joined by a blank line.

    Raises:
        RowError: two that would be merged disagree about something else that they say.
    """
    if not isinstance(messages, list):
        return messages
    merged: list[Any] = []
    for number, message in enumerate(messages, 1):
        before = merged[-1] if merged else None
        role = _speaker(message)
        if before is None or role not in _MERGED or _speaker(before) != role:
            merged.append(message)
        else:
            merged[-1] = _joined(before, message, number)
    return merged


_MERGED = {"system": "system", "developer": "system", "human": "user", "user": "user"} | {
    "gpt": "assistant",
    "assistant": "assistant",
}


def _speaker(message: Any) -> str:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return _MERGED.get(role, "") if isinstance(role, str) else ""


def _joined(first: dict[str, Any], second: dict[str, Any], number: int) -> dict[str, Any]:
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        if value in (None, "", []) or (old == value and key not in ("content", "value")):
            continue
        if key in ("role", "from"):
            continue
        if old in (None, "", []):
            result[key] = value
        elif key in ("content", "value", *REASONING) and isinstance(old, str) and isinstance(value, str):
            result[key] = f"{old}\n\n{value}"
        elif key in ("content", "tool_calls") and isinstance(old, list) and isinstance(value, list):
            result[key] = [*old, *([{"type": "text", "text": "\n\n"}] if key == "content" else []), *value]
        else:
            raise RowError(f'message {number} cannot be merged with the one before it: "{key}" differs')
    for flag in FLAGS:
        if (first.get(flag) is None) != (second.get(flag) is None):
            raise RowError(f'message {number} cannot be merged with the one before it: only one of them says "{flag}"')
    return result


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {kind_of(message)}, expected an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        raise RowError(
            f'message {number} has "from" instead of "role": the row is of format sharegpt  write format = "sharegpt", '
            'columns = { messages = "conversations" } in the source\'s table'
        )
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        meant = nearest(str(role), ROLES) or ("system" if role == "developer" else "")
        hint = f', did you mean "{meant}"?' if meant else ""
        raise RowError(f"message {number} has role {json.dumps(role)}{hint}  allowed: {', '.join(ROLES)}")
    _refuse_unknown(message, number)
    calls = _calls(message, number)
    thinks = any(message.get(key) for key in REASONING)
    content, thought = _content(message.get("content"), number, optional=bool(calls) or thinks)
    thought = _reasoning(message, thought, number)
    if thought and "</think>" in content:
        content = _without_inline(content, thought, number)
    normal: Message = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise RowError(f"message {number}: only an assistant makes tool_calls, this one is from {role}")
        normal["tool_calls"] = [tool_call(call, number) for call in calls]
    if thought:
        if role != "assistant":
            raise RowError(f"message {number}: only an assistant has reasoning, this one is from {role}")
        normal["reasoning_content"] = thought
    for extra in ("name", "tool_call_id"):
        if message.get(extra, "") != "":
            if not isinstance(message[extra], str):
                raise RowError(f"message {number}: {extra} is {kind_of(message[extra])}, expected a string")
            normal[extra] = message[extra]
    trained = _trained(message, number)
    return normal if trained is None else {**normal, "trained": trained}


def _refuse_unknown(message: dict[str, Any], number: int) -> None:
    for key, value in message.items():
        if key in KNOWN or (key in EMPTY_OF_APIS and not value):
            continue
        if key in EMPTY_OF_APIS:
            raise RowError(f'message {number} has "{key}": only text is trained' + _IGNORE.format(key))
        meant = nearest(str(key), KNOWN)
        hint = f', did you mean "{meant}"?' if meant else ""
        raise RowError(
            f'message {number} has an unknown key "{key}"{hint}  allowed: {", ".join(KNOWN)}' + _IGNORE.format(key)
        )


def _trained(message: dict[str, Any], number: int) -> bool | None:
    """Return what `weight` and its relatives say of a turn: False is "not trained"; None where they say nothing."""
    flags: dict[str, bool] = {}
    for key in FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            shown = json.dumps(value, default=str)
            raise RowError(f"message {number}: {key} is {shown}; allowed: 0 or false (not trained), 1 or true")
        flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise RowError(f"message {number}: {' and '.join(flags)} contradict each other")
    return next(iter(flags.values()), None)


def _reasoning(message: dict[str, Any], from_parts: str, number: int) -> str:
    by_key = {key: message[key] for key in REASONING if message.get(key, "") != ""}
    for key, value in by_key.items():
        if not isinstance(value, str):
            raise RowError(f"message {number}: {key} is {kind_of(value)}, expected a string")
    texts = {*by_key.values(), *([from_parts] if from_parts else [])}
    if len(texts) > 1:
        raise RowError(f"message {number}: {' and '.join(by_key) or 'reasoning'} differ; keep one of them")
    return texts.pop() if texts else ""


def _without_inline(content: str, thought: str, number: int) -> str:
    """Return content whose reasoning stands in a key of its own as well: without it."""
    inline, _, answer = content.partition("</think>")
    if inline.strip().removeprefix("<think>").strip() != thought.strip():
        raise RowError(f"message {number}: its reasoning and what its content says before </think> differ; keep one")
    return answer.lstrip()


def _calls(message: dict[str, Any], number: int) -> list[Any]:
    """Return `tool_calls` (a list or its JSON text), or OpenAI's old `function_call` as one of them."""
    calls, old = message.get("tool_calls") or [], message.get("function_call")
    if isinstance(calls, str):
        calls = _json(calls, f"message {number}: tool_calls")
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls is {kind_of(calls)}, expected a list")
    if not old:
        return calls
    if calls:
        raise RowError(f"message {number} has both tool_calls and function_call; keep one of them")
    return [_json(old, f"message {number}: function_call") if isinstance(old, str) else old]


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RowError(f"{what} is a string that is not valid JSON ({error})") from None


def _content(content: Any, number: int, *, optional: bool) -> tuple[str, str]:
    """Return (text, reasoning) of a content; the reasoning is that of parts of type thinking."""
    if isinstance(content, str):
        return content, ""
    if content is None:
        if optional:
            return "", ""
        raise RowError(f"message {number} has no content")
    if not isinstance(content, list):
        raise RowError(f"message {number}: content is {kind_of(content)}, expected a string")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if kind in ("thinking", "reasoning") and isinstance(fields.get(kind, fields.get("text")), str):
            thoughts.append(fields.pop(kind, None) or fields.pop("text"))
            fields.pop("signature", None)  # of an API's own, for the same text
        elif isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(fields.get("text"), str):
            texts.append(fields.pop("text"))
        else:
            raise RowError(
                f"message {number} has a content part that is not text ({kind or 'unknown'}); only text is trained"
            )
        more = [key for key, value in fields.items() if key != "type" and value not in ([], {}, "")]
        if more:
            raise RowError(f'message {number}: a content part has an unknown key "{more[0]}"' + _IGNORE.format(more[0]))
    return "".join(texts), "\n".join(thoughts)


def tool_call(call: Any, number: int) -> dict[str, Any]:
    """Return one call as `{"type": "function", "function": {"name", "arguments": object}}`; `id` is kept.

    Nulls in arguments given as an object are left out, as Arrow writes them for every argument of any other call; in
    JSON text they are the author's and stay.

    Raises:
        RowError: no name, an unknown key, or arguments that are neither an object nor a JSON object in a string.
    """
    if isinstance(call, str):
        call = _json(call, f"message {number}: a tool call")
    if not isinstance(call, dict):
        raise RowError(f"message {number}: a tool call is {kind_of(call)}, expected an object")
    function = call.get("function")
    if isinstance(function, str):  # a call given flat, under the name of its function
        call, function = {"name": function, **{key: call[key] for key in call if key != "function"}}, None
    function = call if function is None else function
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {number}: a tool call without a function name")
    if call.get("type") not in (None, "function", "function_call", "tool_call"):
        raise RowError(f"message {number}: a tool call of type {json.dumps(call['type'])}, expected function")
    name, outer = function["name"], ("id", "type", "index", "function")
    _refuse_keys(call if function is not call else {}, outer, f"message {number}: the call of {name}")
    inner = ("name", "arguments", "parameters", *(outer if function is call else ()))
    _refuse_keys(function, inner, f"message {number}: the call of {name}")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("parameters")
    elif function.get("parameters") is not None:
        raise RowError(f"message {number}: the call of {name} has both arguments and parameters; keep one of them")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError as error:
            raise RowError(f"message {number}: arguments of {name} are not valid JSON ({error})") from None
    else:
        arguments = present(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"message {number}: arguments of {name} are {kind_of(arguments)}, expected an object")
    normal: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **normal} if call.get("id") is not None else normal


def _refuse_keys(given: dict[str, Any], allowed: Sequence[str], where: str) -> None:
    for key, value in given.items():
        if key not in allowed and value not in (None, "", [], {}):
            meant = nearest(str(key), list(allowed))
            hint = f', did you mean "{meant}"?' if meant else ""
            raise RowError(f'{where} has an unknown key "{key}"{hint}  allowed: {", ".join(allowed)}')


def present(value: Any) -> Any:
    """Return the object without keys whose value is null: columnar files write every key of every row."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    return [present(item) for item in value] if isinstance(value, list) else value


def tool_definitions(tools: Any) -> list[dict[str, Any]] | None:
    """Return the `tools` column (a list, or its JSON text) as function definitions; None when empty.

    Nulls in them are left out, unless the definition is JSON text.

    Raises:
        RowError: not JSON, not a list, or a definition without a name.
    """
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise RowError(f'"tools" is not valid JSON ({error})') from None
    elif isinstance(tools, list):
        tools = [
            _json(tool, f'"tools": definition {number}') if isinstance(tool, str) else present(tool)
            for number, tool in enumerate(tools, 1)
        ]
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError(f'"tools" is {kind_of(tools)}, expected a list of tool definitions')
    wrapped = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f'"tools": definition {number} has no function name')
        if function is tool:
            wrapped.append({"type": "function", "function": {key: tool[key] for key in tool if key != "type"}})
        else:
            wrapped.append({"type": "function", **tool})
    return wrapped


_MERGE = "  [data] merge_turns = true joins neighbouring turns of one role"


def _check_order(messages: list[Message]) -> None:
    """Check the order: optional system, then user and assistant in turn; tool results only after a call."""
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        fix = _MERGE if role == before else ""
        if role == "system":
            if number != 1:
                raise RowError(f"message {number} is a system message; only the first may be{fix}")
        elif role == "user":
            if before not in ("start", "system", "assistant"):
                raise RowError(
                    f"message {number} (user) follows a {before} message; expected the assistant's turn{fix}"
                )
        elif role == "assistant":
            if before not in ("user", "tool"):
                what = "a" + ("n assistant" if before == "assistant" else f" {before}") + " message"
                where = f"follows {what}" if before != "start" else "opens the conversation"
                raise RowError(f"message {number} (assistant) {where}; expected a user or tool message before it{fix}")
        elif before != "tool" and not (before == "assistant" and messages[number - 2].get("tool_calls")):
            raise RowError(f"message {number} (tool) does not follow an assistant message with tool_calls")
        before = role
    if before != "assistant":
        raise RowError(
            f"the last message is from {before}; it must be the assistant's, or there is nothing to learn "
            '(format = "prompt" is for objectives whose model writes the answers)'
        )
