"""`exact_match`: the answer is the reference, after what the recipe says to ignore.

The options and the order in which they apply are those of lm-eval's `exact_match` (and of Hugging Face `evaluate`'s,
which it was taken from); without any, two texts match when they are equal but for white space around them.
"""

from __future__ import annotations

import re
import string

from pydantic import field_validator

from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreSpec, by_row, references

FIGURE = MetricInfo(name="exact_match", binary=True)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


class ExactMatchParams(ReferenceParams):
    """lm-eval's names where it has the same option."""

    strip: bool = True
    """White space around both texts does not count (lm-eval: it does)."""
    ignore_case: bool = False
    """Compare in lower case."""
    ignore_punctuation: bool = False
    """Leave out ASCII punctuation."""
    ignore_numbers: bool = False
    """Leave out ASCII digits."""
    regexes_to_ignore: tuple[str, ...] = ()
    """What these match is left out first, one after the other."""

    @field_validator("regexes_to_ignore")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns


def check_pattern(pattern: str) -> None:
    """Raise ValueError, in words, when `pattern` is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def plain(text: str, params: ExactMatchParams) -> str:
    """Return the part of `text` that counts."""
    for pattern in params.regexes_to_ignore:
        text = re.sub(pattern, "", text)
    if params.ignore_case:
        text = text.lower()
    if params.ignore_punctuation:
        text = text.translate(_PUNCTUATION)
    if params.ignore_numbers:
        text = text.translate(_DIGITS)
    return text.strip() if params.strip else text


def build(params: ExactMatchParams) -> Scorer:
    """Build the scorer; of several references any one will do."""

    def judge(answer: Answer) -> tuple[bool]:
        prediction = plain(answer.text, params)
        return (any(prediction == plain(right, params) for right in references(answer, params.reference)),)

    return by_row((FIGURE,), judge)


SPEC = ScoreSpec(name="exact_match", params=ExactMatchParams, figures=lambda _: (FIGURE,), build=build)
