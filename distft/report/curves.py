"""What the run's numbers did over its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from distft.report import formatting
from distft.report.charts import STYLES, Series, line_chart
from distft.report.html import Html, h
from distft.report.tables import fold, missing, table
from distft.run_record import RunRecord, number

_TABLE_ROWS = 24
_STEEP = 20
"""Largest loss over the smallest from which only a logarithmic axis shows both ends."""


def curves(run: RunRecord) -> Iterator[Html]:
    """Yield the section's content."""
    if not run.steps:
        yield missing("metrics.jsonl has no step yet.")
        return
    wide = [chart for chart in (_loss(run), *_scores(run)) if chart is not None]
    narrow = [chart for chart in _charts(run) if chart is not None]
    yield h("div", wide, narrow, class_="charts even" if len(narrow) == 4 else "charts")  # two by two
    own = [chart for chart in _of_objective(run) if chart is not None]
    if own:
        yield h("div", own, class_="charts even" if len(own) in (2, 4) else "charts")
    if run.on_gpu and run.planned_gib is None:
        why = (run.plan or {}).get("why")
        yield missing(
            f"No planned memory to hold the measured one against: {why}."
            if why
            else "No planned memory to hold the measured one against: the run folder has no plan.json."
        )
    yield fold("The figures behind the curves", _steps(run), _evals(run))


def live_curves(run: RunRecord) -> Html | None:
    """Return the curves of a run that goes on; None before its first step. Unlike `curves` it imports no torch."""
    if not run.steps:
        return None
    wide = [chart for chart in (_loss(run), *_scores(run)) if chart is not None]
    narrow = [chart for chart in _charts(run) if chart is not None]
    return h("div", wide, narrow, class_="charts even" if len(narrow) == 4 else "charts")


def _loss(run: RunRecord) -> Html | None:
    loss = run.column("loss")
    held_out = run.looked("eval_loss")
    series = [Series(name="training, each step and its running mean", points=loss, kind="noisy")]
    if held_out:
        series.append(Series(name="held-out rows", points=held_out, style=2, kind="dots"))
    says = (
        f"from {formatting.figure(loss[0][1])} to {formatting.figure(loss[-1][1])} over {len(loss)} steps"
        if loss
        else ""
    )
    if held_out:
        says += f"; held-out loss from {formatting.figure(held_out[0][1])} to {formatting.figure(held_out[-1][1])}"
    values = [value for curve in series for _, value in curve.points]
    steep = min(values, default=0) > 0 and max(values) > _STEEP * min(values)
    return line_chart("Loss", series, says=says, wide=True, logarithmic=steep)


def _charts(run: RunRecord) -> Iterator[Html | None]:
    yield _column_chart(run, "lr", "Learning rate", from_zero=True)
    yield _column_chart(run, "grad_norm", "Gradient norm", unit="before clipping", from_zero=True)
    yield _column_chart(run, "tokens_per_s", "Speed", unit="tokens/s, all processes", from_zero=True)
    yield _column_chart(run, "mfu", "MFU", unit="of the dense bf16 peak", from_zero=True)
    yield _memory(run)


def _scores(run: RunRecord) -> Iterator[Html | None]:
    """Draw the first figure of each set evaluated during training; shares together, others each for itself."""
    measured = [(figure, points) for figure in _firsts(run) if len(points := run.looked(figure)) > 2]
    shares = [(figure, points) for figure, points in measured if all(0 <= value <= 1 for _, value in points)]
    others = [item for item in measured if item not in shares]
    for together in ([shares[:STYLES]] if shares else []) + [[item] for item in others]:
        series = [
            Series(name=figure, points=points, style=style) for style, (figure, points) in enumerate(together, start=1)
        ]
        says = "; ".join(
            f"{figure} from {formatting.figure(points[0][1])} to {formatting.figure(points[-1][1])}"
            for figure, points in together
        )
        title = "Scores" if together[0] in shares else together[0][0]
        yield line_chart(title, series, says=says, wide=True, from_zero=together[0] in shares)


def objective_figures(run: RunRecord) -> list[str]:
    """Return the names of the objective's own figures that the run has measured, such as `reward_margin`."""
    spec = run.objective_spec
    named: Iterable[str] = ()
    if spec is not None:
        with contextlib.suppress(ValueError):  # settings of another version
            settings = {key: value for key, value in run.table("objective").items() if key != "name"}
            named = spec.figures(spec.params.model_validate(settings))
    return [name for name in named if run.column(name) or run.looked(f"eval_{name}")]


def _of_objective(run: RunRecord) -> Iterator[Html | None]:
    """Draw the objective's figures: chosen and rejected answers together, every other for itself."""
    figures = objective_figures(run)
    for name in figures:
        if name.endswith("_rejected") and f"{name.removesuffix('_rejected')}_chosen" in figures:
            continue
        stem = name.removesuffix("_chosen")
        sides = [f"{stem}_chosen", f"{stem}_rejected"] if stem != name and f"{stem}_rejected" in figures else [name]
        yield _figure_chart(run, _TITLES.get(stem, stem.replace("_", " ").capitalize()), sides)


_TITLES = {"logprob": "Log-probability of an answer", "reward": "Reward of an answer", "kl": "KL to the reference"}


def _figure_chart(run: RunRecord, title: str, figures: Sequence[str]) -> Html | None:
    """Draw figures over the steps, and as dots on held-out rows."""
    series, says = [], []
    for place, name in enumerate(figures):
        side = f"{name.rpartition('_')[2]}, " if len(figures) > 1 else ""
        for kind, where, points in (
            ("noisy", "training", run.column(name)),
            ("dots", "held-out", run.looked(f"eval_{name}")),
        ):
            style = 2 * place + (1 if kind == "noisy" else 2)
            series.append(Series(name=f"{side}{where}", points=points, style=style, kind=kind))
            if points:
                ends = (formatting.figure(points[end][1]) for end in (0, -1))
                says.append(f"{side}{where} from {' to '.join(ends)}")
    return line_chart(title, series, says="; ".join(says), from_zero=figures[0].endswith("_accuracy"))


def _column_chart(run: RunRecord, column: str, title: str, *, unit: str = "", from_zero: bool = False) -> Html | None:
    points = run.column(column)
    if not points:
        return None
    values = [value for _, value in points]
    first, last, most = (formatting.figure(value) for value in (values[0], values[-1], max(values)))
    says = f"from {first} to {last}, at most {most}"
    kind = "line" if column == "lr" else "noisy"
    return line_chart(title, [Series(name=title, points=points, kind=kind)], says=says, unit=unit, from_zero=from_zero)


def _memory(run: RunRecord) -> Html | None:
    measured, planned = run.column("memory_gib"), run.planned_gib
    if not measured:
        return None
    what = "allocated on rank 0's GPU" if run.on_gpu else "resident set of rank 0, no GPU"
    series = [Series(name="measured", points=measured)]
    says = f"{what}, at most {formatting.gib(run.peak_gib)}"
    if planned is not None:
        series.append(Series(name="planned peak", points=[(0, planned)], style=2, kind="level"))
        says += f"; planned peak {formatting.gib(planned)}"
    return line_chart("Memory", series, says=says, unit=f"GiB, {what}", from_zero=True)


def _steps(run: RunRecord) -> Html:
    own = objective_figures(run)
    columns = ("loss", *own, "lr", "grad_norm", "tokens_per_s", "mfu", "memory_gib")
    heads = ("step", "loss", *map(_in_words, own), "learning rate", "gradient norm", "tokens/s", "MFU", "GiB")
    last = len(run.steps) - 1
    chosen = sorted({round(index * last / (_TABLE_ROWS - 1)) for index in range(_TABLE_ROWS)})
    rows = [
        [run.steps[index]["step"], *(formatting.figure(number(run.steps[index].get(name))) for name in columns)]
        for index in chosen
    ]
    caption = f"{len(chosen)} of {formatting.noun(len(run.steps), 'step')}; all are in metrics.jsonl"
    return table(caption, heads, rows, numbers=range(len(heads)))


def _evals(run: RunRecord) -> Html | None:
    own = [f"eval_{name}" for name in objective_figures(run)]
    figures = [name for name in ("eval_loss", *own, *_firsts(run)) if run.looked(name)]
    rows = [
        [record["step"], *(formatting.figure(number(record.get(name))) for name in figures)]
        for record in run.looks
        if any(name in record for name in figures)
    ]
    if not rows:
        return None
    heads = ("step", *("held-out loss" if name == "eval_loss" else _in_words(name) for name in figures))
    return table("Evaluations", heads, rows, numbers=range(len(heads)))


def _in_words(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ") if "." not in name else name


def _firsts(run: RunRecord) -> list[str]:
    """Return the first figure of each set."""
    firsts = {result.name: f"{result.name}.{result.figure}" for result in reversed(run.results)}
    return list(reversed(firsts.values()))
