"""What `distft export` made of a run: a line each in RUN/exports.jsonl, read by the model card and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distft.core.files import append_json_line, read_json_lines

FILE = "exports.jsonl"


def note_export(run: Path, out: Path, certificate: Mapping[str, Any], commands: Sequence[str]) -> None:
    """Add what was exported to the run's list."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "path": str(out.resolve()),
        "format": certificate["format"],
        "of": certificate["source"]["label"],
        "levels": [level["level"] for level in certificate["levels"] if level["level"]],
        "proven": certificate["proven"],
        "commands": list(commands),
    }
    append_json_line(run / FILE, record)


def exports_of(run: Path) -> list[dict[str, Any]]:
    """Return what was exported and is still there, the newest of each place."""
    records = {str(record.get("path")): record for record in read_json_lines(run / FILE)}
    return [record for path, record in records.items() if Path(path).is_dir()]


def title_of(record: Mapping[str, Any]) -> str:
    """Return format, levels and state in a line: `gguf F16, Q8_0 of final, compared with its source`."""
    levels = ", ".join(record.get("levels") or ())
    state = "compared with its source" if record.get("proven") else "not compared"
    return f"{record.get('format', '')} {levels}".strip() + f" of {record.get('of', '')}, {state}"


def how_to_run(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the section of a model card with the commands of each export; nothing where there is none."""
    if not records:
        return
    yield from ("## How to run it", "")
    for record in records:
        yield from (f"{title_of(record)}, in `{str(record.get('path', '')).replace('`', '')}`:", "", "```sh")
        yield from (str(command).replace("```", "") for command in record.get("commands") or ())
        yield from ("```", "")
