"""`regex`: what a pattern finds in the answer is the reference, or the pattern is simply there."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from distft.scores.exact_match import check_pattern
from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreSpec, by_row, references

FIGURE = MetricInfo(name="regex", binary=True)


class RegexParams(ReferenceParams):
    """Python's `re`, searched anywhere in the answer unless the pattern is anchored."""

    pattern: str = Field(min_length=1, examples=["Answer: (\\w+)"])
    """Regular expression."""
    group: int | str = 0
    """Number or name of the group that is compared; 0 = all that the pattern matched."""
    must: Literal["equal", "match"] = "equal"
    """equal = the group is the reference; match = the pattern is found, whatever the reference."""
    take: Literal["first", "last"] = "first"
    """Which find counts when there are several."""
    ignore_case: bool = False
    """For the pattern and for the comparison."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_pattern(self.pattern)
        compiled = re.compile(self.pattern)
        groups = [*range(compiled.groups + 1), *compiled.groupindex]
        if self.group not in groups:
            raise ValueError(f"the pattern has no group {self.group!r}; it has {', '.join(map(repr, groups))}")
        if self.must == "match" and self.reference is not None:
            raise ValueError('reference has no effect with must = "match"')
        return self


def build(params: RegexParams) -> Scorer:
    """Build the scorer; under "equal" the pattern is applied to the reference too; without a match all of it counts."""
    pattern = re.compile(params.pattern, re.IGNORECASE if params.ignore_case else 0)

    def extract(text: str) -> str | None:
        finds = list(pattern.finditer(text))
        return (finds[0 if params.take == "first" else -1].group(params.group) or "") if finds else None

    def plain(text: str) -> str:
        return text.strip().lower() if params.ignore_case else text.strip()

    def judge(answer: Answer) -> tuple[bool]:
        prediction = extract(answer.text)
        if prediction is None or params.must == "match":
            return (prediction is not None,)
        right = [
            reference if (inside := extract(reference)) is None else inside
            for reference in references(answer, params.reference)
        ]
        return (any(plain(prediction) == plain(reference) for reference in right),)

    return by_row((FIGURE,), judge)


SPEC = ScoreSpec(name="regex", params=RegexParams, figures=lambda _: (FIGURE,), build=build)
