"""Which model is looked at: what it is called, what its weights are made of, and under which label it is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distft.assemble import with_date
from distft.catalog import REGISTRIES
from distft.checkpoint.folders import Folders
from distft.compatibility import tokenizer_of
from distft.core.errors import Problem, RecipeError
from distft.core.registry import NoParams
from distft.recipe import Choice, Recipe, load_recipe
from distft.run_record import read_run

_LABEL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and the run folder that its answers go to."""

    eval_recipe: Recipe
    """The recipe whose rows the model is evaluated on."""
    built: Recipe
    """The recipe that the model is built by: the same but for [model] and [method]."""
    folder: Path
    label: str
    step: int
    adapter: Path | None = None
    """Folder of a trained adapter, in PEFT's form."""
    checkpoint: Path | None = None
    router: Path | None = None
    """Folder of a router, which chooses an adapter for each question."""


def read(target: str, overrides: Sequence[str], output_dir: str | None) -> tuple[Recipe, Path]:
    """Return the recipe in a file or a run folder, and the run folder.

    Raises:
        RecipeError: every mistake in it.
    """
    run = Path(target)
    if (run / "recipe.toml").is_file():
        return load_recipe(run / "recipe.toml", registries=REGISTRIES, overrides=overrides), run
    more = [] if output_dir is None else [f"output_dir={json.dumps(output_dir)}"]
    recipe = load_recipe(target, registries=REGISTRIES, overrides=[*overrides, *more])
    return recipe, recipe.run_dir


def choose(recipe: Recipe, folder: Path, model: str | None, label: str | None) -> Subject:
    """Return the model that `--model` means: base, final, best, a checkpoint's step, or a folder.

    Without `--model` it is final where there is one, else base.

    Raises:
        RecipeError: there is no such model, or the label is none.
    """
    model = model or ("final" if (folder / "final").is_dir() else "base")
    recipe = with_date(recipe, folder)
    if label is not None and not _LABEL.fullmatch(label):
        raise _wrong(f'--label "{label}"  must be a plain folder name', "letters, digits, dots, dashes, underscores")
    base = Subject(eval_recipe=recipe, built=recipe, folder=folder, label=label or "before", step=0)
    if model == "base":
        return base
    checkpoints = Folders(folder / "checkpoints")
    if model == "best" or model.isdecimal():
        step = _best_step(checkpoints) if model == "best" else int(model)
        place = checkpoints.step(step)
        if not place.is_dir():
            steps = ", ".join(map(str, checkpoints.steps())) if checkpoints.root.is_dir() else ""
            raise _wrong(f"--model {model}  {place}: no such checkpoint", f"steps kept: {steps or 'none'}")
        default_label = "best" if model == "best" else place.name
        return replace(base, label=label or default_label, step=step, checkpoint=place)
    place = folder / "final" if model == "final" else Path(model)
    default_label, step = re.sub(r"[^A-Za-z0-9._-]+", "-", place.resolve().name), 0
    if model == "final":
        default_label = read_run(folder).final_label  # "best": the run went back to its best state
        step = _best_step(checkpoints) if default_label == "best" else _last_step(folder)
    trained = replace(base, label=label or default_label, step=step)
    if (place / "router.json").is_file():
        return replace(trained, router=place)
    if (place / "adapter_config.json").is_file():
        if not recipe.method.spec.adapter:
            raise _wrong(f"--model {model}  holds an adapter, and the recipe's method has none", "use its own recipe")
        return replace(trained, adapter=place)
    if (place / "config.json").is_file():
        return replace(trained, built=_whole(recipe, place))
    if (place / "MANIFEST.json").is_file():
        return replace(trained, checkpoint=place)
    raise _wrong(
        f"--model {model}  {place}: neither a model, an adapter nor a checkpoint",
        "allowed: base, final, best, a checkpoint's step, or a folder of a model, an adapter or a router",
    )


def trained_rows(subject: Subject) -> dict[str, Any] | None:
    """Return what the run noted of the rows it trained on: `stop_ids`, and whether they are `chats`.

    None when it noted nothing, or when they are other rows now.
    """
    try:
        noted = json.loads((subject.folder / "manifest.json").read_text(encoding="utf-8"))["trained_rows"]
        then = load_recipe(subject.folder / "recipe.toml", registries=REGISTRIES)
        same = with_date(then, subject.folder).data == subject.eval_recipe.data
        return noted if same and noted["stop_ids"] and isinstance(noted["chats"], bool) else None
    except (OSError, ValueError, LookupError, TypeError, RecipeError):
        return None


def _whole(recipe: Recipe, place: Path) -> Recipe:
    """Return the recipe on a trained model instead of its base; the tokenizer stays, or other tokens would be asked."""
    spec = REGISTRIES.method["full"]
    tokenizer, _ = tokenizer_of(recipe)
    changes = {"path": str(place), "init": "pretrained", "tokenizer": tokenizer}
    grown = {"add_tokens": None, "add_special_tokens": None, "new_rows": None, "pad_vocabulary": None}
    model = recipe.model.model_copy(update=changes | grown)
    return replace(recipe, model=model, method=Choice[Any](name="full", params=NoParams(), spec=spec))


def _best_step(checkpoints: Folders) -> int:
    try:
        step = checkpoints.best_step()
    except ValueError:
        step = None
    if step is None:
        raise _wrong(f"--model best  {checkpoints.root}: no best.json", "train with [checkpoint] best = true")
    return step


def _last_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "exit.json").read_text(encoding="utf-8"))["state"]["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _wrong(message: str, fix: str) -> RecipeError:
    return RecipeError("distft eval", [Problem(message=message, fix=fix)])
