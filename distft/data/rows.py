"""Payloads -> prepared rows: convert, render, cut or drop by the recipe's policies. What a worker process runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from distft.core.errors import DataError
from distft.data.columns import unread_columns
from distft.data.preparation_report import BAD, EMPTY, SHOWN_FAULTS, TOO_LONG, TRUNCATED_AWAY, UNTRAINED, Note
from distft.data.readers import Payload
from distft.data.render import Renderer, load_renderer, settings_of
from distft.data.rendered import Rendered
from distft.data.samples import FormatSpec, Row, RowError, Sample
from distft.data.sources import RowSource
from distft.data.special_tokens import without_marks
from distft.data.store import Rows

if TYPE_CHECKING:
    from distft.recipe.schema import DataTable


@dataclass(kw_only=True)
class Made:
    """Prepared rows and what became of the others."""

    rows: Rows
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    num_truncated: int = 0
    num_diverged: int = 0
    longest: int = 0
    num_split: int = 0
    faults: list[str] = field(default_factory=list)
    notes: dict[str, Note] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, example: str) -> None:
        """Count a row of which `kind` is true."""
        self.notes.setdefault(kind, Note(num_rows=0, example=example)).num_rows += 1


@dataclass(frozen=True)
class RowMaker:
    """Everything needed to prepare rows, small enough to send to a worker; the tokenizer is loaded on first use."""

    table: DataTable
    sources: list[RowSource]
    converts: list[Callable[[Row], Sample]]
    """The conversion of each source's format."""
    tokenizer: str
    reads: Sequence[tuple[str, ...] | None] = ()
    """The columns that each source's format reads; empty: not known."""
    virtual_tokens: int = 0
    """Before every document."""

    @cached_property
    def renderer(self) -> Renderer:
        """This process's renderer."""
        return load_renderer(self.tokenizer, virtual_tokens=self.virtual_tokens, **settings_of(self.table))

    def make(self, source: int, label: str, rows: list[tuple[int, Payload]]) -> Made:
        """Prepare rows of the file called `label`.

        Raises:
            DataError: a bad row under `bad_rows = "error"`, a long one under `long_rows = "error"`, or a chat template
                that cannot be used.
        """
        made = Made(rows=_NO_ROWS)
        samples: list[Sample] = []
        numbers: list[int] = []
        for number, payload in rows:
            try:
                sample = self._sample(source, payload, made)
            except RowError as error:
                self._bad(made, f"{label}:{number}: {error}")
                continue
            if sample.is_empty:
                made.dropped[EMPTY] += 1
                continue
            samples.append(sample)
            numbers.append(number)
        kept: list[tuple[int, Rendered]] = []
        for number, many in zip(numbers, self._rendered(samples), strict=True):
            where = f"{label}:{number}"
            if isinstance(many, DataError):
                raise DataError(f"{where}: {many}")
            if isinstance(many, RowError):
                self._bad(made, f"{where}: {without_marks(str(many))}")
                continue
            fitting = [row for row in many if self._fits(made, row, where)]
            kept += [(number, row) for row in fitting]
            if fitting:
                made.num_split += len(fitting) - 1
                for kind, example in {kind: text for row in many for kind, text in row.notes.items()}.items():
                    made.note(kind, f"{where}: {example}" if example else where)
        made.rows = _rows(kept, self.table.max_length)
        return made

    def _rendered(self, samples: list[Sample]) -> Iterator[list[Rendered] | RowError | DataError]:
        """Yield the rows of each sample, or the error; all documents are tokenised in one batch."""
        documents = [document for sample in samples for document in sample.documents]
        rendered = iter(self.renderer.render_rows(documents))
        for sample in samples:
            results = [next(rendered) for _ in sample.documents]
            errors = [result for result in results if isinstance(result, Exception)]
            try:
                rows = [result for result in results if not isinstance(result, Exception)]
                yield errors[0] if errors else sample.join(rows, self.renderer)
            except RowError as error:
                yield error

    def _sample(self, source: int, payload: Payload, made: Made) -> Sample:
        row_source = self.sources[source]
        row = row_source.renamed(payload)
        reads = self.reads[source] if self.reads else None
        if reads is not None:
            made.unread.update(unread_columns(row, reads, row_source.table.ignore))
        return self.converts[source](row)

    def _bad(self, made: Made, message: str) -> None:
        if self.table.bad_rows == "error":
            raise DataError(f'{message}  (bad_rows = "skip" counts such rows and goes on)')
        made.dropped[BAD] += 1
        if len(made.faults) < SHOWN_FAULTS:
            made.faults.append(message)

    def _fits(self, made: Made, row: Rendered, where: str) -> bool:
        """Return whether the row is kept; the reason is counted where it is not."""
        length, limit = len(row.ids_T), self.table.max_length
        made.longest = max(made.longest, length)
        if not all(row.labels_of()):
            made.dropped[EMPTY if row.empty else UNTRAINED] += 1
            return False
        if length > limit:
            if self.table.long_rows == "error":
                raise DataError(
                    f"{where}: {length:,} tokens, longer than max_length = {limit}  raise max_length, "
                    'or set long_rows = "drop" or "truncate"'
                )
            if self.table.long_rows == "drop":
                made.dropped[TOO_LONG] += 1
                return False
            if not row.trained_T[1:limit].any():
                made.dropped[TRUNCATED_AWAY] += 1
                return False
            made.num_truncated += 1
        made.num_diverged += row.diverged
        return True


def group_size_of(sources: Sequence[RowSource], specs: Sequence[FormatSpec], table: DataTable, where: str) -> int:
    """Return the documents of each row.

    Args:
        sources: of one split.
        specs: the format of each.
        table: what becomes of long rows.
        where: the recipe's list of these sources, for messages.

    Raises:
        DataError: the sources do not agree, a group would be cut, or prompts would be trained whose answers are judged.
    """
    kinds = {
        (spec.group_size, spec.values): (source.table.path, spec.name)
        for source, spec in zip(sources, specs, strict=True)
    }
    if len(kinds) > 1:
        listed = "; ".join(f"{path} ({name}): {size}" for (size, _), (path, name) in kinds.items())
        raise DataError(f"{where}: rows of different kinds: documents in a row of {listed}  use sources of one kind")
    [(size, values)] = kinds
    if values and table.loss_on == "all":
        raise DataError(
            f'{where}: loss_on = "all" would train the prompts too, and these rows judge answers  '
            'set [data] loss_on = "assistant" or "last_turn"'
        )
    if size > 1 and table.long_rows == "truncate":
        raise DataError(
            f'{where}: long_rows = "truncate" would cut one of the {size} documents of a row and not the others  '
            'set [data] long_rows = "drop" or "error"; max_length holds for all documents of a row together'
        )
    return size


def _rows(kept: list[tuple[int, Rendered]], limit: int) -> Rows:
    if not kept:
        return _NO_ROWS
    ids = [row.ids_T[:limit] for _, row in kept]
    trained = [row.trained_T[:limit] for _, row in kept]
    return Rows(
        ids=np.concatenate(ids),
        trained=np.concatenate(trained).astype(np.uint8),
        lengths_N=np.array([len(part) for part in ids], np.int32),
        supervised_N=np.array([_labels(row, limit) for _, row in kept], np.int32),
        rows_N=np.array([number for number, _ in kept], np.int64),
        stops_N=np.array([row.stop_id if len(row.ids_T) <= limit else -1 for _, row in kept], np.int32),
        documents=np.array([row.documents for _, row in kept], np.int32).reshape(-1) if kept[0][1].documents else None,
        values=np.array([row.values for _, row in kept], np.float32).reshape(-1) if kept[0][1].values else None,
    )


def _labels(row: Rendered, limit: int) -> int:
    return sum(row.labels_of()) if row.documents else int(row.trained_T[1:limit].sum())


_NO_ROWS = Rows(
    ids=np.zeros(0, np.int32),
    trained=np.zeros(0, np.uint8),
    lengths_N=np.zeros(0, np.int32),
    supervised_N=np.zeros(0, np.int32),
    rows_N=np.zeros(0, np.int64),
    stops_N=np.zeros(0, np.int32),
)
