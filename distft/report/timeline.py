"""When the run ran, stopped and was hurt, from events.jsonl, starts.jsonl and exit.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distft.report import formatting
from distft.report.html import Child, Html, h
from distft.report.tables import fold, missing, table
from distft.run_record import RunRecord, seconds_of

_SHOWN = 200
_USUAL = ("started", "ended", "saved", "pace")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    sign: str
    name: str
    bad: bool = False


KINDS = {
    "continued": _Kind(sign="↻", name="continued from a checkpoint"),
    "rolled_back": _Kind(sign="◀", name="rolled back", bad=True),
    "left_out": _Kind(sign="✕", name="step left out", bad=True),
    "save_failed": _Kind(sign="!", name="a save failed", bad=True),
    "straggler": _Kind(sign="▼", name="straggler", bad=True),
    "warned": _Kind(sign="!", name="warning"),
    "enough": _Kind(sign="■", name="stopped early: no better evaluation"),
}
_FAILED = _Kind(sign="✕", name="ended with a failure", bad=True)
_STOPPED = _Kind(sign="‖", name="asked to stop, and saved")
_DONE = _Kind(sign="●", name="done")
_LOST = _Kind(sign="?", name="no last word: killed, lost, or still running", bad=True)
_OTHER = _Kind(sign="◆", name="")


def timeline(run: RunRecord) -> Iterator[Html]:
    """Yield the section's content."""
    if not run.spans:
        yield missing("events.jsonl names no start of this run.")
        return
    happened = sorted(_happened(run), key=lambda entry: entry[0])
    first, last = run.spans[0].began, max(span.ended for span in run.spans)
    yield _strip(run, happened, first, max(last, first + 1))
    yield h("p", _sentence(run))
    restarts = len(run.spans) - 1
    rows = [
        [
            h("span", formatting.moment(seconds), class_="nowrap"),
            f"+{formatting.duration(seconds - first)}",
            "" if step is None else formatting.count(step),
            [h("span", kind.sign, aria_hidden="true"), f" {name}"],
            reason,
        ]
        for seconds, step, kind, name, reason in happened[:_SHOWN]
    ]
    heads = ("time", "after", "step", "what", "why")
    shown = table("Starts, ends and faults, in order", heads, rows, numbers=(1, 2))
    yield shown if restarts or len(rows) > 2 else fold("Starts and ends", shown)
    if run.starts:
        yield fold("Batch jobs", _jobs(run))


def _sentence(run: RunRecord) -> str:
    saves = [event for event in run.events if event.get("event") == "saved"]
    blocked = sum(float(event.get("blocked_s", 0)) for event in saves)
    restarts = len(run.spans) - 1
    text = f"{formatting.noun(len(run.spans), 'start')}, {formatting.duration(run.wall_s)} in all, of which "
    text += f"{formatting.duration(run.training_s)} in optimizer steps. "
    text += f"{formatting.noun(len(saves), 'checkpoint')} saved"
    text += f", training waited {formatting.duration(blocked)} for them. " if saves else ". "
    lost = sum(int(bool(span.code is None)) for span in run.spans[:-1])
    return text + (
        f"{formatting.noun(restarts, 'restart')}, {lost} after a start without a last word." if restarts else ""
    )


def _happened(run: RunRecord) -> Iterator[tuple[float, int | None, _Kind, str, Child]]:
    """Yield (when, step, kind, name, why) of each event."""
    for span in run.spans:
        where = f"{span.engine} × {formatting.noun(span.world, 'process', 'processes')}"
        begun = _Kind(sign="▶", name="started")
        yield span.began, span.step, begun, begun.name, where
        last = span is run.spans[-1]
        kind = {0: _DONE, 75: _STOPPED, None: _LOST}.get(span.code, _FAILED)
        name = kind.name if span.code in (0, 75, None) else f"{kind.name}, code {span.code}"
        yield span.ended, run.exit.get("step") if last else None, kind, name, "" if span.code == 0 else span.reason
    for event in run.events:
        seconds = seconds_of(event.get("time"))
        event_name = str(event.get("event", ""))
        if seconds is not None and event_name not in _USUAL:
            kind = KINDS.get(event_name, _OTHER)
            yield seconds, event.get("step"), kind, kind.name or event_name, _why(event)


def _why(event: Mapping[str, Any]) -> str:
    for key in ("why", "what", "checkpoint", "reason"):
        if event.get(key):
            return str(event[key])
    spike = event.get("spike")
    return f"because of step {spike}" if spike is not None else ""


def _strip(run: RunRecord, happened: list[Any], first: float, last: float) -> Html:
    def left(seconds: float) -> str:
        return f"left:{100 * (seconds - first) / (last - first):.2f}%"

    bars = [
        h(
            "span",
            class_="run",
            style=f"{left(span.began)};width:{100 * (span.ended - span.began) / (last - first):.2f}%",
        )
        for span in run.spans
    ]
    signs = [
        h("span", kind.sign, class_="sign bad" if kind.bad else "sign", style=left(seconds))
        for seconds, _, kind, _, _ in happened[:_SHOWN]
    ]
    ends = [
        h("span", formatting.moment(first), class_="tick begin", style="left:0"),
        h("span", formatting.moment(last), class_="tick end", style="left:100%"),
    ]
    faults = sum(int(kind.bad) for _, _, kind, _, _ in happened)
    starts, faults_text = formatting.noun(len(run.spans), "start"), formatting.noun(faults, "fault")
    says = f"Time line: {starts}, {faults_text}; each is in the table below"
    return h("div", h("span", class_="base"), ends, bars, signs, class_="strip", role="img", aria_label=says)


def _jobs(run: RunRecord) -> Html:
    rows = []
    for record in run.starts:
        begun = "began" in record
        what = "start" if begun else f"end, code {record.get('code')}, then {record.get('then')}"
        where = ", ".join(map(str, record.get("nodes", []))) if begun else record.get("reason", "")
        rows.append([record.get("began", record.get("ended", "")), record.get("job", ""), what, where])
    return table("Starts and ends of batch jobs (starts.jsonl)", ("time", "job", "what", "where, or why"), rows)
