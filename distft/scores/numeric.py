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
    """lm-eval's filter `strict-match`."""
    found = STRICT.findall(text)
    return found[0].strip() if found else INVALID


def flexible(text: str) -> str:
    """lm-eval's filter `flexible-extract`."""
    found = FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else INVALID


def number(text: str) -> Decimal | None:
    """The value that a text ends in; None when there is no number."""
    _, mark, behind = text.rpartition("####")
    found = _NUMBER.findall(behind if mark else text)
    if not found:
        return None
    written = found[0 if mark else -1].replace("\u2212", "-")
    try:
        return Decimal(re.sub(r"[,$€£¥]", "", written))
    except InvalidOperation:  # a sign before the currency and another behind it
        return None


def build(params: NumericParams) -> Scorer:
    """Of several references any one will do."""

    def judge(answer: Answer) -> tuple[bool, bool, bool]:
        right = references(answer, params.reference)
        values = [number(one) for one in right]
        if None in values:
            raise DataError(f"{answer.id}: the reference has no number: {right[values.index(None)][-80:]!r}")
        said = number(answer.text)
        near = said is not None and any(
            abs(said - value) <= Decimal(str(params.tolerance)) * abs(value) for value in values if value is not None
        )
        wanted = {plain(one, GSM8K) for one in right}
        return near, plain(strict(answer.text), GSM8K) in wanted, plain(flexible(answer.text), GSM8K) in wanted

    return by_row(FIGURES, judge)


SPEC = ScoreSpec(name="numeric", params=NumericParams, figures=lambda _: FIGURES, build=build)
