"""Distributed fine-tuning of language models: full, LoRA and QLoRA, from one recipe.

    from distft import Recipe, load_recipe, train

    result = train(load_recipe("recipes/tiny-full.toml", overrides=["train.max_steps=2"]))

Everything heavy is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.job import Result
    from distft.recipe import Recipe
    from distft.resume import Resume

__all__ = ["Recipe", "Result", "load_recipe", "train"]
__version__ = "0.1.0"


def load_recipe(path: str | Path, *, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe file with every default filled in; `overrides` are "table.key=value".

    Raises:
        RecipeError: every mistake in it, with lines.
    """
    from distft.catalog import REGISTRIES
    from distft.recipe import load_recipe as load

    return load(path, registries=REGISTRIES, overrides=overrides)


def train(recipe: Recipe, *, resume: Resume = "auto", allow_changes: bool = False) -> Result:
    """Run the main job in this process: one of many when a launcher started it, else alone.

    `resume`: "auto" continues from the newest valid checkpoint, "never" starts anew, a folder names a checkpoint.

    Raises:
        DistftError: what the command line would have printed; see `distft.core.errors`.
    """
    from distft.job import train as run

    return run(recipe, resume=resume, allow_changes=allow_changes)


def __getattr__(name: str) -> Any:
    """Import a public class on first use."""
    if name == "Recipe":
        from distft.recipe import Recipe

        return Recipe
    if name == "Result":
        from distft.job import Result

        return Result
    raise AttributeError(f"module 'distft' has no attribute {name!r}")
