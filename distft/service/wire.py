"""Files, jobs and their parts as OpenAI's API has them on the wire, field for field (openapi 2.3.0).

Requests refuse fields that are not listed: what is not understood is not ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator

Auto = Literal["auto"]
Epochs = Auto | Annotated[int, Field(ge=1, le=50)]
BatchSize = Auto | Annotated[int, Field(ge=1, le=256)]
Multiplier = Auto | Annotated[float, Field(gt=0, allow_inf_nan=False)]
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
FILE_ID = r"^[A-Za-z0-9_-]{1,64}$"
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class WireRequest(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class WireObject(BaseModel):
    """Base of what is answered."""

    model_config = ConfigDict(extra="forbid")


class SupervisedHyperparameters(WireRequest):
    """Of `method.supervised`."""

    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class DpoHyperparameters(SupervisedHyperparameters):
    """Of `method.dpo`."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"


class ReinforcementHyperparameters(SupervisedHyperparameters):
    """Of `method.reinforcement`."""

    reasoning_effort: Literal["default", "low", "medium", "high"] = "default"
    compute_multiplier: Auto | Annotated[float, Field(gt=1e-5, le=10)] = "auto"
    eval_interval: Auto | Annotated[int, Field(ge=1, lt=2**31)] = "auto"
    eval_samples: Auto | Annotated[int, Field(ge=1, lt=2**31)] = "auto"


class SupervisedMethod(WireRequest):
    """`method.supervised`."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DpoMethod(WireRequest):
    """`method.dpo`."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class ReinforcementMethod(WireRequest):
    """`method.reinforcement`."""

    grader: dict[str, JsonValue]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class MethodRequest(WireRequest):
    """`method`: one kind of training, and its settings alone."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @model_validator(mode="after")
    def _one(self) -> MethodRequest:
        others = [name for name in ("supervised", "dpo", "reinforcement") if name != self.type and getattr(self, name)]
        if others:
            raise ValueError(f"{others[0]} does not go with type = {self.type}")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("reinforcement is missing: it holds the grader")
        return self


class WandbSettings(WireRequest):
    """`integrations[].wandb`."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    entity: str | None = None
    name: str | None = None
    tags: list[str] | None = None


class IntegrationRequest(WireRequest):
    """`integrations[]`."""

    type: Literal["wandb"]
    wandb: WandbSettings


class JobRequest(WireRequest):
    """POST /fine_tuning/jobs."""

    model: str
    training_file: Annotated[str, StringConstraints(pattern=FILE_ID)]
    validation_file: Annotated[str, StringConstraints(pattern=FILE_ID)] | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[IntegrationRequest], Field(max_length=5)] | None = None
    method: MethodRequest | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Not OpenAI's: a job of a higher one is started first."""
    recipe: Annotated[str, StringConstraints(min_length=1, max_length=65536)] | None = None
    """Not OpenAI's: the job's recipe as TOML, as it was shown and then edited (`edited_recipe`)."""


class PriorityRequest(WireRequest):
    """POST /fine_tuning/jobs/{id}/priority. Not OpenAI's."""

    priority: Annotated[int, Field(ge=-100, le=100)]


class JobError(WireObject):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobObject(WireObject):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    """`paused` is not in OpenAI's list, though pause is in its API."""
    hyperparameters: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    estimated_finish: int | None
    integrations: list[dict[str, Any]] | None
    method: dict[str, Any]
    metadata: dict[str, str] | None


class EventObject(WireObject):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointMetrics(WireObject):
    """Of a checkpoint; what the objective does not measure is left out."""

    step: float | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointObject(WireObject):
    """A state of a job's model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics
    fine_tuning_job_id: str


class PermissionRequest(WireRequest):
    """POST …/permissions."""

    project_ids: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=64)]], Field(min_length=1, max_length=100)
    ]


class PermissionObject(WireObject):
    """That a project may use a checkpoint."""

    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str


class FileAnswer(WireObject):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class ExpiresAfter(WireRequest):
    """When a file goes."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class UploadRequest(WireRequest):
    """POST /uploads."""

    filename: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    purpose: Purpose
    bytes: Annotated[int, Field(ge=1, lt=2**63)]
    mime_type: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    expires_after: ExpiresAfter | None = None


class UploadCompletion(WireRequest):
    """POST /uploads/{id}/complete."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=1000)]
    md5: str | None = None


class UploadObject(WireObject):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileAnswer | None = None


class PartObject(WireObject):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class ModelObject(WireObject):
    """A model that can be asked or trained."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: str | None = None


class DeletedObject(WireObject):
    """That something is gone."""

    id: str
    object: str
    deleted: Literal[True] = True


class Page(WireObject):
    """A part of a list."""

    object: Literal["list"] = "list"
    data: list[Any]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


def page_of(objects: list[Any], *, has_more: bool) -> Page:
    """Return the objects as a page, with the ids of its ends."""
    ends = (objects[0].id, objects[-1].id) if objects else (None, None)
    return Page(data=objects, has_more=has_more, first_id=ends[0], last_id=ends[1])
