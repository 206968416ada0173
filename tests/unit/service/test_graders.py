"""Graders by the rules of OpenAI's documentation, on texts whose worth is plain; formulas evaluate nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.fine_tuning.alpha import GraderRunResponse

from distft.service.errors import ApiError
from distft.service.graders import GraderRun, read_grader, run_grader


def grade(grader: dict[str, Any], sample: str, item: Any = None) -> float:
    result = run_grader(GraderRun(grader=grader, model_sample=sample, item=item or {}))
    GraderRunResponse.model_validate(result.model_dump())
    return result.reward


def check(operation: str, reference: str = "{{item.answer}}", input: str = "{{sample.output_text}}") -> dict[str, Any]:
    return {"type": "string_check", "name": "c", "operation": operation, "input": input, "reference": reference}


def similar(metric: str) -> dict[str, Any]:
    texts = {"input": "{{sample.output_text}}", "reference": "the cat sat on the mat"}
    return {"type": "text_similarity", "name": "s", "evaluation_metric": metric, **texts}


@pytest.mark.parametrize(
    ("operation", "sample", "reward"),
    [("eq", "Paris", 1), ("eq", "paris", 0), ("ne", "Rome", 1), ("ne", "Paris", 0), ("like", "In Paris.", 1),
     ("like", "in paris", 0), ("ilike", "in paris", 1), ("ilike", "Rome", 0)],
)  # fmt: skip
def test_string_checks(operation: str, sample: str, reward: float) -> None:
    assert grade(check(operation), sample, {"answer": "Paris"}) == reward


def test_templates_reach_into_json() -> None:
    grader = check("eq", reference="{{ item.a.b }}", input="{{sample.output_json.x}}")
    assert grade(grader, '{"x": 7}', {"a": {"b": 7}}) == 1
    with pytest.raises(ApiError, match=r"sample\.output_json\.x"):
        grade(grader, "no JSON", {"a": {"b": 7}})
    with pytest.raises(ApiError, match=r"item\.a\.b"):
        grade(grader, '{"x": 7}', {"a": {}})


def test_rouge_counts_shared_words() -> None:
    pytest.importorskip("rouge_score")
    assert grade(similar("rouge_1"), "the cat") == pytest.approx(2 * (2 / 2) * (2 / 6) / (2 / 2 + 2 / 6))
    assert grade(similar("rouge_2"), "the cat") == pytest.approx(2 * 1 * (1 / 5) / (1 + 1 / 5))
    assert grade(similar("rouge_l"), "the cat sat on the mat") == 1


def test_formulas() -> None:
    multi = {"type": "multi", "name": "m", "graders": {"a": check("eq"), "b": check("like")}}
    item = {"answer": "Paris"}
    assert grade({**multi, "calculate_output": "0.25 * a + 0.75 * b"}, "In Paris", item) == 0.75
    assert grade({**multi, "calculate_output": "max(a, -b) / (1 + b)"}, "Paris", item) == 0.5
    assert grade({**multi, "calculate_output": "abs(-a) + max(b) - min(a, b, 0.5)"}, "Paris", item) == 1.5
    result = run_grader(GraderRun(grader={**multi, "calculate_output": "a / (b - b)"}, model_sample="x", item=item))
    assert (result.reward, result.metadata.errors.other_error) == (0, True)
    result = run_grader(
        GraderRun(grader={**multi, "calculate_output": "1e308 * 10 * b"}, model_sample="Paris", item=item)
    )
    assert (result.reward, result.metadata.errors.other_error) == (0, True)
    for formula in (
        "__import__('os').system('true')", "a.real", "[a][0]", "c", "a if b else a", "(lambda: a)()", "a ** b", "'x'",
        "f'{a}'", "a and b", "max(a, key=b)", "True", "abs(a, b)", "max()", "max(*[a])",
        "a +", "(" * 500, "-" * 999 + "a",
    ):  # fmt: skip
        with pytest.raises(ApiError, match="calculate_output"):
            read_grader({**multi, "calculate_output": formula})


@pytest.mark.parametrize(
    ("grader", "code"),
    [
        ({"type": "python", "name": "p", "source": "def grade(s, i): return 1"}, "unsupported_grader"),
        ({"type": "score_model", "name": "p", "model": "m", "input": []}, "unsupported_grader"),
        ({"type": "label_model", "name": "p"}, "unsupported_grader"),
        (similar("cosine"), "unsupported_grader"),
        (similar("other"), "invalid_value"),
        ({"type": "string_check", "name": "c"}, "invalid_value"),
        (check("eq") | {"colour": "red"}, "invalid_value"),
        ({"type": ["multi"]}, "invalid_value"),
        ({}, "invalid_value"),
        (
            {"type": "multi", "name": "m", "graders": {"a": {"type": "python"}}, "calculate_output": "a"},
            "unsupported_grader",
        ),
    ],
)
def test_what_is_no_grader_here(grader: dict[str, Any], code: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_grader(grader)
    assert (refused.value.status, refused.value.code) == (400, code)
