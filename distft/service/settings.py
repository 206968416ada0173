"""What `--models FILE` says: the models that may be trained, and how much of everything a project may have."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Params
from distft.recipe.lines import find_lines
from distft.recipe.toml_text import toml_value

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Method = Literal["supervised", "dpo", "reinforcement"]


class VllmSettings(Params):
    """A vLLM server that answers for a base and its LoRA adapters: `[models.NAME.vllm]`."""

    url: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """Where it listens; it sees the server's data folder under the same path."""
    model: str | None = Field(default=None, min_length=1)
    """Name under which it serves the base; None: the model whose folder or hub id is `path`."""
    key_env: str | None = Field(default=None, min_length=1)
    """Environment variable of this server that holds the key it asks for."""


class ServedBase(Params):
    """A model that jobs may be made of: `[models.NAME]`."""

    path: str = Field(min_length=1)
    """Folder or hub id, as `[model] path` of a recipe."""
    chat_template: str = Field(default="auto", min_length=1)
    """As `[data] chat_template`."""
    methods: tuple[Method, ...] = ("supervised", "dpo", "reinforcement")
    """What jobs may do with it; none: it only answers, as a router and an adapter do."""
    nproc: int = Field(default=1, ge=1)
    """Processes of a job on this machine: one for each GPU."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of a job, under Slurm."""
    gpus_per_node: int = Field(default=1, ge=0)
    """GPUs of a job on each node, under Slurm; 0: one process a node, on its CPUs."""
    time: str | None = None
    """Limit of one start, as Slurm writes it; None: the partition's."""
    gpu: str | None = None
    """GPU that jobs are planned for, as `distft plan --gpu`; None: the one of this machine, and no plan without one."""
    price: float | None = Field(default=None, gt=0)
    """What an hour of one GPU costs, in whatever money you count; None: pages tell hours, and no cost."""
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of an answer where a request names no limit."""
    vllm: VllmSettings | None = None
    """Answers for it and for adapters of it; None: this server's own process does."""
    recipe: dict[str, Any] = Field(default={})
    """Keys that every job's recipe has: `[models.NAME.recipe.method] r = 8`."""

    @model_validator(mode="after")
    def _only_answers(self) -> Self:
        if self.methods and (Path(self.path).expanduser() / "router.json").is_file():
            raise ValueError("path: is a router, of which no job can be made: methods = []")
        return self

    def overrides(self) -> Iterator[str]:
        """Yield `recipe` as `table.key=value`."""
        yield from _flat(self.recipe, "")


class ServiceLimits(Params):
    """How much of everything there may be: `[limits]`."""

    jobs_side_by_side: int = Field(default=1, ge=1)
    """Jobs that run at the same time."""
    running_per_project: int = Field(default=16, ge=1)
    """Of them, those of one project."""
    unfinished_per_project: int = Field(default=1000, ge=1)
    """Jobs of one project that have not ended."""
    files_per_project: int = Field(default=10_000, ge=1)
    file_mib: float = Field(default=512.0, gt=0)
    """Of one uploaded file."""
    project_gib: float = Field(default=100.0, gt=0)
    """Of all files and artifacts of a project."""
    line_mib: float = Field(default=8.0, gt=0)
    """Of one line of training data."""
    request_mib: float = Field(default=4.0, gt=0)
    """Of a request that is no file."""
    slowest_upload_s: float = Field(default=60.0, gt=0)
    """Seconds without a byte after which a request is given up."""
    examine_s: float = Field(default=3600.0, gt=0)
    """Seconds that looking at a job's files may take."""
    waiting_answers: int = Field(default=64, ge=1)
    """Requests for answers that may wait for the model."""
    niceness: int = Field(default=5, ge=0, le=19)
    """Added to the server's own for jobs of the runner `local`, for what looks at files and for what makes artifacts:
    how far they give way."""
    lost_starts: int = Field(default=3, ge=0)
    """Times that a job whose process vanished is started again without having got further, and an artifact's."""
    artifacts_per_project: int = Field(default=100, ge=1)
    """Their bytes count with those of the files."""
    artifact_s: float = Field(default=21600.0, gt=0)
    """Seconds that making one artifact may take."""


class SettingsFile(Params):
    """The whole of FILE."""

    models: dict[str, ServedBase] = Field(min_length=1)
    limits: ServiceLimits = ServiceLimits()


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """All that a server is told."""

    data: Path
    """Absolute."""
    models: Mapping[str, ServedBase]
    limits: ServiceLimits
    runner: str = "local"
    site: Path | None = None
    examine: tuple[str, ...] = (sys.executable, "-m", "distft.service.examine")
    """Command that looks at a job's folder."""
    make_artifact: tuple[str, ...] = (sys.executable, "-m", "distft.service.make_artifact")
    """Command that makes what an artifact's folder asks for."""

    @property
    def jobs(self) -> Path:
        """Folder of the jobs' folders."""
        return self.data / "jobs"

    @property
    def artifacts(self) -> Path:
        """Folder of the artifacts' folders."""
        return self.data / "artifacts"

    @property
    def blobs(self) -> Path:
        """Folder of contents, named by their hashes."""
        return self.data / "files"


def read_settings(path: Path) -> SettingsFile:
    """Read the file that `--models` names.

    Raises:
        RecipeError: it cannot be read, or says what is not known; lists everything, with lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise RecipeError(str(path), [Problem(message=f"cannot be read: {error}")]) from None
    lines = find_lines(text)
    problems: list[Problem] = []
    for name in content.get("models", {}) if isinstance(content.get("models"), dict) else ():
        if not MODEL_NAME.fullmatch(name):
            problems.append(
                Problem(
                    message=f"[models.{name}]  is no name of a model",
                    line=lines.get(("models", name)),
                    fix="allowed: letters, digits, dots, dashes and underscores, 64 at most",
                )
            )
    try:
        # JSON's rules where the file is not JSON: a TOML array is a list, which strict tuples refuse
        return SettingsFile.model_validate(_tuples(content)) if not problems else _refuse(path, problems)
    except ValidationError as error:
        for entry in error.errors():
            key = tuple(entry["loc"])
            line = next((lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in lines), None)
            problems.append(Problem(message=f"{'.'.join(map(str, key))}  {entry['msg']}", line=line))
        _refuse(path, problems)
        raise


def _refuse(path: Path, problems: list[Problem]) -> Any:
    raise RecipeError(str(path), problems)


def _tuples(content: Any) -> Any:
    models = content.get("models")
    if not isinstance(models, dict):
        return content
    changed = {
        name: {
            key: tuple(value) if key == "methods" and isinstance(value, list) else value for key, value in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for name, entry in models.items()
    }
    return {**content, "models": changed}


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={toml_value(value)}"
