"""What a run did on rows that judge answers: how often it prefers the right one, how surely, and what is length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distft.core.files import read_json_object
from distft.evaluation.judged import SIDES, judged_warnings
from distft.report import formatting
from distft.report.charts import Series, line_chart, whisker
from distft.report.html import Child, Html, h
from distft.report.tables import table
from distft.run_record import RunRecord, number

Judged = Mapping[str, Any]
"""`distft.evaluation.judged.judged_figures`; empty where there are none. Any key may be missing in older runs."""
HELD_OUT = "held_out"


def judged(run: RunRecord) -> tuple[Judged, Judged]:
    """Return what held-out rows tell of the base model and of the state that final/ holds."""
    before, after = run.judged
    return before or {}, after or {}


def rows_judged(run: RunRecord) -> str:
    """Return `held-out pairs` or `held-out labelled answers`; "" where no rows judge answers."""
    kind = next((figures["kind"] for figures in judged(run) if figures), "")
    return {"pairs": "held-out pairs", "answers": "held-out labelled answers"}.get(kind, "")


def accuracy(figures: Judged) -> str:
    """Return the share of rows whose right answer is preferred, with its interval."""
    return formatting.with_bounds(figures.get("accuracy"), is_share=True)


def margin(figures: Judged) -> str:
    """Return the mean reward margin of pairs with its interval; of single answers, the gap between the mean rewards."""
    return formatting.with_bounds(_margin(figures), is_share=False).replace("-", formatting.MINUS)


def _margin(figures: Judged) -> Judged:
    reward = figures.get("reward") or {}
    of_answers = {"value": reward["good"] - reward["bad"]} if {"good", "bad"} <= reward.keys() else {}
    return figures.get("margin") or of_answers


def calibration_error(figures: Judged) -> str:
    """Return the mean distance of confidence and accuracy."""
    return formatting.figure(number((figures.get("calibration") or {}).get("error")))


def logprob(figures: Judged, side: int = 0) -> str:
    """Return the log-probability per token of chosen or good answers; of the others for side 1."""
    by_side = figures.get("logprob_per_token") or {}
    return _figure(by_side.get(SIDES[figures["kind"]][side])) if figures else formatting.NOTHING


def _figure(value: Any) -> str:
    return formatting.figure(number(value)).replace("-", formatting.MINUS)


def answer_lengths(run: RunRecord) -> dict[str, tuple[float | None, float | None]]:
    """Return the mean tokens of generated answers, before and after, of each set of evaluation rows that has some."""
    lengths: dict[str, tuple[float | None, float | None]] = {}
    for result in run.results:
        if result.name not in lengths:
            lengths[result.name] = _length(run, "before", result.name), _length(run, result.label, result.name)
    return {name: both for name, both in lengths.items() if any(both)}


def _length(run: RunRecord, label: str, name: str) -> float | None:
    about = read_json_object(run.folder / "eval" / label / f"{name}.json")
    tokens, rows = number(about.get("answer_tokens")), number(about.get("rows"))
    return tokens / rows if tokens and rows else None


def preferences(run: RunRecord) -> Iterator[Html]:
    """Yield the section's content; nothing for a run whose rows judge no answers."""
    before, after = judged(run)
    if not before and not after:
        return
    for sentence in judged_warnings(*run.judged):
        what, _, helps = sentence.partition("  ")
        yield h("p", h("strong", "Warning: "), f"{what}. What helps: {helps}.", class_="note")
    yield _accuracies(run, before, after)
    chart = _calibration(before, after)
    if chart is not None:
        yield h("div", chart, class_="charts", style="max-width:36rem")
    yield table(
        "Rewards and likelihoods on held-out rows", ("figure", "before", "after"), _figures(before, after),
        numbers=(1, 2),
    )  # fmt: skip
    lengths = answer_lengths(run)
    if lengths:
        rows = [[name, *map(formatting.figure, both), _change(*both)] for name, both in lengths.items()]
        heads = ("rows", "before", "after", "change")
        yield table("Length of generated answers, mean tokens", heads, rows, numbers=(1, 2, 3))
    yield h("p", _explained(run), class_="soft")


def _accuracies(run: RunRecord, before: Judged, after: Judged) -> Html:
    """Return the accuracy of all rows, and of the groups that may explain it."""
    rows: list[list[Child]] = [_accuracy_row("all", before.get("accuracy"), after.get("accuracy"))]
    named = {"length": "chosen answer {}", "margin": "{} margin in the rows", "label": "{} answers"}
    groups = {
        (kind, key): None for figures in (before, after) for kind, of in figures.get("groups", {}).items() for key in of
    }
    for kind, key in sorted(groups, key=lambda group: (list(named).index(group[0]), _ORDER.index(group[1]))):
        name = named[kind].format({"equal": "as long"}.get(key, key))
        rows.append(
            _accuracy_row(name, *(figures.get("groups", {}).get(kind, {}).get(key) for figures in (before, after)))
        )
    heads = (rows_judged(run), "number", "(picture)", "before", "after")
    return table("Accuracy: the better answer is preferred, with 95 % intervals", heads, rows, numbers=(1, 3, 4))


_ORDER = ("shorter", "equal", "longer", "small", "middle", "large", "good", "bad")


def _accuracy_row(name: str, before: Judged | None, after: Judged | None) -> list[Child]:
    marks = [
        (share["value"], share["low"], share["high"], style) for share, style in ((before, 0), (after, 1)) if share
    ]
    count = (after or before or {}).get("num_rows")
    shares = (formatting.with_bounds(share, is_share=True) for share in (before, after))
    return [name, formatting.count(count), whisker(0.0, 1.0, marks), *shares]


def _calibration(before: Judged, after: Judged) -> Html | None:
    """Draw accuracy over confidence, against the line on which both are equal."""
    curves = {}
    for name, figures in (("before", before), ("after", after)):
        bins = (figures.get("calibration") or {}).get("bins") or []
        curves[name] = [(each["confidence"], each["accuracy"]) for each in bins]
    if not curves["after"] and not curves["before"]:
        return None
    errors = {"before": calibration_error(before), "after": calibration_error(after)}
    says = "; ".join(f"{name} error {error}" for name, error in errors.items() if curves[name])
    series = [
        Series(name="as sure as right", points=[(0.5, 0.5), (1.0, 1.0)], style=3),
        Series(name="before", points=curves["before"], style=6, kind="dots"),
        Series(name="after", points=curves["after"], kind="dots"),
    ]
    return line_chart("Calibration", series, says=says, unit="accuracy over confidence", from_zero=True)


def _figures(before: Judged, after: Judged) -> Iterator[list[Child]]:
    of = after or before
    good, bad = SIDES[of["kind"]]
    pairs = of["kind"] == "pairs"
    yield [f"reward margin ({good} less {bad})", margin(before), margin(after)]
    yield ["calibration error", calibration_error(before), calibration_error(after)]
    for position, side in enumerate((good, bad)):
        if "logprob_per_token" in of:
            name = f"log-probability per token, {side} answers"
            yield [name, logprob(before, position), logprob(after, position)]
    if pairs:
        correlations = (_figure(figures.get("length_correlation")) for figures in (before, after))
        yield ["correlation of margin and difference in length", *correlations]


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return formatting.NOTHING
    return f"{100 * (after / before - 1):+.1f}\u202f%".replace("-", formatting.MINUS)


def _explained(run: RunRecord) -> str:
    tokens = next((figures["tokens"] for figures in reversed(judged(run)) if figures.get("tokens")), {})
    lengths = " and ".join(f"{formatting.figure(count)} in {side} ones" for side, count in tokens.items())
    text = f"Tokens of an answer in the rows, on average: {lengths}. " if lengths else ""
    text += (
        "A tie counts half, so a policy that is still its reference has an accuracy of 50 %. Confidence is the sigmoid "
        "of the reward's lead; the calibration error is the mean distance of confidence and accuracy. Rewards and "
        "margins are on the scale of the objective and its beta: between other objectives they do not compare."
    )
    spec = run.objective_spec
    if spec is not None and spec.head == "scalar":
        return text + " Before training the head of a reward model may be a fresh one, whose rewards mean nothing."
    return text


def same_rows_judged(runs: Sequence[RunRecord]) -> bool:
    """Return whether every run was measured on the same rows that judge answers, as far as is known."""
    measured = [judged(run)[1] for run in runs]
    return all(measured) and len({run.rows_sha256(HELD_OUT) for run in runs} - {""}) <= 1


def figures_judged(run: RunRecord) -> dict[str, float | None]:
    """Return the figures of the state that final/ holds as numbers; empty where its rows judge no answers."""
    figures = judged(run)[1]
    if not figures:
        return {}
    side = SIDES[figures["kind"]][0]
    return {
        "accuracy": number((figures.get("accuracy") or {}).get("value")),
        "margin": number(_margin(figures).get("value")),
        "calibration_error": number((figures.get("calibration") or {}).get("error")),
        "logprob_per_token": number((figures.get("logprob_per_token") or {}).get(side)),
    }


def side_by_side(runs: Sequence[RunRecord], called: Sequence[Child]) -> Iterator[Html]:
    """Yield what held-out rows that judge answers tell of several runs; nothing where no run has such rows."""
    if not any(any(judged(run)) for run in runs):
        return
    if not same_rows_judged([run for run in runs if judged(run)[1]]):
        yield h(
            "p",
            "The runs were not measured on the same pairs or labelled answers: these do not compare.",
            class_="note",
        )
    rows: list[list[Child]] = []
    for name, run in zip(called, runs, strict=True):
        before, after = judged(run)
        cells = (
            accuracy(before),
            accuracy(after),
            margin(after),
            calibration_error(after),
            logprob(before),
            logprob(after),
        )
        rows.append([name, run.objective, rows_judged(run).removeprefix("held-out ") or formatting.NOTHING, *cells])
    heads = ("run", "objective", "rows", "accuracy, before", "accuracy, after", "reward margin", "calibration error",
             "log-probability per token of chosen or good answers, before", "after")  # fmt: skip
    yield table("Held-out rows that judge answers, with 95 % intervals", heads, rows, numbers=range(3, len(heads)))
    lengths = [answer_lengths(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in lengths for name in of_run))
    if names:
        cells = [
            [name, *(_both(of_run.get(rows_name)) for rows_name in names)]
            for name, of_run in zip(called, lengths, strict=True)
        ]
        heads = ("run", *names)
        yield table(
            "Length of generated answers, mean tokens before and after", heads, cells, numbers=range(1, len(heads))
        )
    yield h(
        "p",
        "Accuracies compare where the rows do: each is the share of rows on which the run's own reward prefers the "
        "better answer. For objectives with a reference that reward is measured from the reference, for the others "
        "from nothing. Margins and calibration are on the scale of each objective and its beta.",
        class_="soft",
    )


def _both(lengths: tuple[float | None, float | None] | None) -> str:
    return formatting.NOTHING if lengths is None else " \u2192 ".join(map(formatting.figure, lengths))
