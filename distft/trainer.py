"""Trains from a state to the last step: the loop with the evaluations, rollbacks and saves around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from distft.best import BestTracker
from distft.core.errors import BusyError, Preempted
from distft.core.phase import PHASE
from distft.core.protocols import Every, StepSource
from distft.core.stop import STOP
from distft.core.types import Engine, StateReader, TrainState
from distft.evaluator import Evaluator
from distft.guard import DivergenceGuard, RollBack
from distft.loop import fit
from distft.metrics import Meters
from distft.objectives.spec import Objective
from distft.resume import CheckpointManager
from distft.run_session import RunSession


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A run whose parts are all built. Every method is collective."""

    session: RunSession
    engine: Engine
    objective: Objective
    steps: StepSource
    checkpoints: CheckpointManager
    guard: DivergenceGuard
    best: BestTracker
    evaluator: Evaluator
    open_meters: Callable[[TrainState], Meters]
    """State that training starts from -> the metrics and the sinks of that start."""

    def train(self, state: TrainState, reader: StateReader | None) -> TrainState:
        """Train from `state`, whose tensors `reader` has, to the end; return where that is.

        Raises:
            Preempted: asked to stop; the state is saved.
            NumericError: see `distft.guard`.
        """
        while True:
            PHASE.enter("restore")
            if reader is not None:
                self.engine.restore(reader, state)
            try:
                return self._train_from(state)
            except RollBack as spike:
                loaded = self.checkpoints.go_back(spike.step)
                state, reader = TrainState(**loaded.state["train"]), loaded.reader
                self.guard.restore(loaded.state["guard"], without=[spike.step - 1, spike.step])
                self.best.restore(loaded.state["best"])
                came_to = f"back to {loaded.path.name}, to go on without what led here"
                self.session.say(f"step {spike.step}: {spike.why}: {came_to}")

    def _train_from(self, state: TrainState) -> TrainState:
        table, session = self.session.recipe.eval, self.session
        meters = self.open_meters(state)
        PHASE.training()
        try:
            interrupted = self.evaluator.due(state.step) and self.best.last_eval_step != state.step
            if interrupted and not self.best.should_stop if state.step else table.at_start:
                figures = self.evaluator.during(state) if state.step else self.evaluator.before(state)
                meters.evaluated(state, figures)
                self.best.update(state, figures)
            if not self.best.should_stop:  # a run that was stopped after its last step has nothing left to train
                state = fit(
                    state,
                    self.steps,
                    engine=self.engine,
                    objective=self.objective,
                    meters=meters,
                    checkpoints=self.checkpoints,
                    guard=self.guard,
                    look=self.evaluator.during,
                    best=self.best,
                    stop=session.stop,
                    every=self._every(),
                )
            if self.best.should_stop:
                session.say(f"no better evaluation in {table.early_stop}: training ends early, at step {state.step}")
                session.folder.note("enough", step=state.step, best=self.best.state())
            elif state.step < self.steps.num_steps:
                self.leave_early(state)
            if table.at_end:
                figures = self.evaluator.after(state)
                if figures is None:
                    self.leave_early(state)
                meters.evaluated(state, figures)
                if not self.best.should_stop and (keep := self.best.update(state, figures)):
                    self.checkpoints.save(state, keep)
            PHASE.enter("save")
            self.checkpoints.close()
        finally:
            meters.close()
        return state

    def _every(self) -> Every:
        recipe, last = self.session.recipe, self.steps.num_steps
        saves = recipe.checkpoint.every_steps
        return Every(
            log=lambda step: step % recipe.log.every_steps == 0 or step == last,
            eval=self.evaluator.due,
            save=lambda step: isinstance(saves, int) and step % saves == 0,
        )

    def evaluate_best(self, state: TrainState) -> None:
        """Go to the best state, where one is kept and wanted, and evaluate it; the engine holds its weights then.

        Raises:
            Preempted: asked to stop; the last state is saved, and the next start goes on here.
        """
        recipe, session = self.session.recipe, self.session
        wanted = recipe.train.load_best or self.evaluator.eval_sets
        best = self.checkpoints.best() if recipe.checkpoint.best and wanted else None
        if best is None:
            if recipe.train.load_best:
                session.say("no evaluation during training was better than the base model's: final/ has the last state")
            return
        kept = TrainState(**best.state["train"])
        if kept.step != state.step:
            PHASE.enter("save")
            self.checkpoints.save_now(state)
            PHASE.enter("restore")
            self.engine.restore(best.reader, kept)
        if recipe.train.load_best:
            session.folder.note("load_best", best=kept.step)
            session.say(f"final/ holds the best state, of step {kept.step}")
        if recipe.eval.at_end and self.evaluator.best(kept) is None:
            self.leave_early(state)

    def export(self, state: TrainState, write: Callable[[], None], *, saves: bool) -> None:
        """Write final/, unless some rank was asked to stop: it may take minutes, and the next start begins it anew.

        `saves`: a state that the engine holds is saved before an early leave.
        """
        PHASE.enter("export")
        if any(self.engine.gather(self.session.stop())):
            self.leave_early(state, saves=saves)
        write()

    def leave_early(self, state: TrainState, *, saves: bool = True) -> NoReturn:
        """Save what was trained and end the run.

        Raises:
            Preempted: the state is saved, or there was nothing to save.
            BusyError: another run has taken the folder; nothing is written into it.
        """
        session = self.session
        if any(self.engine.gather(session.lost_lock)):
            raise BusyError(
                f"{session.folder.path}: another run has taken over while this process stood still; it saves nothing"
            )
        PHASE.enter("save")
        if state.step > 0 and saves:
            self.checkpoints.save_now(state)
        STOP.granted()
        kept = "the state is saved" if state.step > 0 else "nothing was trained yet, so there is nothing to save"
        reasons = sorted({reason for reason in self.engine.gather(STOP.reason) if reason})
        raise Preempted(f"stopped by {', '.join(reasons)} after step {state.step}; {kept}")
