"""`python -m distft.service.examine FOLDER`: a job's files and recipe are looked at, and planned, before it may wait.

A process of its own: what people upload is parsed here, and nothing it does can harm the server. The answer is a file,
so that a server that was killed finds it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import DataError, DistftError, MachineError, RecipeError
from distft.core.files import replace_file, replace_json
from distft.core.log import quiet_libraries
from distft.service.edited_recipe import changed_keys, from_shown
from distft.service.job_folder import EXAMINED, JobFolder
from distft.service.job_recipe import TRAIN, VALID, RowScan, chosen, scan_rows, write_recipe
from distft.service.settings import ServedBase

if TYPE_CHECKING:
    from distft.check import CheckReport
    from distft.plan.case import PlanCase


def main(argv: list[str]) -> int:
    """Look at one job, and write what was found."""
    folder = JobFolder(path=Path(argv[0]))
    quiet_libraries()
    try:
        found = examine(folder)
    except DistftError as error:
        found = {"error": {"code": code_of(error), "message": plain(str(error), folder), "param": param_of(error)}}
    replace_json(folder.path / EXAMINED, found, indent=1)
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose rows were looked at, with its recipe."""

    values: dict[str, Any]
    """Hyper-parameters, none of them `auto`."""
    changed: list[str]
    """Keys of the recipe that somebody has edited."""
    num_rows: int
    method: str
    """Name of the recipe's method: full, lora and others."""
    report: CheckReport


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """What the planner says of a job."""

    fits: bool
    verdict: str
    advice: tuple[str, ...] = ()
    """Changes that would make it fit; none where it fits."""
    case: PlanCase | None
    """None: there is no GPU to plan for."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The verdict, and the advice below it."""
        return self.verdict, *self.advice


def examine(folder: JobFolder) -> dict[str, Any]:
    """Return what the job's files hold, the values of its hyper-parameters, and what the plan says.

    A job that does not fit has an `error` beside what check found.

    Raises:
        DistftError: it cannot be trained.
    """
    from distft.data_quality import summary

    checked = check_job(folder, samples=0)
    report = checked.report
    events = [
        _event(
            f"{'Training' if split.split == 'train' else 'Validation'} file: {split.num_rows:,} rows, "
            f"{split.num_tokens:,} tokens, {split.num_supervised:,} of them trained",
            data={"rows": split.num_rows, "tokens": split.num_tokens, "trained_tokens": split.num_supervised},
        )
        for split in report.splits
    ]
    if checked.changed:
        events.append(_event(f"The recipe was edited: {', '.join(checked.changed)}"))
    care = [line for line in summary(report.care) if not line.startswith("!")]
    events.append(_event("Check of the rows: " + plain("\n".join(care), folder)))
    events += [_event(plain(note, folder), level="warn") for note in report.care.notes]
    planned = plan_job(folder)
    events += [_event(plain(line, folder), level="info" if planned.fits else "error") for line in planned.lines]
    if not planned.fits:
        message = "The job does not fit the machine: " + plain("\n".join(planned.lines), folder)
        return {"error": {"code": "does_not_fit", "message": message, "param": None}, "events": events}
    return {"hyperparameters": checked.values, "num_steps": report.num_steps, "events": events}


def check_job(folder: JobFolder, *, samples: int) -> CheckedJob:
    """Make the job's recipe, or take the one that somebody has edited, and look at its rows.

    Args:
        folder: the job's, or a draft's.
        samples: rows to show of each file.

    Raises:
        DistftError: it cannot be trained.
    """
    request = folder.request()
    base = ServedBase.model_validate_json(request["base"])
    method = request["method"]["type"]
    settings = request["method"][method]
    scans: dict[str, RowScan] = {}
    for key, name, param in (("train", TRAIN, "training_file"), ("valid", VALID, "validation_file")):
        if (folder.path / name).exists():
            scans[key] = scan_rows(
                folder.path / name, method, name=param, line_bytes=request["line_bytes"], grader=settings.get("grader")
            )
    held_out = scans["valid"].num_rows if "valid" in scans else 0
    values = chosen(settings["hyperparameters"], scans["train"].num_rows, num_held_out=held_out)
    written, changed = write_recipe(folder, base, scans, values), []
    if (edited := request.get("recipe")) is not None:
        edited = from_shown(edited, folder)
        changed = changed_keys(written, edited)
        replace_file(folder.recipe, edited)
    from distft.catalog import REGISTRIES
    from distft.check import run_check
    from distft.recipe import load_recipe

    recipe = load_recipe(str(folder.recipe), registries=REGISTRIES)
    if changed:  # the API answers what is trained with
        if recipe.train.max_steps is None:
            values["n_epochs"] = recipe.train.epochs
        values["batch_size"] = recipe.train.global_batch_size
    report = run_check(recipe, samples=samples)
    return CheckedJob(
        values=values, changed=changed, num_rows=scans["train"].num_rows, method=recipe.method.name, report=report
    )


def plan_job(folder: JobFolder) -> PlannedJob:
    """Return what the plan says of a folder's recipe; a machine without a GPU is not planned for.

    Raises:
        DistftError: the recipe cannot be planned.
    """
    import torch

    base = ServedBase.model_validate_json(folder.request()["base"])
    if base.gpu is None and not torch.cuda.is_available():
        return PlannedJob(
            fits=True, verdict="No plan: this machine has no GPU, and the model's settings name none.", case=None
        )
    from distft.catalog import REGISTRIES
    from distft.plan import calibration, show
    from distft.plan.machine import read_machine
    from distft.plan.planner import Planner
    from distft.plan.source import config_folder
    from distft.recipe import load_recipe

    gpu = base.gpu or f"{torch.cuda.get_device_properties(0).total_memory / 2**30 * 0.97:.1f}"
    gpus, nodes = folder.request()["layout"]
    machine = read_machine(gpu, gpus, nodes, calibration.place(None))
    recipe = load_recipe(str(folder.recipe), registries=REGISTRIES)
    with config_folder(recipe, None) as config:
        planner = Planner(path=str(folder.recipe), overrides=(), folder=config, machine=machine)
        case = planner.cases([], [])[0][0]
        advice = () if case.fits else tuple(show.advice(planner.changes(case)))
        return PlannedJob(fits=case.fits, verdict=show.verdict(case), advice=advice, case=case)


def plain(text: str, folder: JobFolder) -> str:
    """Return a message without the paths of this machine."""
    return text.replace(f"{folder.path}/runs/", "").replace(f"{folder.path}/", "")


def _event(message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"message": message, "level": level, "data": data}


def code_of(error: DistftError) -> str:
    """Return the error code of what is wrong with a job, as the API has it."""
    match error:
        case DataError():
            return "invalid_training_file"
        case MachineError():
            return "does_not_fit"
        case RecipeError():
            return "invalid_job"
        case _:
            return error.kind.replace(" ", "_")


def param_of(error: DistftError) -> str | None:
    """Return the field of the request that an error is about."""
    if isinstance(error, DataError):
        return "validation_file" if "validation_file" in str(error) or VALID in str(error) else "training_file"
    return None


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
