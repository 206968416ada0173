"""The main job, top to bottom: rows, processes, model, checkpoints, training, export.

`accelerate launch -m distft.train RECIPE`, one process per accelerator; also plain, under torchrun and under srun.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distft import assemble, compatibility
from distft.catalog import REGISTRIES
from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE, RecipeError
from distft.core.hard_exit import keep_alive, plan_hard_exit
from distft.core.log import quiet_libraries
from distft.core.phase import PHASE
from distft.core.stop import STOP
from distft.core.types import TrainState
from distft.recipe import Recipe, load_recipe
from distft.recipe.toml_text import toml_value
from distft.resume import Resume
from distft.run_folder import RunFolder
from distft.run_session import print_line, print_nothing, run_session
from distft.train_options import parser

if TYPE_CHECKING:
    from argparse import Namespace


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind."""

    folder: Path
    """The run folder."""
    final: Path
    """What transformers or PEFT load."""
    state: TrainState


def train(recipe: Recipe, *, resume: Resume = "auto", allow_changes: bool = False) -> Result:
    """Run the main job in this process, which may be one of many.

    Args:
        recipe: what to train; see `distft.load_recipe`.
        resume: "auto" continues from the newest valid checkpoint, "never" starts anew, a folder names a checkpoint.
        allow_changes: continue although learning rate, schedule, clipping or length of the run have changed.

    Raises:
        DistftError: see `distft.core.errors`; nothing else is the user's fault.
    """
    from distft.engine import processes
    from distft.engine.determinism import expandable_segments

    expandable_segments()
    quiet_libraries()
    PHASE.begin()
    _, rank, _, _ = processes.detect_launcher(os.environ)
    say = print_line if rank == 0 else print_nothing
    folder = RunFolder(recipe.run_dir, writes=rank == 0)
    if resume == "auto" and (done := folder.finished(functools.partial(_is_written_in, recipe))) is not None:
        say(f"run {recipe.name} is already complete: {folder.final}")
        return Result(folder=folder.path, final=folder.final, state=done)
    recipe = assemble.with_date(recipe, folder.path, resume)
    with run_session(recipe, folder, say=say) as session:
        # Rows: before any process group exists, for it may take an hour.
        PHASE.enter("rows")
        compatibility.refuse_misfits(recipe)
        layout = assemble.choose_layout(recipe, session.world, say)
        many = f"{session.world} process{'es' if session.world > 1 else ''}, {session.launcher}"
        say(f"run {recipe.name} -> {folder.path} ({many})")
        rows = assemble.load_data(recipe, layout, rank, session.world, say)
        eval_sets = assemble.build_eval_sets(recipe, say)
        PHASE.enter("fetch")
        assemble.fetch_model(recipe)

        # Processes.
        PHASE.enter("join")
        process_info = session.join()
        engine = assemble.open_engine(recipe, process_info, say)
        session.resources.callback(engine.close)
        keep_alive(engine)
        layout, rows = assemble.agree_on_all_ranks(recipe, layout, rows, engine, say)
        advice = functools.partial(assemble.memory_advice, recipe, engine.world, layout)
        with session.explaining_out_of_memory(advice):
            # Both import torch, for which rows do not wait.
            from distft.guard import DivergenceGuard
            from distft.trainer import Trainer

            # Another model as the reference, if the objective names one: before the trained model, not beside it.
            assemble.compute_other_reference(recipe, process_info, engine, layout, rows, say)
            recipe = assemble.find_row_start(
                recipe, folder.path, process_info, engine, layout, rows, say, resume=resume
            )

            # A teacher that is imitated, if the objective names one: it stays beside the trained model.
            teacher = assemble.open_teacher(recipe, process_info, layout, rows, session.resources, say)

            # Model, on the meta device: what it will be is written down before it costs memory.
            PHASE.enter("model")
            num_steps = assemble.num_steps(recipe, rows)
            model = assemble.build_model(recipe, process_info, layout, rows, say)
            manifest = assemble.manifest(recipe, model, engine, process_info, layout, rows)
            guard = DivergenceGuard(recipe.guard, engine, say=say, note=folder.note)
            best = assemble.build_best_tracker(recipe, eval_sets)
            checkpoints, state, reader = assemble.open_checkpoints(
                recipe,
                folder,
                engine,
                rows,
                say,
                judges={"guard": guard, "best": best},
                resume=resume,
                allow_changes=allow_changes,
            )
            folder.start(recipe.to_toml(), manifest)
            hashing = None
            if rank == 0:
                if (plan := assemble.plan_of_run(recipe, engine.world, layout, rows.mean_tokens)) is not None:
                    folder.write("plan.json", plan)
                hashing = assemble.hash_inputs(recipe, folder)
            folder.note("started", engine=engine.name, world=engine.world, step=state.step)

            # Weights, optimizer, objective.
            shapes = assemble.saved_shapes(model, recipe)
            facts = assemble.run_facts(model, process_info, state)
            assemble.set_up_engine(recipe, engine, model, layout, num_steps)
            checkpoints.prepare()
            objective = assemble.build_objective(recipe, engine, model, layout, rows, say, teacher=teacher)
            steps = assemble.open_step_source(
                recipe, folder, layout, rows, engine, model, objective, session.stop, shapes=shapes
            )
            if state.step == 0:
                assemble.refuse_other_policy(recipe, engine, objective, steps)
            if recipe.train.rehearse:
                from distft.memory_preflight import run_preflight

                largest = assemble.largest_micro_batch(recipe, layout, rows)
                say(f"rehearsal: a step of {largest.sequences} x {largest.longest:,} tokens")
                run_preflight(largest, engine, objective, advice=advice)
                say("rehearsal: done")
            evaluator = assemble.build_evaluator(
                recipe,
                folder,
                engine,
                model,
                rows,
                eval_sets,
                objective,
                num_steps=num_steps,
                stop=session.stop,
                say=say,
            )

            # Training.
            trainer = Trainer(
                session=session,
                engine=engine,
                objective=objective,
                steps=steps,
                checkpoints=checkpoints,
                guard=guard,
                best=best,
                evaluator=evaluator,
                open_meters=lambda start: assemble.build_meters(
                    recipe, folder, replace(facts, start=start), engine, process_info, steps, say
                ),
            )
            state = session.state = trainer.train(state, reader)
            if hashing is not None:
                hashing.join()

            # final/: of the last state, or of the best one, whose weights the engine holds after `evaluate_best`.
            write = functools.partial(assemble.export, recipe, folder, engine, model, shapes, rows)
            if not recipe.train.load_best:
                trainer.export(state, write, saves=True)
            trainer.evaluate_best(state)
            if recipe.train.load_best:
                trainer.export(state, write, saves=False)
            say(f"done: {folder.final}")
    return Result(folder=folder.path, final=folder.final, state=state)


def _is_written_in(recipe: Recipe, file: Path) -> bool:
    """Return whether a run folder's recipe.toml, whatever version wrote it, reads as `recipe`."""
    try:
        return load_recipe(file, registries=REGISTRIES).resolved() == recipe.resolved()
    except RecipeError:
        return False


def run(options: Namespace) -> int:
    """Run the command whose flags were parsed; return the exit code."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    overrides = options.overrides
    if options.output_dir is not None:
        overrides = [*overrides, f"output_dir={toml_value(str(options.output_dir))}"]
    try:
        loaded = load_recipe(options.recipe, registries=REGISTRIES, overrides=overrides)
        train(loaded, resume=options.resume, allow_changes=options.allow_changes)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, rank)
        return exit_code(error)
    return DONE


def main(argv: list[str] | None = None) -> int:
    """Run `python -m distft.train`."""
    STOP.install()
    plan_hard_exit()
    options = parser().parse_args(argv)
    if options.nproc is not None:
        parser().error("--nproc starts processes, and this is one of them")
    return run(options)
