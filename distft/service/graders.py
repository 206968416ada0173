"""Graders of OpenAI's API that need no model and run no code of users: what an answer is worth, by texts alone."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import operator
import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError

from distft.catalog import REGISTRIES
from distft.core.errors import DistftError
from distft.scores.spec import Answer
from distft.service.errors import ApiError, refuse
from distft.service.wire import WireObject, WireRequest

Text = Annotated[str, StringConstraints(max_length=100_000)]
GraderName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Metric = Literal[
    "cosine", "fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
]
FormulaName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w{0,63}$")]
SERVED_METRICS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
UNSERVED = {
    "python": "runs code of users, which this server does not",
    "score_model": "asks a model for a score, and none is configured to judge here",
    "label_model": "asks a model for a label, and none is configured to judge here",
}
_PLACE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}  # of several values, also of one alone
_LONGEST_FORMULA = 1000


class StringCheckGrader(WireRequest):
    """1 where a comparison of two texts holds, else 0."""

    type: Literal["string_check"]
    name: GraderName
    input: Text
    reference: Text
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarityGrader(WireRequest):
    """How alike two texts are, from 0 to 1."""

    type: Literal["text_similarity"]
    name: GraderName
    input: Text
    reference: Text
    evaluation_metric: Metric


Single = Annotated[StringCheckGrader | TextSimilarityGrader, Field(discriminator="type")]


class MultiGrader(WireRequest):
    """A formula of several graders' scores."""

    type: Literal["multi"]
    name: GraderName
    graders: Annotated[dict[FormulaName, Single], Field(min_length=1, max_length=20)]
    calculate_output: Annotated[str, StringConstraints(min_length=1, max_length=_LONGEST_FORMULA)]


Grader = StringCheckGrader | TextSimilarityGrader | MultiGrader


class GraderValidation(WireRequest):
    """POST /fine_tuning/alpha/graders/validate."""

    grader: dict[str, JsonValue]


class GraderRun(GraderValidation):
    """POST /fine_tuning/alpha/graders/run."""

    model_sample: Text
    item: dict[str, JsonValue] = Field(default={})


class ValidatedGrader(WireObject):
    """That a grader is understood."""

    grader: dict[str, Any]


class GraderErrors(WireObject):
    """What went wrong, as OpenAI lists it."""

    formula_parse_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    invalid_variable_error: bool = False
    other_error: bool = False
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    model_grader_server_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_server_error_details: str | None = None


class GraderMetadata(WireObject):
    """How a grader ran."""

    name: str
    type: str
    errors: GraderErrors
    execution_time: float
    scores: dict[str, float]
    token_usage: int | None = None
    sampled_model_name: str | None = None


class GraderResult(WireObject):
    """What an answer is worth."""

    reward: float
    sub_rewards: dict[str, float]
    metadata: GraderMetadata
    model_grader_token_usage_per_model: dict[str, Any] = Field(default={})


def read_grader(content: Mapping[str, Any]) -> Grader:
    """Return a grader.

    Raises:
        ApiError: it is none, or one that is not served.
    """
    kind = content.get("type")
    kinds = {"string_check": StringCheckGrader, "text_similarity": TextSimilarityGrader, "multi": MultiGrader}
    inner = content.get("graders")
    for entry in [content, *(inner.values() if isinstance(inner, dict) else ())]:
        if isinstance(entry, dict) and (why := UNSERVED.get(str(entry.get("type")))):
            raise ApiError(400, f"A grader {entry['type']} {why}.", param="grader.type", code="unsupported_grader")
    if not isinstance(kind, str) or kind not in kinds:
        refuse(f"grader.type is one of {', '.join(kinds)}", param="grader.type")
    try:
        grader = kinds[kind].model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(["grader", *(str(step) for step in first["loc"])])
        refuse(f"Invalid value for '{param}': {first['msg']}.", param=param)
    for single in grader.graders.values() if isinstance(grader, MultiGrader) else (grader,):
        if isinstance(single, TextSimilarityGrader) and single.evaluation_metric not in SERVED_METRICS:
            message = f"The metric {single.evaluation_metric} is not served: {', '.join(SERVED_METRICS)} are."
            raise ApiError(400, message, param="grader.evaluation_metric", code="unsupported_grader")
    if isinstance(grader, MultiGrader):
        _total(grader, dict.fromkeys(grader.graders, 1.0))
    return grader


def run_grader(request: GraderRun) -> GraderResult:
    """Return what a sample is worth.

    Raises:
        ApiError: the grader is none, or names what item and sample do not have.
    """
    grader, began = read_grader(request.grader), time.monotonic()
    errors, scores = GraderErrors(), dict[str, float]()
    singles = grader.graders if isinstance(grader, MultiGrader) else {grader.name: grader}
    try:
        for name, single in singles.items():
            scores[name] = _score(single, request)
        reward = scores[grader.name] if not isinstance(grader, MultiGrader) else 0.0
        if isinstance(grader, MultiGrader):
            value = _total(grader, scores)
            errors, reward = GraderErrors(other_error=value is None), value or 0.0
    except KeyError as error:
        message = f"The grader names {error.args[0]}, which is not there."
        raise ApiError(400, message, param="grader", code="invalid_variable") from None
    metadata = GraderMetadata(
        name=grader.name, type=grader.type, errors=errors, execution_time=time.monotonic() - began, scores=scores
    )
    sub_rewards = scores if isinstance(grader, MultiGrader) else {}
    return GraderResult(reward=reward, sub_rewards=sub_rewards, metadata=metadata)


def _score(grader: Any, request: GraderRun) -> float:
    given, wanted = _filled(grader.input, request), _filled(grader.reference, request)
    if isinstance(grader, StringCheckGrader):
        match grader.operation:
            case "eq":
                return float(given == wanted)
            case "ne":
                return float(given != wanted)
            case "like":
                return float(wanted in given)
            case "ilike":
                return float(wanted.lower() in given.lower())
    score = REGISTRIES.scores["rouge"]
    params = score.params(kinds=(SERVED_METRICS[grader.evaluation_metric],))
    try:
        result = score.build(params)([Answer(id="sample", row={}, reference=wanted, text=given)])
    except DistftError as error:
        raise ApiError(503, str(error), code="grader_unavailable") from None
    return float(result.totals[SERVED_METRICS[grader.evaluation_metric]])


def _filled(template: str, request: GraderRun) -> str:
    """Return a template with `{{item.KEY}}`, `{{sample.output_text}}` and `{{sample.output_json.KEY}}` in place."""
    sample: dict[str, Any] = {"output_text": request.model_sample}
    with contextlib.suppress(ValueError, RecursionError):  # it is no JSON: a template that wants some finds none
        sample["output_json"] = json.loads(request.model_sample)
    places = {"item": request.item, "sample": sample}

    def value(match: re.Match[str]) -> str:
        found: Any = places
        for step in match[1].split("."):
            if not isinstance(found, dict) or step not in found:
                raise KeyError(f"{{{{{match[1]}}}}}")
            found = found[step]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _PLACE.sub(value, template)


def _total(grader: MultiGrader, scores: Mapping[str, float]) -> float | None:
    """Return the value of a grader's formula; None where it is no number for these scores.

    Raises:
        ApiError: it is no formula of them.
    """
    try:
        value = _value(_formula(grader.calculate_output), scores)
    except (ZeroDivisionError, OverflowError):
        return None
    except RecursionError:
        refuse("calculate_output is nested too deeply.", param="grader.calculate_output", code="formula_parse_error")
    return value if math.isfinite(value) else None


def _formula(text: str) -> ast.AST:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        refuse("calculate_output is no formula.", param="grader.calculate_output", code="formula_parse_error")


def _value(node: ast.AST, scores: Mapping[str, float]) -> float:
    """Return the value of a formula of numbers, names, + - * /, min, max and abs; nothing else is evaluated."""
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in scores:
            return scores[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, scores))
        case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
            return abs(_value(argument, scores))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name]([_value(argument, scores) for argument in arguments])
        case _:
            pass
    allowed = ", ".join([*scores, *_FUNCTIONS, "abs"])
    message = f"calculate_output knows numbers, + - * / and {allowed}."
    refuse(message, param="grader.calculate_output", code="formula_parse_error")
