"""Rows that ask and hold no answer: every form, what is asked of the model, who takes them, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_kit import table_of

from distft import load_recipe
from distft.compatibility import refuse_other_rows
from distft.core.errors import DataError, RecipeError
from distft.data.formats import FORMATS
from distft.data.prepare import prepare
from distft.data.questions import questions
from distft.data.render import load_renderer
from distft.data.samples import RowError
from distft.scores.exact_match import SPEC as EXACT
from distft.scores.spec import Answer

SYSTEM, USER = {"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]] | str]] = {
    # name: (row, what is asked)
    "text": ({"prompt": "2 + 2 ="}, "2 + 2 ="),
    "messages": ({"messages": [USER], "answer": "4"}, [USER]),
    "messages as text": ({"messages": json.dumps([SYSTEM, USER])}, [SYSTEM, USER]),
    "prompt of messages": ({"prompt": [USER, GOOD, USER]}, [USER, GOOD, USER]),
    "prompt of messages as text": ({"prompt": json.dumps([USER])}, [USER]),
    "system beside": ({"prompt": [USER], "system": "Count."}, [SYSTEM, USER]),
}
MISTAKES = {
    "an answer": ({"prompt": "a", "completion": "b"}, r'has an answer \("completion"\).*use format = "auto"'),
    "an answer in the chat": ({"messages": [USER, GOOD]}, 'the last message is the assistant\'s.*"messages"'),
    "two": ({"prompt": "a", "messages": [USER]}, "keep one of them"),
    "a number": ({"prompt": 3}, '"prompt" is a number, expected a string'),
    "no chat": ({"messages": 3}, "messages"),
    "nobody asks": ({"messages": [SYSTEM]}, "expected a user"),
    "tools without a chat": (
        {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
        "need a chat",
    ),
}
RECIPE = """name = "x"
[model]
path = "demo:tiny-llama"
[objective]
name = "{objective}"
[data]
packing = false
[[data.train]]
path = "rows.jsonl"
[train]
max_steps = 1
"""


@pytest.mark.parametrize("name", FORMS)
def test_what_is_asked_is_the_row_and_there_is_no_right_answer(name: str, tokenizer: Path, tmp_path: Path) -> None:
    row, wanted = FORMS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    table = table_of({"path": str(tmp_path / "rows.jsonl"), "format": "prompt"})
    renderer = load_renderer(tokenizer, chat_template="chatml")
    given: Any = {"columns": None, "max_rows": None, "skip_bad": False, "progress": lambda count: None}
    (question,) = questions(table.train, renderer, **given)
    if isinstance(wanted, str):
        assert (question.prompt, question.as_chat) == (wanted, False)
    else:
        assert question.chat is not None
        assert question.chat.messages == wanted
        assert question.prompt.endswith("<|im_start|>assistant\n")
    assert question.reference == ""
    assert "..." not in question.prompt
    with pytest.raises(DataError, match=r'holds no right answer  name its column: reference = "\.\.\."'):
        EXACT.build(EXACT.params())([Answer(id="row 1", row=row, reference=question.reference, text="4")])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    row, message = MISTAKES[name]
    with pytest.raises(RowError, match=message):
        FORMATS["prompt"].convert(row)


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_only_objectives_that_write_answers_take_them(objective: str, tokenizer: Path, tmp_path: Path) -> None:
    """Found out by the columns; held-out rows have a loss or are none."""
    text = RECIPE.format(objective=objective)
    rewards = '[rollout]\nrewards = [{ name = "regex", pattern = "4" }]\n' if objective == "grpo" else ""
    (tmp_path / "recipe.toml").write_text(text + rewards)
    recipe = load_recipe(tmp_path / "recipe.toml")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "2 + 2 =", "answer": "4"}) + "\n")
    table = table_of(tmp_path / "rows.jsonl")
    rows = prepare(table, table.train, split="train", tokenizer=str(tokenizer), cache_dir=tmp_path / "cache")
    assert [source.format for source in rows.report.sources] == ["prompt"]
    if objective == "sft":
        with pytest.raises(RecipeError, match=r"line 5 .*learns from answers.* hold none .*grpo, rloo"):
            refuse_other_rows(recipe, rows.report, "train")
    else:
        refuse_other_rows(recipe, rows.report, "train")
    with pytest.raises(RecipeError, match=r"measures the loss of answers.*take \[\[eval.answers\]\]"):
        refuse_other_rows(recipe, rows.report, "eval")
