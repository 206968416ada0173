"""Pairs in every form that people have become two documents with one beginning, or a message."""

from __future__ import annotations

from typing import Any

import pytest

from distft.data.formats import preference
from distft.data.samples import Conversation, PromptCompletion, RowError

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)
SYSTEM = {"role": "system", "content": "be brief"}
HUMAN = {"from": "human", "value": "2+2?"}
CHAT = [USER, GOOD], [USER, BAD], 1
FORMS: dict[str, tuple[dict[str, Any], Any, float]] = {
    "TRL, messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHAT, 0),
    "TRL, implicit": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT, 0),
    "implicit, several turns": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
        ([USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD], 3),
        0,
    ),
    "binarised UltraFeedback": (
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.5, "score_rejected": 6.0},
        CHAT,
        2.5,
    ),
    "a prompt and messages": ({"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD], "margin": 1}, CHAT, 1),
    "system column": (
        {"system": "be brief", "question": "2+2?", "chosen": "4", "rejected": "5"},
        ([SYSTEM, USER, GOOD], [SYSTEM, USER, BAD], 2),
        0,
    ),
    "OpenAI": (
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        CHAT,
        0,
    ),
    "LLaMA-Factory, alpaca": ({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, CHAT, 0),
    "LLaMA-Factory, sharegpt": (
        {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        CHAT,
        0,
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4\n\nHuman: sure?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: 4\n\nHuman: sure?\n\nAssistant: No.",
        },
        (
            [USER, GOOD, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "Yes."}],
            [USER, GOOD, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "No."}],
            3,
        ),
        0,
    ),
    "HH-RLHF with a prompt": (
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
        CHAT,
        0,
    ),
    "UltraFeedback": (
        {
            "instruction": "2+2?",
            "completions": [
                {"response": "5", "overall_score": 2.0},
                {"response": "four", "overall_score": 6},
                {"response": "4", "overall_score": 9.0},
            ],
        },
        CHAT,
        7,
    ),
    "raw text": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        (PromptCompletion(prompt="2+2=", completion="4"), PromptCompletion(prompt="2+2=", completion="5")),
        0,
    ),
    "raw text, implicit": (
        {"chosen": "The sum is four.", "rejected": "The sum is five."},
        (
            PromptCompletion(prompt="The sum is ", completion="four."),
            PromptCompletion(prompt="The sum is ", completion="five."),
        ),
        0,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_both_answers_after_one_prompt(form: str) -> None:
    row, expected, margin = FORMS[form]
    assert preference.matches(row)
    group = preference.convert(row)
    assert group.values == (margin,)
    assert group.same_prompt
    if isinstance(expected[0], PromptCompletion):
        assert group.documents == expected
        return
    chosen, rejected, num_prompt = expected
    for document, messages in zip(group.documents, (chosen, rejected), strict=True):
        assert isinstance(document, Conversation)
        assert document.messages == messages
        assert document.num_prompt == num_prompt


PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a side is missing": ({"prompt": "2+2=", "chosen": "4"}, '"rejected" is missing or empty'),
    "a side is empty": (PAIR | {"chosen": ""}, '"chosen" is missing or empty'),
    "a side is null": (PAIR | {"rejected": None}, '"rejected" is missing or empty'),
    "equal sides": (PAIR | {"rejected": "4"}, "are the same"),
    "equal chats": ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "are the same"),
    "margin as text": (PAIR | {"margin": "big"}, '"margin" is a string, expected a finite number'),
    "margin as truth": (PAIR | {"margin": True}, '"margin" is true/false'),
    "margin below zero": (PAIR | {"margin": -1}, "cannot be negative"),
    "margin not a number": (PAIR | {"margin": float("nan")}, "expected a finite number"),
    "scores the wrong way": (PAIR | {"score_chosen": 1, "score_rejected": 2}, "contradicts itself"),
    "nothing in common": ({"chosen": "Yes", "rejected": "No"}, "do not begin alike"),
    "no message in common": ({"chosen": [GOOD], "rejected": [BAD]}, "no first message in common"),
    "another prompt": ({"prompt": "3+3?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "none of them"),
    "ends with the user": (
        {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]},
        "does not end with an assistant",
    ),
    "a number as an answer": (PAIR | {"chosen": 4, "rejected": 5}, '"chosen" is a number, expected a list'),
    "tools with raw text": (PAIR | {"tools": [{"type": "function", "function": {"name": "f"}}]}, "need a chat"),
    "all scores equal": (
        {"prompt": "x", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 1}]},
        "none is preferred",
    ),
    "a score is missing": ({"prompt": "x", "completions": [{"text": "a", "score": 1}, {"text": "b"}]}, "needs a text"),
    "one scored answer": ({"prompt": "x", "completions": [{"text": "a", "score": 1}]}, "two or more answers"),
    "an unknown speaker": (
        {"conversations": [HUMAN], "chosen": {"from": "bot", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        'turn 1 is from "bot"',
    ),
    "nothing at all": ({"prompt": "x"}, 'missing "chosen" and "rejected"'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    row, message = MISTAKES[mistake]
    with pytest.raises(RowError) as caught:
        preference.convert(row)
    assert message in str(caught.value)


def test_positions_are_for_a_document_not_for_a_pair(prepared: Any, write: Any) -> None:
    rows = prepared(write([{"prompt": "a b c", "chosen": " x y z", "rejected": " x"}]), max_length=64)
    assert rows.group_size == 2
    assert rows.longest_document == max(rows.documents(0)) < rows.lengths[0] == sum(rows.documents(0))
