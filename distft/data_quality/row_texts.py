"""Rows as a person would compare them: what is asked, what is answered; read anew from the sources, not from tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from distft.data.samples import FormatSpec, RowError
from distft.data.sources import RowSource


@dataclass(frozen=True, kw_only=True)
class RowText:
    """One row."""

    file: int
    """Index over all files of the split."""
    number: int
    """1-based line or row in the file."""
    prompt: str
    """All before the last answer but the system message; "" for plain text."""
    answer: str
    """The completion, the last assistant message with its tool calls, or the document."""
    system: str
    """System message and tool definitions: looked through for secrets, and what makes the same prompt another question;
    not compared, as one system message over all rows would make all of them alike."""

    @property
    def text(self) -> str:
        """What is compared."""
        return f"{self.prompt}\n{self.answer}"


@dataclass(kw_only=True)
class Unread:
    """Counts rows that are of no format."""

    num_rows: int = 0


def row_texts(sources: Sequence[RowSource], specs: Sequence[FormatSpec], unread: Unread) -> Iterator[RowText]:
    """Yield every row that a format can read, in order; the others are counted.

    Raises:
        DataError: a file cannot be read.
    """
    file_index = 0
    for source, spec in zip(sources, specs, strict=True):
        left = source.table.max_rows
        for file in source.files:
            for number, payload in islice(source.rows(file), left):
                left = None if left is None else left - 1
                try:
                    sample = spec.convert(source.renamed(payload))
                except RowError:
                    unread.num_rows += 1
                    continue
                yield RowText(
                    file=file_index,
                    number=number,
                    prompt=sample.question,
                    answer=sample.answer,
                    system=sample.system,
                )
            file_index += 1
