"""`preference`: one prompt with a chosen and a rejected answer, in the forms that people have.

Of each row come two documents with the same beginning. Two strings and a prompt that is a string are raw text; message
lists, transcripts ("Human: ... Assistant: ...") and the columns of chat formats are chats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from distft.data.chat import conversation, message_list
from distft.data.formats import alpaca, sharegpt
from distft.data.formats.messages import tools_of
from distft.data.samples import (
    Document,
    FormatSpec,
    Group,
    Message,
    PromptCompletion,
    Row,
    RowError,
    columns_of,
    kind_of,
    text_column,
)

SIDES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
"""The columns of both answers: most libraries', and OpenAI's."""
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"))
SCORED = ("completions", "responses")
"""Columns with a list of answers that have scores (UltraFeedback)."""
_SCORE_KEYS = ("overall_score", "score", "rating")
_TEXT_KEYS = ("response", "text", "content", "completion")
_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")


def convert(row: Row) -> Group:
    """Return two documents, chosen first; `margin_G` is how much better the chosen one is, 0 if not given."""
    chosen, rejected, margin = _sides(row)
    prompt, tools = _prompt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        documents = _of_texts(prompt, chosen, rejected, tools)
    else:
        documents = _of_messages(prompt, _messages(chosen, "chosen"), _messages(rejected, "rejected"), tools)
    if documents[0] == documents[1]:
        raise RowError("the chosen and the rejected answer are the same")
    return Group(documents=documents, values=(margin,), same_prompt=True)


def _sides(row: Row) -> tuple[Any, Any, float]:
    for good, bad in SIDES:
        if good in row or bad in row:
            for name in (good, bad):
                if row.get(name) in (None, "", []):
                    raise RowError(f'"{name}" is missing or empty: a preference has both "{good}" and "{bad}"')
            return row[good], row[bad], _margin(row)
    name = next((name for name in SCORED if name in row), None)
    if name is None:
        raise RowError(f'missing "chosen" and "rejected"; the row has {columns_of(row)}')
    return _best_and_worst(row[name], name)


def _margin(row: Row) -> float:
    if row.get("margin") is not None:
        margin = _number(row["margin"], "margin")
        if margin < 0:
            raise RowError(f'"margin" is {margin:g}: the chosen answer is the better one, so it cannot be negative')
        return margin
    for good, bad in SCORES:
        if row.get(good) is not None and row.get(bad) is not None:
            gap = _number(row[good], good) - _number(row[bad], bad)
            if gap < 0:
                raise RowError(f'"{bad}" is higher than "{good}": the row contradicts itself')
            return gap
    return 0.0


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f'"{name}" is {kind_of(value)}, expected a finite number')
    return float(value)


def _best_and_worst(answers: Any, column: str) -> tuple[str, str, float]:
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(f'"{column}" is {kind_of(answers)}, expected a list of two or more answers with scores')
    scored: list[tuple[float, str]] = []
    for number, answer in enumerate(answers, 1):
        keys = answer if isinstance(answer, dict) else {}
        text = next((keys[key] for key in _TEXT_KEYS if isinstance(keys.get(key), str)), None)
        score = next((keys[key] for key in _SCORE_KEYS if keys.get(key) is not None), None)
        if text is None or score is None:
            needs = f"a text ({', '.join(_TEXT_KEYS)}) and a score ({', '.join(_SCORE_KEYS)})"
            raise RowError(f'"{column}" entry {number} needs {needs}')
        scored.append((_number(score, f"{column} entry {number}: score"), text))
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise RowError(f'all answers in "{column}" have the score {best[0]:g}: none is preferred')
    return best[1], worst[1], best[0] - worst[0]


def _prompt(row: Row) -> tuple[str | list[Message] | None, Any]:
    """Return the prompt as text or messages, None when the answers hold it; and the tools."""
    tools = tools_of(row)
    if isinstance(row.get("input"), dict):  # OpenAI's
        given = row["input"]
        return message_list(given.get("messages"), "input.messages"), given.get("tools") or tools
    if row.get("conversations") is not None:
        return sharegpt.turns_of(row), tools
    if row.get("instruction") is not None:
        return alpaca.prompt_of(row), tools
    prompt = row.get("prompt", row.get("question"))
    if prompt is None or prompt == "":
        return None, tools
    if isinstance(prompt, str) and not _is_message_text(prompt):
        system = text_column(row, "system", default="")
        if system:
            return [{"role": "system", "content": system}, {"role": "user", "content": prompt}], tools
        return prompt, tools
    return message_list(prompt, "prompt"), tools


def _is_message_text(text: str) -> bool:
    return text.lstrip()[:2] in ("[{", "[ ", "[\n") and '"role"' in text


def _messages(side: Any, name: str) -> list[Any]:
    """Return an answer as messages: a list, or one message; turns with `from` are ShareGPT's."""
    if isinstance(side, str) and not _is_message_text(side):
        return [{"role": "assistant", "content": side}]
    turns = [side] if isinstance(side, dict) else message_list(side, name)
    return [
        sharegpt.message(turn, number) if isinstance(turn, dict) and "from" in turn else turn
        for number, turn in enumerate(turns, 1)
    ]


def _of_texts(prompt: str | list[Message] | None, chosen: str, rejected: str, tools: Any) -> tuple[Document, Document]:
    if isinstance(prompt, list):
        return _of_messages(prompt, _messages(chosen, "chosen"), _messages(rejected, "rejected"), tools)
    if prompt is not None and (before := _transcript(prompt)) is not None:
        return _of_messages(before, _messages(chosen.strip(), "chosen"), _messages(rejected.strip(), "rejected"), tools)
    if prompt is None:
        good, bad = _transcript(chosen), _transcript(rejected)
        if good is not None and bad is not None:
            return _of_messages(None, good, bad, tools)
        prompt = _shared_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not prompt.strip():
            raise RowError('there is no "prompt", and the two answers do not begin alike')
    if tools:
        raise RowError('"tools" need a chat: prompt and answers are strings, which no chat template renders')
    return PromptCompletion(prompt=prompt, completion=chosen), PromptCompletion(prompt=prompt, completion=rejected)


def _of_messages(
    prompt: str | list[Message] | None, chosen: list[Any], rejected: list[Any], tools: Any
) -> tuple[Document, Document]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    common, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(prompt, str):
        user_texts = [turn.get("content") for turn in common if isinstance(turn, dict) and turn.get("role") == "user"]
        if common and prompt not in user_texts:
            raise RowError('both answers begin with the same messages, and "prompt" is none of them; keep one of both')
        before = common or [{"role": "user", "content": prompt}]
    elif prompt is None or common[: len(prompt)] == prompt:
        before = common
    else:
        before = [*prompt, *common]
    if not before:
        raise RowError('there is no "prompt", and the two answers have no first message in common')
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in side]
        if not roles or roles[-1] != "assistant":
            raise RowError(f'"{name}" does not end with an assistant\'s message')
    made = [conversation([*before, *side], tools, num_prompt=len(before)) for side in (chosen, rejected)]
    return made[0], made[1]


def _transcript(text: str) -> list[Message] | None:
    """Return the turns of a transcript in the form of HH-RLHF; None for any other text."""
    if not text.startswith("\n\nHuman:"):
        return None
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": content.strip()} for who, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:  # a prompt that ends where the answer begins
        turns.pop()
    return turns


def _shared_text(first: str, second: str) -> str:
    """Return the common beginning, up to the last white space in it."""
    length = next((index for index, pair in enumerate(zip(first, second, strict=False)) if len({*pair}) > 1), -1)
    if length < 0:
        return ""
    spaces = [index for index in range(length) if first[index].isspace()]
    return first[: spaces[-1] + 1] if spaces else ""


def matches(row: Row) -> bool:
    """Return whether the row has two answers to be compared, or several with scores."""
    two: Sequence[tuple[str, str]] = SIDES
    if any(good in row and bad in row for good, bad in two):
        return True
    return any(
        isinstance(answers := row.get(name), list)
        and len(answers) > 1
        and all(isinstance(answer, dict) and any(key in answer for key in _SCORE_KEYS) for answer in answers)
        for name in SCORED
    )


SPEC = FormatSpec(
    name="preference",
    needs='"chosen" and "rejected": two strings or two lists of messages, "prompt" unless both begin with it, '
    'optional "margin", or "score_chosen" and "score_rejected"',
    matches=matches,
    convert=convert,
    reads=(
        *(name for pair in (*SIDES, *SCORES) for name in pair),
        *SCORED,
        *("prompt", "question", "input", "conversations", "instruction", "history", "system", "margin"),
        *("tools", "functions"),
    ),
    example={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    group_size=2,
    values=("margin_G",),
)
