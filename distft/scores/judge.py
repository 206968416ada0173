"""`judge`: another model gives marks, through any OpenAI-compatible endpoint. Off unless a recipe names it.

Marks of a model are marks of that model: it favours long answers, the first of two, and its own (Zheng et al. 2023,
https://arxiv.org/abs/2306.05685). Temperature 0 makes them steadier, not exact; what was answered once is kept by hash.
"""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from distft.core.errors import MachineError
from distft.scores.endpoint import Endpoint, Unanswered, read_key
from distft.scores.exact_match import check_pattern
from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreResult, ScoreSpec, mean, references

PROMPT = """\
You grade answers. Compare the answer with the reference: is it correct, complete, and nothing beside the point?

[Question]
{prompt}

[Reference]
{reference}

[Answer]
{answer}

First give one sentence of explanation. Then write on a line of its own: Score: N, a number from {lowest} (useless)
to {highest} (as good as the reference)."""
_WORDS = frozenset({"prompt", "reference", "answer", "lowest", "highest"})
FIGURE = MetricInfo(name="judge")


class JudgeParams(ReferenceParams):
    """Whom to ask and what."""

    url: str = Field(pattern=r"^https?://[^\s?#@]+$", examples=["https://api.openai.com/v1"])
    """Base address with its version; vLLM, llama.cpp and others serve the same interface."""
    model: str = Field(min_length=1)
    """The model's name there."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", examples=["OPENAI_API_KEY"])
    """Environment variable that holds the key; a key itself has no place in a recipe."""
    prompt: str = Field(default=PROMPT, min_length=1)
    """What it is asked; {answer} and, where wanted, {prompt}, {reference}, {lowest}, {highest} are filled in."""
    lowest: float = 1.0
    """Worst mark."""
    highest: float = 10.0
    """Best mark."""
    pattern: str = r"(?i)score\W{0,5}(-?\d+(?:\.\d+)?)"
    """Finds the mark: its only group, in the last place it matches."""
    max_tokens: int = Field(default=512, ge=1)
    """Of its answer."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Of one request."""
    retries: int = Field(default=5, ge=0)
    """Further tries when it is busy or broken; an answer without a mark is an answer."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests under way at a time."""
    max_unscored: float = Field(default=0.05, ge=0, le=1)
    """Share of rows that may stay without a mark before the score counts as failed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lowest < self.highest:
            raise ValueError(f"lowest = {self.lowest:g} is not below highest = {self.highest:g}")
        check_pattern(self.pattern)
        if re.compile(self.pattern).groups != 1:
            raise ValueError("pattern needs exactly one group, around the mark")
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"prompt: {error}; a literal brace is written twice") from None
        if unknown := used - _WORDS:
            raise ValueError(f"prompt names {{{sorted(unknown)[0]}}}; known: {', '.join(sorted(_WORDS))}")
        if "answer" not in used:
            raise ValueError("prompt does not show the {answer}")
        return self


def build(params: JudgeParams) -> Scorer:
    """Return a judge whose key is there.

    Raises:
        MachineError: the environment variable is not set.
    """
    return judge(
        params,
        Endpoint(
            url=params.url,
            model=params.model,
            key=read_key(params.api_key_env),
            max_tokens=params.max_tokens,
            timeout_s=params.timeout_s,
            retries=params.retries,
            cache=cache_folder(),
        ),
    )


def judge(params: JudgeParams, endpoint: Endpoint) -> Scorer:
    """Build a scorer that takes marks from answers of `endpoint`; rows without a mark stay unscored, and are named."""

    def mark(answer: Answer) -> float | str:
        reference = references(answer, params.reference)[0]
        filled = {"prompt": answer.prompt, "reference": reference, "answer": answer.text}
        question = params.prompt.format(**filled, lowest=f"{params.lowest:g}", highest=f"{params.highest:g}")
        try:
            reply = endpoint.ask(question)
        except Unanswered as error:
            return str(error)
        matches = re.findall(params.pattern, reply)
        if not matches:
            return f"no mark in its answer: {reply[:80]!r}"
        value = _float(matches[-1])
        if not params.lowest <= value <= params.highest:
            return f"mark {matches[-1]} is not between {params.lowest:g} and {params.highest:g}"
        return value

    def scored(answers: Sequence[Answer]) -> ScoreResult:
        with ThreadPoolExecutor(params.concurrency) as pool:
            futures = [pool.submit(mark, answer) for answer in answers]
            try:
                marks = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # a wrong key is told after one request, not after all
                raise
        unscored = {answer.id: why for answer, why in zip(answers, marks, strict=True) if isinstance(why, str)}
        if len(unscored) > params.max_unscored * len(answers):
            row, why = next(iter(unscored.items()))
            raise MachineError(
                f"{params.url}: the judge {params.model!r} gave no mark for {len(unscored)} of {len(answers)} answers "
                f"(max_unscored = {params.max_unscored:g}); {row}: {why}"
            )
        values = tuple(math.nan if isinstance(mark_or_reason, str) else mark_or_reason for mark_or_reason in marks)
        return ScoreResult(figures=(FIGURE,), rows={"judge": values}, totals={"judge": mean(values)}, unscored=unscored)

    return scored


def cache_folder() -> Path:
    """Return where answers are kept: `judge` in the user's cache folder (DISTFT_CACHE, XDG_CACHE_HOME)."""
    named = os.environ.get("DISTFT_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distft"
    return base / "judge"


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # a pattern of the user's own; NaN is between nothing


SPEC = ScoreSpec(name="judge", params=JudgeParams, figures=lambda _: (FIGURE,), build=build)
