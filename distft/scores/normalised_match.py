"""`normalised_match`: equal after SQuAD's normalisation; and `f1`, the overlap of words after it.

Normalisation, in this order: lower case; ASCII punctuation removed; the English articles a, an, the removed; runs of
white space become one space. Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al. 2016,
https://arxiv.org/abs/1606.05250), `normalize_answer` and `f1_score`; for two texts of which one is empty then, `f1` is
1 if both are, as in SQuAD 2.0's script.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from distft.scores.spec import Answer, MetricInfo, ReferenceParams, Scorer, ScoreSpec, by_row, references

FIGURES = (MetricInfo(name="normalised_match", binary=True), MetricInfo(name="f1"))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class NormalisedMatchParams(ReferenceParams):
    """Nothing to choose: a normalisation of one's own would be comparable with nothing."""


def normalise(text: str) -> str:
    """Normalise a text as SQuAD does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(prediction: str, right: str) -> float:
    """Return the harmonic mean of precision and recall over words, each counted as often as it occurs."""
    words, wanted = normalise(prediction).split(), normalise(right).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def build(params: NormalisedMatchParams) -> Scorer:
    """Build the scorer; of several references the best counts, for each figure by itself."""

    def judge(answer: Answer) -> tuple[float, float]:
        right = references(answer, params.reference)
        prediction = normalise(answer.text)
        return any(prediction == normalise(reference) for reference in right), max(
            word_f1(answer.text, reference) for reference in right
        )

    return by_row(FIGURES, judge)


SPEC = ScoreSpec(name="normalised_match", params=NormalisedMatchParams, figures=lambda _: FIGURES, build=build)
