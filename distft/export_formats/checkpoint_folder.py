"""A checkpoint of a run becomes the folder that the run would have written as final/ at that step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distft.core.errors import CheckpointError


def rebuild(run: Path, checkpoint: Path, out: Path) -> Path:
    """Write the model or adapter of a checkpoint and return its folder.

    Args:
        run: folder of the run.
        checkpoint: the checkpoint's folder.
        out: a folder that does not exist; made like a run's folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run noted nothing of its rows.
    """
    from distft import assemble
    from distft.catalog import REGISTRIES
    from distft.checkpoint.loading import load_path
    from distft.core.types import TrainState
    from distft.engine import processes
    from distft.recipe import load_recipe
    from distft.run_folder import RunFolder

    recipe = load_recipe(run / "recipe.toml", registries=REGISTRIES, overrides=_ALONE)
    recipe = assemble.with_start_of(assemble.with_date(recipe, run), run)
    layout = assemble.choose_layout(recipe, 1, _say)
    rows: Any = assemble.load_held_out(recipe, layout, 0, 1, _stop_ids(run), _say)
    with processes.leaving() as group:
        joined = processes.join()
        group.callback(processes.leave, joined)
        engine = assemble.open_engine(recipe, joined, _say)
        group.callback(engine.close)
        model = assemble.build_model(recipe, joined, layout, rows, _say)
        shapes = assemble.saved_shapes(model, recipe)
        engine.setup(model, assemble.update_rule(recipe, model, 1000), micros_per_step=layout.micros_per_step)
        loaded = load_path(checkpoint, engine)
        engine.restore(loaded.reader, TrainState(**loaded.state["train"]))
        out.mkdir(parents=True)
        folder = RunFolder(out, writes=True)
        assemble.export(recipe, folder, engine, model, shapes, rows)
    return folder.final


_ALONE = ['engine={ name = "solo" }', "export.also=[]", "train.optimizer_in_backward=false"]
"""What differs for one process that trains nothing."""


def _stop_ids(run: Path) -> tuple[int, ...]:
    try:
        noted = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["trained_rows"]
        return tuple(map(int, noted["stop_ids"]))
    except (OSError, ValueError, LookupError, TypeError):
        raise CheckpointError(f"{run}/manifest.json does not say what trained answers end with") from None


def _say(line: str) -> None:
    print(f"distft: {line}", file=sys.stderr, flush=True)
