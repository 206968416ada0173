"""Where a plan finds the model's config.json: never on the network, never beside weights it would read."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distft.core.errors import Problem, RecipeError
from distft.recipe import Recipe


@contextlib.contextmanager
def config_folder(recipe: Recipe, config: str | None) -> Iterator[Path]:
    """A folder that holds the config.json of the recipe's model, for as long as the context lasts.

    `config`: a config.json under any name, or a folder that holds one, instead of the recipe's model.

    Raises:
        RecipeError: there is none on this machine; says how to get one.
    """
    if config is not None:
        yield from _given(Path(config).expanduser())
        return
    path = recipe.model.path
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        yield folder
        return
    cached = _cached(recipe)
    if cached is not None:
        yield cached.parent
        return
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not folder.exists()
    fix = (
        f"plan --config FILE with the model's config.json (a few kB): hf download {path} config.json"
        if is_hub_id
        else ("plan --config FILE with the config.json of that model, or make the folder first")
    )
    raise RecipeError(
        recipe.source,
        [
            Problem(
                message=f'[model] path = "{path}"  has no config.json on this machine, and a plan downloads nothing',
                line=recipe.line_of("model.path"),
                fix=fix,
            )
        ],
    )


def _given(path: Path) -> Iterator[Path]:
    if (path / "config.json").is_file():
        yield path
        return
    if not path.is_file():
        raise RecipeError(
            "distft plan", [Problem(message=f"--config {path}  no such file, and no config.json below it")]
        )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "config.json")
        yield Path(folder)


def _cached(recipe: Recipe) -> Path | None:
    """Return config.json in the hub's local cache, where an earlier download left it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(recipe.model.path, "config.json", revision=recipe.model.revision)
    except HFValidationError:  # a path that cannot be a hub id
        return None
    return Path(path) if isinstance(path, str) else None
