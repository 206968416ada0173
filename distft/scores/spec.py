"""What a score is: a named function from answers and their rows to figures, one per row and one for all.

Shape letters: N rows. Nothing here knows where answers come from: whoever generates them hands over `Answer`s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import Field

from distft.core.errors import DataError
from distft.core.registry import Params


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row and what the model made of it."""

    id: str
    """`valid.jsonl row 12`: what messages and lists of regressions call it."""
    row: Mapping[str, Any]
    """The row as its file holds it, columns renamed as the recipe says."""
    reference: str
    """The right answer: the row's completion, or its last assistant message."""
    text: str = ""
    """What the model wrote, without prompt and special tokens; unused by scores of choices."""
    prompt: str = ""
    """What the model was asked, in words; only judges read it."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """What it was asked, as a chat; None: raw text."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions of that chat."""
    logprobs: tuple[float, ...] = ()
    """For a score of choices: log-likelihood of each choice after the prompt, in nats, summed over its tokens."""


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """One number that a score gives."""

    name: str
    higher_is_better: bool = True
    binary: bool = False
    """Every row has 0 or 1: its mean is a proportion (Wilson interval), two runs are compared by McNemar's test."""
    per_row: bool = True
    """False: it exists for all rows together only (corpus BLEU), so it has no interval over rows."""


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What a score says of N answers."""

    figures: tuple[MetricInfo, ...]
    """The first is the one to look at: the list of regressions and the best checkpoint go by it."""
    rows: dict[str, tuple[float, ...]]
    """Figure -> N values, for figures that rows have; NaN where a row could not be scored (see `unscored`)."""
    totals: dict[str, float]
    """Figure -> value over all rows; NaN when no row was scored."""
    unscored: dict[str, str] = field(default_factory=dict)
    """Row id -> why it has no score; such rows count in no figure."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes null."""
        return {
            "figures": [vars(figure) for figure in self.figures],
            "rows": {name: [_plain(value) for value in values] for name, values in self.rows.items()},
            "totals": {name: _plain(value) for name, value in self.totals.items()},
            "unscored": self.unscored,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ScoreResult:
        """Return what `to_json` gave."""
        return cls(
            figures=tuple(MetricInfo(**figure) for figure in stored["figures"]),
            rows={name: tuple(map(_number, values)) for name, values in stored["rows"].items()},
            totals={name: _number(value) for name, value in stored["totals"].items()},
            unscored=dict(stored["unscored"]),
        )


Scorer: TypeAlias = Callable[[Sequence[Answer]], ScoreResult]
"""Judges answers. Raises DataError for a row that cannot be judged by its own fault (no such column)."""


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """A registered score: one file in this room."""

    name: str
    params: type[Params]
    figures: Callable[[Any], tuple[MetricInfo, ...]]
    """(params) -> what it will give; known before anything is generated."""
    build: Callable[[Any], Scorer]
    """(params) -> the score. Raises RecipeError (params that cannot work), MachineError (a library is missing)."""
    load: Callable[[Any], None] | None = None
    """(what `build` gave) -> loads now what the first answers would wait for, such as a model; None: nothing."""
    choices: Callable[[Any, Answer], tuple[str, ...]] | None = None
    """(params, answer without text) -> the texts whose log-likelihoods it needs; None: it needs generated text."""


class ReferenceParams(Params):
    """Of scores that compare with a right answer."""

    reference: str | None = Field(default=None, min_length=1)
    """Column that holds the right answer, or a list of right answers; the row's own completion unless set."""


def references(answer: Answer, column: str | None) -> tuple[str, ...]:
    """Return the right answers of a row, at least one.

    Raises:
        DataError: the row has no such column, or it holds something that is no text.
    """
    if column is None:
        if not answer.reference:
            raise DataError(f'{answer.id}: holds no right answer  name its column: reference = "..."')
        return (answer.reference,)
    if column not in answer.row:
        have = ", ".join(f'"{name}"' for name in answer.row)
        raise DataError(f'{answer.id}: no column "{column}" to compare with; the row has {have or "no columns"}')
    value = answer.row[column]
    texts = tuple(_text(item) for item in (value if isinstance(value, list | tuple) else [value]))
    if not texts or any(text is None for text in texts):
        raise DataError(f'{answer.id}: "{column}" holds no text, number or list of these to compare with')
    return tuple(text for text in texts if text is not None)


def by_row(figures: Sequence[MetricInfo], judge: Callable[[Answer], Sequence[float]]) -> Scorer:
    """Build a scorer that judges one answer at a time and averages; `judge` gives a value for each of `figures`."""

    def scored(answers: Sequence[Answer]) -> ScoreResult:
        table = [tuple(float(value) for value in judge(answer)) for answer in answers]
        rows = {figure.name: tuple(line[index] for line in table) for index, figure in enumerate(figures)}
        return ScoreResult(
            figures=tuple(figures), rows=rows, totals={name: mean(values) for name, values in rows.items()}
        )

    return scored


def mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN when there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
