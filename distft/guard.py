"""Decides about steps that go wrong: skips an update, stops the run or rolls it back; names a straggler.

Decisions are made from numbers that are equal on all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distft.core.errors import NumericError
from distft.core.phase import PHASE
from distft.health.slowdown import SlowdownDetector
from distft.health.straggler import StragglerProbe, slowest

if TYPE_CHECKING:
    from distft.core.types import Engine, StepReport, TrainState
    from distft.recipe.schema import GuardTable

Note = Callable[..., None]
"""Takes an event's name and its facts (`RunFolder.note`)."""


class RollBack(Exception):
    """The run must go on from an earlier checkpoint; raised on all ranks alike."""

    def __init__(self, step: int, why: str) -> None:
        self.step, self.why = step, why
        super().__init__(why)


class DivergenceGuard:
    """Allows or skips each update, and reacts to the report of each step."""

    def __init__(self, table: GuardTable, engine: Engine, *, say: Callable[[str], None], note: Note) -> None:
        self._table, self._engine, self._say, self._note = table, engine, say, note
        self._losses: list[float] = []
        """Losses of the last steps that were no spikes."""
        self._in_a_row = 0
        self._rollbacks = 0
        self._steps_to_skip: list[int] = []
        """Steps to leave out when they come again after a rollback."""
        self._why = ""
        """Why the step that is being made is left out."""
        self._straggler_probe, self._slowdowns = StragglerProbe(), SlowdownDetector()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that a continued run decides as this one would, as JSON values."""
        return {"losses": self._losses, "in_a_row": self._in_a_row, "without": self._steps_to_skip}

    def restore(self, saved: dict[str, Any], *, without: list[int] | None = None) -> None:
        """Continue from what `state()` returned, with further steps to skip."""
        self._losses = list(saved.get("losses", ()))
        self._in_a_row = saved.get("in_a_row", 0)
        self._steps_to_skip = sorted({*saved.get("without", ()), *(without or ())})

    def allow_update(self, loss: float) -> bool:
        """Return whether a step of this finite loss, equal on all ranks, may change weights."""
        step, spike = PHASE.step, self._table.loss_spike
        if step in self._steps_to_skip:
            self._why = "left out since the rollback"
            return False
        if spike is None:
            return True
        if len(self._losses) >= spike.window:
            usual = statistics.median(self._losses)
            if loss > spike.factor * usual:
                self._why = (
                    f"loss {loss:.4g} is {loss / usual:.1f} times the median {usual:.4g} of {spike.window} steps"
                )
                return False
        self._losses = [*self._losses, loss][-spike.window :]
        return True

    def after(self, state: TrainState, report: StepReport) -> None:
        """React to the report of a step.

        Raises:
            NumericError: the recipe says to stop, or patience is at its end; no weight was changed by this step.
            RollBack: the recipe says to go back.
        """
        straggler = self._table.straggler
        if state.step % straggler.every_steps == 0 and self._engine.world > 1:
            self._look_for_stragglers(state.step, straggler.factor)
        if report.updated:
            self._in_a_row = 0
            return
        finite = math.isfinite(report.loss) and math.isfinite(report.grad_norm)
        why = self._why if finite else _not_finite(report)
        if finite and report.step in self._steps_to_skip:
            self._skip_step(report, why)
            return
        spike = self._table.loss_spike
        action = self._table.non_finite if not finite or spike is None else spike.action
        if action == "rollback":
            self._rollbacks += 1
            if self._rollbacks > self._table.patience:
                raise NumericError(
                    f"step {report.step}: {why}, after {self._table.patience} rollbacks ({report.samples})"
                )
            raise RollBack(report.step, why)
        self._in_a_row += 1
        if action == "stop" or self._in_a_row > self._table.patience:
            many = f"{self._in_a_row} steps in a row: " if self._in_a_row > 1 else ""
            raise NumericError(
                f"{many}step {report.step}: {why}, no weight was changed ({report.samples}). "
                "Try a lower learning_rate, a longer warm-up, or leave the named rows out."
            )
        self._skip_step(report, why)

    def _skip_step(self, report: StepReport, why: str) -> None:
        self._say(f"step {report.step} is left out: {why} ({report.samples})")
        self._note("left_out", step=report.step, why=why, samples=report.samples)

    def _look_for_stragglers(self, step: int, factor: float) -> None:
        mine = self._straggler_probe.read(PHASE.seconds["data"], self._engine.device)
        worst = slowest(self._engine.gather(mine))
        tempo = self._slowdowns.look(PHASE.seconds, step)
        host, _, device = worst.who.partition(", ")
        self._note(
            "pace",
            step=step,
            rank=worst.rank,
            host=host,
            device=device,
            what=worst.what,
            took_ms=round(1000 * worst.took_s, 3),
            others_ms=round(1000 * worst.others_s, 3),
            percent=round(worst.percent, 1),
            **({} if tempo is None else {"step_s": round(tempo.step_s, 4), "phase": tempo.phase}),
        )
        if worst.percent > 100 * (factor - 1):
            self._say(f"straggler: {worst}")
            self._note("straggler", step=step, what=str(worst))
        else:
            self._say(f"pace: slowest is rank {worst.rank} ({worst.who}), {worst.percent:.0f} % behind the median")
        if tempo is not None and tempo.is_slow(factor):
            alone = "" if worst.percent > 100 * (factor - 1) else "; no rank is behind the others: look at the network"
            self._say(f"slower: {tempo}{alone}")
            self._note("slower", step=step, what=f"{tempo}{alone}")


def _not_finite(report: StepReport) -> str:
    if not math.isfinite(report.loss):
        return f"loss {report.loss} is not finite"
    return f"gradient norm {report.grad_norm} is not finite though every loss is"
