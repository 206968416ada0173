"""What a run folder says of its run, read once: any part may be missing, and a torn line is left out.

The report, the comparison of runs and the model card are all written from this.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.files import read_json_lines, read_json_object

if TYPE_CHECKING:
    from distft.model.adapters import MethodSpec
    from distft.objectives import ObjectiveSpec

SUMMARY = "eval/summary.json"
CARE = "data-card.json"
PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class EvalFigure:
    """One figure of one set of evaluation rows: an element of `sets` in eval/summary.json."""

    name: str
    score: str
    figure: str
    higher_is_better: bool
    binary: bool
    before: Mapping[str, Any] | None
    """`Interval.to_json()` with the step."""
    label: str
    """`after` or `best`: the answers of the state that final/ holds; the other where they alone were looked at."""
    tuned: Mapping[str, Any] | None
    change: Mapping[str, Any] | None
    """`Change.to_json()`, from before to `label`."""
    regressions: tuple[str, ...]
    """Ids of rows that got worse, worst first; of very many the first ones."""

    @property
    def num_worse(self) -> int:
        """Rows that got worse, all of them."""
        return max(len((self.change or {}).get("regressions") or ()), len(self.regressions))

    @property
    def title(self) -> str:
        """`exact_match` where the score has one figure of its own name, else `rouge: rougeL`."""
        return self.score if self.figure == self.score else f"{self.score}: {self.figure}"

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The tuned model's, or the base model's where there is no other yet."""
        return self.tuned or self.before

    @property
    def verdict(self) -> str:
        """What may be said of the change: better, worse, no clear change; empty where there are not two to compare."""
        return str((self.change or {}).get("verdict", ""))


@dataclass(frozen=True, kw_only=True)
class Span:
    """One start of the run, as events.jsonl tells it. Seconds since the epoch."""

    began: float
    ended: float
    """When it ended; of a start without a last word, when it was last heard of."""
    step: int
    """It started from."""
    engine: str
    world: int
    code: int | None
    """None: it said no last word (killed, lost, or still running)."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that was found."""

    folder: Path
    manifest: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    exit: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    looks: tuple[Mapping[str, Any], ...] = ()
    """Records of metrics.jsonl of evaluations: the loss, figures of answers, or both."""
    events: tuple[Mapping[str, Any], ...] = ()
    starts: tuple[Mapping[str, Any], ...] = ()
    results: tuple[EvalFigure, ...] = ()
    held_out: Mapping[str, Any] = field(default_factory=dict)
    care: Mapping[str, Any] | None = None
    """`DataQualityReport.to_json()`."""
    plan: Mapping[str, Any] | None = None
    """One case of `distft plan --json`."""
    best: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's; its folder's where there is no recipe."""
        return str(self.recipe.get("name", self.folder.name))

    @property
    def method(self) -> str:
        """full, lora, qlora, …; "" unknown."""
        return str(self.table("method").get("name", ""))

    @property
    def method_spec(self) -> MethodSpec | None:
        """What the method declares about itself; None where the run names none, or one that is not installed here."""
        from distft.model.adapters import METHODS  # not for the help of commands, which imports this file

        return METHODS.get(self.method)

    @property
    def method_title(self) -> str:
        """What people call the method; "" unknown."""
        return self.method_spec.title or self.method if self.method_spec is not None else self.method

    @property
    def objective(self) -> str:
        """sft, dpo, kto, …; "" unknown."""
        return str(self.table("objective").get("name", ""))

    @property
    def objective_spec(self) -> ObjectiveSpec | None:
        """What the objective declares about itself; None where it is unknown, or not installed here."""
        from distft.objectives import OBJECTIVES  # not for the help of commands, which imports this file

        return OBJECTIVES.get(self.objective)

    @property
    def engine(self) -> str:
        """The one that ran."""
        return str(self.manifest.get("engine", ""))

    @property
    def world(self) -> int | None:
        """Processes of the last start."""
        return self.manifest.get("world")

    @property
    def is_adapter(self) -> bool:
        """Whether final/ holds an adapter beside an untouched base."""
        if (self.folder / "final" / "adapter_config.json").is_file():
            return True
        return self.method_spec is not None and self.method_spec.adapter

    @property
    def base(self) -> str:
        """What the recipe calls the model it started from."""
        return str(self.table("model").get("path", ""))

    @property
    def evals(self) -> tuple[Mapping[str, Any], ...]:
        """Those of the loss on held-out rows."""
        return tuple(record for record in self.looks if "eval_loss" in record)

    def looked(self, figure: str) -> list[tuple[int, float]]:
        """Return (step, value) of a figure of the evaluations, finite values alone."""
        pairs = [(record["step"], number(record.get(figure))) for record in self.looks]
        return [(step, value) for step, value in pairs if value is not None]

    @property
    def final_label(self) -> str:
        """The label of the answers of the state that final/ holds: `best` where the run went back to its best one."""
        return _final_label(self.events)

    @property
    def last(self) -> Mapping[str, Any]:
        """The last step's figures."""
        return self.steps[-1] if self.steps else {}

    def table(self, name: str) -> Mapping[str, Any]:
        """Return a table of the recipe; empty where it is missing."""
        table = self.recipe.get(name, {})
        return table if isinstance(table, dict) else {}

    def column(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a figure of the steps, finite values alone."""
        pairs = [(record["step"], number(record.get(name))) for record in self.steps]
        return [(step, value) for step, value in pairs if value is not None]

    @property
    def losses(self) -> tuple[float, float] | None:
        """Training loss of the first and the last step; a mean of a few at both ends, as single steps are noise."""
        values = [value for _, value in self.column("loss")]
        if not values:
            return None
        few = max(1, min(10, len(values) // 10))
        return sum(values[:few]) / few, sum(values[-few:]) / few

    @property
    def held_out_losses(self) -> tuple[float | None, float | None]:
        """Held-out loss before the first step, and of the state that final/ holds."""
        losses = [number((self.held_out.get(label) or {}).get("loss")) for label in ("before", self.final_label)]
        seen = self.looked("eval_loss")
        first = losses[0] if losses[0] is not None else next((loss for step, loss in seen if step == 0), None)
        last = losses[1] if losses[1] is not None else next((loss for step, loss in reversed(seen) if step > 0), None)
        return first, last

    @cached_property
    def judged(self) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """What held-out rows that judge answers tell, as `distft.evaluation.judged.judged_figures` puts it.

        Of the base model and of the state that final/ holds, on the same rows; None where there are no such rows.
        """
        labels = ("before", self.final_label)
        before, after = (read_json_object(self.folder / "eval" / label / "held_out.json") for label in labels)
        other = after and before.get("rows_sha256") != after.get("rows_sha256")
        return (None if other else before.get("judged")), after.get("judged")

    @property
    def training_s(self) -> float:
        """Seconds inside optimizer steps."""
        return math.fsum(value for _, value in self.column("step_s"))

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every start, oldest first."""
        spans = list(_spans(self.events, self.exit))
        if spans and spans[-1].code is None:  # it goes on, or broke off between two events: its steps tell how long
            last = spans.pop()
            since = [number(record.get("step_s")) or 0.0 for record in self.steps if record["step"] > last.step]
            spans.append(replace(last, ended=max(last.ended, last.began + math.fsum(since))))
        return tuple(spans)

    @property
    def wall_s(self) -> float | None:
        """Seconds that processes existed and trained, evaluated or saved, over all starts; None: no start is known."""
        return math.fsum(span.ended - span.began for span in self.spans) if self.spans else None

    @property
    def gpu_hours(self) -> float | None:
        """`wall_s` of each start times its processes, in hours: what a price per GPU hour multiplies."""
        if not self.spans:
            return None
        return math.fsum((span.ended - span.began) * span.world for span in self.spans) / 3600

    @property
    def peak_gib(self) -> float | None:
        """Rank 0's peak memory."""
        return max((value for _, value in self.column("memory_gib")), default=None)

    @property
    def planned_gib(self) -> float | None:
        """The peak that the plan predicted for a rank."""
        peak = ((self.plan or {}).get("per_rank") or {}).get("peak_bytes")
        return None if peak is None else peak / 2**30

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the steps: the first ones warm up, and a save or a neighbour slows some."""
        values = sorted(value for _, value in self.column("tokens_per_s"))
        return values[len(values) // 2] if values else None

    @property
    def on_gpu(self) -> bool:
        """Whether memory is a device's and there is a peak to hold speed against."""
        return self.manifest.get("device", "cpu") != "cpu"

    def rows_sha256(self, name: str) -> str:
        """Return the hash of the rows of a set of results: a name alone may mean others in another run. "" unknown."""
        return _first_hash(self.folder / "eval", name)

    def answers(self, label: str, name: str) -> dict[str, dict[str, Any]]:
        """Return row id -> its line of eval/LABEL/NAME.jsonl; empty where it is missing."""
        path = self.folder / "eval" / label / f"{name}.jsonl"
        return {str(record["id"]): record for record in read_json_lines(path) if "id" in record}


def _first_hash(folder: Path, name: str) -> str:
    abouts = (read_json_object(folder / label / f"{name}.json") for label in ("after", "best", "before"))
    return next((str(about["rows_sha256"]) for about in abouts if about.get("rows_sha256")), "")


def read_run(folder: Path) -> RunRecord:
    """Read whatever of a run is there."""
    text = _text(folder / "recipe.toml")
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        recipe = {}
    records = [record for record in read_json_lines(folder / "metrics.jsonl") if isinstance(record.get("step"), int)]
    summary = read_json_object(folder / SUMMARY)
    care, plan = read_json_object(folder / CARE), read_json_object(folder / PLAN)
    events = tuple(read_json_lines(folder / "events.jsonl"))
    return RunRecord(
        folder=folder,
        manifest=read_json_object(folder / "manifest.json"),
        recipe=recipe,
        recipe_text=text,
        exit=read_json_object(folder / "exit.json"),
        steps=tuple(record for record in records if "loss" in record),
        looks=tuple(record for record in records if "loss" not in record),
        events=events,
        starts=tuple(read_json_lines(folder / "starts.jsonl")),
        results=_in_order(_results(summary, _final_label(events)), recipe),
        held_out=summary.get("held_out") or {},
        care=care or None,
        plan=plan or None,
        best=read_json_object(folder / "checkpoints" / "best.json"),
    )


def number(value: Any) -> float | None:
    """Return a finite number, or None: metrics.jsonl writes "nan" and "inf" as text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def seconds_of(text: Any) -> float | None:
    """Convert an ISO time to seconds since the epoch; None where it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _in_order(results: Iterator[EvalFigure], recipe: Mapping[str, Any]) -> tuple[EvalFigure, ...]:
    """Sort the recipe's own sets first, in its order, before the sanity sets that every run has."""
    table = recipe.get("eval")
    answers = (table.get("answers") if isinstance(table, dict) else None) or []
    names = [entry.get("name") for entry in answers if isinstance(entry, dict)]
    return tuple(sorted(results, key=lambda result: names.index(result.name) if result.name in names else len(names)))


def _final_label(events: Iterable[Mapping[str, Any]]) -> str:
    return "best" if any(event.get("event") == "load_best" for event in events) else "after"


def _results(summary: Mapping[str, Any], final: str) -> Iterator[EvalFigure]:
    for entry in summary.get("sets") or []:
        if not isinstance(entry, dict) or "name" not in entry:
            continue
        figure = str(entry.get("figure", ""))
        label = next((key for key in (final, "after", "best") if entry.get(key)), final)
        of_best = "_best" if label == "best" else ""
        yield EvalFigure(
            name=str(entry["name"]),
            score=str(entry.get("score", figure)),
            figure=figure,
            higher_is_better=bool(entry.get("higher_is_better", True)),
            binary=bool(entry.get("binary", False)),
            before=entry.get("before"),
            label=label,
            tuned=entry.get(label),
            change=entry.get(f"change{of_best}"),
            regressions=tuple(map(str, entry.get(f"regressions{of_best}") or ())),
        )


def _spans(events: tuple[Mapping[str, Any], ...], ended: Mapping[str, Any]) -> Iterator[Span]:
    timed = [(event, seconds) for event in events if (seconds := seconds_of(event.get("time"))) is not None]
    opened = [place for place, (event, _) in enumerate(timed) if event.get("event") == "started"]
    for place, following in pairwise([*opened, len(timed)]):
        event, began = timed[place]
        of_start = timed[place:following]
        last, heard = of_start[-1]
        code, reason = (last.get("code"), last.get("reason", "")) if last.get("event") == "ended" else (None, "")
        if code is None and following == len(timed) and ended:  # it may have been ended by another rank
            code, reason = ended.get("code"), ended.get("reason", "")
            heard = max(heard, seconds_of(ended.get("time")) or heard)
        yield Span(
            began=began,
            ended=heard,
            step=int(event.get("step", 0)),
            engine=str(event.get("engine", "")),
            world=int(event.get("world", 1)),
            code=code,
            reason=str(reason),
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
