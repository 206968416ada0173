"""Levels side by side: size, quality and speed, and which of them lose too much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distft.core.errors import NumericError
from distft.export_formats.certificate import LevelRecord

HEAD = ("level", "MB", "KL nats", "perplexity", "tokens/s", "task", "of the gain lost")


def lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a certificate; nothing where there are no levels."""
    levels = [entry for entry in certificate["levels"] if entry["level"]]
    if levels:
        yield from _aligned([_cells(entry) for entry in levels])
    left_out: dict[str, list[str]] = {}
    for level, reason in certificate.get("left_out", {}).items():
        left_out.setdefault(reason, []).append(level)
    yield from (f"left out: {', '.join(names)}: {reason}" for reason, names in left_out.items())


def line(record: LevelRecord) -> str:
    """Return one level in a line, as it goes on."""
    failed = ", ".join(check.name for check in record.failed)
    state = record.proof.unproven or (
        f"differs: {failed}" if failed else f"{len(record.proof.checks)} comparisons hold"
    )
    return f"{record.level or 'written'}: {record.num_bytes / 1e6:,.2f} MB, {state}"


def refuse_losses(records: Sequence[LevelRecord], max_drop: float | None) -> None:
    """Refuse levels that lose too much of what training gained.

    Raises:
        NumericError: some level does; carries the table.
    """
    if max_drop is None:
        return
    bad = [record for record in records if any(figure["lost"] > max_drop for figure in record.proof.task)]
    if bad:
        names = ", ".join(record.level for record in bad)
        cells = [_cells(as_entry(record)) for record in records]
        head = f"lost more than {max_drop:g} of the gain: {names}; nothing was kept"
        fix = "leave these levels out, or allow a larger --max-drop"
        raise NumericError("\n".join([head, *_aligned(cells), fix]))


def as_entry(record: LevelRecord) -> dict[str, Any]:
    """Return a level as the certificate has it, without its comparisons."""
    return {
        "level": record.level,
        "bytes": record.num_bytes,
        "figures": record.proof.figures,
        "task": [dict(figure) for figure in record.proof.task],
    }


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    figures = entry["figures"]
    task = "; ".join(
        f"{one['name']} {one['level']:.4g} ({one['before']:.4g} → {one['tuned']:.4g})" for one in entry["task"]
    )
    lost = "; ".join(f"{one['lost']:.0%}" for one in entry["task"])
    shown = [f"{figures[name]:.4g}" if name in figures else "" for name in ("kl_nats", "perplexity", "tokens_per_s")]
    return (entry["level"], f"{entry['bytes'] / 1e6:.2f}", *shown, task, lost)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    filled = [column for column in range(len(HEAD)) if any(row[column] for row in rows)]
    widths = {column: max(len(row[column]) for row in (HEAD, *rows)) for column in filled}
    for row in (HEAD, *rows):
        yield "  ".join(row[column].ljust(widths[column]) for column in filled).rstrip()
