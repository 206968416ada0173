"""A chat template as a Go template: found by rendering, written for Ollama, and rendered here to be checked.

A Jinja template is not translated line by line. It is asked to render chats of marked contents, and what it writes
around each role becomes the Go template. A template that writes something else around a turn depending on its place or
its content comes out wrong in the check that follows, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distft.core.errors import DataError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]

_MARKS = {"system": "\x01system\x01", "user": "\x01user\x01", "assistant": "\x01assistant\x01"}


@dataclass(frozen=True, kw_only=True)
class Around:
    """What a template writes around the contents of a chat."""

    start: str
    """Before everything."""
    default_system: str
    """Instead of a system turn, where a chat has none."""
    turns: Mapping[str, tuple[str, str]]
    """Role -> texts before and behind its content."""
    ask: str
    """Behind the last turn, to ask for the assistant's."""


def find(render: Render) -> Around:
    """Return what a template writes around contents, found by rendering marked chats.

    Args:
        render: (chat, whether the assistant is asked for its next turn) -> text.

    Raises:
        DataError: what it writes is no text around each turn.
    """
    user, assistant = {"role": "user", "content": _MARKS["user"]}, {"role": "assistant", "content": _MARKS["assistant"]}
    one, two, three = render([user], False), render([user, assistant], False), render([user, assistant, user], False)
    asked = render([user], True)
    if not (two.startswith(one) and three.startswith(two) and asked.startswith(one)):
        raise _irregular("what it writes of a turn depends on the turns that follow")
    answer = _split(two[len(one) :], _MARKS["assistant"])
    question = _split(three[len(two) :], _MARKS["user"])
    if not one.endswith("".join([question[0], _MARKS["user"], question[1]])):
        raise _irregular("the first question is written otherwise than later ones")
    start = one[: len(one) - len(question[0] + _MARKS["user"] + question[1])]
    turns = {"user": question, "assistant": answer}
    made = Around(start=start, default_system="", turns=turns, ask=asked[len(one) :])
    try:
        with_system = render([{"role": "system", "content": _MARKS["system"]}, user], False)
    except Exception:  # templates raise jinja's own errors: this one takes no system turn
        return made
    if _MARKS["system"] not in with_system:
        return made
    before, behind = _split(with_system, _MARKS["system"])
    whole = question[0] + _MARKS["user"] + question[1]
    if not behind.endswith(whole):
        raise _irregular("a system turn changes what is written around the question")
    behind = behind[: len(behind) - len(whole)]
    if before.startswith(start):
        return replace(made, turns=turns | {"system": (before[len(start) :], behind)})
    return replace(made, start="", default_system=start, turns=turns | {"system": (before, behind)})


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, behind = text.partition(mark)
    if not found:
        raise _irregular(f"it does not write the content of a turn ({mark.strip(chr(1))}) as it is")
    return before, behind


def _irregular(why: str) -> DataError:
    return DataError(f"chat template: cannot be written as a Go template: {why}  fix: export it as gguf")


def write(around: Around) -> str:
    """Return the Go template over `.Messages`, on one line but for line ends that it writes itself."""
    system = around.turns.get("system")
    parts = [_text(around.start)]
    if around.default_system:
        first = '{{ if ne (index .Messages 0).Role "system" }}'
        parts.append(f"{first}{_text(around.default_system)}{{{{ end }}}}")
    parts.append("{{ range .Messages }}")
    roles = ["user", "assistant"] + (["system"] if system else [])
    for number, role in enumerate(roles):
        before, behind = around.turns[role]
        word = "if" if number == 0 else "else if"
        parts.append(f'{{{{ {word} eq .Role "{role}" }}}}{_text(before)}{{{{ .Content }}}}{_text(behind)}')
    parts += ["{{ end }}", "{{ end }}", _text(around.ask)]
    return "".join(parts)


def _text(text: str) -> str:
    if '"""' in text:
        raise _irregular('it writes """, which ends a text of a Modelfile')
    return text.replace("{{", '{{ "{{" }}')


# -- the subset of Go's text/template that `write` uses, for the check: https://pkg.go.dev/text/template --------------

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)


def render_go(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Render a Go template of this subset: range, if, else if, else, end, eq, ne, index, fields, strings, trim marks.

    Raises:
        DataError: it says something else.
    """
    nodes, _ = _parse(_tokens(template), 0)
    data = {"Messages": [{"Role": one["role"], "Content": one["content"]} for one in messages]}
    return "".join(_run(nodes, data, data))


def _tokens(template: str) -> list[tuple[str, str]]:
    tokens, place, trims = list[tuple[str, str]](), 0, False
    for action in _ACTION.finditer(template):
        text = template[place : action.start()]
        text = text.lstrip() if trims else text
        tokens.append(("text", text.rstrip() if action[1] else text))
        tokens.append(("action", action[2]))
        place, trims = action.end(), bool(action[3])
    tokens.append(("text", template[place:].lstrip() if trims else template[place:]))
    return tokens


Node = tuple[Any, ...]


def _parse(tokens: list[tuple[str, str]], place: int) -> tuple[list[Node], int]:
    """Return nodes up to an `end` or `else` that closes them, and where that is."""
    nodes = list[Node]()
    while place < len(tokens):
        kind, text = tokens[place]
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or text.split(" ")[0] == "else":
            return nodes, place
        elif text.startswith("range "):
            body, place = _parse(tokens, place + 1)
            nodes.append(("range", text.removeprefix("range "), body))
        elif text.startswith("if "):
            branches, place = _branches(tokens, place, text.removeprefix("if "))
            nodes.append(("if", branches))
        else:
            nodes.append(("value", text))
        place += 1
    return nodes, place


def _branches(tokens: list[tuple[str, str]], place: int, condition: str) -> tuple[list[tuple[str, list[Node]]], int]:
    branches = list[tuple[str, list[Node]]]()
    while True:
        body, place = _parse(tokens, place + 1)
        branches.append((condition, body))
        if place >= len(tokens):
            raise _not_go("{{ if }} without {{ end }}")
        text = tokens[place][1]
        if text == "end":
            return branches, place
        condition = text.removeprefix("else").strip().removeprefix("if ") or "true"


def _run(nodes: Sequence[Node], here: Any, whole: Any) -> list[str]:
    written = list[str]()
    for node in nodes:
        if node[0] == "text":
            written.append(node[1])
        elif node[0] == "value":
            written.append(str(_value(node[1], here, whole)))
        elif node[0] == "range":
            for item in _value(node[1], here, whole):
                written += _run(node[2], item, whole)
        else:
            body = next((body for condition, body in node[1] if _value(condition, here, whole)), [])
            written += _run(body, here, whole)
    return written


_WORDS = re.compile(r'"(?:[^"\\]|\\.)*"|\([^()]*\)(?:\.\w+)?|[^\s()]+')


def _value(text: str, here: Any, whole: Any) -> Any:
    words = _WORDS.findall(text)
    if len(words) == 3 and words[0] in ("eq", "ne", "index"):
        first, second = (_value(word, here, whole) for word in words[1:])
        return first[second] if words[0] == "index" else (first == second) is (words[0] == "eq")
    if len(words) != 1:
        raise _not_go(text)
    word = words[0]
    if word.startswith('"'):
        return word[1:-1]
    if word.startswith("("):
        inner, _, key = word.rpartition(").")
        return _value(inner[1:], here, whole)[key] if inner else _value(word[1:-1], here, whole)
    if word.isdecimal():
        return int(word)
    if word == "true":
        return True
    if word.startswith(".") and word[1:] in here:
        return here[word[1:]]
    raise _not_go(text)


def _not_go(text: str) -> DataError:
    return DataError(f"Go template: {text!r} is not in the subset that is checked here")
