"""The data card: a Markdown page that says what a data set is and what to look at before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distft.data_quality.examine import describe_shared
from distft.data_quality.findings import DataQualityReport, Split

_SHOWN = 10
_SHOWN_LABELS = 20


def card(report: DataQualityReport, *, name: str, sources: Sequence[tuple[str, str]]) -> str:
    """Return the page; `sources` are (split, path) in the recipe's order.

    Everything in it is counted from the rows, but for what only people know: origin, licence and consent are asked for
    in its last section.
    """
    return "\n".join(_lines(report, name, sources)) + "\n"


def _lines(report: DataQualityReport, name: str, sources: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield from (f"# Data card: {_plain(name)}", "")
    if report.notes:
        yield from ("## Look at this first", "", *(f"- {_plain(note)}" for note in report.notes), "")
    yield from ("## Rows", "", "| split | sources | rows | of no format |", "|---|---|---:|---:|")
    for split, figures in report.splits.items():
        paths = ", ".join(f"`{_plain(path)}`" for part, path in sources if part == split)
        yield f"| {split} | {paths} | {figures.num_rows:,} | {figures.num_unread:,} |"
    yield from ("", "## Lengths in characters", "", "| split | part | p10 | p50 | p90 | longest |")
    yield "|---|---|---:|---:|---:|---:|"
    for split, figures in report.splits.items():
        for part, lengths in (("prompt", figures.prompt_chars), ("answer", figures.answer_chars)):
            yield f"| {split} | {part} | {' | '.join(f'{lengths[quantile]:,}' for quantile in lengths)} |"
    yield ""
    yield from _labels(report.splits)
    yield from _repeats(report)
    yield from _finds(report)
    yield from (
        "## What only people know",
        "",
        "- Where the rows come from, and who wrote them:",
        "- Licence, and whether it allows training:",
        "- Consent of people named in them:",
        "- What the data leaves out that users will ask:",
    )


def _labels(splits: dict[str, Split]) -> Iterator[str]:
    train = splits["train"]
    if not train.labels:
        return
    held_out = splits.get("eval")
    yield from ("## Answers", "", "| answer | training rows | share | evaluation rows |", "|---|---:|---:|---:|")
    for label, count in list(train.labels.items())[:_SHOWN_LABELS]:
        held_out_count = f"{held_out.labels.get(label, 0):,}" if held_out is not None and held_out.labels else ""
        yield f"| {_plain(label) or '(empty)'} | {count:,} | {count / train.num_rows:.1%} | {held_out_count} |"
    if len(train.labels) > _SHOWN_LABELS:
        yield f"| {len(train.labels) - _SHOWN_LABELS} more | | | |"
    yield ""


def _repeats(report: DataQualityReport) -> Iterator[str]:
    searched = report.near_searched
    among = "" if searched >= report.splits["train"].num_rows else f" (searched among the first {searched:,} rows)"
    yield from ("## Repeats and overlap", "")
    yield f"- training rows equal to an earlier one: {report.num_same:,}"
    yield f"- training rows nearly equal to an earlier one: {report.num_near:,}{among}"
    yield f"- training rows with an earlier row's question and another answer: {report.num_conflicting:,}"
    if "eval" in report.splits:
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in report.num_shared.items() if count)
        yield f"- evaluation rows that are also trained on: {report.num_overlap:,}" + (f" ({kinds})" if kinds else "")
    yield ""
    if report.shared:
        yield from (*(f"- {_plain(describe_shared(shared))}" for shared in report.shared[:_SHOWN]), "")


def _finds(report: DataQualityReport) -> Iterator[str]:
    yield from ("## Personal data and secrets", "")
    if not report.num_found:
        yield from ("None found by shape; names and addresses of people have none.", "")
        return
    yield from ("Found by shape, shown masked; a shape is no proof.", "")
    yield from ("| kind | rows | for example |", "|---|---:|---|")
    for kind, count in report.num_found.items():
        first = next(finding for finding in report.found if finding.kind == kind)
        yield f"| {kind} | {count:,} | {_plain(first.row)}: {_plain(first.masked)} |"
    yield ""


def _plain(text: str) -> str:
    """Return a text on one line, without Markdown or HTML of its own."""
    for char, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(char, shown)
    return " ".join(text.split())
