"""What must hold for `[[eval.answers]]`: rules as in `rules`, and the sets that come with the project."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from distft.core.registry import Params
from distft.recipe.evaluation import AnswersTable
from distft.recipe.explain import did_you_mean
from distft.recipe.origin import RecipeMistake
from distft.recipe.schema import Recipe, Registries
from distft.recipe.toml_text import toml_value

ParamsT = TypeVar("ParamsT", bound=Params)
SPOT = "spot:"
TASK = "lm-eval:"
"""A path that is a task of lm-eval's, or a YAML file as it reads them."""
SPOT_SETS: dict[str, tuple[dict[str, Any], ...]] = {
    "spot:general": ({"name": "multiple_choice"},),
    "spot:refusals": (
        {
            "name": "function",
            "function": "distft.evaluation.sanity_sets:refusal",
            "figures": ["as_wanted", "refused"],
        },
    ),
}
"""The sanity sets of `distft.evaluation.sanity_sets`, and how each is scored unless the recipe says."""
EVAL_LOSS = "eval_loss"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
_OF_WRITING = ("max_new_tokens", "temperature", "top_p", "stop")
_NOT_OF_TASKS = ("format", "split", "subset", "columns", "prompt", "reference", "scores", *_OF_WRITING)


def names_are_plain_and_distinct(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check names of sets, which name their files and begin the names of their figures."""
    seen: set[str] = set()
    for index, answers in enumerate(recipe.eval.answers):
        key = ("eval", "answers", index, "name")
        if not _NAME.fullmatch(answers.name) or answers.name in ("summary", "held_out"):
            safe = re.sub(r"[^A-Za-z0-9_-]+", "-", answers.name).strip("-")[:60]
            message = "must be up to 60 letters, digits, dashes and underscores, and not summary or held_out"
            yield RecipeMistake(key=key, message=message, fix=f"try {toml_value(safe)}" if safe else "")
        elif answers.name in seen:
            yield RecipeMistake(key=key, message="is the name of an earlier set", fix="name each set differently")
        seen.add(answers.name)


def answers_have_rows(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that rows come from a path of the set's own, or from the held-out rows."""
    formats = ["auto", *registries.formats]
    trained = {(source.path, source.subset, source.split) for source in recipe.data.train}
    for index, answers in enumerate(recipe.eval.answers):
        where = ("eval", "answers", index)
        if answers.path is None:
            if not recipe.data.eval:
                yield RecipeMistake(
                    key=(*where, "path"), message="is required without a [[data.eval]] source", also=(("data", "eval"),)
                )
            for key in ("format", "split", "subset", "columns"):
                if _is_set(answers, key):
                    yield RecipeMistake(
                        key=(*where, key), message="has no effect without path", fix="remove it, or add path"
                    )
        elif answers.path == TASK:
            yield RecipeMistake(key=(*where, "path"), message="names no task", fix='for example "lm-eval:gsm8k"')
        elif answers.path.startswith(SPOT) and answers.path not in SPOT_SETS:
            message = f"is no set of the project's{did_you_mean(answers.path, list(SPOT_SETS))}"
            yield RecipeMistake(
                key=(*where, "path"), message=message, fix=f"allowed: {', '.join(SPOT_SETS)}, or rows of yours"
            )
        elif (answers.path, answers.subset, answers.split) in trained:
            yield RecipeMistake(
                key=(*where, "path"),
                message="is also trained on, in [[data.train]]",
                fix="ask about rows that are not trained",
            )
        if answers.format not in formats:
            message = f"unknown format{did_you_mean(answers.format, formats)}"
            yield RecipeMistake(key=(*where, "format"), message=message, fix=f"allowed: {', '.join(formats)}")
        elif answers.format == "text":
            yield RecipeMistake(
                key=(*where, "format"),
                message="is plain text, which asks nothing",
                fix="its loss is measured as [[data.eval]]",
            )


def questions_are_found_one_way(recipe: Recipe, _: Registries) -> Iterator[RecipeMistake]:
    """Check that a row is of a data format, or its columns are named."""
    for index, answers in enumerate(recipe.eval.answers):
        where = ("eval", "answers", index)
        if answers.num_fewshot is not None and not is_task(answers):
            yield RecipeMistake(
                key=(*where, "num_fewshot"), message="has no effect but on tasks of lm-eval", fix="remove it"
            )
        if is_task(answers):
            for key in _NOT_OF_TASKS:
                if _is_set(answers, key):
                    yield RecipeMistake(
                        key=(*where, key), message=f"has no effect: {answers.path} says it itself", fix="remove it"
                    )
        elif answers.prompt is None:
            for key, is_set in (
                ("reference", answers.reference is not None),
                ("ask_as", answers.ask_as != "auto" and not _is_spot(answers)),
            ):
                if is_set:
                    yield RecipeMistake(
                        key=(*where, key),
                        message="has no effect without prompt",
                        fix="name the column of the question, or remove it",
                    )
        elif answers.format != "auto":
            yield RecipeMistake(
                key=(*where, "prompt"), message="cannot be set together with format", fix="remove one of the two"
            )
        elif _is_spot(answers):
            yield RecipeMistake(
                key=(*where, "prompt"),
                message=f"has no effect on {answers.path}, whose columns are known",
                fix="remove it",
            )


def answers_are_scored(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that no two figures have one name, and that every setting has an effect on the scores."""
    for index, answers in enumerate(recipe.eval.answers):
        where = ("eval", "answers", index)
        if is_task(answers):
            continue
        if not answers.scores and not _is_spot(answers):
            fix = f'allowed: {", ".join(registries.scores)}  for example: scores = [{{ name = "exact_match" }}]'
            yield RecipeMistake(key=(*where, "scores"), message="is required: what makes an answer right?", fix=fix)
        owner: dict[str, str] = {}
        for number, (name, params) in enumerate(_parts(answers, registries)):
            for figure in registries.scores[name].figures(params):
                if figure.name in owner:
                    yield RecipeMistake(
                        key=(*where, "scores", number),
                        message=f'gives "{figure.name}", which {owner[figure.name]} of this set gives already',
                        fix="put it into a second set",
                    )
                    break
                owner[figure.name] = name
        written = any(registries.scores[name].choices is None for name, _ in _parts(answers, registries))
        if list(_parts(answers, registries)) and not written:
            for key in _OF_WRITING:
                if _is_set(answers, key):
                    yield RecipeMistake(
                        key=(*where, key),
                        message="has no effect: these scores weigh choices, nothing is written",
                        fix="remove it",
                    )
        elif answers.temperature == 0 and _is_set(answers, "top_p"):
            yield RecipeMistake(
                key=(*where, "top_p"), message="has no effect with temperature = 0", fix="remove it, or set temperature"
            )


def best_by_is_measured(recipe: Recipe, registries: Registries) -> Iterator[RecipeMistake]:
    """Check that the figure that decides exists, is measured during training, and decides something."""
    if recipe.train.load_best and not recipe.checkpoint.best:
        yield RecipeMistake(
            key=("train", "load_best"),
            message="needs the best state to be kept",
            fix="set [checkpoint] best = true",
            also=(("checkpoint", "best"),),
        )
    by, key = recipe.eval.best_by, ("eval", "best_by")
    if by == EVAL_LOSS:
        return
    owners = {
        f"{answers.name}.{name}": index
        for index, answers in enumerate(recipe.eval.answers)
        for name in figures_of(answers, registries)
    }
    also = (("eval", "answers"),)
    objective = recipe.objective
    of_rows = [f"eval_{name}" for name in objective.spec.figures(objective.params)] if recipe.data.eval else []
    # Which figures a task of lm-eval gives is known when it has been loaded.
    for index, answers in enumerate(recipe.eval.answers):
        if is_task(answers) and by.startswith(f"{answers.name}."):
            owners[by] = index
    if by not in owners and by not in of_rows:
        allowed = [EVAL_LOSS, *of_rows, *owners]
        yield RecipeMistake(
            key=key,
            message=f"is measured nowhere{did_you_mean(by, allowed)}",
            fix=f"allowed: {', '.join(allowed)}",
            also=also,
        )
        return
    if not (recipe.checkpoint.best or recipe.eval.early_stop):
        yield RecipeMistake(
            key=key,
            message="decides nothing",
            fix="set [checkpoint] best = true or [eval] early_stop, or remove it",
            also=also,
        )
    if by in of_rows:
        if recipe.eval.every_steps is None:
            yield RecipeMistake(key=key, message="is not measured during training", fix="set [eval] every_steps")
    elif recipe.eval.answers[owners[by]].every_steps is None:
        yield RecipeMistake(
            key=key,
            message="is not measured during training",
            fix=f'set every_steps in the set "{recipe.eval.answers[owners[by]].name}"',
            also=also,
        )


def figures_of(answers: AnswersTable, registries: Registries) -> dict[str, Any]:
    """Return every figure that a set's scores give, by name."""
    figures: dict[str, Any] = {}
    for name, params in _parts(answers, registries):
        figures |= {figure.name: figure for figure in registries.scores[name].figures(params)}
    return figures


def _parts(answers: AnswersTable, registries: Registries) -> Iterator[tuple[str, Any]]:
    """Yield (name, params) of each score that could be read."""
    for raw in answers.scores:
        name = raw.get("name")
        if isinstance(name, str) and name in registries.scores:
            with contextlib.suppress(ValidationError):  # reported where it was read
                yield name, listed_params(raw, registries.scores[name].params)


def listed_params(raw: dict[str, Any], kind: type[ParamsT]) -> ParamsT:
    """Return the settings of one entry of a list of parts, such as `scores`."""
    return kind.model_validate_json(json.dumps({key: value for key, value in raw.items() if key != "name"}))


def _is_set(answers: AnswersTable, key: str) -> bool:
    """Return whether a key has another value than its default: a resolved recipe states defaults too."""
    return getattr(answers, key) != AnswersTable.model_fields[key].default


def is_task(answers: AnswersTable) -> bool:
    """Return whether rows, prompts and scores are those of a task of lm-eval."""
    return answers.path is not None and answers.path.startswith(TASK)


def has_own_rows(answers: AnswersTable) -> bool:
    """Return whether the set has rows of the user's that `[[data.eval]]` does not name."""
    return answers.path is not None and not is_task(answers) and not _is_spot(answers)


def _is_spot(answers: AnswersTable) -> bool:
    return answers.path is not None and answers.path.startswith(SPOT)


ANSWER_RULES = (
    names_are_plain_and_distinct,
    answers_have_rows,
    questions_are_found_one_way,
    answers_are_scored,
    best_by_is_measured,
)
