"""Several runs side by side: what each of them gives, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.report import formatting
from distft.report.charts import Series, line_chart, scatter, sign
from distft.report.html import Child, Html, h, page
from distft.report.page import footer, skip
from distft.report.preferences import answer_lengths, figures_judged, same_rows_judged, side_by_side
from distft.report.results import picture, verdict
from distft.report.run_setup import money
from distft.report.tables import fold, missing, section, table
from distft.run_record import EvalFigure, RunRecord, number

_IGNORED = ("name", "output_dir")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run in figures; None: not known."""

    run: str
    folder: str
    method: str
    objective: str
    engine: str
    world: int | None
    trained_parameters: int | None
    steps: int | None
    tokens: int | None
    held_out_loss: float | None
    quality: Mapping[str, float | None]
    """`set, score` -> the tuned model's value."""
    judged: Mapping[str, float | None]
    """Of held-out rows that judge answers: `accuracy`, `margin`, `calibration_error`, `logprob_per_token` of chosen or
    good answers; empty where there are no such rows."""
    answer_tokens: Mapping[str, float | None]
    """Set -> mean tokens of the tuned model's answers."""
    peak_memory_gib: float | None
    tokens_per_s: float | None
    wall_s: float | None
    gpu_hours: float | None
    cost: float | None


def line(run: RunRecord, price: float | None) -> Line:
    """Summarise a run in one line of the comparison."""
    hours = run.gpu_hours
    return Line(
        run=run.name,
        folder=str(run.folder),
        method=run.method,
        objective=run.objective,
        engine=run.engine,
        world=run.world,
        trained_parameters=(run.manifest.get("parameters") or {}).get("trainable"),
        steps=run.last.get("step"),
        tokens=run.last.get("tokens"),
        held_out_loss=run.held_out_losses[1],
        quality={_key(result): number((result.tuned or {}).get("value")) for result in run.results},
        judged=figures_judged(run),
        answer_tokens={name: after for name, (_, after) in answer_lengths(run).items()},
        peak_memory_gib=run.peak_gib,
        tokens_per_s=run.tokens_per_s,
        wall_s=run.wall_s,
        gpu_hours=hours,
        cost=None if price is None or hours is None else hours * price,
    )


def names(runs: Sequence[RunRecord]) -> list[str]:
    """Return what the page calls each run: its name, with its folder's parent where two have one name."""
    run_names = [run.name for run in runs]
    return [
        run.name if run_names.count(run.name) == 1 else f"{run.folder.resolve().parent.name}/{run.folder.name}"
        for run in runs
    ]


def comparison_page(runs: Sequence[RunRecord], *, price: float | None = None) -> str:
    """Return one HTML document; runs in the order they were named."""
    called = names(runs)
    lines = [line(run, price) for run in runs]
    title = " · ".join(called) if len(called) <= 4 else f"{len(called)} runs"
    preferences = list(side_by_side(runs, [_called(position, name) for position, name in enumerate(called, start=1)]))
    parts = {
        "glance": ("Side by side", list(_side_by_side(runs, called, lines))),
        "quality": ("Quality", list(_quality(runs, called))),
        **({"preferences": ("Preferences", preferences)} if preferences else {}),
        "against": ("Quality against what it takes", list(_against(runs, called, lines))),
        "curves": ("Loss", list(_losses(runs, called))),
        "settings": ("Settings that differ", list(_settings(runs, called))),
    }
    header = h(
        "header",
        h("p", f"{len(runs)} runs compared", class_="kicker"),
        h("h1", title),
        h("p", _lead(runs, called, lines), class_="lead"),
        class_="top",
    )
    nav = h(
        "nav",
        h("ul", [h("li", h("a", part[0], href=f"#{anchor}")) for anchor, part in parts.items()]),
        aria_label="Contents",
    )
    main = h("main", [section(anchor, *part) for anchor, part in parts.items()], id="main")
    where = ", ".join(str(run.folder) for run in runs)
    return page(f"{title} – distft compare", skip(), h("div", header, nav, main, footer(where), class_="wrap"))


def _lead(runs: Sequence[RunRecord], called: Sequence[str], lines: Sequence[Line]) -> str:
    """Return which run is best at what; nothing where runs do not differ or are not comparable."""
    claims = []
    first = _shared(runs)[0] if _shared(runs) else None
    if first is not None:
        values = {name: summary.quality[_key(first)] for name, summary in zip(called, lines, strict=True)}
        claims.append(_best(f"best {first.title} on {first.name}", values, largest=first.higher_is_better))
    elif same_rows_judged(runs):
        accuracies = (summary.judged["accuracy"] for summary in lines)
        claims.append(_best("best held-out accuracy", dict(zip(called, accuracies, strict=True)), largest=True))
    elif not _losses_differ(runs):
        claims.append(
            _best("lowest held-out loss", dict(zip(called, (summary.held_out_loss for summary in lines), strict=True)))
        )
    claims.append(_best("least memory", dict(zip(called, (summary.peak_memory_gib for summary in lines), strict=True))))
    speeds = dict(zip(called, (summary.tokens_per_s for summary in lines), strict=True))
    claims.append(_best("fastest", speeds, largest=True))
    text = "; ".join(part for part in claims if part)
    return text[:1].upper() + text[1:] + "." if text else ""


def _best(what: str, values: Mapping[str, float | None], *, largest: bool = False) -> str:
    present = {name: value for name, value in values.items() if value is not None}
    if len(present) < 2 or len(set(present.values())) == 1:
        return ""
    return f"{what}: {(max if largest else min)(present, key=present.__getitem__)}"


def _side_by_side(runs: Sequence[RunRecord], called: Sequence[str], lines: Sequence[Line]) -> Iterator[Html]:
    columns = {
        "held-out loss": ("held_out_loss", formatting.figure),
        "peak memory": ("peak_memory_gib", formatting.gib),
        "tokens/s": ("tokens_per_s", formatting.count),
        "time": ("wall_s", formatting.duration),
        "process hours": ("gpu_hours", formatting.figure),
        "cost": ("cost", lambda value: formatting.NOTHING if value is None else money(value)),
    }
    if all(summary.cost is None for summary in lines):
        del columns["cost"]
    rows: list[list[Child]] = []
    for position, (name, summary) in enumerate(zip(called, lines, strict=True), start=1):
        engine = f"{summary.engine} × {summary.world}" if summary.engine else formatting.NOTHING
        cells = [how(getattr(summary, column)) for column, how in columns.values()]
        trained = formatting.count(summary.trained_parameters)
        rows.append(
            [_called(position, name), summary.method, engine, trained, formatting.count(summary.tokens), *cells]
        )
    heads = ["run", "method", "engine", "trained parameters", "tokens", *columns]
    if len({run.objective for run in runs}) > 1:
        heads.insert(2, "objective")
        for row, run in zip(rows, runs, strict=True):
            row.insert(2, run.objective)
    yield table(
        "What each run gave, and what it took", heads, rows, numbers=range(heads.index("engine") + 1, len(heads))
    )
    if why := _losses_differ(runs):
        yield h("p", f"The runs {why}: their held-out losses do not compare.", class_="note")
    if len({summary.tokens for summary in lines}) > 1:
        yield h(
            "p", "The runs saw different numbers of tokens; time, hours and cost are of the whole run.", class_="soft"
        )


def _quality(runs: Sequence[RunRecord], called: Sequence[str]) -> Iterator[Html]:
    every = {_key(figure): figure for run in reversed(runs) for figure in run.results}
    if not every:
        yield missing("None of these runs has evaluated answers; ", h("code", "distft eval"), " adds them.")
        return
    order = list(dict.fromkeys(_key(figure) for run in runs for figure in run.results))
    first = {(every[key].name, every[key].score): key for key in reversed(order)}
    others = sorted({figure.name for figure in every.values() if not _same(runs, figure.name)})
    if others:
        named = [[h("code", name), " "] for name in others]
        yield h(
            "p",
            named,
            "are not the same rows in all of these runs: what is said of them does not compare.",
            class_="note",
        )
    for key in order:
        if key in first.values():
            yield _figure(every[key], [_of(run, key) for run in runs], called)
    yield h(
        "p",
        "In the picture the ring is each run's own base model, which need not be the same one, and the dot the tuned "
        "model. Intervals that overlap do not separate two runs.",
        class_="soft",
    )
    more = [key for key in order if key not in first.values()]
    if more:
        rows = [
            [f"{every[key].name}: {every[key].title}", *map(_cell, [_of(run, key) for run in runs])] for key in more
        ]
        heads = ("figure", *called)
        yield fold(
            "Further figures", table("After training, with 95 % intervals", heads, rows, numbers=range(1, len(heads)))
        )


def _figure(kind: EvalFigure, figures: Sequence[EvalFigure | None], called: Sequence[str]) -> Html:
    bounds = [
        number(interval.get(key))
        for figure in figures
        if figure is not None
        for interval in (figure.before, figure.tuned)
        if interval is not None
        for key in ("low", "value", "high")
    ]
    present = [bound for bound in bounds if bound is not None]
    scale = (0.0, 1.0) if not present or (min(present) >= 0 and max(present) <= 1) else (min(present), max(present))
    rows: list[list[Child]] = []
    for position, (name, figure) in enumerate(zip(called, figures, strict=True), start=1):
        if figure is None:
            rows.append([_called(position, name), "", formatting.NOTHING, formatting.NOTHING, formatting.NOTHING])
            continue
        cells = (formatting.interval(figure, figure.before), formatting.interval(figure, figure.tuned), verdict(figure))
        rows.append([_called(position, name), picture(figure, (position - 1) % 6 + 1, scale), *cells])
    less = "" if kind.higher_is_better else ", less is better"
    heads = ("run", "(picture)", "before", "after, with its 95 % interval", "against its own base")
    return table(f"{kind.name}: {kind.title}{less}", heads, rows, numbers=(2, 3))


def _called(position: int, name: str) -> Html:
    return h("span", sign(position), f" {name}", class_="nowrap")


def _of(run: RunRecord, key: str) -> EvalFigure | None:
    return next((figure for figure in run.results if _key(figure) == key), None)


def _cell(figure: EvalFigure | None) -> str:
    return formatting.NOTHING if figure is None else formatting.interval(figure, figure.tuned)


def _losses_differ(runs: Sequence[RunRecord]) -> str:
    """Return why evaluation losses are not means of the same thing; "" where they are, as far as is known."""
    if len({str((run.manifest.get("data") or {}).get("eval", "")) for run in runs} - {""}) > 1:
        return "were evaluated on different rows"
    return "have different objectives" if len(_by_objective(runs)) > 1 else ""


def _by_objective(runs: Sequence[RunRecord]) -> dict[str, list[int]]:
    """Return objective, with the settings that differ, -> indices of its runs.

    A run whose recipe is missing goes with the first.
    """
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        alike = [other.table("objective") for other in runs if other.objective == run.objective]
        own = [f"{key} {value}" for key, value in run.table("objective").items()
               if any(table.get(key) != value for table in alike)]  # fmt: skip
        called = run.objective + (f" ({', '.join(own)})" if own else "")
        groups.setdefault(called or next(iter(groups), ""), []).append(index)
    return groups


def _tuned(figure: EvalFigure | None) -> float | None:
    return None if figure is None else number((figure.tuned or {}).get("value"))


def _against(runs: Sequence[RunRecord], called: Sequence[str], lines: Sequence[Line]) -> Iterator[Html]:
    shared = _shared(runs)
    if shared:
        first = shared[0]
        name, quality = f"{first.title} on {first.name}", [summary.quality[_key(first)] for summary in lines]
    elif same_rows_judged(runs):
        name, quality = "held-out accuracy", [summary.judged["accuracy"] for summary in lines]
    elif _losses_differ(runs):
        yield missing("The runs share no figure on the same rows, so there is nothing to draw.")
        return
    else:
        name, quality = "held-out loss (less is better)", [summary.held_out_loss for summary in lines]
    charts = []
    for title, column, unit in (
        ("Memory", "peak_memory_gib", "peak GiB, rank 0"),
        ("Speed", "tokens_per_s", "tokens/s"),
        ("Time", "gpu_hours", "process hours"),
    ):
        dots = [
            (who, taken, value)
            for who, summary, value in zip(called, lines, quality, strict=True)
            if value is not None and (taken := getattr(summary, column)) is not None
        ]
        if len(dots) > 1:
            says = "; ".join(f"{who}: {formatting.figure(x)}, {formatting.figure(y)}" for who, x, y in dots)
            charts.append(scatter(title, dots, says=says, across=unit, up=name))
    if charts:
        yield h("div", charts, class_="charts")
    else:
        yield missing("Fewer than two runs have both a quality and what it took.")


def _losses(runs: Sequence[RunRecord], called: Sequence[str]) -> Iterator[Html]:
    groups = _by_objective(runs)
    for what, points in (
        ("Training loss", [run.column("loss") for run in runs]),
        ("Held-out loss", [run.looked("eval_loss") for run in runs]),
    ):
        for objective, members in groups.items():
            title = what if len(groups) == 1 else f"{what} of {objective}"
            chart = _loss_chart(title, [(index + 1, called[index], points[index]) for index in members])
            if chart is not None:
                yield h("div", chart, class_="charts")
    rows = [
        [
            _called(position, name),
            *(formatting.figure(value) for value in (*(run.losses or (None, None)), *run.held_out_losses)),
        ]
        for position, (name, run) in enumerate(zip(called, runs, strict=True), start=1)
    ]
    heads = ("run", "training, at first", "at the end", "held-out, before", "after")
    yield table("The ends of the curves", heads, rows, numbers=range(1, 5))


def _loss_chart(title: str, curves: Sequence[tuple[int, str, list[tuple[int, float]]]]) -> Html | None:
    """Draw losses that are means of the same thing: (position of the run, what it is called, points)."""
    series = [Series(name=name, points=points, style=position) for position, name, points in curves]
    says = "; ".join(
        f"{name} from {formatting.figure(points[0][1])} to {formatting.figure(points[-1][1])}"
        for _, name, points in curves
        if points
    )
    values = [value for _, _, points in curves for _, value in points]
    steep = min(values, default=0) > 0 and max(values) > 20 * min(values)
    return line_chart(title, series, says=says, unit="by step", wide=True, logarithmic=steep)


def _settings(runs: Sequence[RunRecord], called: Sequence[str]) -> Iterator[Html]:
    differing = settings_that_differ(runs)
    if not differing:
        yield h("p", "None, but for names and folders.")
        return
    rows = [
        [h("code", key), *(h("code", value) if value else formatting.NOTHING for value in values)]
        for key, values in differing
    ]
    yield table("Keys of the recipe that are not the same everywhere", ("key", *called), rows)


def settings_that_differ(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (key, its value in each run as text; "" where it is not set), sorted by table."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [(key, [settings.get(key, "") for settings in flat]) for key in keys if key not in _IGNORED]
    return sorted(((key, values) for key, values in rows if len(set(values)) > 1), key=lambda pair: pair[0])


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{place}")
    else:
        yield path, str(value).lower() if isinstance(value, bool) else str(value)


def _shared(runs: Sequence[RunRecord]) -> list[EvalFigure]:
    """Return the figures that every run has of the same rows, in the first run's order."""
    keys = [{_key(figure) for figure in run.results if _tuned(figure) is not None} for run in runs]
    return [
        figure
        for figure in runs[0].results
        if _same(runs, figure.name) and all(_key(figure) in keys_of_run for keys_of_run in keys)
    ]


def _same(runs: Sequence[RunRecord], name: str) -> bool:
    """Return whether a set of results is about the same rows in every run, as far as is known."""
    return len({run.rows_sha256(name) for run in runs} - {""}) <= 1


def _key(figure: EvalFigure) -> str:
    return f"{figure.name}, {figure.title}"
