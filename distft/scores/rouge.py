"""`rouge`: overlap of n-grams and longest common subsequence with the reference (rouge-score library).

F-measures from 0 to 1. Source: Lin 2004, https://aclanthology.org/W04-1013.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distft.core.errors import MachineError
from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreSpec, by_row, references


class RougeParams(ReferenceParams):
    """rouge-score's options."""

    kinds: tuple[Literal["rouge1", "rouge2", "rougeL", "rougeLsum"], ...] = Field(
        default=("rougeL", "rouge1", "rouge2"), min_length=1
    )
    """Which; the first is the one to look at. rougeLsum takes each line as a sentence."""
    stemmer: bool = False
    """Compare English word stems (Porter)."""


def figures(params: RougeParams) -> tuple[MetricInfo, ...]:
    """Return one figure for each kind."""
    return tuple(MetricInfo(name=kind) for kind in params.kinds)


def build(params: RougeParams) -> Scorer:
    """Build the scorer; of several references the best counts.

    Raises:
        MachineError: rouge-score is not installed.
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise MachineError('score "rouge" needs rouge-score: pip install "distft[eval]"') from None
    library: Any = rouge_scorer.RougeScorer(list(params.kinds), use_stemmer=params.stemmer)

    def judge(answer: Answer) -> list[float]:
        results = library.score_multi(list(references(answer, params.reference)), answer.text)
        return [results[kind].fmeasure for kind in params.kinds]

    return by_row(figures(params), judge)


SPEC = ScoreSpec(name="rouge", params=RougeParams, figures=figures, build=build)
