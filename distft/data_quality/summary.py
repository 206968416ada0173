"""The report in a few lines, for `distft check`."""

from __future__ import annotations

from collections.abc import Iterator

from distft.data_quality.examine import describe_shared
from distft.data_quality.findings import DataQualityReport

_SHOWN = 3


def summary(report: DataQualityReport) -> Iterator[str]:
    """Yield counts with the first few rows of each, then the warnings; secrets are never shown."""
    train = report.splits["train"]
    yield f"{'repeats':<20} {report.num_same:,} equal, {report.num_near:,} nearly, of {train.num_rows:,} training rows"
    for repeat in report.repeats[:_SHOWN]:
        relation = "is" if repeat.similarity == 1 else f"is {repeat.similarity:.0%} alike to"
        yield f"  {repeat.row} {relation} {repeat.like}"
    if report.near_searched < train.num_rows:
        yield f"  (near ones searched among the first {report.near_searched:,})"
    if report.num_conflicting:
        yield f"{'conflicts':<20} {report.num_conflicting:,} training rows answer an earlier row's question otherwise"
    if held_out := report.splits.get("eval"):
        yield f"{'overlap':<20} {report.num_overlap:,} of {held_out.num_rows:,} evaluation rows are also trained on"
        yield from (f"  {describe_shared(shared)}" for shared in report.shared[:_SHOWN])
    counts = ", ".join(f"{kind} {count:,}" for kind, count in report.num_found.items())
    yield f"{'personal, secret':<20} {f'rows with: {counts}' if counts else 'none by shape'}"
    for repeat in sorted(report.found, key=lambda finding: not finding.secret)[:_SHOWN]:
        yield f"  {repeat.row}: {repeat.kind} {repeat.masked}"
    if train.labels:
        most = ", ".join(f"{label!r} {count / train.num_rows:.0%}" for label, count in list(train.labels.items())[:6])
        yield f"{'answers':<20} {len(train.labels)} different: {most}"
    yield from (f"! {note}" for note in report.notes)
