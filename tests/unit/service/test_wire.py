"""What is answered has the fields that the installed `openai` client knows, by name, and what it must have."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
from openai import types
from openai.types import (
    chat,
    completion_create_params,
    fine_tuning,
    upload_complete_params,
    upload_create_params,
    uploads,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.fine_tuning import job_create_params, jobs
from openai.types.fine_tuning.checkpoints import permission_create_params, permission_create_response

from distft.service import wire, wire_answers

ANSWERS: list[tuple[Any, Any, set[str]]] = [
    (wire.JobObject, fine_tuning.FineTuningJob, set()),
    (wire.EventObject, fine_tuning.FineTuningJobEvent, set()),
    (wire.CheckpointObject, jobs.FineTuningJobCheckpoint, set()),
    (wire.CheckpointMetrics, jobs.fine_tuning_job_checkpoint.Metrics, set()),
    (wire.JobError, fine_tuning.fine_tuning_job.Error, set()),
    (wire.FileAnswer, types.FileObject, set()),
    (wire.UploadObject, types.Upload, set()),
    (wire.PartObject, uploads.UploadPart, set()),
    (wire.ModelObject, types.Model, set()),
    (wire.PermissionObject, permission_create_response.PermissionCreateResponse, set()),
    (wire_answers.ChatAnswer, chat.ChatCompletion, {"metadata", "moderation", "service_tier"}),
    (wire_answers.ChatChoice, chat.chat_completion.Choice, set()),
    (wire_answers.TextAnswer, types.Completion, set()),
    (wire_answers.TextChoice, types.CompletionChoice, set()),
    (wire_answers.TokenLogprob, chat.ChatCompletionTokenLogprob, set()),
]
REQUESTS: list[tuple[Any, Any, set[str]]] = [
    (wire.JobRequest, job_create_params.JobCreateParams, {"priority", "recipe"}),
    (wire.MethodRequest, job_create_params.Method, set()),
    (wire.IntegrationRequest, job_create_params.Integration, set()),
    (wire.WandbSettings, job_create_params.IntegrationWandb, set()),
    (
        wire.SupervisedHyperparameters,
        fine_tuning.supervised_hyperparameters_param.SupervisedHyperparametersParam,
        set(),
    ),
    (wire.DpoHyperparameters, fine_tuning.dpo_hyperparameters_param.DpoHyperparametersParam, set()),
    (
        wire.ReinforcementHyperparameters,
        fine_tuning.reinforcement_hyperparameters_param.ReinforcementHyperparametersParam,
        set(),
    ),
    (wire.UploadRequest, upload_create_params.UploadCreateParams, set()),
    (wire.UploadCompletion, upload_complete_params.UploadCompleteParams, set()),
    (wire.PermissionRequest, permission_create_params.PermissionCreateParams, set()),
    (wire_answers.ChatRequest, chat_create_params.CompletionCreateParamsStreaming, set()),
    (wire_answers.CompletionRequest, completion_create_params.CompletionCreateParamsStreaming, set()),
]


@pytest.mark.parametrize(("ours", "theirs", "left_out"), ANSWERS, ids=lambda value: getattr(value, "__name__", ""))
def test_answers_have_their_fields(ours: Any, theirs: Any, left_out: set[str]) -> None:
    """All but optional ones that this server has nothing to say in."""
    assert set(theirs.model_fields) - set(ours.model_fields) == left_out
    assert set(ours.model_fields) - set(theirs.model_fields) == set()
    assert not {name for name in left_out if theirs.model_fields[name].is_required()}


def annotations(theirs: Any) -> dict[str, str]:
    return {name: str(hint) for name, hint in getattr(theirs, "__annotations__", {}).items()}


@pytest.mark.parametrize(("ours", "theirs", "more"), REQUESTS, ids=lambda value: getattr(value, "__name__", ""))
def test_requests_take_their_fields(ours: Any, theirs: Any, more: set[str]) -> None:
    """Every one of theirs is known, if only to be refused by its name; what is required there is required here."""
    hints = {
        name: hint for base in reversed((theirs, *theirs.__orig_bases__)) for name, hint in annotations(base).items()
    }
    names = set(hints)
    assert names - set(ours.model_fields) == set()
    assert set(ours.model_fields) - names == more
    required = {name for name, field in ours.model_fields.items() if field.is_required()}
    assert required == {name for name, hint in hints.items() if "Required[" in hint} - {"stream"}


def test_every_field_that_is_not_served_is_refused_by_name() -> None:
    """A field is used, a label that changes no answer, or in the table of what is refused."""
    used = inspect.getsource(__import__("distft.service.completions", fromlist=["x"]))
    for method in (wire_answers.ChatRequest.offered_tools, wire_answers.ChatRequest.answer_schema):
        used += inspect.getsource(method).replace("self.", "request.")
    for model in (wire_answers.ChatRequest, wire_answers.CompletionRequest):
        for name in model.model_fields:
            known = name in wire_answers.OFF or name in wire_answers.LABELS or f"request.{name}" in used
            assert known or name in ("stop", "prompt"), name
    assert typing.get_args(wire.Purpose) == wire.PURPOSES
