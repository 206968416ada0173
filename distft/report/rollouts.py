"""What a run's own answers were worth: by part, early and late, the best and the worst, and by length."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.core.files import read_json_lines
from distft.report import formatting
from distft.report.charts import STYLES, Series, line_chart
from distft.report.html import Child, Html, h
from distft.report.tables import fold, table
from distft.run_record import RunRecord

Written = Mapping[str, Any]
"""A line of the rollouts folder (`distft.step_sources.rollout_files`)."""
_SHOWN = 3
"""Answers from each end."""
_QUARTERS = 4
_LONGEST = 600
"""Characters of a prompt or an answer that are shown."""


def rollouts(run: RunRecord) -> Iterator[Html]:
    """Yield the section's content; nothing for a run that trains on the answers of rows."""
    files = sorted((run.folder / "rollouts").glob("step-*.jsonl"))
    if not files:
        return
    ends = {"first": files[0]} | ({"last": files[-1]} if len(files) > 1 else {})
    written = {name: _answers(path) for name, path in ends.items()}
    charts = [
        chart
        for chart in (_rewards(run, written["first"]), _shares(run), _seconds(run), _sampler(run))
        if chart is not None
    ]
    if charts:
        yield h("div", charts, class_="charts")
    captions = {name: f"{name}, from step {int(path.stem.removeprefix('step-')) + 1:,}" for name, path in ends.items()}
    yield table(
        "A step's answers",
        ("figure", *captions.values()),
        _figures(list(written.values())),
        numbers=range(1, 1 + len(captions)),
    )
    latest = list(written)[-1]
    by_length = _by_length(written[latest])
    if by_length:
        heads = ("tokens of an answer", "answers", "mean reward", "ended")
        yield table(f"Reward against length, {latest} answers", heads, by_length, numbers=(1, 2, 3))
    for name, answers in written.items():
        judged = sorted((each for each in answers if each.get("reward") is not None), key=lambda each: each["reward"])
        for kind, chosen in (("best", judged[::-1][:_SHOWN]), ("worst", judged[:_SHOWN])):
            if chosen:
                yield fold(f"The {kind} of the {name} answers", [_shown(each) for each in chosen])


def _answers(path: Path) -> list[Written]:
    return list(read_json_lines(path))


def _rewards(run: RunRecord, answers: Sequence[Written]) -> Html | None:
    """Draw the whole reward and, where there are several, its parts."""
    parts = list(dict.fromkeys(name for each in answers for name in each.get("rewards") or {}))
    series, says = [], []
    for name in ("total", *(parts if len(parts) > 1 else ()))[:STYLES]:
        points = run.column(f"reward_{name}")
        series.append(Series(name=name, points=points, style=len(series) + 1, kind="noisy"))
        if points:
            says.append(f"{name} from {formatting.figure(points[0][1])} to {formatting.figure(points[-1][1])}")
    return line_chart("Reward", series, says="; ".join(says))


def _shares(run: RunRecord) -> Html | None:
    names = {
        "truncated_answers": "not ended",
        "unscored_answers": "without a reward",
        "equal_answers": "of equal groups",
        "refilled_answers": "to replaced prompts",
    }
    series = [
        Series(name=name, points=run.column(figure), style=number, kind="noisy")
        for number, (figure, name) in enumerate(names.items(), start=1)
    ]
    says = "; ".join(
        f"{curve.name} {formatting.percent(curve.points[-1][1])} at the end" for curve in series if curve.points
    )
    return line_chart("Shares of the answers", series, says=says, from_zero=True)


def _seconds(run: RunRecord) -> Html | None:
    names = {"step_s": "whole step", "writing_s": "answers written", "judging_s": "answers judged"}
    series = [
        Series(name=name, points=run.column(figure), style=number, kind="noisy")
        for number, (figure, name) in enumerate(names.items(), start=1)
    ]
    means = {curve.name: statistics.mean(value for _, value in curve.points) for curve in series if curve.points}
    says = "; ".join(f"{name} {formatting.figure(value)} s" for name, value in means.items())
    return line_chart("Time of a step", series, says=says, unit="s", from_zero=True)


def _sampler(run: RunRecord) -> Html | None:
    """Draw how far log-probabilities of the sampler are from the trainer's; runs of older versions know the mean."""
    names = {"sampler_gap": "mean", "sampler_gap_max": "largest"}
    series = [
        Series(name=name, points=run.column(figure), style=number, kind="noisy")
        for number, (figure, name) in enumerate(names.items(), start=1)
    ]
    says = "; ".join(
        f"{curve.name} {formatting.figure(curve.points[-1][1])} at the end" for curve in series if curve.points
    )
    return line_chart("Log-probabilities, sampler against trainer", series, says=says, unit="nats", from_zero=True)


def _figures(columns: Sequence[Sequence[Written]]) -> Iterator[list[Child]]:
    """Yield what each step's answers are, side by side."""

    def row(name: str, of: list[str]) -> list[Child]:
        return [name, *of]

    judged = [[each["reward"] for each in answers if each.get("reward") is not None] for answers in columns]
    yield row("answers", [formatting.count(len(answers)) for answers in columns])
    yield row(
        "mean reward", [_signed(statistics.fmean(rewards)) if rewards else formatting.NOTHING for rewards in judged]
    )
    yield row(
        "spread of rewards (standard deviation)",
        [
            formatting.figure(statistics.stdev(rewards)) if len(rewards) > 1 else formatting.NOTHING
            for rewards in judged
        ],
    )
    yield row("mean tokens", [formatting.figure(statistics.fmean(map(_tokens, answers))) for answers in columns])
    yield row("ended", [formatting.percent(_share(answers, "ended")) for answers in columns])
    reasons = Counter(each["unscored"] for answers in columns for each in answers if each.get("unscored"))
    for reason, _ in reasons.most_common(_SHOWN):
        counts = [sum(each.get("unscored") == reason for each in answers) for answers in columns]
        yield row(f"no reward: {reason}", [formatting.count(count) for count in counts])


def _by_length(answers: Sequence[Written]) -> list[list[Child]]:
    """Return a row for each quarter of the answers, the shortest first."""
    judged = sorted((each for each in answers if each.get("reward") is not None), key=_tokens)
    if len(judged) < 2 * _QUARTERS:
        return []
    rows: list[list[Child]] = []
    for quarter in range(_QUARTERS):
        part = judged[len(judged) * quarter // _QUARTERS : len(judged) * (quarter + 1) // _QUARTERS]
        rows.append(
            [
                f"{_tokens(part[0]):,} to {_tokens(part[-1]):,}",
                formatting.count(len(part)),
                _signed(statistics.fmean(each["reward"] for each in part)),
                formatting.percent(_share(part, "ended")),
            ]
        )
    return rows


def _shown(each: Written) -> Html:
    tokens = formatting.noun(_tokens(each), "token")
    about = f"{each['id']}, answer {each['number'] + 1}: reward {_signed(each['reward'])}, {tokens}"
    return h("div", h("h4", about), *(h("pre", _cut(each[part]), tabindex=0) for part in ("prompt", "answer")))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"


def _tokens(each: Written) -> int:
    return len(each["ids"])


def _share(answers: Sequence[Written], key: str) -> float:
    return sum(bool(each[key]) for each in answers) / max(1, len(answers))


def _signed(value: float) -> str:
    return formatting.figure(value).replace("-", formatting.MINUS)
