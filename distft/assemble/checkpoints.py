"""Opens a run's checkpoints, resumes from them, and exports the model to final/."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.assemble.evaluation import load_row_renderer
from distft.assemble.step_source import num_steps
from distft.assemble.training_data import Data, Say
from distft.catalog import REGISTRIES
from distft.columns import keeps_reference
from distft.compatibility import tokenizer_of
from distft.recipe import Recipe

if TYPE_CHECKING:
    from distft.best import BestTracker
    from distft.core.types import Engine, StateReader, TrainState
    from distft.guard import DivergenceGuard
    from distft.model.load import MetaModel
    from distft.resume import CheckpointManager, Resume
    from distft.run_folder import RunFolder


def open_checkpoints(
    recipe: Recipe,
    folder: RunFolder,
    engine: Engine,
    rows: Data,
    say: Say,
    *,
    judges: dict[str, DivergenceGuard | BestTracker],
    resume: Resume,
    allow_changes: bool,
) -> tuple[CheckpointManager, TrainState, StateReader | None]:
    """Open the checkpoints and decide where this run starts: at zero, or at one with a reader of its tensors.

    Raises:
        CheckpointError: there are checkpoints and none is valid, or the one to continue does not fit this run.
        DataError: it was trained on other rows.
    """
    from distft.assemble.teacher import teacher_recipe
    from distft.checkpoint.store import CheckpointStore
    from distft.core.types import TrainState
    from distft.resume import CheckpointManager, about, check_fits

    base = weights_hash(recipe, engine) if recipe.method.spec.adapter or keeps_reference(recipe) else ""
    if (taught := teacher_recipe(recipe)) is not None:
        base += f" taught by {weights_hash(taught, engine)}"
    says = about(recipe, rows.fingerprint, base, num_steps(recipe, rows)) | {"date": recipe.data.date}
    root = folder.path / "checkpoints"
    if resume == "never" and engine.rank == 0:
        folder.set_aside(root)
        folder.set_aside(folder.path / "eval")
    engine.barrier()
    hashes = {"recipe": recipe.digest(), "base": base, **rows.fingerprint}
    store = CheckpointStore(root, engine, keep=recipe.checkpoint.keep, engine=engine.name, hashes=hashes)
    keeper = CheckpointManager(
        store,
        engine,
        says,
        asynchronous=recipe.checkpoint.asynchronous,
        grace_s=recipe.checkpoint.grace_s,
        reached=folder.reach,
        note=folder.note,
        judges=lambda: {name: judge.state() for name, judge in judges.items()},
    )
    loaded = store.load(resume) if isinstance(resume, Path) else store.load_newest()
    if loaded is None:
        return keeper, TrainState(), None
    for rejected in loaded.rejected:
        say(f"passed over {rejected}")
    changed = check_fits(loaded.state, says, loaded.path, registries=REGISTRIES, allow_changes=allow_changes)
    state = TrainState(**loaded.state["train"])
    was = f"{loaded.manifest.engine} x {loaded.manifest.world}"
    say(f"continuing {loaded.path} at step {state.step} of {num_steps(recipe, rows)} (saved under {was})")
    for change in changed:
        say(f"changed since: {change}")
    folder.reach(state.step)
    folder.note("continued", checkpoint=str(loaded.path), was=was, passed_over=loaded.rejected, changed=changed)
    for name, judge in judges.items():
        judge.restore(loaded.state[name])
    return keeper, state, loaded.reader


def weights_hash(recipe: Recipe, engine: Engine) -> str:
    """Return the sha256 of the weights that training starts from.

    The files of one host are hashed once and remembered by size and time.
    """
    from distft.data.fingerprint import file_hash
    from distft.data.prepared_folder import cache_folder
    from distft.model.load import find_folder

    if recipe.model.init == "random":
        return f"random-{recipe.seed}"
    if engine.rank != 0:
        return engine.gather("")[0]
    memory = cache_folder(recipe.data) / "hashes"
    files = sorted(find_folder(recipe.model).glob("*.safetensors"))
    digest = hashlib.sha256("".join(file_hash(file, memory) for file in files).encode()).hexdigest()
    return engine.gather(digest)[0]


def saved_shapes(built: MetaModel, recipe: Recipe) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the names, whole shapes and types of what final/ will hold; asked for before an engine shards anything."""
    from distft.model.load import WRAPPER

    adapter = recipe.method.spec.adapter
    named = [
        (name, param)
        for name, param in built.module.named_parameters()
        if name.startswith(WRAPPER) and (param.requires_grad or not adapter)
    ]
    if not adapter:
        named += [(name, buffer) for name, buffer in built.saved_buffers() if name.startswith(WRAPPER)]
    return {name.removeprefix(WRAPPER): (tuple(tensor.shape), tensor.dtype) for name, tensor in named}


def export(
    recipe: Recipe, folder: RunFolder, engine: Engine, built: MetaModel, shapes: dict[str, Any], rows: Data
) -> None:
    """Write final/, what transformers, PEFT and inference servers load, and the recipe's further exports."""
    from distft.data.tokenizer import save_tokenizer
    from distft.export import EXPORTS, ExportInputs, final, model_card
    from distft.model.heads import HEADS
    from distft.model.load import WRAPPER
    from distft.recipe import listed_params
    from distft.run_record import read_run

    transformer = built.module.transformer
    tokenizer, revision = tokenizer_of(recipe)
    head = HEADS[recipe.objective.spec.head_of(recipe.objective.params)]

    def write_config(target: Path) -> None:
        pad_id = load_row_renderer(recipe).tokenizer.pad_token_id
        free = None if pad_id in rows.stop_ids else pad_id
        final.save_config(transformer, target, finish=lambda config: head.finish_config(config, free))

    def write_beside(target: Path) -> None:
        save_tokenizer(tokenizer, target, chat_template=recipe.data.chat_template, revision=revision)
        final.save_generation_config(transformer, target, rows.stop_ids)
        model_card.write(target, read_run(folder.path))

    inputs = ExportInputs(
        engine=engine,
        lm=built.module.lm,
        shapes=shapes,
        prefix=WRAPPER,
        layout=built.layout,
        method=recipe.method.spec,
        starts=built.starts,
        write_config=write_config,
        write_beside=write_beside,
    )
    primary = EXPORTS["adapter" if recipe.method.spec.adapter else "model"]
    primary.write(primary.params(), inputs, folder.final)
    for chosen in recipe.export.also:
        spec = EXPORTS[chosen["name"]]
        spec.write(listed_params(chosen, spec.params), inputs, folder.path / "exports" / spec.name)
