"""The run's own questions, asked of an exported model in its runtime and judged by the run's own scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distft.core.errors import Problem, RecipeError
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.run_record import EvalFigure, number, read_run

if TYPE_CHECKING:
    from distft.export_formats.llama_cpp import Generated


class GreedyRuntime(Protocol):
    """A program with an exported model in it."""

    def greedy(self, ids: Sequence[int], most: int) -> Generated:
        """Return the likeliest continuation."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """One figure of one set, before training, after it, and of an exported level."""

    name: str
    before: float
    tuned: float
    level: float

    @property
    def lost(self) -> float:
        """Share of the gain that the level lost; negative where it is better still. Zero where nothing was gained."""
        gain = self.tuned - self.before
        return (self.tuned - self.level) / gain if gain else 0.0


def gained(run: Path) -> list[EvalFigure]:
    """Return the figures that training made better, of the recipe's own sets that write text."""
    record = read_run(run)
    own = {str(table.get("name")) for table in record.table("eval").get("answers") or () if isinstance(table, dict)}
    return [result for result in record.results if result.name in own and _gain(result) > 0]


def _gain(result: EvalFigure) -> float:
    before, tuned = (number((side or {}).get("value")) for side in (result.before, result.tuned))
    if before is None or tuned is None:
        return 0.0
    return tuned - before if result.higher_is_better else before - tuned


def refuse_without_gain(given: str, run: Path | None) -> None:
    """Refuse `--max-drop` where there is no gain that a level could lose.

    Raises:
        RecipeError: the source belongs to no run, or the run made no figure of its own rows better.
    """
    if run is None or not gained(run):
        why = "belongs to no run" if run is None else "has no figure of its own rows that got better"
        fix = "leave it out, or export a run with [[eval.answers]]"
        raise RecipeError(f"distft export {given}", [Problem(message=f"--max-drop: the source {why}", fix=fix)])


def task_figures(run: Path, runtime: GreedyRuntime, tokenizer: Any, context: int) -> list[TaskFigure]:
    """Ask the run's sets of the loaded model and return the figures that training made better."""
    from distft import assemble
    from distft.catalog import REGISTRIES
    from distft.recipe import load_recipe

    results = gained(run)
    if not results:
        return []
    recipe = assemble.with_date(load_recipe(run / "recipe.toml", registries=REGISTRIES), run)
    asked = {result.name for result in results}
    made: list[TaskFigure] = []
    generator: Any = _RuntimeGenerator(runtime, tokenizer, context)
    one_process: Any = _OneProcess()
    for eval_set in assemble.build_eval_sets(recipe, _say):
        if eval_set.name not in asked or not getattr(eval_set, "writes", False):
            continue
        answered = eval_set.run(generator, one_process)
        totals: Mapping[str, float] = {} if answered is None else answered.totals
        made += [
            _figure(result, totals) for result in results if result.name == eval_set.name and result.figure in totals
        ]
    return made


def _figure(result: EvalFigure, totals: Mapping[str, float]) -> TaskFigure:
    before, tuned = (float((side or {})["value"]) for side in (result.before, result.tuned))
    name = f"{result.name}.{result.figure}"
    return TaskFigure(name=name, before=before, tuned=tuned, level=totals[result.figure])


class _RuntimeGenerator:
    """Implements `CompletionGenerator` with a loaded file."""

    def __init__(self, runtime: GreedyRuntime, tokenizer: Any, context: int) -> None:
        self._runtime, self._tokenizer, self._context = runtime, tokenizer, context
        self.seconds = 0.0

    def truncate_prompt(self, ids: Sequence[int], room: int) -> Sequence[int]:
        """Cut the start of a prompt so that `room` tokens are left."""
        return ids[-max(1, self._context - room) :]

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion]:
        """Return a greedy completion of each prompt.

        Raises:
            RecipeError: the set draws its answers.
        """
        if how.temperature:
            problem = Problem(message="[[eval.answers]] temperature: drawn answers are not asked of an export", fix="0")
            raise RecipeError("distft export", [problem])
        began = time.monotonic()
        made = [self._completion(prompt, how) for prompt in prompts]
        self.seconds = time.monotonic() - began
        return made

    def _completion(self, prompt: Prompt, how: SamplingParams) -> Completion:
        written = self._runtime.greedy(prompt.ids, how.max_new_tokens)
        ids = written.ids[:-1] if written.ended else written.ids
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        ends = [place for stop in how.stop if (place := text.find(stop)) >= 0]
        text = text[: min(ends)] if ends else text
        return Completion(text=text, ids=written.ids, num_tokens=len(written.ids), ended=written.ended)


class _OneProcess:
    """Implements `Ranks` for one process."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def gather_to_rank0(self, value: Any) -> list[Any]:
        return [value]

    def all_true(self, value: bool) -> bool:
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""


def _say(line: str) -> None:
    print(f"distft: {line}", file=sys.stderr, flush=True)
