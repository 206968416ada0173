"""What `distft export` made of a run, and the commands that run it."""

from __future__ import annotations

from collections.abc import Iterator

from distft.report.html import Html, h
from distft.run_exports import exports_of, title_of
from distft.run_record import RunRecord


def how_to_run(run: RunRecord) -> Iterator[Html]:
    """Yield each export that is still there with its commands."""
    for record in exports_of(run.folder):
        commands = "\n".join(map(str, record.get("commands") or ()))
        yield h("p", title_of(record), ", in ", h("code", str(record.get("path", ""))), ".")
        yield h("pre", h("code", commands), tabindex=0)
