"""Did it help: figures before and after with their intervals, and the rows that got worse side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from distft.report import formatting
from distft.report.charts import whisker
from distft.report.html import Html, h
from distft.report.tables import missing, table
from distft.run_record import EvalFigure, RunRecord, number

SHOWN = 20
"""Rows that got worse, of each set."""
_OPEN = 2
_VERDICTS = {
    "better": ("better", "▲ better"),
    "worse": ("worse", "▼ worse"),
    "no clear change": ("unclear", "= unclear"),
}


def results(run: RunRecord) -> Iterator[Html]:
    """Yield the section's content."""
    if run.results:
        yield _scores(run.results)
        yield h(
            "p",
            "Intervals are 95 % and speak of rows drawn like these, not of another training seed. The verdict is "
            "McNemar's exact test where a row is right or wrong, else whether the paired interval excludes zero; "
            "unclear is what chance alone may do. In the picture the base model is a ring on a dashed line, the tuned "
            "one a dot.",
            class_="soft",
        )
    elif any(run.judged):
        yield missing(
            "No answers were generated for evaluation rows in this run; what its held-out rows tell is below."
        )
    else:
        yield missing(
            "No answers were generated for evaluation rows in this run, so only the loss tells whether it helped. ",
            h("code", "distft eval"),
            " adds them.",
        )
    yield from _held_out(run)
    yield from _regressions(run)


def verdict(result: EvalFigure) -> Html | str:
    """Show the verdict in colour, and by a shape for those who do not see it."""
    change = result.change or {}
    bounds = (change.get("difference") or {}).get("low")
    if bounds is None and change.get("mcnemar") is None:  # a figure of all rows together: nothing to judge by
        return formatting.NOTHING
    kind, text = _VERDICTS.get(result.verdict, ("unclear", result.verdict or formatting.NOTHING))
    return h("span", text, class_=f"verdict {kind}")


def _scores(results: Sequence[EvalFigure]) -> Html:
    heads = ("rows", "score", "(picture)", "before", "after", "change", "verdict")
    body = []
    for result in results:
        change = result.change or {}
        body.append(
            [
                result.name,
                [result.title, h("span", "" if result.higher_is_better else " (less is better)", class_="soft")],
                picture(result),
                formatting.interval(result, result.before),
                [
                    formatting.interval(result, result.tuned),
                    h("span", " best" if result.label == "best" and result.tuned else "", class_="soft"),
                ],
                [formatting.interval(result, change.get("difference"), signed=True), _p_value(change)],
                verdict(result),
            ]
        )
    return table("Scores before and after training, with 95 % intervals", heads, body, numbers=(3, 4, 5))


def _p_value(change: Any) -> Html | None:
    test = change.get("mcnemar")
    if not test:
        return None
    p = number(test.get("p_value"))
    p_text = "" if p is None else f", p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    return h("span", f" {test['gained']} gained, {test['lost']} lost{p_text}", class_="under")


def picture(result: EvalFigure, style: int = 1, scale: tuple[float, float] | None = None) -> Html | None:
    """Draw before above after, on a scale from 0 to 1 where both lie in it."""
    marks = []
    for interval, of in ((result.before, 0), (result.tuned, style)):
        value = None if interval is None else number(interval.get("value"))
        if interval is None or value is None:
            continue
        low, high = number(interval.get("low")), number(interval.get("high"))
        marks.append((value, value if low is None else low, value if high is None else high, of))
    if not marks:
        return None
    low, high = min(mark[1] for mark in marks), max(mark[2] for mark in marks)
    return whisker(*(scale or ((0.0, 1.0) if low >= 0 and high <= 1 else (low, high))), marks)


def _held_out(run: RunRecord) -> Iterator[Html]:
    before, after = run.held_out_losses
    if before is None and after is None:
        yield missing("The recipe names no held-out rows ([[data.eval]]), so there is no evaluation loss.")
        return

    def perplexity(loss: float | None) -> str:
        return formatting.NOTHING if loss is None or loss > 50 else formatting.figure(math.exp(loss))

    best = None if run.final_label == "best" else number(run.best.get("eval_loss"))
    spec = run.objective_spec
    of_tokens = spec is None or spec.perplexity
    rows = [["loss", formatting.figure(before), formatting.figure(after)]]
    if of_tokens:
        rows.append(["perplexity", perplexity(before), perplexity(after)])
    final = "after" if run.final_label == "after" else f"final/ (best, step {run.best.get('step')})"
    heads = ["figure", "before", final]
    if best is not None:
        heads.append(f"best, step {run.best.get('step')}")
        rows = [[*row, how(best)] for row, how in zip(rows, (formatting.figure, perplexity), strict=False)]
    what = "mean loss over the trained tokens" if of_tokens else f"mean loss of {run.objective}"
    yield table(f"Held-out rows: {what}, less is better", heads, rows, numbers=(1, 2, 3))


def _regressions(run: RunRecord) -> Iterator[Html]:
    if not run.results:
        return
    first = {
        (result.name, result.score): result for result in reversed(run.results)
    }  # a score's own list goes by its first figure
    lost = [result for result in run.results if result is first[result.name, result.score] and result.regressions]
    yield h("h3", "Rows that got worse")
    if not lost:
        yield h("p", "None: no row has a lower score than before.")
    for index, result in enumerate(lost):
        num = result.num_worse
        more = f", the worst {SHOWN} shown" if num > SHOWN else ""
        yield h("p", f"{result.name}, {result.title}: {formatting.noun(num, 'row')}{more}, worst first.")
        old, new = run.answers("before", result.name), run.answers(result.label, result.name)
        for place, row in enumerate(islice(result.regressions, SHOWN)):
            yield _row(result, row, old.get(row), new.get(row), opened=index == 0 and place < _OPEN)


def _mark(result: EvalFigure, value: Any) -> str:
    parsed = number(value)
    return formatting.of(result, value) if not result.binary or parsed not in (0, 1) else "right" if parsed else "wrong"


def _row(result: EvalFigure, row: str, old: Any, new: Any, *, opened: bool) -> Html:
    marks = [_mark(result, ((answer or {}).get("scores") or {}).get(result.figure)) for answer in (old, new)]
    summary = h("summary", h("strong", row), " ", h("span", f"{marks[0]} \u2192 {marks[1]}", class_="soft nowrap"))
    if old is None and new is None:
        return h("details", summary, missing("The answers of this row are not in the run folder."), class_="row")
    any_ = old or new
    parts = (
        ("Prompt", any_.get("prompt"), None),
        ("Right answer", any_.get("reference"), None),
        ("Before", (old or {}).get("answer"), "is-before"),
        ("After", (new or {}).get("answer"), "is-after"),
    )
    quotes = [
        h("div", h("dt", name), h("dd", h("pre", text if text else "(nothing)", tabindex=0)), class_=kind)
        for name, text, kind in parts
    ]
    return h("details", summary, h("dl", quotes, class_="quotes"), class_="row", open=opened)
