"""Evaluates the model before, during and after training: held-out loss, and the answers to evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distft.core.ranks import on_rank_zero
from distft.core.types import Batch, Engine, TrainState
from distft.evaluation.answer_records import HELD_OUT, AnswerRecords, perplexity, step_label
from distft.evaluation.eval_sets import EvalSet
from distft.evaluation.held_out import held_out_loss
from distft.evaluation.judged import judged_warnings
from distft.evaluation.summary import write_summary
from distft.generation.generator import Generator
from distft.objectives.spec import Objective

T = TypeVar("T")
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EvalSchedule:
    """Says at which steps the held-out loss is measured; an evaluation set has its own interval."""

    every_steps: int | None
    at_end: bool
    num_steps: int

    def is_due(self, step: int, every_steps: int | None) -> bool:
        """Return whether an evaluation is due at this step; the one at the end is not made twice."""
        return bool(every_steps and step % every_steps == 0 and not (self.at_end and step == self.num_steps))


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates the model; methods are collective, and return None when some rank was asked to stop before the end."""

    engine: Engine
    objective: Objective
    held_out: Sequence[Batch]
    held_out_sha256: str
    eval_sets: Sequence[EvalSet]
    generator: Generator
    records: AnswerRecords
    base: str
    """Name of the weights that training starts from (`record.model_key`)."""
    schedule: EvalSchedule
    stop: Callable[[], bool]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    """Say what is wrong with a gain, and keep it among the run's events."""

    def due(self, step: int) -> bool:
        """Return whether any evaluation is due after this step."""
        return bool(self.held_out and self.schedule.is_due(step, self.schedule.every_steps)) or any(
            self._due_eval_sets(step)
        )

    def during(self, state: TrainState) -> Figures | None:
        """Evaluate what is due at this step."""
        figures: Figures = {}
        if self.held_out and self.schedule.is_due(state.step, self.schedule.every_steps):
            measured = held_out_loss(self.engine, self.objective, self.held_out, stop=self.stop)
            if measured is None:
                return None
            figures |= self._with_perplexity(measured.figures)
        return self._run_eval_sets(self._due_eval_sets(state.step), step_label(state.step), state, figures)

    def before(self, state: TrainState) -> Figures | None:
        """Evaluate the base model. What an earlier start has kept of the same rows and settings is not made again."""
        return self._all("before", state, reuse=True)

    def under(self, label: str, state: TrainState) -> Figures | None:
        """Evaluate the model as the engine holds it, kept under any label; write the summary."""
        figures = self._all(label, state)
        if figures is not None:
            self._sum_up(say=label if label in ("after", "best") else None)
        return figures

    def after(self, state: TrainState) -> Figures | None:
        """Evaluate the trained model; write the summary."""
        return self.under("after", state)

    def best(self, state: TrainState) -> Figures | None:
        """Evaluate the best state, whose weights the engine holds, and write the summary."""
        last = self.records.about("after", HELD_OUT) or next(
            (record for eval_set in self.eval_sets if (record := self.records.about("after", eval_set.name))), None
        )
        if self._first(lambda: last is not None and last.get("step") == state.step):
            self._first(self._copy_after)
            figures: Figures | None = {}
        else:
            figures = self._all("best", state)
        if figures is not None:
            self._sum_up(say="best" if figures else None)
        return figures

    def _all(self, label: str, state: TrainState, *, reuse: bool = False) -> Figures | None:
        figures: Figures = {}
        if self.held_out:
            measured = self._loss(label, state, reuse=reuse)
            if measured is None:
                return None
            figures |= measured
        return self._run_eval_sets(self.eval_sets, label, state, figures, reuse=reuse)

    def _loss(self, label: str, state: TrainState, *, reuse: bool) -> Figures | None:
        facts = {"rows_sha256": self.held_out_sha256, "model": self._model(label), "step": state.step}

        def kept() -> Figures | None:
            record = self.records.about(label, HELD_OUT) if reuse else None
            if (
                record is None
                or record.get("loss") is None
                or any(record.get(key) != fact for key, fact in facts.items())
            ):
                return None
            other_figures = {
                name: math.nan if value is None else value for name, value in record.get("figures", {}).items()
            }
            return {"eval_loss": record["loss"], "eval_tokens": float(record["tokens"]), **other_figures}

        measured = self._first(kept)
        if measured is None:
            result = held_out_loss(self.engine, self.objective, self.held_out, stop=self.stop)
            if result is None:
                return None
            measured = result.figures
            figures = self._with_perplexity(measured)
            self._first(lambda: self.records.write_held_out(figures, result.rows, label=label, **facts))
        return self._with_perplexity(measured)

    def _with_perplexity(self, figures: Figures) -> Figures:
        return figures | (
            {"eval_perplexity": perplexity(figures["eval_loss"])} if self.objective.spec.perplexity else {}
        )

    def _run_eval_sets(
        self, eval_sets: Sequence[EvalSet], label: str, state: TrainState, figures: Figures, *, reuse: bool = False
    ) -> Figures | None:
        about: dict[str, Any] = {"label": label, "step": state.step, "model": self._model(label)}
        for eval_set in eval_sets:

            def kept(eval_set: EvalSet = eval_set) -> Figures | None:
                is_kept = reuse and self.records.holds(eval_set, **about)
                return self.records.totals(label, eval_set.name) if is_kept else None

            totals = self._first(kept)
            if totals is None:
                result = eval_set.run(self.generator, self.engine)
                if result is None:
                    return None
                if result.cut_prompts:
                    self.say(f"{eval_set.name}: {result.cut_prompts} prompts lost their start: too long for the model")
                if self.generator.share < 1:
                    self.say(
                        f"{eval_set.name}: memory ran out, so {self.generator.share:.3g} of a batch is answered at once"
                    )
                self._first(lambda eval_set=eval_set, result=result: self.records.write(eval_set, result, **about))
                totals = result.totals
            figures |= {f"{eval_set.name}.{name}": value for name, value in totals.items()}
        return figures

    def _due_eval_sets(self, step: int) -> list[EvalSet]:
        return [eval_set for eval_set in self.eval_sets if self.schedule.is_due(step, eval_set.every_steps)]

    def _model(self, label: str) -> str:
        return self.base if label == "before" else f"{self.base}+trained"

    def _first(self, work: Callable[[], T]) -> T:
        """Run `work`, which reads or writes files, on rank 0, so that all ranks decide alike."""
        return on_rank_zero(self.engine, work)

    def _copy_after(self) -> None:
        for name in (HELD_OUT, *(eval_set.name for eval_set in self.eval_sets)):
            self.records.copy(name, old="after", new="best")

    def _sum_up(self, *, say: str | None) -> None:
        """Write the summary, say how the first figure of each score has changed, and what is wrong with the change."""
        if not (self.held_out or self.eval_sets):
            return
        summary = self._first(lambda: write_summary(self.records))
        firsts: set[tuple[str, str]] = set()
        for entry in summary["sets"]:
            score = (entry["name"], entry["score"])
            if say is not None and score not in firsts and (line := summary_line(entry, say)) is not None:
                self.say(line)
            firsts.add(score)
        if say is not None:
            for sentence in self._first(lambda: judged_warnings(*self.records.judged(say))):
                self.warn(sentence)


def summary_line(entry: dict[str, Any], label: str = "after") -> str | None:
    """Return an entry of the summary as a line, `label` against before; None where one of the two is missing."""
    change, now = entry["change_best" if label == "best" else "change"], entry[label]
    if change is None or entry["before"] is None or now is None:
        return None
    mcnemar = change["mcnemar"]
    gap, low, high = (change["difference"][key] for key in ("value", "low", "high"))
    bounds = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    test = "" if mcnemar is None else f", McNemar p = {mcnemar['p_value']:.2g}"
    worse = len(change["regressions"])
    return (
        f"{entry['name']}.{entry['figure']}: {_value(entry['before'])} before, {_value(now)} {label}: "
        f"{change['verdict']} ({'?' if gap is None else f'{gap:+.3f}'}{bounds}{test})"
        + (f"; {worse} row{'s' if worse > 1 else ''} got worse" if worse else "")
    )


def _value(interval: dict[str, Any]) -> str:
    return "?" if interval["value"] is None else f"{interval['value']:.3f}"
