"""Levels side by side: size, quality and speed, and which of them lose too much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distft.core.errors import NumericError
from distft.export_formats.certificate import LevelRecord

HEAD = ("level", "MB", "KL nats", "perplexity", "tokens/s", "task", "of the gain lost")


MOST_LOST, MOST_PERPLEXITY = 0.05, 1.02
"""What an advised level may lose of a gain, and its perplexity over that of the most exact level."""


def lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a certificate; nothing where there are no levels."""
    levels = [entry for entry in certificate["levels"] if entry["level"]]
    if levels:
        yield from _aligned([_cells(entry) for entry in levels])
    if (take := advised(certificate["levels"])) is not None:
        kept = f"{1 - MOST_LOST:.0%} of the gain and " if any(entry["task"] for entry in levels) else ""
        near = f"perplexity within {MOST_PERPLEXITY - 1:.0%} of the most exact"
        yield f"take {take}: the smallest that keeps {kept}{near}"
    left_out: dict[str, list[str]] = {}
    for level, reason in certificate.get("left_out", {}).items():
        left_out.setdefault(reason, []).append(level)
    yield from (f"left out: {', '.join(names)}: {reason}" for reason, names in left_out.items())


def advised(levels: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the smallest level that loses next to nothing; None where there are not several, or none was run."""
    run = [entry for entry in levels if entry["level"] and "perplexity" in entry["figures"]]
    if len(run) < 2:
        return None
    exact = run[0]["figures"]["perplexity"]
    good = [
        entry
        for entry in run
        if entry["figures"]["perplexity"] <= MOST_PERPLEXITY * exact
        and all(figure["lost"] <= MOST_LOST for figure in _shown(entry))
    ]
    return min(good, key=lambda entry: entry["bytes"])["level"] if good else None


def _shown(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return of each set the figure that gained most: a score may have many, and the others are in the certificate."""
    best: dict[str, Mapping[str, Any]] = {}
    for figure in entry["task"]:
        name = figure["name"].partition(".")[0]
        if name not in best or _gain(figure) > _gain(best[name]):
            best[name] = figure
    return list(best.values())


def _gain(figure: Mapping[str, Any]) -> float:
    return abs(figure["tuned"] - figure["before"])


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
        f"{one['name']} {one['level']:.4g} ({one['before']:.4g} → {one['tuned']:.4g})" for one in _shown(entry)
    )
    lost = "; ".join(f"{one['lost']:.0%}" for one in _shown(entry))
    shown = [f"{figures[name]:.4g}" if name in figures else "" for name in ("kl_nats", "perplexity", "tokens_per_s")]
    return (entry["level"], f"{entry['bytes'] / 1e6:.2f}", *shown, task, lost)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    filled = [column for column in range(len(HEAD)) if any(row[column] for row in rows)]
    widths = {column: max(len(row[column]) for row in (HEAD, *rows)) for column in filled}
    for row in (HEAD, *rows):
        yield "  ".join(row[column].ljust(widths[column]) for column in filled).rstrip()
