"""The report in a few lines, for `distft check`."""

from __future__ import annotations

from collections.abc import Iterator

from distft.data_quality.examine import told
from distft.data_quality.findings import DataQualityReport

_SHOWN = 3


def summary(report: DataQualityReport) -> Iterator[str]:
    """Counts with the first few rows of each, then the warnings; never what a secret says."""
    train = report.splits["train"]
    yield f"{'repeats':<20} {report.num_same:,} equal, {report.num_near:,} nearly, of {train.num_rows:,} training rows"
    for one in report.repeats[:_SHOWN]:
        yield f"  {one.row} {'is' if one.similarity == 1 else f'is {one.similarity:.0%} alike to'} {one.like}"
    if report.near_searched < train.num_rows:
        yield f"  (near ones searched among the first {report.near_searched:,})"
    if report.num_conflicting:
        yield f"{'conflicts':<20} {report.num_conflicting:,} training rows answer an earlier row's question otherwise"
    if held_out := report.splits.get("eval"):
        yield f"{'overlap':<20} {report.num_overlap:,} of {held_out.num_rows:,} evaluation rows are also trained on"
        yield from (f"  {told(one)}" for one in report.shared[:_SHOWN])
    found = ", ".join(f"{kind} {count:,}" for kind, count in report.num_found.items())
    yield f"{'personal, secret':<20} {f'rows with: {found}' if found else 'none by shape'}"
    for one in sorted(report.found, key=lambda one: not one.secret)[:_SHOWN]:
        yield f"  {one.row}: {one.kind} {one.masked}"
    if train.labels:
        most = ", ".join(f"{label!r} {count / train.num_rows:.0%}" for label, count in list(train.labels.items())[:6])
        yield f"{'answers':<20} {len(train.labels)} different: {most}"
    yield from (f"! {note}" for note in report.notes)
