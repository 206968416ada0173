"""The main job: resolve, prepare, open the engine, load, fit, export; and how its end is told.

`accelerate launch -m distft.train RECIPE`, one process per accelerator; also plain, under torchrun and under srun.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from distft import assemble, compatibility
from distft.catalog import REGISTRIES
from distft.core.ending import exit_code, reason, report_error
from distft.core.errors import DONE, BusyError, MachineError, PeerEnded, Preempted
from distft.core.hard_exit import keep_alive, plan_hard_exit
from distft.core.log import quiet_libraries
from distft.core.phase import PHASE
from distft.core.stop import STOP
from distft.core.types import TrainState
from distft.demo.files import locate
from distft.recipe import Recipe, load_recipe
from distft.recipe.toml_text import toml_value
from distft.resume import Resume
from distft.run_folder import RunFolder
from distft.train_options import parser

if TYPE_CHECKING:
    from argparse import Namespace

    from distft.best import BestTracker
    from distft.checkpoint.lock import RunLock
    from distft.core.types import Engine
    from distft.engine.processes import Processes
    from distft.evaluation.eval_sets import EvalSet
    from distft.evaluator import Evaluator
    from distft.guard import DivergenceGuard
    from distft.health.watchdog import Watchdog
    from distft.metrics import RunFacts
    from distft.objectives.spec import Objective
    from distft.resume import CheckpointManager


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

    `resume`: "auto" continues from the newest valid checkpoint, "never" starts anew, a folder names a checkpoint.
    `allow_changes`: continue although learning rate, schedule, clipping or length of the run have changed.

    Raises:
        DistftError: see `distft.core.errors`; nothing else is the user's fault.
    """
    from distft.checkpoint.lock import RunLock
    from distft.engine import processes
    from distft.engine.determinism import deterministic, expandable_segments
    from distft.health.watchdog import Watchdog

    expandable_segments()
    quiet_libraries()
    PHASE.begin()
    launcher, rank, world, local_rank = processes.placed_by(os.environ)
    say = _say if rank == 0 else _say_nothing
    located = locate(recipe)
    folder = RunFolder(recipe.run_dir, writes=rank == 0)
    if resume == "auto" and (done := folder.finished(recipe.digest())) is not None:
        say(f"run {recipe.name} is already complete: {folder.final}")
        return Result(folder=folder.path, final=folder.final, state=done)
    located = assemble.dated(located, folder.path, resume)
    lock = RunLock(folder.path) if rank == 0 else None

    def end(code: int, reason: str) -> bool:
        first = folder.end(code=code, reason=reason, rank=rank)
        if lock is not None:
            lock.release()
        return first

    watch = Watchdog(
        folder.path,
        rank=rank,
        world=world,
        neighbours=processes.neighbours(os.environ, rank, world, local_rank),
        timeout_s=recipe.guard.hang_timeout_s,
        launched=launcher in ("accelerate", "torchrun") and world > 1,
        end=end,
    )
    fixed = deterministic(recipe.train.deterministic)
    with lock or contextlib.nullcontext(), watch, fixed, processes.leaving() as group:
        STOP.watch(folder.path / "STOP")
        try:
            PHASE.enter("rows")
            compatibility.refuse_misfits(located)
            cut = assemble.layout(recipe, world, say)
            say(f"run {recipe.name} -> {folder.path} ({world} process{'es' if world > 1 else ''}, {launcher})")
            rows, asked = assemble.data(located, cut, rank, world, say), assemble.eval_sets(located, say)
            run = _Run(recipe, located, folder, cut, rows, asked, say, resume, allow_changes, watch, lock, end, group)
            state = run.to_its_end()
        except BaseException as found:
            error = watch.cause(found)
            if not (lock is not None and lock.lost):  # then the folder belongs to another run
                folder.end(code=exit_code(error), reason=reason(error), rank=rank, follows=isinstance(error, PeerEnded))
                folder.note("ended", code=exit_code(error), reason=reason(error))
            if error is found:
                raise
            raise error from found
        folder.end(code=DONE, reason="done", state=state, recipe_sha256=recipe.digest(), rank=rank)
        folder.note("ended", code=DONE, reason="done")
    return Result(folder=folder.path, final=folder.final, state=state)


@dataclass(frozen=True)
class _Run:
    """Everything between joining the processes and leaving them."""

    recipe: Recipe
    located: Recipe
    folder: RunFolder
    cut: assemble.Layout
    rows: assemble.Data
    asked: list[EvalSet]
    say: assemble.Say
    resume: Resume
    allow_changes: bool
    watch: Watchdog
    lock: RunLock | None
    end: Callable[[int, str], bool]  # writes exit.json
    group: contextlib.ExitStack  # leaves the processes that have been joined

    def to_its_end(self) -> TrainState:
        """Join, train, export."""
        from distft.engine import flight_recorder, processes

        PHASE.enter("fetch")
        assemble.fetch(self.located)
        PHASE.enter("join")
        # Longer than the watch's patience: it ends a hang first, and knows whose it is.
        traces = self.folder.path / "ranks"
        placed = processes.join(timeout_s=60 + 2 * self.recipe.guard.hang_timeout_s, record_in=traces)
        self.group.callback(processes.leave, placed)
        self.watch.on(str(placed.device), lambda: flight_recorder.write(traces, placed.rank))
        engine = assemble.open_engine(self.recipe, placed, self.say)
        self.group.callback(engine.close)
        keep_alive(engine)
        try:
            cut, rows = assemble.on_all(self.located, self.cut, self.rows, engine, self.say)
            return replace(self, cut=cut, rows=rows)._under(engine, placed)
        except (RuntimeError, MemoryError) as error:
            if (told := self._too_large(error, engine.world)) is None:
                raise
            raise told from error

    def _under(self, engine: Engine, placed: Processes) -> TrainState:
        from distft.guard import DivergenceGuard, RollBack

        recipe, steps = self.recipe, self.rows.steps
        PHASE.enter("model")
        model = assemble.model(self.located, placed, self.cut, self.rows, self.say)
        facts = assemble.manifest(recipe, self.located, model, engine, placed, self.cut, self.rows)
        guard = DivergenceGuard(recipe.guard, engine, say=self.say, note=self.folder.note)
        best = assemble.best(recipe, self.asked)
        checkpoints, state, reader = assemble.open_checkpoints(
            recipe,
            self.located,
            self.folder,
            engine,
            self.rows,
            self.say,
            judges={"guard": guard, "best": best},
            resume=self.resume,
            allow_changes=self.allow_changes,
        )
        self.folder.start(recipe.to_toml(), facts)
        here = (self.located, placed.world, self.cut)
        if placed.rank == 0 and (plan := assemble.planned(*here, self.rows.mean_tokens)) is not None:
            self.folder.write("plan.json", plan)
        hashing = assemble.remember(self.located, self.folder) if placed.rank == 0 else None
        self.folder.note("started", engine=engine.name, world=placed.world, step=state.step)
        shapes, costs = assemble.saved_shapes(model, recipe), assemble.run_facts(model, placed, state)
        assemble.adopt(recipe, engine, model, self.cut, steps.num_steps)
        checkpoints.prepare()
        objective = assemble.objective(recipe, engine, model)
        if recipe.train.rehearse:
            self._rehearse(engine, objective)
        told = {"num_steps": steps.num_steps, "stop": self._stop, "say": self.say}
        looks = assemble.evaluator(self.located, self.folder, engine, model, self.rows, self.asked, objective, **told)
        while True:
            PHASE.enter("restore")
            if reader is not None:
                engine.restore(reader, state)
            try:
                facts_now = replace(costs, start=state)
                state = self._train(engine, placed, objective, checkpoints, guard, best, looks, facts_now)
                break
            except RollBack as spike:
                loaded = checkpoints.go_back(spike.step)
                state, reader = TrainState(**loaded.state["train"]), loaded.reader
                guard.restore(loaded.state["guard"], without=[spike.step - 1, spike.step])
                best.restore(loaded.state["best"])
                self.say(f"step {spike.step}: {spike.why}: back to {loaded.path.name}, to go on without what led here")
        if hashing is not None:
            hashing.join()
        export = functools.partial(assemble.export, self.located, self.folder, engine, model, shapes, self.rows)
        if not recipe.train.load_best:
            self._export(engine, functools.partial(self._leave_early, engine, checkpoints, state), export)
        self._at_its_best(engine, checkpoints, looks, state)
        if recipe.train.load_best:
            # The engine holds the best weights by now; the last state was saved before.
            self._export(engine, functools.partial(self._leave_early, engine, checkpoints, state, saves=False), export)
        self.say(f"done: {self.folder.final}")
        return state

    def _export(self, engine: Engine, early: Callable[[], NoReturn], write: Callable[[], None]) -> None:
        """Write final/, unless some rank was asked to stop: it may take minutes, and the next start begins it anew."""
        PHASE.enter("export")
        if any(engine.gather(self._stop())):
            early()
        write()

    def _at_its_best(self, engine: Engine, checkpoints: CheckpointManager, looks: Evaluator, state: TrainState) -> None:
        """Go to the best state, where one is kept and wanted, and look at it; the engine holds its weights then.

        Raises:
            Preempted: asked to stop; the last state is saved, and the next start goes on here.
        """
        wanted = self.recipe.train.load_best or self.asked
        best = checkpoints.best() if self.recipe.checkpoint.best and wanted else None
        if best is None:
            if self.recipe.train.load_best:
                self.say("no evaluation during training was better than the base model's: final/ holds the last state")
            return
        kept = TrainState(**best.state["train"])
        if kept.step != state.step:
            PHASE.enter("save")
            checkpoints.save_now(state)
            PHASE.enter("restore")
            engine.restore(best.reader, kept)
        if self.recipe.train.load_best:
            self.folder.note("load_best", best=kept.step)
            self.say(f"final/ holds the best state, of step {kept.step}")
        if self.recipe.eval.at_end and looks.best(kept) is None:
            self._leave_early(engine, checkpoints, state)

    def _too_large(self, error: RuntimeError | MemoryError, world: int) -> MachineError | None:
        """Memory ran out: where, and what to change; None for any other error."""
        from distft.core.out_of_memory import held, is_out_of_memory

        if not is_out_of_memory(error):
            return None
        where = f"the {PHASE.phase} of step {PHASE.step}" if PHASE.step else f"the phase {PHASE.phase}"
        short = MachineError(f"memory ran out in {where}{held()}")
        self.end(exit_code(short), reason(short))  # planning what to change takes seconds, in which peers would wait
        hint = "" if self.recipe.train.rehearse else "\n[train] rehearse = true finds this out in the first minute"
        advice = assemble.advice(self.recipe, self.located, world, self.cut)
        return MachineError(f"{short}\n{advice}{hint}")

    def _rehearse(self, engine: Engine, objective: Objective) -> None:
        from distft.memory_preflight import run_preflight

        worst = assemble.largest_micro_batch(self.recipe, self.cut, self.rows)
        self.say(f"rehearsal: a step of {worst.sequences} x {worst.longest:,} tokens")
        found = (self.recipe, self.located, engine.world, self.cut)
        run_preflight(worst, engine, objective, advice=lambda: assemble.advice(*found))
        self.say("rehearsal: done")

    def _train(
        self,
        engine: Engine,
        placed: Processes,
        objective: Objective,
        checkpoints: CheckpointManager,
        guard: DivergenceGuard,
        best: BestTracker,
        looks: Evaluator,
        facts: RunFacts,
    ) -> TrainState:
        """From a state to the end of the steps, with the evaluations around them.

        Raises:
            Preempted: asked to stop; the state is saved.
        """
        from distft.core.protocols import Every
        from distft.loop import fit

        recipe, state, steps, when = self.recipe, facts.start, self.rows.steps, self.recipe.eval
        every = Every(
            log=lambda step: step % recipe.log.every_steps == 0 or step == steps.num_steps,
            eval=looks.due,
            save=lambda step: isinstance(saves := recipe.checkpoint.every_steps, int) and step % saves == 0,
        )
        meters = assemble.meters(recipe, self.folder, facts, engine, placed, steps, self.say)
        PHASE.training()
        try:
            broken_off = looks.due(state.step) and best.last_eval_step != state.step and not best.enough
            if broken_off if state.step else when.at_start:
                figures = looks.during(state) if state.step else looks.before(state)
                meters.evaluated(state, figures)
                best.see(state, figures)
            if not best.enough:  # a run that was stopped after its last step has nothing left to train
                state = fit(
                    state,
                    steps,
                    engine=engine,
                    objective=objective,
                    meters=meters,
                    checkpoints=checkpoints,
                    guard=guard,
                    look=looks.during,
                    best=best,
                    stop=self._stop,
                    every=every,
                )
            if best.enough:
                self.say(f"enough: no better evaluation in {when.early_stop}; training ends at step {state.step}")
                self.folder.note("enough", step=state.step, best=best.state())
            elif state.step < steps.num_steps:
                self._leave_early(engine, checkpoints, state)
            if when.at_end:
                figures = looks.after(state)
                if figures is None:
                    self._leave_early(engine, checkpoints, state)
                meters.evaluated(state, figures)
                if not best.enough and (keep := best.see(state, figures)):
                    checkpoints.save(state, keep)
            PHASE.enter("save")
            checkpoints.close()
        finally:
            meters.close()
        return state

    def _stop(self) -> bool:
        if self.lock is not None and self.lock.lost:
            STOP.ask("the loss of its lock")
        return STOP.asked()

    def _leave_early(
        self, engine: Engine, checkpoints: CheckpointManager, state: TrainState, *, saves: bool = True
    ) -> NoReturn:
        if any(engine.gather(self.lock is not None and self.lock.lost)):
            raise BusyError(f"{self.folder.path}: another run has taken over, this one was frozen; it saves nothing")
        PHASE.enter("save")
        if state.step > 0 and saves:
            checkpoints.save_now(state)
        STOP.granted()
        kept = "the state is saved" if state.step > 0 else "nothing was trained yet, so there is nothing to save"
        reasons = sorted({reason for reason in engine.gather(STOP.reason) if reason})
        raise Preempted(f"stopped by {', '.join(reasons)} after step {state.step}; {kept}")


def _say(line: str) -> None:
    print(f"distft: {line}", file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    """Other ranks: things are said once, not once per process."""


def run(options: Namespace) -> int:
    """The command, its flags parsed: returns the exit code."""
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
    """`python -m distft.train`."""
    STOP.install()
    plan_hard_exit()
    options = parser().parse_args(argv)
    if options.nproc is not None:
        parser().error("--nproc starts processes, and this is one of them")
    return run(options)
