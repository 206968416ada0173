"""A whole model of whatever the source is: the one place where an export merges an adapter."""

from __future__ import annotations

from pathlib import Path

from distft.export_formats.source import ModelSource


def whole_model(source: ModelSource, workdir: Path) -> Path:
    """Return the folder of a whole model: the source's own, or its adapter merged into the base in `workdir`.

    Raises:
        RecipeError: the adapter cannot be merged.
    """
    if not source.is_adapter:
        return source.folder
    from distft.model.adapters.whole import merge_with_peft

    merged = workdir / "merged"
    merge_with_peft(source.folder, merged)
    return merged
