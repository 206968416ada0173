"""Scores built as a recipe would build them, and answers for them: what tests of the scores room share."""

import json
from typing import Any

from distft.scores import SCORES, Answer, ScoreResult


def answer(text: str = "", reference: str = "", number: int = 1, **row: Any) -> Answer:
    logprobs = row.pop("logprobs", ())
    return Answer(id=f"valid.jsonl row {number}", row=row, reference=reference, text=text, logprobs=logprobs)


def scorer(name: str, **params: Any):
    """Params through JSON, as TOML gives them: lists become tuples, strict types are checked."""
    spec = SCORES[name]
    return spec.build(spec.params.model_validate_json(json.dumps(params)))


def score(name: str, pairs: list[tuple[str, str]], **params: Any) -> ScoreResult:
    """Of (text, reference) pairs."""
    answers = [answer(text, reference, number) for number, (text, reference) in enumerate(pairs, 1)]
    return scorer(name, **params)(answers)


def one(name: str, text: str, reference: str = "", **params: Any) -> dict[str, float]:
    """Figures of one answer."""
    return {figure: values[0] for figure, values in score(name, [(text, reference)], **params).rows.items()}
