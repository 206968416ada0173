"""The page of the first hour, as Markdown and as one HTML file, from the phases' records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.first_hour.phase import Phase, Table

GOOD = ("done", "not here")


def write(out: Path, phases: Mapping[str, Phase], records: Mapping[str, dict[str, Any]]) -> None:
    """Write page.md and page.html."""
    from distft.core.files import replace_file
    from distft.report.html import h, page
    from distft.report.tables import table

    title, lines, body = "First hour on a GPU", [], []
    head = _head(records)
    lines += [f"# {title}", "", *(f"- {line}" for line in head), ""]
    body += [h("h1", title), h("ul", [h("li", line) for line in head])]
    wrong = [f"{name}: {line}" for name, record in records.items() for line in record.get("wrong", ())]
    if wrong:
        lines += ["## What is wrong", "", *(f"- {line}" for line in wrong), ""]
        body += [h("h2", "What is wrong"), h("ul", [h("li", line) for line in wrong])]
    for name, record in records.items():
        heading = f"{phases[name].title}: {record['outcome']}"
        lines += [f"## {heading}", ""]
        body.append(h("h2", heading))
        for part in _parts(phases[name], record):
            if isinstance(part, str):
                lines += [part, ""]
                body.append(h("p", part))
            else:
                lines += [*_markdown(part), ""]
                body.append(table(part.caption, part.heads, part.rows))
    replace_file(out / "page.md", "\n".join(lines).rstrip() + "\n")
    replace_file(out / "page.html", page(title, h("main", body)))


def _head(records: Mapping[str, dict[str, Any]]) -> list[str]:
    if not records:
        return ["nothing has been measured yet"]
    last = max(records.values(), key=lambda record: record["date"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    size = "" if last["gpus"] else " (no GPU: toy size; figures are no measurements of speed)"
    states = ", ".join(f"{name} {record['outcome']}" for name, record in records.items())
    several = f" x {len(last['gpus'])}" if len(last["gpus"]) > 1 else ""
    return [
        f"device: {last['device']}{several}{size}",
        f"date {last['date'][:10]}, commit {last['commit'][:9]}, {versions}",
        f"command: {last['command']}",
        f"phases: {states}; {sum(record['wall_s'] for record in records.values()):.0f} s of measuring",
    ]


def _parts(phase: Phase, record: dict[str, Any]) -> Iterator[Table | str]:
    if record["reason"]:
        yield record["reason"]
    measured = {name: step["measured"] for name, step in record["steps"].items() if step["measured"] is not None}
    if measured:
        yield from phase.show(measured)
    missing = [(name, step) for name, step in record["steps"].items() if step["measured"] is None]
    if missing:
        rows = [(name, step["outcome"], step["reason"]) for name, step in missing]
        yield Table(caption="not measured", heads=("step", "outcome", "why"), rows=rows)


def _markdown(part: Table) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [f"{part.caption}:", "", line(part.heads), "|" + "---|" * len(part.heads), *map(line, part.rows)]
