"""The page of one run, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from distft.report import formatting
from distft.report.curves import curves
from distft.report.data_card import data_card
from distft.report.exports import how_to_run
from distft.report.html import Child, Html, h, page
from distft.report.preferences import Judged, accuracy, judged, margin, preferences, rows_judged
from distft.report.results import results, verdict
from distft.report.rollouts import rollouts
from distft.report.run_setup import cost, environment, going_back, money, recipe
from distft.report.tables import facts, section
from distft.report.timeline import timeline
from distft.run_record import RunRecord, number
from distft.status import Status

_STATES = {"complete": ("good", "● complete"), "failed": ("bad", "✕ failed"), "lost": ("bad", "? lost"),
           "stopped": ("", "‖ stopped"), "running": ("", "▶ running"), "queued": ("", "… queued")}  # fmt: skip


def run_page(run: RunRecord, status: Status, *, price: float | None = None, no_card: str = "") -> str:
    """Return one HTML document. `no_card`: why there is no data card."""
    of_preferences, of_rollouts, exports = list(preferences(run)), list(rollouts(run)), list(how_to_run(run))
    parts = {
        "results": ("Did it help?", list(results(run))),
        **({"preferences": ("Preferences", of_preferences)} if of_preferences else {}),
        **({"rollouts": ("Its own answers", of_rollouts)} if of_rollouts else {}),
        "curves": ("Curves", list(curves(run))),
        "time": ("Time line", list(timeline(run))),
        "data": ("Data", list(data_card(run, no_card))),
        "cost": ("Cost", list(cost(run, price))),
        **({"run": ("How to run it", exports)} if exports else {}),
        "back": ("The way back", list(going_back(run))),
        "recipe": ("Recipe", list(recipe(run))),
        "environment": ("Environment", list(environment(run))),
    }
    contents = [("glance", "At a glance"), *((name, title) for name, (title, _) in parts.items())]
    kind, state_text = _STATES.get(status.state, ("", status.state))
    kicker = " · ".join(filter(None, [run.method_title, run.base, _where(run)]))
    header = h(
        "header",
        h("p", kicker, class_="kicker"),
        h("h1", run.name),
        h("p", h("span", state_text, class_=f"state {kind}"), f" {_lead(run, status)}", class_="lead"),
        h("p", h("strong", "Why: "), status.why, class_="note") if status.why else None,
        _keys(run, price),
        class_="top",
    )
    nav = h(
        "nav", h("ul", [h("li", h("a", title, href=f"#{name}")) for name, title in contents]), aria_label="Contents"
    )
    main = h(
        "main",
        section("glance", "At a glance", _glance(run, status, price)),
        [section(name, title, content) for name, (title, content) in parts.items()],
        id="main",
    )
    return page(f"{run.name} – distft run", skip(), h("div", header, nav, main, footer(str(run.folder)), class_="wrap"))


def skip() -> Html:
    """Return the first thing that a keyboard reaches."""
    return h("a", "Skip to content", href="#main", class_="skip")


def footer(where: str) -> Html:
    """Return where and when the page was made."""
    return h("footer", f"Made by distft from {where}, {formatting.moment(datetime.now(UTC).timestamp())}.")


def _where(run: RunRecord) -> str:
    if not run.engine:
        return ""
    kinds = {place["device"] for place in run.manifest.get("devices") or []}
    what = kinds.pop() if len(kinds) == 1 else str(run.manifest.get("device", ""))
    return f"{run.engine} on {run.world} × {what.upper() if what == 'cpu' else what}"


def _lead(run: RunRecord, status: Status) -> str:
    """Return the outcome in one sentence."""
    step = f"{status.step or 0:,}" + (f" of {status.num_steps:,}" if status.num_steps else "")
    text = f"after step {step}" if status.state != "complete" else f"after {formatting.noun(status.step or 0, 'step')}"
    tokens = run.last.get("tokens")
    if tokens:
        text += f" and {formatting.count(tokens)} tokens"
    text += "."
    first = run.results[0] if run.results else None
    if first is not None and first.before and first.tuned:
        text += f" On {first.name}, {first.title} went from {formatting.of(first, first.before.get('value'))} to "
        text += f"{formatting.of(first, (first.tuned or {}).get('value'))}"
        text += f": {first.verdict}." if first.verdict else "."
    base, tuned = judged(run)
    if tuned:
        change = f"went from {_share(base)} to" if base else "is"
        text += f" On {rows_judged(run)}, accuracy {change} {_share(tuned)}."
    elif first is None or not first.before or not first.tuned:
        before, after = run.held_out_losses
        if before is not None and after is not None:
            text += f" The held-out loss went from {formatting.figure(before)} to {formatting.figure(after)}."
    return text


def _share(figures: Judged) -> str:
    return formatting.percent(number((figures.get("accuracy") or {}).get("value")))


def _keys(run: RunRecord, price: float | None) -> Html:
    def key(name: str, value: Child, small: Child = None) -> Html:
        return h("div", h("dt", name), h("dd", value, h("small", small) if small else None))

    first = run.results[0] if run.results else None
    before, after = run.held_out_losses
    cells = []
    if first is not None:
        change = (first.change or {}).get("difference")
        detail = [formatting.interval(first, change, signed=True), " ", verdict(first)] if change else None
        cells.append(key(f"{first.name}, {first.title}", formatting.of(first, (first.last or {}).get("value")), detail))
    base, tuned = judged(run)
    if tuned:
        cells.append(key(f"Accuracy, {rows_judged(run)}", _share(tuned), f"before {_share(base)}" if base else None))
    elif after is not None:
        cells.append(key("Held-out loss", formatting.figure(after), f"before {formatting.figure(before)}"))
    elif run.losses:
        cells.append(
            key("Training loss", formatting.figure(run.losses[1]), f"at first {formatting.figure(run.losses[0])}")
        )
    cells.append(key("Time", formatting.duration(run.wall_s), f"{formatting.duration(run.training_s)} in steps"))
    speed = run.tokens_per_s
    cells.append(
        key("Speed", formatting.count(speed), "tokens/s, median") if speed else key("Speed", formatting.NOTHING)
    )
    planned = run.planned_gib
    detail = f"planned {formatting.gib(planned)}" if planned else ("on a GPU" if run.on_gpu else "host memory, no GPU")
    cells.append(key("Peak memory, rank 0", formatting.gib(run.peak_gib), detail))
    hours = run.gpu_hours
    if price is not None and hours is not None:
        cells.append(key("Cost", money(hours * price), f"{formatting.figure(hours)} hours at {price:g}"))
    return h("dl", cells, class_="keys")


def _glance(run: RunRecord, status: Status, price: float | None) -> Html:
    return facts("The run in a table", _facts(run, status, price))


def _facts(run: RunRecord, status: Status, price: float | None) -> Iterator[tuple[str, Child]]:
    parameters = run.manifest.get("parameters") or {}
    trained, total = parameters.get("trainable"), parameters.get("total")
    yield "what", f"{run.table('objective').get('name', '')} on {run.base}" if run.base else ""
    method = run.method_title
    share = (
        f", {formatting.count(trained)} of {formatting.count(total)} parameters trained" if total and trained else ""
    )
    yield "method", f"{method}{share}" if method else ""
    yield "engine", _where(run)
    optim, schedule = run.table("optim"), run.table("schedule")
    rate = f", learning rate {optim['learning_rate']:g}, {schedule.get('name', '')}" if "learning_rate" in optim else ""
    yield "optimizer", f"{optim.get('name', '')}{rate}" if optim else ""
    if status.step is not None:
        yield "steps", f"{status.step:,}" + (f" of {status.num_steps:,}" if status.num_steps else "")
    last = run.last
    if last.get("tokens"):
        yield (
            "tokens",
            f"{formatting.count(last['tokens'])}, {formatting.count(last.get('tokens_loss'))} of them trained",
        )
    if last.get("epoch"):
        yield "epochs", formatting.figure(last["epoch"])
    yield "time", formatting.duration(run.wall_s) if run.wall_s is not None else ""
    if run.losses:
        yield (
            "training loss",
            f"{formatting.figure(run.losses[0])} at first, {formatting.figure(run.losses[1])} at the end",
        )
    before, after = run.held_out_losses
    if after is not None:
        yield "held-out loss", f"{formatting.figure(before)} before, {formatting.figure(after)} after"
    base, tuned = judged(run)
    if tuned:
        yield f"accuracy, {rows_judged(run)}", f"{accuracy(base)} before, {accuracy(tuned)} after"
        yield "reward margin", f"{margin(base)} before, {margin(tuned)} after"
    for result in run.results[:1]:
        yield (
            f"{result.name}, {result.title}",
            [
                f"{formatting.interval(result, result.before)} before, "
                f"{formatting.interval(result, result.tuned)} after ",
                verdict(result),
            ],
        )
    if run.best:
        yield "best checkpoint", f"step {run.best.get('step')}"
    yield "peak memory", formatting.gib(run.peak_gib) if run.peak_gib else ""
    hours = run.gpu_hours
    if hours is not None and price is not None:
        yield "cost", f"{money(hours * price)} ({formatting.figure(hours)} hours at {price:g})"
    yield "restarts", formatting.count(len(run.spans) - 1) if run.spans else ""
