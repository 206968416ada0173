"""How good answers are, and how sure of that one may be. A new score is one file here and one line below."""

from distft.core.registry import Registry
from distft.scores import (
    exact_match,
    field_match,
    function,
    grader,
    json_schema,
    judge,
    multiple_choice,
    normalised_match,
    numeric,
    regex,
    reward_model,
    rouge,
    translation,
    trl_function,
)
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreResult, ScoreSpec

SCORES: Registry[ScoreSpec] = Registry("score")
SCORES.add(exact_match.SPEC)
SCORES.add(normalised_match.SPEC)
SCORES.add(regex.SPEC)
SCORES.add(multiple_choice.SPEC)
SCORES.add(json_schema.SPEC)
SCORES.add(field_match.SPEC)
SCORES.add(numeric.SPEC)
SCORES.add(rouge.SPEC)
SCORES.add(translation.BLEU)
SCORES.add(translation.CHRF)
SCORES.add(function.SPEC)
SCORES.add(judge.SPEC)
SCORES.add(reward_model.SPEC)
SCORES.add(grader.SPEC)
SCORES.add(trl_function.SPEC)

__all__ = ["SCORES", "Answer", "MetricInfo", "ScoreResult", "ScoreSpec", "Scorer"]
