"""The score `trl_function`: functions as TRL's trainer calls them, and what they may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from score_kit import scorer

from distft.core.errors import DataError, RecipeError
from distft.scores import Answer

REWARDS = """
SEEN = []

def polite(prompts, completions, solution, **kwargs):
    SEEN.append((prompts, completions, solution, sorted(kwargs)))
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float("please" in text) * weight for text, weight in zip(texts, solution)]

def sometimes(completions, **kwargs):
    return [None if not c else len(c) for c in completions]

def wrong(completions, **kwargs):
    return 1.0

def fails(completions, **kwargs):
    raise KeyError("solution")

def text(completions, **kwargs):
    return ["good"]

def of_ids(completion_ids, **kwargs):
    return [0.0 for _ in completion_ids]
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rewards_{re.sub('[^a-z0-9]', '_', tmp_path.name)}"
    (tmp_path / f"{name}.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def raw(text: str, **row: object) -> Answer:
    return Answer(id="rows.jsonl row 1", row=row, reference="", text=text, prompt="say")


def test_it_is_called_as_trl_calls_it(rewards: str) -> None:
    chat = ({"role": "user", "content": "say"},)
    asked = Answer(
        id="rows.jsonl row 2",
        row={"messages": [], "solution": 2.0, "level": 1},
        reference="",
        text="please",
        messages=chat,
    )
    result = scorer("trl_function", function=f"{rewards}:polite")([raw("no", solution=1.0, prompt="say"), asked])
    assert result.rows == {"polite": (0.0, 2.0)}
    seen = __import__(rewards).SEEN
    assert seen == [
        (["say"], ["no"], [1.0], []),
        ([[dict(chat[0])]], [[{"role": "assistant", "content": "please"}]], [2.0], ["level"]),
    ]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("sometimes", "returned None: it says nothing of this answer"),
        ("wrong", "returned 1.0, expected a list of one number"),
        ("fails", "raised KeyError: 'solution'"),
        ("text", "returned str 'good', expected a finite number"),
    ],
)
def test_what_is_no_number_is_no_reward_and_never_0(rewards: str, function: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        scorer("trl_function", function=f"{rewards}:{function}")([raw("")])


def test_what_only_trls_trainer_has_is_refused_before_anything_is_written(rewards: str) -> None:
    with pytest.raises(RecipeError, match="asks for completion_ids, which only TRL's trainer hands over"):
        scorer("trl_function", function=f"{rewards}:of_ids")
    with pytest.raises(RecipeError, match="has no 'polit'"):
        scorer("trl_function", function=f"{rewards}:polit")
