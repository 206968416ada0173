"""Splits a message into parts and checks whether a rendered chat still contains them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distft.data.samples import Message

CONTENT = "content"
REASONING = "reasoning"
CALL = "tool call"
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_MOST_WORDS = 20_000
"""Most words of a piece that is looked for word by word."""


@dataclass(frozen=True)
class MessagePart:
    """A part of a message."""

    kind: str
    text: str
    """The text without white space at its ends, which templates trim."""


def thought_and_answer(message: Message) -> tuple[str, str]:
    """Return the reasoning and content; reasoning may also stand in the content, before `</think>`."""
    content, thought = message["content"], message.get("reasoning_content", "")
    inline = _THOUGHT.fullmatch(content) if "</think>" in content else None
    if thought or inline is None:
        return thought.strip(), content
    return inline[1].strip(), inline[2].lstrip()


def says_nothing(message: Message) -> bool:
    """Return whether there is no text but white space, and no tool call."""
    thought, answer = thought_and_answer(message)
    return not (thought or answer.strip() or message.get("tool_calls"))


def pieces(message: Message) -> list[MessagePart]:
    """Return all parts of a message's content, in the order in which templates write them."""
    if message["role"] != "assistant":
        return [MessagePart(CONTENT, message["content"].strip())] if message["content"].strip() else []
    thought, answer = thought_and_answer(message)
    parts = [MessagePart(REASONING, thought), MessagePart(CONTENT, answer.strip())]
    for call in message.get("tool_calls", ()):
        parts += [
            MessagePart(CALL, call["function"]["name"]),
            *(MessagePart(CALL, leaf) for leaf in _leaves(call["function"]["arguments"])),
        ]
    return [piece for piece in parts if piece.text]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value.strip()


@dataclass(frozen=True)
class MessageMatch:
    """Where a text says what a message says."""

    missing: tuple[MessagePart, ...]
    """What it does not say."""
    end: int
    """Behind the last piece."""


def find(text: str, message: Message, begin: int = 0, end: int | None = None) -> MessageMatch:
    """Look for every piece of a message between two places of a text.

    Reasoning and content each have a place of their own; parts of tool calls may repeat.
    """
    end = len(text) if end is None else end
    missing: list[MessagePart] = []
    first, behind, last = end, begin, begin
    for piece in pieces(message):
        if piece.kind == CALL:
            place = _place(text, piece.text, begin, end)
        else:
            place = _place(text, piece.text, behind, end) or (
                _place(text, piece.text, begin, first) if first < end else None
            )
            if place is not None:
                first, behind = min(first, place[0]), max(behind, place[1])
        if place is None:
            missing.append(piece)
        else:
            last = max(last, place[1])
    return MessageMatch(tuple(missing), last)


def _place(text: str, wanted: str, begin: int, end: int) -> tuple[int, int] | None:
    """Find `wanted` as it is, as JSON text (templates may write results so), or with other white space in it."""
    start = text.find(wanted, begin, end)
    if start >= 0:
        return start, start + len(wanted)
    for form in (json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1]):
        start = text.find(form, begin, end)
        if start >= 0:
            return start, start + len(form)
    words = wanted.split()
    if not 1 < len(words) <= _MOST_WORDS:
        return None
    match = re.compile(r"\s+".join(map(re.escape, words))).search(text, begin, end)
    return None if match is None else match.span()


_OPENS = re.compile(r"\s*(<[^<>\s]{1,40}>)")
_CLOSES = re.compile(r"(</[^<>\s]{1,40}>)\s*\Z")
_STAND_IN = "70930{:06d}81"
"""Digits: no template changes them, and no other text has them."""


@dataclass(frozen=True)
class StandIn:
    """A chat of the same form, in which every piece is another number: what a template leaves out can be told."""

    messages: list[Message]
    pieces: dict[str, tuple[int, str]]
    """Number -> (index of the message, kind)."""

    def lost(self, text: str) -> set[tuple[int, str]]:
        """Return the pieces that the rendered text does not have."""
        return {piece for number, piece in self.pieces.items() if number not in text}


_PLAIN = {"role", "content", "trained"}


def form_of(messages: Sequence[Message]) -> str:
    """Return a text that is equal for chats with the same kinds of parts, which templates treat alike."""
    if all(message.keys() <= _PLAIN and not _has_tags(message["content"]) for message in messages):
        return " ".join(f"{message['role']}{bool(message['content'].strip())}" for message in messages)
    return json.dumps(stand_in(messages).messages)


def _has_tags(content: str) -> bool:
    return "</think>" in content or content.lstrip()[:1] == "<" or content.rstrip()[-1:] == ">"


def stand_in(messages: Sequence[Message]) -> StandIn:
    """Return the same chat with numbers in place of its texts; tags around a content stay, as templates read them."""
    pieces: dict[str, tuple[int, str]] = {}

    def number(index: int, kind: str) -> str:
        name = _STAND_IN.format(len(pieces))
        pieces[name] = (index, kind)
        return name

    others: list[Message] = []
    for index, message in enumerate(messages):
        stand_in_message: Message = {key: value for key, value in message.items() if key in ("role", "tool_call_id")}
        thought, answer = thought_and_answer(message) if message["role"] == "assistant" else ("", message["content"])
        inline = answer is not message["content"]
        if "reasoning_content" in message:
            stand_in_message["reasoning_content"] = number(index, REASONING)
        if answer.strip():
            before, behind = _OPENS.match(answer), _CLOSES.search(answer, max(0, len(answer) - 60))
            answer = f"{before[1] if before else ''}{number(index, CONTENT)}{behind[1] if behind else ''}"
        else:
            answer = ""
        if inline:
            opener = "<think>" if message["content"].lstrip().startswith("<think>") else ""
            answer = f"{opener}\n{number(index, REASONING) if thought else ''}\n</think>\n\n{answer}"
        stand_in_message["content"] = answer
        if "tool_calls" in message:
            stand_in_message["tool_calls"] = [
                {
                    **{key: value for key, value in call.items() if key == "type"},
                    "id": "abcdefghi",
                    "function": {
                        "name": number(index, CALL),
                        "arguments": {"a": number(index, CALL)} if call["function"]["arguments"] else {},
                    },
                }
                for call in message["tool_calls"]
            ]
        others.append(stand_in_message)
    return StandIn(others, pieces)
