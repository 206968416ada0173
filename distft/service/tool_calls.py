"""Tools in chats: rendered by the model's template, and calls read back in the form in which the template writes them.

How a template writes calls is found by having it write one: what stands before, between and behind its JSON objects.
A template that leaves tools out, or writes calls in another form than JSON objects, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.core.errors import Problem, RecipeError
from distft.data.chat import conversation
from distft.data.chat_rendering import TemplateDrawing
from distft.data.samples import Message, RowError

_QUESTION: Message = {"role": "user", "content": "which"}
_NAME, _KEY, _VALUE = "probe_of_calls", "probed_key", "probed value"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}
_CALL = {"type": "function", "id": "callprobe", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a template writes a call."""

    before: str
    """Text in front of a call's JSON object, without the white space around it; "" where it stands bare."""
    behind: str
    arguments: str
    """Key of the arguments beside "name"."""


@dataclass(frozen=True, kw_only=True)
class ReadAnswer:
    """An answer, taken apart."""

    content: str
    calls: tuple[Mapping[str, str], ...] = ()
    """`name` and `arguments`, which are JSON text."""


class ToolChats:
    """Chats with tools of one tokenizer and template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer, self._draw = tokenizer, TemplateDrawing(tokenizer, template, None)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Return the text of a chat up to the answer.

        Raises:
            RecipeError: the template takes no tools, or the messages are no chat that it renders.
        """
        try:
            # the checks of a chat are those of one that is answered
            chat = conversation([*messages, {"role": "assistant", "content": "..."}], list(tools) if tools else None)
            return self._draw(chat.messages[:-1], chat.tools, True)[0]
        except RowError as error:
            raise _mistake("messages", str(error)) from None

    def form(self) -> CallForm:
        """Return how the template writes calls.

        Raises:
            RecipeError: it takes no tools, or writes calls as nothing here reads them.
        """
        try:
            bare = self._draw([_QUESTION], None, True)[0]
            asked = self._draw([_QUESTION], [_TOOL], True)[0]
        except RowError:
            bare = asked = ""
        if _NAME not in asked or asked == bare:
            raise _mistake("tools", "this model's chat template takes no tools")
        called = self._called(asked)
        for place, char in enumerate(called):
            if char != "{":
                continue
            try:
                call, end = json.JSONDecoder().raw_decode(called, place)
            except ValueError:
                continue
            keys = [key for key in ("arguments", "parameters") if call.get(key) == {_KEY: _VALUE}]
            if call.get("name") == _NAME and keys:
                before, behind = called[:place].strip(), called[end:].strip()
                return CallForm(before=before, behind=behind, arguments=keys[0])
        raise _mistake("tools", "this model's chat template writes calls of tools in a form that is not read here")

    def _called(self, asked: str) -> str:
        """Return the turn in which the template calls, as an answer would be decoded."""
        message: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        try:
            whole = self._draw([_QUESTION, message], [_TOOL], False)[0]
        except RowError:
            return ""
        if not whole.startswith(asked):
            return ""
        ids = self._tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"]
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def read_answer(text: str, form: CallForm, names: Sequence[str]) -> ReadAnswer:
    """Return what an answer says, and what it calls; text that is no whole call stays text.

    Args:
        text: the answer.
        form: of calls.
        names: of the tools that the model was offered: a bare JSON object is a call of one of them, or an answer.
    """
    if not form.before:
        call, end = _call_at(text, len(text) - len(text.lstrip()), form)
        whole = call is not None and not text[end:].strip().removeprefix(form.behind).strip()
        if call is None or not whole or call["name"] not in names:
            return ReadAnswer(content=text)
        return ReadAnswer(content="", calls=(call,))
    content, *parts = text.split(form.before)
    calls: list[Mapping[str, str]] = []
    for part in parts:
        call, end = _call_at(part, len(part) - len(part.lstrip()), form)
        if call is None or not part[end:].strip().startswith(form.behind):
            return ReadAnswer(content=text)
        if part[end:].strip().removeprefix(form.behind).strip():
            return ReadAnswer(content=text)  # it goes on behind the call: nothing is left out
        calls.append(call)
    return ReadAnswer(content=content.strip() if calls else text, calls=tuple(calls))


def _call_at(text: str, place: int, form: CallForm) -> tuple[Mapping[str, str] | None, int]:
    try:
        call, end = json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None, place
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or form.arguments not in call:
        return None, place
    if set(call) - {"name", form.arguments}:
        return None, place
    arguments = call[form.arguments]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": call["name"], "arguments": text}, end


def _mistake(given: str, message: str) -> RecipeError:
    return RecipeError(given, [Problem(message=message)])
