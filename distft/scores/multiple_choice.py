"""`multiple_choice`: the choice that the model finds likeliest is the right one.

As lm-eval defines them (`ConfigurableTask.process_results`): `acc` takes the summed log-likelihood of each choice after
the prompt, `acc_norm` divides it by the choice's length in characters, `acc_bytes` by its length in UTF-8 bytes; of
equals the first wins. Lengths are those of the choice alone, without the space that joins it to the prompt.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from distft.core.errors import DataError
from distft.core.registry import Params
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreSpec, by_row

FIGURES = tuple(MetricInfo(name=name, binary=True) for name in ("acc", "acc_norm", "acc_bytes"))


class MultipleChoiceParams(Params):
    """Where a row keeps its choices."""

    choices: str = Field(default="choices", min_length=1)
    """Column: a list of texts."""
    label: str = Field(default="label", min_length=1)
    """Column: the right one's index from 0, its letter (A, B, …), or its text."""


def choices(params: MultipleChoiceParams, answer: Answer) -> tuple[str, ...]:
    """Return the row's choices.

    Raises:
        DataError: the column holds no list of at least two texts.
    """
    options = answer.row.get(params.choices)
    if (
        not isinstance(options, list | tuple)
        or len(options) < 2
        or not all(isinstance(option, str) and option for option in options)
    ):
        raise DataError(f'{answer.id}: "{params.choices}" is no list of two or more texts')
    return tuple(options)


def right_choice(params: MultipleChoiceParams, answer: Answer) -> int:
    """Return the index of the right choice.

    Raises:
        DataError: the label names none of them.
    """
    options, label = choices(params, answer), answer.row.get(params.label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(options):
        return label
    if isinstance(label, str):
        if label in options:  # before letters: a choice may be called "B" and stand first
            return options.index(label)
        if label in string.ascii_uppercase[: len(options)] and label:
            return string.ascii_uppercase.index(label)
        if label.isdecimal() and int(label) < len(options):
            return int(label)
    raise DataError(f'{answer.id}: "{params.label}" is {label!r}, which names none of its {len(options)} choices')


def build(params: MultipleChoiceParams) -> Scorer:
    """Build the scorer, which needs `logprobs`, one for each of `choices`."""

    def judge(answer: Answer) -> tuple[bool, bool, bool]:
        options, right = choices(params, answer), right_choice(params, answer)
        assert len(answer.logprobs) == len(options), "a log-likelihood for each choice"
        per_char = [logprob / len(text) for logprob, text in zip(answer.logprobs, options, strict=True)]
        per_byte = [logprob / len(text.encode()) for logprob, text in zip(answer.logprobs, options, strict=True)]
        return _likeliest(answer.logprobs) == right, _likeliest(per_char) == right, _likeliest(per_byte) == right

    return by_row(FIGURES, judge)


def _likeliest(values: Sequence[Any]) -> int:
    return max(range(len(values)), key=values.__getitem__)


SPEC = ScoreSpec(
    name="multiple_choice",
    params=MultipleChoiceParams,
    figures=lambda _: FIGURES,
    build=build,
    choices=choices,
)
