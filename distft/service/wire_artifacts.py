"""Requests for artifacts, and artifacts as they are answered. Not OpenAI's: its API hands no weights out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from distft.service.wire import JobError, WireObject, WireRequest

Kind = Literal["export", "merge", "combine"]
MOST_MODELS = 16
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Setting = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | str


class ArtifactRequest(WireRequest):
    """POST /artifacts."""

    kind: Kind
    models: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=300)]],
        Field(min_length=1, max_length=MOST_MODELS),
    ]
    """Tuned models or checkpoints of this project: one, and of `combine` several."""
    format: Name | None = None
    """Of `export`: as `distft export --as`."""
    level: Name | None = None
    """Of `export`: degree of rounding, where the format has levels."""
    dtype: Name | None = None
    """Of `merge`: type of the merged weights; the base's."""
    how: Name | None = None
    """Of `combine`: as `distft adapters combine --how`."""
    weights: Annotated[list[float], Field(max_length=MOST_MODELS)] | None = None
    """Of `combine`: one for each model; 1."""
    rank: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Of `combine`: of the result."""
    settings: Annotated[dict[Name, Setting], Field(max_length=16)] | None = None
    """Of `combine`: what the way of combining lets be set."""


class ArtifactObject(WireObject):
    """What is made, or was made, of tuned models."""

    id: str
    object: Literal["artifact"] = "artifact"
    created_at: int
    started_at: int | None
    finished_at: int | None
    kind: Kind
    models: list[str]
    settings: dict[str, Any]
    """What of the request is of this kind, with the defaults that were filled in."""
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    error: JobError | None
    bytes: int
    """Of its files, once it has succeeded."""
    proof: dict[str, Any] | None
    """What was found when it was compared with its source: as certificate.json, merge.json or combine.json say it."""
