"""Where an adapter's start is found in the training rows: the base looks at them, before the trained model is built.

The base is opened under the run's own engine, as another model's reference is, and closed again. All ranks compute the
same batches, which follow from rows and seed alone, and rank 0 decides: so the start is the same under every engine and
number of ranks. It is kept in the run's folder, and a run that goes on reads it there.
"""

from __future__ import annotations

import gc
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.assemble.batch_layout import Layout
from distft.assemble.checkpoints import weights_hash
from distft.assemble.frozen_model import frozen_model
from distft.assemble.training_data import HeldOut, Say
from distft.core.errors import CheckpointError, DistftError, Preempted, Problem, RecipeError
from distft.core.phase import PHASE
from distft.core.ranks import on_rank_zero
from distft.core.stop import STOP
from distft.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from distft.core.types import Batch, Engine
    from distft.engine.processes import Processes
    from distft.model.load import MetaModel
    from distft.resume import Resume

FILE = "adapter_start.safetensors"
"""In the run's folder: what was found, under a hash of what it follows from."""


def find_row_start(
    recipe: Recipe,
    run: Path,
    processes: Processes,
    engine: Engine,
    layout: Layout,
    rows: HeldOut,
    say: Say,
    *,
    resume: Resume,
) -> Recipe:
    """Collective: return the recipe whose method starts from what is found in the rows; itself where it reads none.

    Args:
        recipe: of the run.
        run: its folder.
        processes: that have joined.
        engine: of the run, without a model as yet.
        layout: of the run.
        rows: of all splits.
        say: takes a line for the user.
        resume: as in `distft.job.train`.

    Raises:
        RecipeError: rows have too few tokens to look at, or a layer cannot be looked at.
        CheckpointError: the run goes on from a checkpoint, and what its adapter began with is gone.
        Preempted: asked to stop.
    """
    if not recipe.method.spec.reads_rows(recipe.method.params):
        return recipe
    if isinstance(resume, Path):
        file = resume.absolute().parents[1] / FILE
        if file.absolute() != (run / FILE).absolute():
            on_rank_zero(engine, lambda: _copy(_kept(file), run / FILE))
        return _started(recipe, run / FILE)
    goes_on = resume == "auto" and any(engine.gather(any((run / "checkpoints").glob("step-*"))))
    file, key = run / FILE, _key(recipe, engine, rows)
    if goes_on:
        return _started(recipe, _kept(file))
    if not on_rank_zero(engine, lambda: resume == "auto" and _key_of(file) == key):
        _find(recipe, file, key, processes, engine, layout, rows, say)
    return _started(recipe, file)


def with_start_of(recipe: Recipe, run: Path | None) -> Recipe:
    """Return the recipe whose method starts from what `run` has found, for its checkpoints; None: as its base alone.

    Raises:
        CheckpointError: what the run's adapter began with is gone.
    """
    from distft.model.adapters.lora_params import without_rows

    params: Any = recipe.method.params
    if not recipe.method.spec.reads_rows(params):
        return recipe
    if run is None:
        return replace(recipe, method=replace(recipe.method, params=without_rows(params)))
    return _started(recipe, _kept(run / FILE))


def _started(recipe: Recipe, file: Path) -> Recipe:
    from distft.model.adapters import eva

    params: Any = recipe.method.params
    spec = eva.started(recipe.method.spec, params, file)
    return replace(recipe, method=replace(recipe.method, spec=spec))


def _kept(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(
            f"{file} is gone: the checkpoints beside it hold an adapter whose ranks stood there  copy it back, or say "
            "--resume never"
        )
    return file


def _copy(file: Path, to: Path) -> None:
    from distft.core.files import replace_file

    replace_file(to, file.read_bytes(), durable=True)


def _key(recipe: Recipe, engine: Engine, rows: HeldOut) -> str:
    facts = [recipe.digest(), weights_hash(recipe, engine), *sorted(map(str, rows.fingerprint.items()))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _key_of(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            return (stored.metadata() or {}).get("key", "")
    except (OSError, SafetensorError):
        return ""


def _find(
    recipe: Recipe,
    file: Path,
    key: str,
    processes: Processes,
    engine: Engine,
    layout: Layout,
    rows: HeldOut,
    say: Say,
) -> None:
    """Collective: open the base, look at the rows, close it, and write what was found."""
    from safetensors.torch import save_file

    plain = with_start_of(recipe, None)
    eager = replace(layout, path=replace(layout.path, compiled=False))  # hooks look at what blocks compute
    params: Any = recipe.method.params
    say(f'[method] init = "{params.init}": the base looks at training rows first')
    PHASE.enter("reference")
    with frozen_model(plain, processes, eager, rows) as (alone, built):
        matrices = _look(recipe, alone, built, eager, rows)
    del alone, built
    gc.collect()
    if matrices is not None:
        aside = file.with_suffix(".tmp")
        save_file(matrices, aside, metadata={"key": key})
        os.replace(aside, file)
        ranks = [len(matrix) for matrix in matrices.values()]
        say(f"found what {len(ranks)} layers start from, ranks {min(ranks)} to {max(ranks)}")
    engine.barrier()


def _batches(recipe: Recipe, layout: Layout, rows: HeldOut, least: int) -> list[Batch]:
    """Return the batches of the training rows, in an order of the seed: a sequence each, with enough tokens.

    Raises:
        RecipeError: none has.
    """
    import numpy as np

    from distft.data.loader import EvalSteps
    from distft.model.adapters import eva

    params: Any = recipe.method.params
    given = [of_rows for of_rows in rows.row_passes if of_rows.trained]
    batches: list[Batch] = []
    if given:
        prepared = given[0].prepared
        order = np.random.Generator(np.random.PCG64(recipe.seed)).permutation(prepared.num_rows)
        # Not packed, several short rows are a sequence's worth.
        together = 1 if recipe.data.packing else max(1, recipe.data.max_length // int(prepared.lengths.max()))
        steps = EvalSteps(
            prepared, recipe.data, micro_batch_size=together, single_documents=layout.single, only=order[:_MOST_ROWS]
        )
        batches = [batch for batch in steps if len(eva.chosen_T(batch, params)) >= least]
    if not batches:
        kind = "trained tokens" if eva.wants_trained(params) else "tokens"
        message = f'[method] init = "{params.init}": no sequence of the training rows has {least} {kind}'
        fix = 'a smaller r, or eva = { tokens = "all" }; without such rows another init'
        raise RecipeError(recipe.source, [Problem(message=message, line=recipe.line_of("method.init"), fix=fix)])
    return batches


_MOST_ROWS = 20_000
"""Rows that are looked at: directions have converged long before."""


def _look(
    recipe: Recipe, engine: Engine, built: MetaModel, layout: Layout, rows: HeldOut
) -> dict[str, torch.Tensor] | None:
    """Collective: let the ranks compute what rank 0 asks for; return what it found, None on the others."""
    from distft.model.adapters import eva
    from distft.model.load import WRAPPER

    params: Any = recipe.method.params
    layers = eva.layers_of(built.module.lm, params)
    batches = _batches(recipe, layout, rows, eva.least_tokens(layers, params))

    def forward(index: int) -> None:
        if any(stop for _, stop in engine.gather((index, STOP.requested()))):
            raise Preempted("stopped while the rows were looked at that the adapter starts from: nothing was trained")
        _compute(engine, batches[index])

    with engine.evaluating():
        if engine.rank > 0:
            _follow(engine, batches)
            return None
        try:
            found = eva.found(built.module, layers, WRAPPER, params, batches, forward)
        except Preempted:
            raise
        except DistftError:
            engine.gather((_FAILED, False))
            raise
        engine.gather((_DONE, False))
    return found


_DONE, _FAILED = -1, -2


def _follow(engine: Engine, batches: list[Batch]) -> None:
    """Compute what rank 0 computes, where a forward is collective."""
    from distft.core.errors import PeerEnded

    while True:
        answers = engine.gather((0, STOP.requested()))
        index = answers[0][0]
        if index == _FAILED:
            raise PeerEnded(RecipeError.exit_code, "rank 0 could not find what the adapter starts from")
        if index == _DONE:
            return
        if any(stop for _, stop in answers):
            raise Preempted("stopped while the rows were looked at that the adapter starts from: nothing was trained")
        if engine.collective_forward:
            _compute(engine, batches[index])


def _compute(engine: Engine, batch: Batch) -> None:
    PHASE.enter("reference")
    engine.inference_module(**engine.place(batch).inputs())
