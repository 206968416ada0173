"""Builds the evaluation sets of `[[eval.answers]]`, and reports every mistake in them before training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distft.core.errors import DataError, RecipeError
from distft.data.questions import Columns, Question, followed_by, questions, trained_as_chat
from distft.data.render import Renderer
from distft.evaluation import sanity_sets
from distft.evaluation.eval_sets import BoundScore, EvalSet, RowEvalSet, choices
from distft.generation.completion import SamplingParams
from distft.recipe import AnswersTable, listed_params
from distft.recipe.eval_rules import SPOT, TASK, is_task
from distft.recipe.schema import DataTable, SourceTable
from distft.scores import SCORES, Answer


def build_eval_sets(
    tables: Sequence[AnswersTable],
    data: DataTable,
    renderer: Renderer,
    *,
    seed: int,
    progress: Callable[[int], None],
) -> list[EvalSet]:
    """Build one set for each table, in order. Paths are real ones, or `spot:NAME`.

    Raises:
        DataError: rows that cannot be asked, or that lack what a score needs.
        RecipeError: a score's settings cannot work.
        MachineError: a score's library is missing.
    """
    return [_any(table, data, renderer, seed, progress) for table in tables]


def _any(
    table: AnswersTable, data: DataTable, renderer: Renderer, seed: int, progress: Callable[[int], None]
) -> EvalSet:
    return (
        _task(table, data, renderer, seed) if is_task(table) else _row_eval_set(table, data, renderer, seed, progress)
    )


def _task(table: AnswersTable, data: DataTable, renderer: Renderer, seed: int) -> EvalSet:
    from distft.evaluation.lm_eval_set import LmEvalSet  # imports torch
    from distft.scores.harness import LmEvalTasks

    assert table.path is not None
    as_chat = _as_chat(table, data)
    try:
        tasks = LmEvalTasks(
            table.path.removeprefix(TASK),
            limit=table.max_rows,
            num_fewshot=table.num_fewshot,
            seed=seed,
            chat=(lambda messages, open_turn: renderer.draw(messages, open_turn=open_turn)) if as_chat else None,
        )
    except DataError as error:
        raise DataError(f'[[eval.answers]] "{table.name}": {error}') from None
    except RecipeError as error:
        raise RecipeError(f'[[eval.answers]] "{table.name}"', error.problems) from None
    return LmEvalSet(
        name=table.name,
        tasks=tasks,
        renderer=renderer,
        seed=seed,
        as_chat=as_chat,
        batch_size=None if table.batch_size == "auto" else table.batch_size,
        every_steps=table.every_steps,
    )


def _as_chat(table: AnswersTable, data: DataTable) -> bool:
    if table.ask_as != "auto":
        return table.ask_as == "chat"
    return trained_as_chat(data.train, merge_turns=data.merge_turns)


def _row_eval_set(
    table: AnswersTable, data: DataTable, renderer: Renderer, seed: int, progress: Callable[[int], None]
) -> RowEvalSet:
    source = table.source
    if source is not None and source.path.startswith(SPOT):
        source = SourceTable(path=sanity_sets.path_of(source.path))
    try:
        set_questions = questions(
            data.eval if source is None else [source],
            renderer,
            columns=_columns(table, data),
            max_rows=table.max_rows,
            skip_bad=data.bad_rows == "skip",
            progress=progress,
        )
        scorings = tuple(_scoring(raw, set_questions, renderer) for raw in table.scores)
    except DataError as error:
        raise DataError(f'[[eval.answers]] "{table.name}": {error}') from None
    writing = SamplingParams(
        max_new_tokens=table.max_new_tokens,
        temperature=table.temperature,
        top_p=table.top_p,
        stop=table.stop,
        seed=seed,
        batch_size=None if table.batch_size == "auto" else table.batch_size,
    )
    return RowEvalSet(
        name=table.name, questions=set_questions, scorings=scorings, writing=writing, every_steps=table.every_steps
    )


def _columns(table: AnswersTable, data: DataTable) -> Columns | None:
    prompt = "prompt" if table.path is not None and table.path.startswith(SPOT) else table.prompt
    if prompt is None:
        return None
    reference = "label" if table.path == f"{SPOT}general" else table.reference
    return Columns(prompt=prompt, reference=reference, as_chat=_as_chat(table, data))


def _scoring(raw: dict[str, Any], set_questions: Sequence[Question], renderer: Renderer) -> BoundScore:
    spec = SCORES[raw["name"]]
    params = listed_params(raw, spec.params)
    scoring = BoundScore(spec=spec, params=params, scorer=spec.build(params))
    if spec.choices is None:
        return scoring
    pairs = tuple(
        tuple(followed_by(renderer, question, choice) for choice in choices(scoring, _unanswered(question)))
        for question in set_questions
    )
    return BoundScore(spec=spec, params=params, scorer=scoring.scorer, pairs=pairs)


def _unanswered(question: Question) -> Answer:
    return Answer(id=question.id, row=question.row, reference=question.reference)
