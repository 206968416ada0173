"""Graders on the wire: whether one is understood, and what it says of a sample. The score `grader` computes it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from distft.core.errors import MachineError
from distft.scores.grader import (
    GRADER,
    UNSERVED,
    FormulaError,
    GraderComputation,
    MultiGrader,
    PlaceError,
    StringCheckGrader,
    Text,
    TextSimilarityGrader,
    UnservedGraderError,
)
from distft.service.errors import ApiError, refuse
from distft.service.wire import WireObject, WireRequest

Grader = StringCheckGrader | TextSimilarityGrader | MultiGrader
_KINDS = ("string_check", "text_similarity", "multi")


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


def read_grader(content: Mapping[str, Any], *, param: str = "grader") -> Grader:
    """Return a grader.

    Args:
        content: as it was sent.
        param: where the request has it.

    Raises:
        ApiError: it is none, or one that is not served.
    """
    kind = content.get("type")
    if not isinstance(kind, str) or kind not in (*_KINDS, *UNSERVED):
        refuse(f"{param}.type is one of {', '.join(_KINDS)}", param=f"{param}.type")
    try:
        return GRADER.validate_python(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        steps = [str(step) for step in first["loc"] if step not in _KINDS]
        match cause:
            case UnservedGraderError():
                place = ".".join([param, *steps, cause.key])
                raise ApiError(400, _sentence(cause), param=place, code="unsupported_grader") from None
            case FormulaError():
                place = f"{param}.calculate_output"
                raise ApiError(400, f"{cause}.", param=place, code="formula_parse_error") from None
            case _:
                place = ".".join([param, *steps])
                refuse(f"Invalid value for '{place}': {first['msg']}.", param=place)


def run_grader(request: GraderRun) -> GraderResult:
    """Return what a sample is worth.

    Raises:
        ApiError: the grader is none, or names what item and sample do not have.
    """
    grader, began = read_grader(request.grader), time.monotonic()
    try:
        grade = GraderComputation(grader).grade(request.item, request.model_sample)
    except PlaceError as error:
        raise ApiError(400, _sentence(error), param="grader", code="invalid_variable") from None
    except MachineError as error:
        raise ApiError(503, str(error), code="grader_unavailable") from None
    scores = dict(grade.scores)
    metadata = GraderMetadata(
        name=grader.name, type=grader.type, errors=GraderErrors(other_error=bool(grade.why)),
        execution_time=time.monotonic() - began, scores=scores,
    )  # fmt: skip
    sub_rewards = scores if isinstance(grader, MultiGrader) else {}
    # the API's reward is a number: the error beside it says that this one is none
    return GraderResult(reward=0.0 if grade.why else grade.reward, sub_rewards=sub_rewards, metadata=metadata)


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."
