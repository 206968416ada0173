"""The score `grader`: what OpenAI's graders say of answers, and what cannot be said."""

from __future__ import annotations

import json
import math

import pytest
from score_kit import answer, scorer

from distft.core.errors import DataError
from distft.scores import SCORES, Answer
from distft.scores.grader import UNSERVED, places

CHECK = {"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}",
         "reference": "{{item.answer}}"}  # fmt: skip
JSON_CHECK = {**CHECK, "name": "json", "input": "{{sample.output_json.answer}}", "reference": "{{ item.number }}"}
MULTI = {"type": "multi", "name": "both", "graders": {"a": CHECK, "b": {**CHECK, "operation": "like"}},
         "calculate_output": "a / (2 * b)"}  # fmt: skip


def test_a_grade_is_a_figure_and_so_is_each_part_of_a_formula() -> None:
    result = scorer("grader", grader=CHECK)([answer("Paris", answer="Paris"), answer("Rome", number=2, answer="Paris")])
    assert (result.rows, result.totals, result.unscored) == ({"grade": (1.0, 0.0)}, {"grade": 0.5}, {})
    assert result.figures[0].binary
    rows = scorer("grader", grader=MULTI)([answer("In Paris", answer="Paris"), answer("Paris", answer="Paris")]).rows
    assert rows == {"grade": (0.0, 0.5), "grade_a": (0.0, 1.0), "grade_b": (1.0, 1.0)}


def test_an_answer_that_cannot_be_graded_has_no_grade_and_never_0() -> None:
    result = scorer("grader", grader=MULTI)([answer("Rome", answer="Paris"), answer("Paris", number=2, answer="Paris")])
    assert math.isnan(result.rows["grade"][0])
    assert math.isnan(result.rows["grade_a"][0])
    assert (result.rows["grade"][1], result.totals["grade"]) == (0.5, 0.5)
    assert result.unscored == {"valid.jsonl row 1": "calculate_output is no number where a = 0, b = 0"}
    result = scorer("grader", grader=JSON_CHECK)(
        [
            Answer(id=str(number), row={"number": 7}, reference="", text=text)
            for number, text in enumerate(('{"answer": 7}', "seven", '{"other": 7}', "[" * 100_000), 1)
        ]
    )
    assert result.rows["grade"][0] == 1.0
    assert all(map(math.isnan, result.rows["grade"][1:]))
    assert set(result.unscored) == {"2", "3", "4"}
    assert result.unscored["2"] == "the grader names {{sample.output_json.answer}}, which is not there"


def test_a_row_without_what_the_grader_names_is_its_own_fault() -> None:
    with pytest.raises(DataError, match=r"valid\.jsonl row 1: the grader names \{\{item\.answer\}\}, which is not"):
        scorer("grader", grader=CHECK)([answer("Paris", other="Paris")])


def test_similarity_is_that_of_rouge_score() -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    wanted, given = "the cat sat on the mat", "a cat on the mat sat"
    for metric, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        grader = {"type": "text_similarity", "name": "s", "evaluation_metric": metric,
                  "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}  # fmt: skip
        right = rouge.RougeScorer([kind]).score(wanted, given)[kind].fmeasure
        result = scorer("grader", grader=grader)([answer(given, answer=wanted), answer(given, answer="")])
        assert result.rows["grade"] == (pytest.approx(right), 0.0)


def test_what_is_refused_is_refused_by_name() -> None:
    params = SCORES["grader"].params
    for kind in UNSERVED:
        for grader in ({"type": kind, "name": "x"}, {**MULTI, "graders": {"a": {"type": kind, "name": "x"}}}):
            with pytest.raises(ValueError, match=f"a grader {kind} (runs code of users|asks a model)"):
                params.model_validate_json(json.dumps({"grader": grader}))
    for change, message in (
        ({"evaluation_metric": "bleu", "type": "text_similarity"}, "bleu is not computed here"),
        ({"calculate_output": "a + c"}, "calculate_output knows numbers"),
        ({"calculate_output": "__import__('os')"}, "calculate_output knows numbers"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
    ):
        grader = {**(CHECK if "evaluation_metric" in change else MULTI), **change}
        grader.pop("operation", None)
        with pytest.raises(ValueError, match=message):
            params.model_validate_json(json.dumps({"grader": grader}))
    read = params.model_validate_json(json.dumps({"grader": MULTI})).grader  # pyright: ignore[reportAttributeAccessIssue]
    assert set(places(read)) == {"sample.output_text", "item.answer"}
