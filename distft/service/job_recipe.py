"""A job becomes a recipe: the importer's, with the values that `auto` was answered with, in the job's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.catalog import REGISTRIES
from distft.core.errors import DataError
from distft.core.files import read_json_object, replace_file, replace_json
from distft.demo.files import locate_path
from distft.importers import IMPORTERS, ImportOptions, import_config
from distft.importers.openai import answers_per_prompt
from distft.recipe.toml_text import toml_value
from distft.scores.grader import GRADER, PlaceError, places, value_at
from distft.service.job_folder import JobFolder
from distft.service.settings import ServedBase

TRAIN, VALID = "train.jsonl", "valid.jsonl"
LONGEST = 4096
"""Tokens of a row, where the model has as many positions."""
MOST_BETWEEN_SAVES = 500
_ROW_FORMS = {
    "supervised": (("messages", "messages"), ("prompt", "prompt_completion")),
    "dpo": (("input", "preference"),),
    "reinforcement": (("messages", "prompt"),),
}
"""Method -> (key that shows the form, format of the recipe)."""


@dataclass(frozen=True, kw_only=True)
class RowScan:
    """What a file of rows is, before any of them is tokenized."""

    num_rows: int
    form: str
    """Format of the recipe."""


def scan_rows(
    file: Path, method: str, *, name: str, line_bytes: int, grader: Mapping[str, Any] | None = None
) -> RowScan:
    """Read a JSONL file line by line, each at most `line_bytes` long.

    Args:
        file: of rows.
        method: of the job.
        name: what messages call the file.
        line_bytes: of a line at most.
        grader: what of each row it names has to be there.

    Raises:
        DataError: a line is too long, no JSON object, or a row of another method; names file and line.
    """
    forms, num_rows = dict(_ROW_FORMS[method]), 0
    wanted_places = [] if grader is None else [place for place in places(GRADER.validate_python(dict(grader)))]
    form: str | None = None
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(line_bytes + 1):
            number += 1
            if len(line) > line_bytes:
                raise DataError(f"{name}, line {number}: is longer than {line_bytes:,} bytes")
            if not line.strip():
                continue
            row = _row(line, f"{name}, line {number}")
            shown = next((forms[key] for key in forms if key in row), None)
            if shown is None:
                wanted = " or ".join(f'"{key}"' for key in forms)
                raise DataError(f"{name}, line {number}: a row of the method {method} has {wanted}, this one has not")
            if form not in (None, shown):
                raise DataError(f"{name}, line {number}: is a row of another form than those before it")
            for place in wanted_places:
                if place.startswith("item."):
                    try:
                        value_at({"item": row}, place)
                    except PlaceError as error:
                        raise DataError(f"{name}, line {number}: {error}") from None
            form, num_rows = shown, num_rows + 1
    if form is None:
        raise DataError(f"{name}: holds no row")
    return RowScan(num_rows=num_rows, form=form)


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes, json would take UTF-16 too
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not a JSON object")
    return row


def chosen(hyperparameters: Mapping[str, Any], num_rows: int, *, num_held_out: int = 0) -> dict[str, Any]:
    """Return the hyper-parameters with a value in the place of each `auto`.

    `batch_size`: 0.2 % of the rows, 8 at least and 256 at most, never more than there are rows. `n_epochs`: 3, and for
    few rows as many as make 100 steps, 10 at most. `learning_rate_multiplier`: 1. `beta`: 0.1. `compute_multiplier`: 1.
    `eval_interval`: an epoch, `eval_samples`: all rows of the validation file; without one they stay `auto`.
    """
    batch = hyperparameters.get("batch_size", "auto")
    batch = min(num_rows, max(8, min(256, round(0.002 * num_rows)))) if batch == "auto" else batch
    epochs = max(3, min(10, math.ceil(100 * batch / num_rows)))
    values: dict[str, Any] = {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0, "beta": 0.1}
    values |= {"compute_multiplier": 1.0, "eval_interval": "auto", "eval_samples": "auto"}
    if num_held_out:
        values |= {"eval_interval": _epoch_steps(num_rows, batch), "eval_samples": num_held_out}
    return {name: values[name] if given == "auto" else given for name, given in hyperparameters.items()}


def _epoch_steps(num_rows: int, batch: int) -> int:
    """Return the steps between saves and evaluations: an epoch's, and not too many."""
    return max(1, min(MOST_BETWEEN_SAVES, math.ceil(num_rows / batch)))


def write_recipe(folder: JobFolder, base: ServedBase, scans: Mapping[str, RowScan], values: Mapping[str, Any]) -> str:
    """Write the job's recipe; return what the importer said of keys that mean something else here.

    Args:
        folder: the job's.
        base: the model that it trains.
        scans: `train`, and `valid` where the job has a validation file.
        values: hyper-parameters, none of them `auto`.

    Raises:
        RecipeError: no recipe can be made of it.
    """
    request = folder.request()
    method = request["method"]["type"]
    path = locate_path(base.path)
    job = {
        "model": path,
        "training_file": str(folder.path / TRAIN),
        **({"validation_file": str(folder.path / VALID)} if "valid" in scans else {}),
        "method": {"type": method, method: {**request["method"].get(method, {}), "hyperparameters": dict(values)}},
        "seed": request["seed"],
        **({"integrations": request["integrations"]} if request.get("integrations") else {}),
    }
    replace_json(folder.path / "job.json", job, indent=1)
    every = _epoch_steps(scans["train"].num_rows, values["batch_size"])
    positions = read_json_object(Path(path) / "config.json").get("max_position_embeddings")
    longest = min(LONGEST, positions) if isinstance(positions, int) else LONGEST
    settings: dict[str, Any] = {
        "name": folder.job_id,
        "output_dir": str(folder.path / "runs"),
        "data.cache_dir": str(folder.path.parent.parent / "cache"),
        "data.train.0.format": scans["train"].form,
        "data.chat_template": base.chat_template,
        "data.max_length": longest,
        "checkpoint.every_steps": every,
        "log.tensorboard": False,
        "log.console": "plain",
    }
    if method == "reinforcement":
        answer = min(base.max_tokens, longest // 2)
        count = answers_per_prompt(values["compute_multiplier"])  # each behind its prompt, with a context of its own
        settings |= {"rollout.max_new_tokens": answer, "data.max_length": longest * count}
        if "valid" in scans:
            settings["eval.answers.0.max_new_tokens"] = answer
    elif "valid" in scans:
        settings |= {"data.eval.0.format": scans["valid"].form, "eval.every_steps": every}
    if scans["train"].form == "prompt_completion":
        settings["data.loss_on"] = "completion"
    overrides = [f"{key}={toml_value(value)}" for key, value in settings.items()]
    rate = next((text.partition("=")[2] for text in base.overrides() if text.startswith("optim.learning_rate=")), None)
    overrides += [text for text in base.overrides() if not text.startswith("optim.learning_rate=")]
    if rate is not None:  # the model's own: it is what the multiplier multiplies
        overrides.append(f"optim.learning_rate={toml_value(float(rate) * values['learning_rate_multiplier'])}")
    imported = import_config(
        folder.path / "job.json", importers=IMPORTERS, registries=REGISTRIES, tool="openai",
        options=ImportOptions(gpus=math.prod(request["layout"]), overrides=tuple(overrides)),
    )  # fmt: skip
    replace_file(folder.recipe, imported.toml)
    return imported.toml
