"""Whatever a chat says, under any template: what is trained stands behind the prompt that it will be asked with."""

from __future__ import annotations

from typing import Any

import chat_templates as shapes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from distft.core.errors import DataError
from distft.data.chat import conversation
from distft.data.message_parts import thought_and_answer
from distft.data.render import Renderer, load_renderer
from distft.data.rendered import Rendered
from distft.data.samples import Conversation, RowError

TEMPLATES = {
    name: getattr(shapes, name)
    for name in ("QWEN3", "R1", "GLM4", "GLM46", "PHI3", "GPT_OSS", "LLAMA31", "MISTRAL", "MISTRAL3", "TEXT_CALLS")
}
PIECES = [
    "a",
    "the weather",
    " ",
    "\n",
    "\n\n",
    "é",
    "🌞",
    "<|im_end|>",
    "<|user|>",
    "</s>",
    "<s>",
    "user",
    "assistant",
    "4",
]
PIECES += ["<think>", "</think>", "{", '"', "'", "\\", "\t", "[INST]", "0", "<b>", "\u2028"]
said = some.lists(some.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
answers = some.fixed_dictionaries(
    {"role": some.just("assistant"), "content": said},
    optional={"reasoning": said, "weight": some.sampled_from([0, 1])},
)


@some.composite
def chats(draw: Any) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": draw(said)}] if draw(some.booleans()) else []
    for _ in range(draw(some.integers(1, 3))):
        messages += [{"role": "user", "content": draw(said)}, draw(answers)]
    return messages


MADE: dict[str, tuple[Renderer, Renderer]] = {}
"""Of each template: every turn trained, and everything. Not a fixture: hypothesis would print it with each example."""


@pytest.fixture(scope="module", autouse=True)
def _made(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, template in TEMPLATES.items():
        folder = shapes.save_tokenizer(tmp_path_factory.mktemp(name), template)
        assistant, whole = (load_renderer(folder, loss_on=on, date="2026-01-31") for on in ("assistant", "all"))
        MADE[name] = assistant, whole


def rendered(renderer: Renderer, messages: list[dict[str, Any]]) -> tuple[Conversation, list[Rendered]] | None:
    """The chat and its rows; None: it is refused, in words."""
    try:
        chat = conversation(messages)
    except RowError:
        return None
    (rows,) = renderer.render_rows([chat])
    if isinstance(rows, Exception):
        assert isinstance(rows, RowError | DataError)
        return None
    return chat, rows


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=chats())
@settings(deadline=None, max_examples=50)
def test_rows_are_what_will_be_asked_and_answered(name: str, messages: list[dict[str, Any]]) -> None:
    renderer, _ = MADE[name]
    if (made := rendered(renderer, messages)) is None:
        return
    chat, rows = made
    turns = [
        index
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant"
        and message.get("trained") is not False
        and any(part.strip() for part in thought_and_answer(message))
    ]
    trained = [(row, span) for row in rows for span in _spans(row.trained_T.tolist())]
    assert len(trained) == len(turns)
    for index, (row, (begin, end)) in zip(turns, trained, strict=True):
        text = squeezed(renderer.tokenizer.decode(row.ids_T[begin:end]))
        for part in thought_and_answer(chat.messages[index]):
            assert squeezed(part) in text
        assert int(row.ids_T[end - 1]) in renderer.tokenizer.added_tokens_decoder
        if len(rows) == len(turns):  # each is the last turn of its row
            asked = Conversation(messages=chat.messages[: index + 1])
            assert row.ids_T[:begin].tolist() == renderer.ask(asked)[1]


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=chats())
@settings(deadline=None, max_examples=30)
def test_a_whole_chat_says_all_that_its_messages_say(name: str, messages: list[dict[str, Any]]) -> None:
    _, renderer = MADE[name]
    if (made := rendered(renderer, messages)) is None or made[1][0].empty:
        return
    chat, rows = made
    text = squeezed(renderer.tokenizer.decode(rows[0].ids_T))
    for message in chat.messages:
        for part in thought_and_answer(message) if message["role"] == "assistant" else [message["content"]]:
            assert squeezed(part) in text


def _spans(trained: list[bool]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for at, flag in enumerate(trained):
        if flag and (at == 0 or not trained[at - 1]):
            spans.append((at, at + 1))
        elif flag:
            spans[-1] = (spans[-1][0], at + 1)
    return spans
