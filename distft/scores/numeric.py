"""`numeric`: the number that an answer ends in is the reference's, as in GSM8K.

Three figures, because papers report all three:

- `numeric`: by value. The number behind the last `####`, or else the last number in the text; signs, thousands commas,
  currency signs and a closing full stop are read as people mean them, so 1,080.00 is 1080.
- `strict_match`, `flexible_extract`: lm-eval's task gsm8k (version 3), to the letter: a regular expression each, then
  its exact_match, so "18.00" is not "18". Source: lm_eval/tasks/gsm8k/gsm8k.yaml.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from pydantic import Field

from distft.core.errors import DataError
from distft.scores.exact_match import ExactMatchParams, plain
from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreSpec, by_row, references

FIGURES = tuple(MetricInfo(name=name, binary=True) for name in ("numeric", "strict_match", "flexible_extract"))
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
INVALID = "[invalid]"
"""What lm-eval's filter gives when it finds nothing."""
GSM8K = ExactMatchParams(strip=False, ignore_case=True, regexes_to_ignore=(",", "\\$", "(?s).*#### ", "\\.$"))
"""What lm-eval ignores when it compares."""
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?[$€£¥]?(?:(?<=[$€£¥])[-\u2212])?"  # -$5 and $-5, but 10-20 is no minus twenty
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d{1,3})?"
)


class NumericParams(ReferenceParams):
    """How near is right."""

    tolerance: float = Field(default=0.0, ge=0)
    """`numeric` only: the largest difference from the reference that is still right, as a share of it."""


def strict(text: str) -> str:
    """Apply lm-eval's filter `strict-match`."""
    matches = STRICT.findall(text)
    return matches[0].strip() if matches else INVALID


def flexible(text: str) -> str:
    """Apply lm-eval's filter `flexible-extract`."""
    matches = FLEXIBLE.findall(text)
    return next(part for part in matches[-1] if part).strip() if matches else INVALID


def number(text: str) -> Decimal | None:
    """Return the value that a text ends in; None when there is no number."""
    _, mark, behind = text.rpartition("####")
    matches = _NUMBER.findall(behind if mark else text)
    if not matches:
        return None
    written = matches[0 if mark else -1].replace("\u2212", "-")
    try:
        return Decimal(re.sub(r"[,$€£¥]", "", written))
    except InvalidOperation:  # a sign before the currency and another behind it
        return None


def build(params: NumericParams) -> Scorer:
    """Build the scorer; of several references any one will do."""

    def judge(answer: Answer) -> tuple[bool, bool, bool]:
        right = references(answer, params.reference)
        values = [number(reference) for reference in right]
        if None in values:
            raise DataError(f"{answer.id}: the reference has no number: {right[values.index(None)][-80:]!r}")
        prediction = number(answer.text)
        near = prediction is not None and any(
            abs(prediction - value) <= Decimal(str(params.tolerance)) * abs(value)
            for value in values
            if value is not None
        )
        wanted = {plain(reference, GSM8K) for reference in right}
        return near, plain(strict(answer.text), GSM8K) in wanted, plain(flexible(answer.text), GSM8K) in wanted

    return by_row(FIGURES, judge)


SPEC = ScoreSpec(name="numeric", params=NumericParams, figures=lambda _: FIGURES, build=build)
