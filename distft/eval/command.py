"""Builds the model, asks it, keeps what it said beside the run, and shows what has changed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.command_line import CommandParser, add_json, add_nproc, add_output_dir, add_overrides
from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE, Preempted, Problem, RecipeError
from distft.core.phase import PHASE
from distft.core.stop import STOP

if TYPE_CHECKING:  # nothing heavy before the flags are read: help is instant
    from distft import assemble
    from distft.core.types import Engine
    from distft.engine.processes import Processes
    from distft.eval.subject import Subject
    from distft.evaluation.eval_sets import EvalSet
    from distft.model.load import MetaModel
    from distft.recipe import Recipe

MICRO_TOKENS = 8192
"""Tokens of a micro-batch of held-out rows."""


def evaluate(subject: Subject) -> dict[str, Any]:
    """Evaluate the model in this process, which may be one of many, and return the figures, equal on all ranks.

    Raises:
        DistftError: there is nothing to evaluate, or it cannot be evaluated.
    """
    from distft import assemble, compatibility
    from distft.core.log import quiet_libraries
    from distft.engine import processes
    from distft.engine.determinism import expandable_segments
    from distft.eval.subject import trained_rows

    expandable_segments()
    quiet_libraries()
    PHASE.begin()
    _, rank, world, _ = processes.detect_launcher(os.environ)
    say = _say if rank == 0 else _say_nothing
    if not (subject.eval_recipe.eval.answers or subject.eval_recipe.data.eval):
        problem = Problem(message="nothing to look at", fix="add [[data.eval]], [[eval.answers]], or --lm-eval TASK")
        raise RecipeError(subject.eval_recipe.source, [problem])
    if subject.router is not None:
        from distft.eval.routed import evaluate_router

        return evaluate_router(subject, world, say)
    compatibility.refuse_misfits(subject.built)
    eval_recipe, built = _for_evaluation(subject.eval_recipe, world), _for_evaluation(subject.built, world)
    layout = assemble.choose_layout(built, world, say)
    trained = trained_rows(subject)
    if trained is None:
        rows: assemble.HeldOut = assemble.load_data(eval_recipe, layout, rank, world, say)
    else:
        rows = assemble.load_held_out(eval_recipe, layout, rank, world, tuple(trained["stop_ids"]), say)
        eval_recipe = _with_ask_as(eval_recipe, chats=trained["chats"])
    eval_sets = assemble.build_eval_sets(eval_recipe, say)
    with processes.leaving() as group:
        process_info = processes.join()
        group.callback(processes.leave, process_info)
        engine = assemble.open_engine(built, process_info, say)
        group.callback(engine.close)
        assemble.compute_other_reference(eval_recipe, process_info, engine, layout, rows, say)
        model = _held(replace(subject, built=built), engine, process_info, layout, rows, say)
        return _look(subject, engine, model, layout, rows, eval_sets, say)


def _with_ask_as(recipe: Recipe, *, chats: bool) -> Recipe:
    """Set `ask_as` where it is "auto", so that no trained row has to be read."""
    how = {"ask_as": "chat" if chats else "text"}
    answers = tuple(
        answers_table.model_copy(update=how if answers_table.ask_as == "auto" else {})
        for answers_table in recipe.eval.answers
    )
    return replace(recipe, eval=recipe.eval.model_copy(update={"answers": answers}))


def _for_evaluation(recipe: Recipe, world: int) -> Recipe:
    """Return the recipe without what only training needs: a batch that divides by the ranks, recomputation."""
    micro = max(1, MICRO_TOKENS // recipe.data.max_length)
    changed = {"micro_batch_size": micro, "global_batch_size": micro * world, "activation_checkpointing": "off",
               "optimizer_in_backward": False}  # fmt: skip
    return replace(recipe, train=recipe.train.model_copy(update=changed))


def _held(
    subject: Subject,
    engine: Engine,
    processes: Processes,
    layout: assemble.Layout,
    rows: assemble.HeldOut,
    say: assemble.Say,
) -> MetaModel:
    """Build and fill the model and hand it to the engine."""
    from distft import assemble
    from distft.core.types import TrainState

    recipe = subject.built
    if subject.adapter is not None:
        from distft.model.adapters.trained import evaluated

        spec = evaluated(recipe.method.spec, subject.adapter)
        recipe = replace(recipe, method=replace(recipe.method, spec=spec))
    else:
        recipe = assemble.with_start_of(
            recipe, None if subject.checkpoint is None else subject.checkpoint.absolute().parents[1]
        )
    model = assemble.build_model(recipe, processes, layout, rows, say, trains=subject.checkpoint is not None)
    if subject.checkpoint is None:
        assemble.freeze(model)
    engine.setup(model, assemble.update_rule(recipe, model, 1000), micros_per_step=layout.micros_per_step)
    if subject.checkpoint is not None:
        from distft.checkpoint.loading import load_path

        loaded = load_path(subject.checkpoint, engine)
        engine.restore(loaded.reader, TrainState(**loaded.state["train"]))
    return model


def _look(
    subject: Subject,
    engine: Engine,
    model: MetaModel,
    layout: assemble.Layout,
    rows: assemble.HeldOut,
    eval_sets: list[EvalSet],
    say: assemble.Say,
) -> dict[str, Any]:
    from distft import assemble
    from distft.core.types import TrainState
    from distft.export.model_card import refresh
    from distft.run_folder import RunFolder
    from distft.run_record import read_run

    recipe = subject.eval_recipe
    objective = assemble.build_objective(
        recipe, engine, model, layout, rows, say, is_trained=subject.step > 0, trains=False
    )
    folder = RunFolder(subject.folder, writes=engine.rank == 0)
    PHASE.training()  # from here on a stop is agreed on
    looks = assemble.build_evaluator(
        recipe, folder, engine, model, rows, eval_sets, objective, num_steps=0, stop=STOP.requested, say=say
    )
    figures = looks.under(subject.label, TrainState(step=subject.step))
    if figures is None:
        raise Preempted(f"stopped by {STOP.reason or 'another rank'}; sets that were finished are kept")
    summary = folder.path / "eval" / "summary.json"
    if engine.rank == 0:
        refresh(read_run(folder.path))  # the model card of final/, where there is one
    engine.barrier()
    return {
        "label": subject.label,
        "step": subject.step,
        "folder": str(folder.path / "eval" / subject.label),
        "figures": figures,
        "summary": json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    }


def _with_tasks(subject: Subject, names: Sequence[str], limit: int | None, num_fewshot: int | None) -> Subject:
    """Add tasks of lm-eval, as sets of the recipe would be."""
    from distft.recipe import AnswersTable
    from distft.recipe.eval_rules import TASK

    more = [
        AnswersTable(
            name="lm-eval-" + re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem),
            path=f"{TASK}{name}",
            max_rows=limit,
            num_fewshot=num_fewshot,
        )
        for name in names
    ]
    table = subject.eval_recipe.eval
    changed = table.model_copy(update={"answers": (*table.answers, *more)})
    return replace(subject, eval_recipe=replace(subject.eval_recipe, eval=changed))


def show(result: dict[str, Any]) -> Iterator[str]:
    """Yield the result as lines for people."""
    from distft.evaluator import summary_line

    yield f"{result['label']} (step {result['step']}): {result['folder']}"
    for name, value in result["figures"].items():
        yield f"  {name:<40} {value:.6g}"
    for name, count in result.get("chosen", {}).items():
        yield f"  answered by {name}: {count}"
    for entry in (result["summary"] or {}).get("sets", []):
        for label in ("after", "best"):
            if (line := summary_line(entry, label)) is not None:
                yield line


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft eval",
        description="Look at a model: held-out loss, answers and their scores, compared with the base model's.",
    )
    made.add_argument("target", metavar="RECIPE_OR_RUN", help="a TOML recipe, or a run's folder")
    made.add_argument(
        "--model", metavar="base|final|best|STEP|FOLDER", help="default: final if there is one, else base"
    )
    made.add_argument("--label", help="name of the results (default: before, after, best, step-N, the folder's name)")
    add_overrides(made)
    add_output_dir(made)
    made.add_argument("--lm-eval", default="", metavar="TASK,...", help="run these tasks of lm-eval as well")
    made.add_argument("--limit", type=int, metavar="N", help="rows of each task")
    made.add_argument("--num-fewshot", type=int, metavar="N", help="rows shown in each task's prompts")
    add_nproc(made)
    add_json(made)
    return made


def start(argv: Sequence[str]) -> int:
    """Run `distft eval`: read the flags, then become this machine's processes."""
    from distft.launch import start_processes

    given = parser().parse_args(argv)
    return start_processes("distft.eval", argv, nproc=given.nproc)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m distft.eval`, one process of a launcher's or alone; returns the exit code."""
    given = parser().parse_args(argv)
    if given.nproc is not None:
        return start(sys.argv[1:] if argv is None else argv)
    from distft.eval.subject import choose, read

    output_dir = None if given.output_dir is None else str(given.output_dir)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        recipe, folder = read(given.target, given.overrides, output_dir)
        subject = choose(recipe, folder, given.model, given.label)
        names = [name for name in given.lm_eval.split(",") if name]
        subject = _with_tasks(subject, names, given.limit, given.num_fewshot)
        # Libraries print to standard output, which is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result = evaluate(subject)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, rank)
        return exit_code(error)
    if rank == 0:
        print(json.dumps(result, indent=1) if given.json else "\n".join(show(result)))
    return DONE


def _say(line: str) -> None:
    print(f"distft: {line}", file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    """Print nothing, on other ranks: things are said once."""
