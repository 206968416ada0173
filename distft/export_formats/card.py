"""README.md of an exported folder: the run's own card with this format's commands, or a short one without a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distft.export_formats.certificate import LevelRecord
from distft.export_formats.noted_options import FILE
from distft.export_formats.source import ModelSource
from distft.export_formats.spec import ExportFormatSpec


def write_card(folder: Path, source: ModelSource, spec: ExportFormatSpec, records: Sequence[LevelRecord]) -> None:
    """Write the card; commands say PATH for wherever the folder will lie."""
    section = list(_how_to_run(spec, records))
    if source.run is None:
        lines = [f"# {source.name}", "", f"`{source.folder.name}` exported with distft: {spec.title}.", "", *section]
        (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    from distft.export.model_card import card
    from distft.run_record import read_run

    text = card(read_run(source.run), source.folder, run_section=section)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _how_to_run(spec: ExportFormatSpec, records: Sequence[LevelRecord]) -> list[str]:
    commands = [command for record in records for command in record.exported.commands]
    found = [f"- {_found(record)}" for record in records]
    head = f"Format `{spec.name}`: {spec.title}. PATH is where this folder lies."
    return [
        "## How to run it",
        "",
        head,
        "",
        "```sh",
        *commands,
        "```",
        "",
        *found,
        "",
        f"{FILE} has the whole comparison.",
        "",
    ]


def _found(record: LevelRecord) -> str:
    name = f"{record.level}: " if record.level else ""
    if record.proof.unproven:
        return f"{name}not compared with what it was made of ({record.proof.unproven})"
    names = ", ".join(check.name for check in record.proof.checks)
    return f"{name}compared with what it was made of in {record.proof.runtime}: {names}"
