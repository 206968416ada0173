"""A whole model of whatever the source is, and an adapter beside its base: the two forms that are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distft.export_formats.source import ModelSource


def whole_model(source: ModelSource, workdir: Path) -> Path:
    """Return the folder of a whole model: the source's own, or its adapter merged into the base in `workdir`.

    It is stored in the base's type, merged tensor by tensor, and not compared here: the certificate does that.

    Raises:
        RecipeError: the adapter cannot be merged.
    """
    if not source.is_adapter:
        return source.folder
    from distft.merging import merging

    merged = workdir / "merged"
    merging.merge(_merge_source(source), merged, rows=None)
    return merged


def beside_its_base(source: ModelSource) -> Any:
    """Return the base with the adapter in PEFT's own layers, in fp32: what was trained.

    The base of a QLoRA run has the values that its 4 bits have, as in training.

    Raises:
        RecipeError: PEFT cannot put this adapter on its base.
    """
    import torch

    from distft.merging.adapter_config import read_adapter_config
    from distft.merging.merging import open_base
    from distft.model.adapters.peft_folder import with_adapter

    base = open_base(_merge_source(source), read_adapter_config(source.folder))
    return with_adapter(base.filled(torch.float32), source.folder)


def _merge_source(source: ModelSource) -> Any:
    from distft.adapter_sources import in_4bit_of
    from distft.catalog import REGISTRIES
    from distft.merging.merging import MergeSource
    from distft.model.adapters.whole import base_of
    from distft.recipe import load_recipe

    recipe = None if source.run is None else load_recipe(source.run / "recipe.toml", registries=REGISTRIES)
    return MergeSource(
        adapter=source.folder,
        base=base_of(source.folder),
        in_4bit=None if recipe is None else in_4bit_of(recipe),
    )
