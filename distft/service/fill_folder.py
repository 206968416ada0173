"""What was asked becomes a folder, which a job's and a draft's examination both read."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.service.job_folder import JobFolder
from distft.service.job_recipe import TRAIN, VALID
from distft.service.runners import RUNNERS
from distft.service.settings import ServedBase, ServiceSettings


@dataclass(frozen=True, kw_only=True)
class JobFolderRequest:
    """What was asked of a job."""

    base: ServedBase
    method: dict[str, Any]
    """As the API has it, with every hyper-parameter."""
    seed: int
    integrations: list[dict[str, Any]] | None
    recipe: str | None
    """The recipe, where somebody has edited it."""
    training: Path
    validation: Path | None
    """Contents of the files."""


def fill_folder(folder: JobFolder, asked: JobFolderRequest, settings: ServiceSettings) -> None:
    """Write what was asked; the rows are linked, so that they outlive the files they came as."""
    folder.make(
        {
            "base": asked.base.model_dump_json(),
            "layout": RUNNERS[settings.runner].layout(asked.base),
            "method": asked.method,
            "seed": asked.seed,
            "integrations": asked.integrations,
            "recipe": asked.recipe,
            "line_bytes": int(settings.limits.line_mib * (1 << 20)),
        }
    )
    for content, name in ((asked.training, TRAIN), (asked.validation, VALID)):
        if content is not None:
            _link(content, folder.path / name)


def _link(content: Path, path: Path) -> None:
    try:
        os.link(content, path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(content, path)
