"""What the figures mean for a run: each warning with its reason, so that one may disagree with it."""

from __future__ import annotations

from collections.abc import Iterator

from distft.data_quality.findings import FEW_ROWS, DataQualityReport
from distft.scores.confidence_intervals import of_share

_SHARE_THAT_MATTERS = 0.01
_MOSTLY = 0.8
_RARE = 10


def notes(report: DataQualityReport) -> Iterator[str]:
    """Yield warnings, gravest first."""
    train, held_out = report.splits["train"], report.splits.get("eval")
    secrets = sorted({finding.kind for finding in report.found if finding.secret})
    if secrets:
        yield (
            f"secrets in the rows ({', '.join(secrets)}): revoke them, not only remove them; "
            "what is trained on can be asked for"
        )
    if held_out is not None and report.num_overlap:
        yield (
            f"{report.num_overlap:,} of {held_out.num_rows:,} evaluation rows are also trained on: figures on them "
            'measure memory; take them out of one of the two ([data] overlap = "error" refuses such data)'
        )
    if train.num_rows < FEW_ROWS:
        yield (
            f"{train.num_rows} training rows: below {FEW_ROWS} a model learns form and tone more than a skill, one "
            "wrong row weighs a percent or more, and several epochs memorise the rows; OpenAI's guide sees clear gains "
            "from 50 to 100 rows on, LIMA (https://arxiv.org/abs/2305.11206) took 1,000 chosen ones"
        )
    if held_out is not None and held_out.num_rows < FEW_ROWS:
        half = of_share(held_out.num_rows // 2, held_out.num_rows) if held_out.num_rows else None
        margin = f": a share of one half is known to ± {50 * (half.high - half.low):.0f} points" if half else ""
        yield f"{held_out.num_rows} evaluation rows{margin}, so small gains and losses will not show"
    repeated = report.num_same + report.num_near
    if repeated > _SHARE_THAT_MATTERS * train.num_rows:
        yield (
            f"{repeated:,} of {train.num_rows:,} training rows repeat earlier ones: they count double and are "
            "memorised first (https://arxiv.org/abs/2107.06499); to show a source more often, set its weight"
        )
    if report.num_conflicting > _SHARE_THAT_MATTERS * train.num_rows:
        yield (
            f"{report.num_conflicting:,} training rows ask what an earlier row asks and answer it otherwise: "
            "a model can learn only the mixture"
        )
    yield from _about_labels(train.labels, train.num_rows)


def _about_labels(labels: dict[str, int], num_rows: int) -> Iterator[str]:
    if len(labels) < 2:
        return
    most, count = next(iter(labels.items()))
    if count > _MOSTLY * num_rows:
        yield (
            f"{count / num_rows:.0%} of the training answers are {most!r}: always saying it would be right as often; "
            "compare figures with that, and look at each label's own"
        )
    rare = [label for label, seen in labels.items() if seen < _RARE]
    if rare:
        shown = ", ".join(map(repr, rare[:5])) + (", …" if len(rare) > 5 else "")
        yield f"fewer than {_RARE} training rows for {shown}: too few to learn from"
