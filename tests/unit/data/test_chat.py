"""What messages of any dialect say is taken over, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.core.errors import DataError
from distft.data.chat import conversation, merge_turns, tool_call, tool_definitions
from distft.data.formats import FORMATS
from distft.data.samples import Conversation, RowError
from distft.data.store import Prepared

ASKED = {"role": "user", "content": "go"}
ANSWER = {"role": "assistant", "content": "done"}


def said(message: dict[str, Any]) -> dict[str, Any]:
    """The normal form of an assistant's message."""
    return conversation([ASKED, message]).messages[1]


def test_old_function_calls_are_tool_calls() -> None:
    """OpenAI's form before `tools`: the call, its result under the role `function`, definitions in `functions`."""
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    row = {
        "messages": [ASKED, call, {"role": "function", "name": "f", "content": "2"}, ANSWER],
        "functions": [{"name": "f"}],
    }
    chat = FORMATS["messages"].convert(row)
    assert isinstance(chat, Conversation)
    assert chat.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    assert chat.messages[2] == {"role": "tool", "name": "f", "content": "2"}
    assert chat.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "f", "arguments": {"a": 1}}},
        {"name": "f", "arguments": {"a": 1}},
        {"name": "f", "parameters": {"a": 1}},
        {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}, "index": 0},
        {"function": "f", "arguments": '{"a": 1}'},
        '{"name": "f", "arguments": {"a": 1}}',
        {"name": "f", "arguments": {"a": 1, "b": None, "c": None}},
    ],
)
def test_calls_of_every_dialect_are_one(call: Any) -> None:
    assert tool_call(call, 1) == {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert said({"role": "assistant", "content": "", "tool_calls": json.dumps([call])})["tool_calls"]


def test_nulls_that_arrow_writes_are_not_there() -> None:
    calls = [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": {"x": None, "y": [1]}, "b": None}}}
    ]
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": calls,
        "tool_call_id": None,
        "weight": None,
        "name": None,
    }
    assert said(message) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": {"y": [1]}}}}],
    }
    parameters = {"type": "object", "properties": {"a": {"type": "string", "enum": [None, "x"]}, "b": None}}
    (tool,) = (
        tool_definitions([{"type": "function", "function": {"name": "f", "parameters": parameters}, "strict": None}])
        or []
    )
    assert tool["function"]["parameters"]["properties"] == {"a": {"type": "string", "enum": [None, "x"]}}
    assert tool.keys() == {"type", "function"}


def test_nulls_that_an_author_wrote_stay() -> None:
    assert tool_call({"name": "f", "arguments": '{"a": null}'}, 1)["function"]["arguments"] == {"a": None}
    (tool,) = tool_definitions('[{"name": "f", "parameters": {"default": null}}]') or []
    assert tool["function"]["parameters"] == {"default": None}


def test_flat_definitions_lose_no_key() -> None:
    flat = {"type": "function", "name": "f", "strict": True, "parameters": {}}
    assert tool_definitions([flat]) == [
        {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}
    ]
    wrapped = {"type": "function", "function": {"name": "f"}, "strict": True}
    assert tool_definitions([wrapped]) == [wrapped]
    assert tool_definitions([json.dumps(wrapped)]) == [wrapped]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key: str) -> None:
    assert said(ANSWER | {key: "hm"}) == ANSWER | {"reasoning_content": "hm"}
    parts = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "done"}]
    assert said({"role": "assistant", "content": parts}) == ANSWER | {"reasoning_content": "hm"}
    assert said(ANSWER | {key: "", "refusal": None, "annotations": [], "audio": None}) == ANSWER


def test_reasoning_said_twice_is_kept_once() -> None:
    twice = {"role": "assistant", "content": "<think>\nhm\n</think>\n\ndone", "reasoning": "hm"}
    assert said(twice) == ANSWER | {"reasoning_content": "hm"}
    with pytest.raises(RowError, match="its reasoning and what its content says before </think> differ; keep one"):
        said(twice | {"reasoning": "hmm"})
    assert said({"role": "assistant", "content": None, "reasoning": "hm"})["content"] == "", "it may only think"


REFUSED = {
    "unknown key": (ANSWER | {"contentt": "x"}, r'message 2 has an unknown key "contentt", did you mean "content"\?'),
    "misspelt weight": (
        ANSWER | {"weight_": 0},
        r'"weight_", did you mean "weight"\?  allowed: role, .*ignore = \["weight_"\]',
    ),
    "unknown again": (ANSWER | {"timestamp": 3}, r'unknown key "timestamp"  allowed.*ignore = \["timestamp"\]'),
    "a mask": (ANSWER | {"loss_mask": 0}, 'unknown key "loss_mask"'),
    "images": (ANSWER | {"images": ["x.png"]}, 'message 2 has "images": only text is trained'),
    "half a weight": (ANSWER | {"weight": 0.5}, "message 2: weight is 0.5; allowed: 0 or false"),
    "weight in words": (ANSWER | {"weight": "0"}, 'message 2: weight is "0"'),
    "two flags": (ANSWER | {"weight": 0, "train": True}, "message 2: weight and train contradict each other"),
    "two calls": (
        ANSWER | {"function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]},
        "both tool_calls and function_call",
    ),
    "two thoughts": (ANSWER | {"reasoning": "a", "thinking": "b"}, "message 2: reasoning and thinking differ"),
    "thoughts as a list": (ANSWER | {"reasoning": ["a"]}, "message 2: reasoning is a list, expected a string"),
    "a call's typo": (
        ANSWER | {"tool_calls": [{"name": "f", "argumentss": {}, "arguments": None}]} | {"content": "x"},
        None,
    ),
    "a call's typo that says something": (
        ANSWER | {"tool_calls": [{"name": "f", "argumentss": {"a": 1}}]},
        r'the call of f has an unknown key "argumentss", did you mean "arguments"\?',
    ),
    "another kind of call": (
        ANSWER | {"tool_calls": [{"type": "custom", "name": "f"}]},
        'a tool call of type "custom", expected function',
    ),
    "call in broken json": (ANSWER | {"tool_calls": "[{"}, "message 2: tool_calls is a string that is not valid JSON"),
    "captioned image": (
        {"role": "assistant", "content": [{"type": "image", "text": "a cat"}]},
        r"message 2 has a content part that is not text \(image\)",
    ),
    "part with more": (
        {"role": "assistant", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        'a content part has an unknown key "cache_control"',
    ),
    "tool result part": (
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]},
        r"that is not text \(tool_use\)",
    ),
    "name is a number": (ANSWER | {"name": 3}, "message 2: name is a number, expected a string"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    message, match = REFUSED[name]
    if match is None:
        assert said(message)["tool_calls"]
        return
    with pytest.raises(RowError, match=match):
        said(message)


def test_only_an_assistant_thinks() -> None:
    with pytest.raises(RowError, match="message 1: only an assistant has reasoning, this one is from user"):
        conversation([ASKED | {"reasoning": "x"}, ANSWER])


def test_sharegpt_turns_say_as_much() -> None:
    turns = [{"from": "human", "value": "go"}, {"from": "gpt", "value": "done", "weight": 0, "reasoning": "hm"}]
    chat = FORMATS["sharegpt"].convert({"conversations": json.dumps(turns)})
    assert isinstance(chat, Conversation)
    assert chat.messages[1] == ANSWER | {"reasoning_content": "hm", "trained": False}
    with pytest.raises(RowError, match=r'turn 1 is from \["human"\]'):
        FORMATS["sharegpt"].convert({"conversations": [{"from": ["human"], "value": "go"}]})
    for wrong in ({"valuee": "x"}, {"content": "x"}):
        with pytest.raises(RowError, match=r'unknown key "valuee"|"role" or "content" beside "from"'):
            FORMATS["sharegpt"].convert({"conversations": [{"from": "human", "value": "go"}, {**turns[1], **wrong}]})


def test_messages_may_be_json_text() -> None:
    text = json.dumps([ASKED, ANSWER])
    assert FORMATS["messages"].convert({"messages": text}) == conversation([ASKED, ANSWER])
    pair = {"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWER])}
    assert FORMATS["prompt_completion"].convert(pair) == conversation([ASKED, ANSWER], num_prompt=1)
    for wrong, message in (
        (str([ASKED, ANSWER]), r"holds Python's notation of a list, not JSON  write it with json.dumps"),
        ("[{", "is a string that is not valid JSON"),
        ("hi", '"messages" is a string, expected a list of messages'),
    ):
        with pytest.raises(RowError, match=message):
            FORMATS["messages"].convert({"messages": wrong})


def test_messages_may_be_kept_key_by_key() -> None:
    """As older versions of `datasets` store a sequence of objects."""
    by_key = {"role": ["user", "assistant"], "content": ["go", "done"], "name": [None, None]}
    assert FORMATS["messages"].convert({"messages": by_key}) == conversation([ASKED, ANSWER])
    with pytest.raises(RowError, match="not as many of each key"):
        FORMATS["messages"].convert({"messages": by_key | {"content": ["go"]}})


def test_a_system_column_is_the_first_message() -> None:
    row = {"messages": [ASKED, ANSWER], "system": "Be."}
    chat = FORMATS["messages"].convert(row)
    assert isinstance(chat, Conversation)
    assert chat.messages[0] == {"role": "system", "content": "Be."}
    again = {"messages": [{"role": "system", "content": "Be not."}, ASKED, ANSWER], "system": "Be."}
    with pytest.raises(RowError, match="are two system messages; keep one of them"):
        FORMATS["messages"].convert(again)


MERGED = {
    "users": ([ASKED, ASKED, ANSWER], [{"role": "user", "content": "go\n\ngo"}, ANSWER]),
    "assistants": ([ASKED, ANSWER, ANSWER], [ASKED, {"role": "assistant", "content": "done\n\ndone"}]),
    "systems": (
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}],
        [{"role": "system", "content": "a\n\nb"}],
    ),
    "sharegpt": (
        [{"from": "human", "value": "a"}, {"from": "user", "value": "b"}],
        [{"from": "human", "value": "a\n\nb"}],
    ),
    "calls": (
        [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [1]}],
        [{"role": "assistant", "content": "a", "tool_calls": [1]}],
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 2,
        [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "\n\n", "a")]}],
    ),
    "results stay": ([{"role": "tool", "content": "1"}] * 2, [{"role": "tool", "content": "1"}] * 2),
}


@pytest.mark.parametrize("name", MERGED)
def test_neighbours_of_one_role_are_merged(name: str) -> None:
    given, right = MERGED[name]
    before = json.dumps(given)
    assert merge_turns(given) == right
    assert json.dumps(given) == before


def test_neighbours_that_disagree_are_not_merged() -> None:
    with pytest.raises(
        RowError, match='message 2 cannot be merged with the one before it: only one of them says "weight"'
    ):
        merge_turns([ANSWER | {"weight": 0}, ANSWER])
    with pytest.raises(RowError, match='"weight" differs'):
        merge_turns([ANSWER | {"weight": 1}, ANSWER | {"weight": 0.0}] * 1)


def test_the_message_offers_to_merge_and_it_does(write: Callable[..., Path], prepared: Callable[..., Prepared]) -> None:
    for chat in ([ASKED, ASKED, ANSWER], [ASKED, ANSWER, ANSWER]):
        path = write([{"messages": chat}])
        with pytest.raises(
            DataError, match=r"follows an? \w+ message.*\[data\] merge_turns = true joins neighbouring turns"
        ):
            prepared(path)
        assert prepared(path, merge_turns=True).num_rows == 1
    path = write([{"messages": [ANSWER, ASKED]}])
    with pytest.raises(DataError, match="opens the conversation") as raised:
        prepared(path)
    assert "merge_turns" not in str(raised.value), "it would not help"


def test_keys_are_left_out_on_purpose(write: Callable[..., Path], prepared: Callable[..., Prepared]) -> None:
    row = {"messages": [ASKED | {"id": 1}, ANSWER | {"id": 2, "timestamp": "x"}]}
    path = write([row])
    with pytest.raises(DataError, match=r'train\.jsonl:1: message 1 has an unknown key "id"'):
        prepared(path)
    assert prepared({"path": str(path), "ignore": ("id", "timestamp")}).num_rows == 1
