"""`[[eval.answers]]`: every mistake with its line, what is filled in, and that a resolved recipe reads the same."""

from __future__ import annotations

import pytest

from distft.catalog import REGISTRIES
from distft.core.errors import RecipeError
from distft.recipe import Recipe, parse_recipe

MARK = "# <-"
BASE = """\
name = "run"
[model]
path = "base"
[[data.train]]
path = "train.jsonl"
"""
SET = '[[eval.answers]]\nname = "one"\npath = "rows.jsonl"\nscores = [{ name = "exact_match" }]\n'
HELD_OUT = '[[data.eval]]\npath = "valid.jsonl"\n'


def parse(text: str) -> Recipe:
    return parse_recipe(text, source="r.toml", registries=REGISTRIES)


MISTAKES = {
    "no name": ('[[eval.answers]] # <-\npath = "x.jsonl"\nscores = [{ name = "bleu" }]', "name  is required"),
    "a name that is no file": (SET.replace('"one"', '"a/b" # <-'), 'must be up to 60 letters', 'try "a-b"'),
    "a name twice": (SET + SET.replace('"one"', '"one" # <-'), "is the name of an earlier set"),
    "no scores": (SET.replace("scores = [", "# [").replace("[[eval.answers]]", "[[eval.answers]] # <-"),
                  "scores  is required: what makes an answer right?"),
    "a score without a name": (
        SET.replace('{ name = "exact_match" }]', '{ pattern = "x" }] # <-'), "a score needs a name",
    ),
    "an unknown score": (SET.replace('"exact_match" }]', '"exactmatch" }] # <-'), 'did you mean "exact_match"?'),
    "an unknown setting": (
        SET.replace('"exact_match" }]', '"exact_match", strp = true }] # <-'), 'did you mean "strip"?',
    ),
    "a setting of a wrong type": (
        SET.replace('"exact_match" }]', '"numeric", tolerance = "a" }] # <-'), "must be a number",
    ),
    "the same figure twice": (
        SET.replace('"exact_match" }]', '"regex", pattern = "a" }, { name = "regex", pattern = "b" }] # <-'),
        'gives "regex", which regex of this set gives already',
    ),
    "no rows": (SET.replace('path = "rows.jsonl"\n', "").replace("[[eval.answers]]", "[[eval.answers]] # <-"),
                "path  is required without a [[data.eval]] source"),
    "format without path": (
        HELD_OUT + SET.replace('path = "rows.jsonl"', 'format = "messages" # <-'), "has no effect without path"
    ),
    "an unknown spot set": ('[[eval.answers]]\nname = "s"\npath = "spot:generl2" # <-', 'did you mean "spot:general"?'),
    "trained rows": (SET.replace('"rows.jsonl"', '"train.jsonl" # <-'), "is also trained on"),
    "an unknown format": (SET + 'format = "message" # <-', 'did you mean "messages"?'),
    "plain text": (SET + 'format = "text" # <-', "is plain text, which asks nothing"),
    "reference without prompt": (SET + 'reference = "gold" # <-', "has no effect without prompt"),
    "prompt and format": (SET + 'format = "alpaca"\nprompt = "q" # <-', "cannot be set together with format"),
    "writing that nobody reads": (
        '[[eval.answers]]\nname = "s"\npath = "spot:general"\ntemperature = 0.5 # <-',
        "has no effect: these scores weigh choices",
    ),
    "top_p of the likeliest": (SET + "top_p = 0.5 # <-", "has no effect with temperature = 0"),
    "an unknown figure": (
        "[checkpoint]\nbest = true\n[eval]\nbest_by = \"one.exact\" # <-\n" + SET + "every_steps = 5",
        'is measured nowhere, did you mean "one.exact_match"?',
    ),
    "a figure that decides nothing": (
        '[eval]\nbest_by = "one.exact_match" # <-\n' + SET + "every_steps = 5", "decides nothing",
    ),
    "a figure only at the end": (
        '[checkpoint]\nbest = true\n[eval]\nbest_by = "one.exact_match" # <-\n' + SET,
        'set every_steps in the set "one"',
    ),
    "a task without a name": ('[[eval.answers]]\nname = "s"\npath = "lm-eval:" # <-', "names no task"),
    "a task that is scored": (
        '[[eval.answers]]\nname = "s"\npath = "lm-eval:gsm8k"\nscores = [{ name = "numeric" }] # <-',
        "has no effect: lm-eval:gsm8k says it itself",
    ),
    "shown rows of no task": (SET + "num_fewshot = 2 # <-", "has no effect but on tasks of lm-eval"),
    "a task's figure only at the end": (
        '[checkpoint]\nbest = true\n[eval]\nbest_by = "s.acc" # <-\n[[eval.answers]]\nname = "s"\npath = "lm-eval:x"',
        'set every_steps in the set "s"',
    ),
    "load_best of nothing": ("[train]\nload_best = true # <-", "set [checkpoint] best = true"),
    "a loss without rows": ("[eval]\nevery_steps = 5 # <-\n" + SET, "has no effect without a [[data.eval]] source"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str) -> None:
    added, *said = MISTAKES[name]
    text = BASE + added
    with pytest.raises(RecipeError) as caught:
        parse(text)
    (problem,) = caught.value.problems
    for part in said:
        assert part in f"{problem.message}  {problem.fix}"
    assert problem.line == 1 + next(at for at, line in enumerate(text.splitlines()) if MARK in line)


def test_settings_are_filled_in_and_a_resolved_recipe_reads_the_same() -> None:
    spots = "".join(f'[[eval.answers]]\nname = "{name}"\npath = "spot:{name}"\n' for name in ("general", "refusals"))
    recipe = parse(BASE + SET + spots)
    first, general, refusals = recipe.eval.answers
    assert first.scores[0]["strip"] is True
    assert general.scores == ({"name": "multiple_choice", "choices": "choices", "label": "label"},)
    assert refusals.scores[0]["function"] == "distft.evaluation.sanity_sets:refusal"
    assert parse(recipe.to_toml()) == recipe
    assert parse(recipe.to_toml()).digest() == recipe.digest()


def test_any_figure_can_decide() -> None:
    recipe = parse(BASE + '[checkpoint]\nbest = true\n[eval]\nbest_by = "one.exact_match"\n' + SET + "every_steps = 5")
    assert recipe.eval.best_by == "one.exact_match"


def test_a_task_of_lm_eval_is_a_set() -> None:
    """Which figures it gives is known when it is loaded."""
    table = '[[eval.answers]]\nname = "s"\npath = "lm-eval:gsm8k"\nnum_fewshot = 0\nask_as = "chat"\nevery_steps = 5'
    recipe = parse(BASE + '[checkpoint]\nbest = true\n[eval]\nbest_by = "s.exact_match,strict-match"\n' + table)
    assert (recipe.eval.answers[0].num_fewshot, recipe.eval.answers[0].scores) == (0, ())
    assert parse(recipe.to_toml()) == recipe


def test_without_answers_the_recipe_says_nothing_of_them() -> None:
    assert "eval" not in parse(BASE).resolved()


def test_an_objectives_figures_may_decide() -> None:
    pairs = BASE.replace("[[data.train]]", '[objective]\nname = "dpo"\n[[data.train]]', 1)
    rows = '[[data.eval]]\npath = "held.jsonl"\n[checkpoint]\nbest = true\n[eval]\nbest_by = "eval_reward_accuracy"\n'
    assert parse(pairs + rows + "every_steps = 5").eval.best_by == "eval_reward_accuracy"
    with pytest.raises(RecipeError, match="is not measured during training"):
        parse(pairs + rows)
    with pytest.raises(RecipeError, match=r"did you mean .eval_reward_accuracy.*eval_reward_margin"):
        parse(pairs + rows.replace("_accuracy", "_acuracy") + "every_steps = 5")
    with pytest.raises(RecipeError, match="is measured nowhere"):
        parse(BASE + rows + "every_steps = 5")
