"""What preparation did with every row, source by source: nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from distft.data.chat_template import SPLIT

TOO_LONG = "too long"
UNTRAINED = "no trained token"
TRUNCATED_AWAY = "no trained token left after truncation"
BAD = "bad row"
EMPTY = "empty"
REASONS = (TOO_LONG, UNTRAINED, TRUNCATED_AWAY, BAD, EMPTY)
"""Why a row is dropped."""
SHOWN_FAULTS = 5


@dataclass(kw_only=True)
class Note:
    """Something that is true of several rows."""

    num_rows: int
    example: str
    """The first of them: file and row, and what was found."""


@dataclass(kw_only=True)
class SourceReport:
    """One source's rows, counted. Filled while preparing, read-only after."""

    path: str
    format: str
    decided: bool
    """Whether the format was chosen by `auto`."""
    num_read: int = 0
    num_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    num_truncated: int = 0
    """Kept rows that lost their end to max_length."""
    num_diverged: int = 0
    """Kept prompt/completion rows whose prompt's last token merges with the completion's first."""
    num_tokens: int = 0
    num_supervised: int = 0
    longest: int = 0
    """Tokens of the longest row that could be rendered, before max_length."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of the kept rows' tokens: p10, p50, p90, p99, max."""
    faults: list[str] = field(default_factory=list)
    """The first few bad rows, each with file and row."""
    num_split: int = 0
    """Kept rows beyond one for each row read: chats whose turns became rows of their own."""
    notes: dict[str, Note] = field(default_factory=dict)
    """What is to be known of kept rows, by kind."""
    unread: dict[str, int] = field(default_factory=dict)
    """Columns that the format does not read -> rows that have them."""

    def __post_init__(self) -> None:
        """Convert notes that were read from JSON, where they are plain values."""
        self.notes = {kind: note if isinstance(note, Note) else Note(**note) for kind, note in self.notes.items()}

    @property
    def num_dropped(self) -> int:
        """Rows dropped, for any reason."""
        return sum(self.dropped.values())

    def drop(self, reason: str, count: int = 1) -> None:
        """Count dropped rows."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def note(self, kind: str, num_rows: int, example: str) -> None:
        """Count rows that a note of this kind applies to."""
        entry = self.notes.setdefault(kind, Note(num_rows=0, example=example))
        entry.num_rows += num_rows

    def messages(self) -> Iterator[str]:
        """Yield what happened to the rows, beyond their numbers, one line each."""
        if self.num_dropped:
            yield f"dropped: {self.reasons()}; longest row {self.longest:,} tokens"
        if self.num_diverged:
            yield f"{self.num_diverged:,} rows: the prompt's last token merges with the completion"
        for kind, note in self.notes.items():
            more = f" ({self.num_split:,} rows more than were read)" if kind == SPLIT else ""
            yield f"{note.num_rows:,} rows: {kind}{more}; first {note.example}"
        if self.unread:
            yield "columns not read: " + ", ".join(f'"{name}" ({count:,})' for name, count in self.unread.items())

    def reasons(self) -> str:
        """Return `3 too long, 1 empty`."""
        return ", ".join(f"{self.dropped[reason]:,} {reason}" for reason in REASONS if reason in self.dropped)


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """All sources of a split."""

    sources: tuple[SourceReport, ...]
    files: tuple[str, ...]
    """Label of each file, as sample ids name them."""
    file_sources: tuple[int, ...]
    """Which source each file belongs to."""
    fingerprint: str
    """sha256 over all token ids, trained marks and lengths: what a resumed run must find again."""
    largest_id: int
    """The largest id of all tokens: the embedding must have a row for it."""
    stop_ids: tuple[int, ...]
    """What at least a tenth of the rows' answers end with, and the model will stop at; most frequent first."""
    group_size: int = 1
    """Documents of each row."""
    values: tuple[str, ...] = ()
    """Names of the numbers of each row (`FormatSpec.values`)."""

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return sum(source.num_kept for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows kept."""
        return sum(source.num_tokens for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PrepareReport:
        """Return the report that `to_json` gave."""
        return cls(
            sources=tuple(SourceReport(**source) for source in stored["sources"]),
            files=tuple(stored["files"]),
            file_sources=tuple(stored["file_sources"]),
            fingerprint=stored["fingerprint"],
            largest_id=stored["largest_id"],
            stop_ids=tuple(stored["stop_ids"]),
            group_size=stored.get("group_size", 1),
            values=tuple(stored.get("values", ())),
        )
