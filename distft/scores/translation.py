"""`bleu` and `chrf` (sacrebleu library): of all rows together, as papers report them, and row by row.

From 0 to 100. The corpus figure is not the mean of the rows': it pools counts first. It is what to quote; the rows'
figures (`bleu_sentence`, `chrf_sentence`) are what intervals and regressions are made of.

Sources: Papineni et al. 2002, https://aclanthology.org/P02-1040; Popović 2015, https://aclanthology.org/W15-3049;
Post 2018, https://aclanthology.org/W18-6319.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Literal

from pydantic import Field

from distft.core.errors import MachineError
from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreResult, ScoreSpec, mean, references


class BleuParams(ReferenceParams):
    """sacrebleu's options."""

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """How words are told apart; 13a is what published figures use."""
    lowercase: bool = False
    """Compare in lower case."""


class ChrfParams(ReferenceParams):
    """sacrebleu's options."""

    word_order: int = Field(default=0, ge=0, le=4)
    """Longest word n-gram beside the character 6-grams; 2 is chrF++."""
    lowercase: bool = False
    """Compare in lower case."""


def figures(name: str) -> tuple[MetricInfo, ...]:
    """Return the rows' figure, then the corpus'."""
    return MetricInfo(name=f"{name}_sentence"), MetricInfo(name=name, per_row=False)


def build_bleu(params: BleuParams) -> Scorer:
    """Build BLEU: sentences with effective order, as sacrebleu's `sentence_bleu`; the corpus without."""
    metrics = _library("bleu").metrics
    options = {"tokenize": params.tokenize, "lowercase": params.lowercase}
    sentence, corpus = metrics.BLEU(**options, effective_order=True), metrics.BLEU(**options)
    return _scorer("bleu", sentence, corpus, params.reference)


def build_chrf(params: ChrfParams) -> Scorer:
    """Build chrF: the same object for both, as it has no setting that differs."""
    both = _library("chrf").metrics.CHRF(word_order=params.word_order, lowercase=params.lowercase)
    return _scorer("chrf", both, both, params.reference)


def _library(score: str) -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise MachineError(f'score "{score}" needs sacrebleu: pip install "distft[eval]"') from None
    return sacrebleu


def _scorer(name: str, sentence: Any, corpus: Any, column: str | None) -> Scorer:
    rows_name = f"{name}_sentence"

    def scored(answers: Sequence[Answer]) -> ScoreResult:
        right = [references(answer, column) for answer in answers]
        predictions = [answer.text for answer in answers]
        values = tuple(
            float(sentence.sentence_score(text, list(row_references)).score)
            for text, row_references in zip(predictions, right, strict=True)
        )
        streams = [list(stream) for stream in zip_longest(*right)]  # sacrebleu takes None for a reference too few
        total = float(corpus.corpus_score(predictions, streams).score) if answers else math.nan
        return ScoreResult(
            figures=figures(name), rows={rows_name: values}, totals={rows_name: mean(values), name: total}
        )

    return scored


def _spec(name: str, params: type[ReferenceParams], build: Callable[[Any], Scorer]) -> ScoreSpec:
    return ScoreSpec(name=name, params=params, figures=lambda _: figures(name), build=build)


BLEU = _spec("bleu", BleuParams, build_bleu)
CHRF = _spec("chrf", ChrfParams, build_chrf)
