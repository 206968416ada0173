"""`trl_function`: a reward function as TRL's GRPOTrainer calls it, unchanged.

It is called with `prompts`, `completions` and every other column of the row as lists, here of one answer, and returns a
list of numbers (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"). As there, answers to
chats are lists of one message, and answers to raw text are text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from distft.core.errors import DataError, Problem, RecipeError
from distft.core.registry import Params
from distft.scores.function import figure_value, find
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreSpec, by_row

_ASKED = ("prompt", "messages")
_NOT_HERE = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What TRL hands over besides, and nothing here does."""


class TrlFunctionParams(Params):
    """Which function."""

    function: str = Field(min_length=1, examples=["my_package.rewards:polite", "trl.rewards:think_format_reward"])
    """`module:function`, importable where the run starts (PYTHONPATH)."""


def _name(params: TrlFunctionParams) -> str:
    return params.function.rpartition(":")[2].rpartition(".")[2]


def _figures(params: TrlFunctionParams) -> tuple[MetricInfo, ...]:
    return (MetricInfo(name=_name(params)),)


def _build(params: TrlFunctionParams) -> Scorer:
    """Import it now, so that a mistake is told before anything is generated.

    Raises:
        RecipeError: it cannot be found, is no function, or asks for what is not here.
    """
    function = find(params.function)
    _refuse_what_is_not_here(params.function, function)

    def judge(answer: Answer) -> list[float]:
        is_chat = answer.messages is not None
        completion = [{"role": "assistant", "content": answer.text}] if is_chat else answer.text
        prompt = [dict(message) for message in answer.messages or ()] if is_chat else answer.prompt
        columns = {name: [value] for name, value in answer.row.items() if name not in _ASKED}
        try:
            given = function(prompts=[prompt], completions=[completion], **columns)
        except Exception as error:  # the user's own code: its mistake is told, and the answer has no reward
            raise DataError(f"{answer.id}: {params.function} raised {type(error).__name__}: {error}") from error
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 1:
            raise DataError(f"{answer.id}: {params.function} returned {given!r:.80}, expected a list of one number")
        if given[0] is None:
            raise DataError(f"{answer.id}: {params.function} returned None: it says nothing of this answer")
        return [figure_value(given[0], answer, params.function)]

    return by_row(_figures(params), judge)


def _refuse_what_is_not_here(name: str, function: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, or one that says nothing: the call will tell
        return
    needs = [each.name for each in parameters if each.name in _NOT_HERE and each.default is inspect.Parameter.empty]
    if needs:
        message = f'function = "{name}"  asks for {", ".join(needs)}, which only TRL\'s trainer hands over'
        raise RecipeError('score "trl_function"', [Problem(message=message, fix='write it for the score "function"')])


SPEC = ScoreSpec(name="trl_function", params=TrlFunctionParams, figures=_figures, build=_build)
