"""What was found in a data set: counts in full, examples by row, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 50
"""Examples of each kind that are kept."""
FEW_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A training row that an earlier one is like."""

    row: str
    """`train.jsonl row 12`."""
    like: str
    similarity: float
    """1.0: the same text but for white space."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """An evaluation row that is also trained on."""

    eval_row: str
    train_row: str
    kind: str
    """row: the same text; prompt: the same question with another answer; near: nearly the same text."""
    similarity: float


@dataclass(frozen=True, kw_only=True)
class SensitiveText:
    """Personal data or a secret; the text itself is not kept anywhere."""

    row: str
    kind: str
    secret: bool
    masked: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """[[data.train]] or [[data.eval]] in figures."""

    num_rows: int
    num_unread: int
    """Rows that are of no format: preparation drops them, or stops there."""
    prompt_chars: dict[str, int]
    """Percentiles p10, p50, p90, max."""
    answer_chars: dict[str, int]
    labels: dict[str, int]
    """Answer -> rows, most frequent first, where answers are few and short enough to be labels; else empty."""


@dataclass(frozen=True, kw_only=True)
class DataQualityReport:
    """All that a look at the rows says."""

    splits: dict[str, Split]
    """"train", and "eval" where the recipe has one."""
    num_same: int
    """Training rows whose text an earlier row has."""
    num_near: int
    """Further training rows that an earlier row is near to."""
    num_conflicting: int
    """Training rows whose question (prompt, system message, tools) an earlier row has, with another answer."""
    near_searched: int
    """Training rows that near repeats were searched among: all, unless there are very many."""
    repeats: tuple[Repeat, ...]
    num_shared: dict[str, int]
    """Kind -> evaluation rows that are also trained on; each counts once: row before prompt before near."""
    shared: tuple[Shared, ...]
    num_found: dict[str, int]
    """Kind of personal data or secret -> rows with it, in both splits."""
    found: tuple[SensitiveText, ...]
    notes: tuple[str, ...] = field(default=())
    """Warnings, each with its reason."""

    @property
    def num_overlap(self) -> int:
        """Evaluation rows that are also trained on."""
        return sum(self.num_shared.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> DataQualityReport:
        """Build the report from what `to_json` returned."""
        return cls(
            **stored
            | {
                "splits": {name: Split(**split) for name, split in stored["splits"].items()},
                "repeats": tuple(Repeat(**fields) for fields in stored["repeats"]),
                "shared": tuple(Shared(**fields) for fields in stored["shared"]),
                "found": tuple(SensitiveText(**fields) for fields in stored["found"]),
                "notes": tuple(stored["notes"]),
            }
        )
