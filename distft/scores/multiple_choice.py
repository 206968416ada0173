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
    """The row's choices.

    Raises:
        DataError: the column holds no list of at least two texts.
    """
    found = answer.row.get(params.choices)
    if not isinstance(found, list | tuple) or len(found) < 2 or not all(isinstance(one, str) and one for one in found):
        raise DataError(f'{answer.id}: "{params.choices}" is no list of two or more texts')
    return tuple(found)


def right_choice(params: MultipleChoiceParams, answer: Answer) -> int:
    """Index of the right choice.

    Raises:
        DataError: the label names none of them.
    """
    known, label = choices(params, answer), answer.row.get(params.label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(known):
        return label
    if isinstance(label, str):
        if label in known:  # before letters: a choice may be called "B" and stand first
            return known.index(label)
        if label in string.ascii_uppercase[: len(known)] and label:
            return string.ascii_uppercase.index(label)
        if label.isdecimal() and int(label) < len(known):
            return int(label)
    raise DataError(f'{answer.id}: "{params.label}" is {label!r}, which names none of its {len(known)} choices')


def build(params: MultipleChoiceParams) -> Scorer:
    """Needs `logprobs`, one for each of `choices`."""

    def judge(answer: Answer) -> tuple[bool, bool, bool]:
        known, right = choices(params, answer), right_choice(params, answer)
        assert len(answer.logprobs) == len(known), "a log-likelihood for each choice"
        per_char = [logprob / len(text) for logprob, text in zip(answer.logprobs, known, strict=True)]
        per_byte = [logprob / len(text.encode()) for logprob, text in zip(answer.logprobs, known, strict=True)]
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
