"""Rows -> what a model is asked: the row without its answer, rendered as training renders it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from distft.core.errors import DataError
from distft.data.prepare import with_distinct_labels
from distft.data.readers import Payload
from distft.data.render import Renderer
from distft.data.samples import Conversation, PromptCompletion, Row, RowError, Sample, columns_of, text_column
from distft.data.sources import RowSource, decide_format, find

if TYPE_CHECKING:
    from distft.recipe.schema import SourceTable

AskAs = Literal["auto", "chat", "text"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a set."""

    id: str
    """`valid.jsonl row 12`."""
    row: Row
    """The row as its file holds it, columns renamed as the recipe says."""
    prompt: str
    """What is asked, special tokens of the chat template included."""
    ids: tuple[int, ...]
    """The prompt's tokens."""
    as_chat: bool
    """Rendered by the chat template: special tokens are in the text."""
    reference: str
    """The right answer: the completion, or what the assistant says last; "" where the row has none."""
    chat: Conversation | None = None
    """What is asked, without the answer; None: raw text."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """For rows that are of no data format: where the question is, and the right answer, if there is one."""

    prompt: str
    reference: str | None
    as_chat: bool
    """The question is what a user says, instead of raw text."""

    def convert(self, row: Row) -> Sample:
        """Return the row as a sample with an open end.

        Raises:
            RowError: a column is missing or holds no text.
        """
        prompt = text_column(row, self.prompt)
        if self.reference is not None and self.reference not in row:
            raise RowError(f'missing "{self.reference}"; the row has {columns_of(row)}')
        if self.as_chat:
            return Conversation(messages=[{"role": "user", "content": prompt}])
        return PromptCompletion(prompt=prompt, completion="")

    def answer(self, row: Row) -> str:
        """Return what the reference column holds; a list of right answers as JSON."""
        value = "" if self.reference is None else row[self.reference]
        return value if isinstance(value, str) else json.dumps(value)


def questions(
    sources: Sequence[SourceTable],
    renderer: Renderer,
    *,
    columns: Columns | None,
    max_rows: int | None,
    skip_bad: bool,
    progress: Callable[[int], None],
) -> list[Question]:
    """Return the rows of `sources` in their order, at most `max_rows` in all.

    Args:
        sources: tables of files.
        renderer: of the trained model.
        columns: for rows that are of no data format; None: the sources' formats say.
        max_rows: besides each source's own.
        skip_bad: leave out rows that ask nothing, instead of an error.
        progress: told the number of rows so far.

    Raises:
        DataError: a source cannot be read, a row is bad, or there is no row.
    """
    rows = list(islice(_questions(sources, renderer, columns, skip_bad, progress), max_rows))
    if not rows:
        raise DataError(f"{', '.join(source.path for source in sources)}: no row that asks anything")
    return rows


def _questions(
    sources: Sequence[SourceTable],
    renderer: Renderer,
    columns: Columns | None,
    skip_bad: bool,
    progress: Callable[[int], None],
) -> Iterator[Question]:
    count = 0
    for source in with_distinct_labels([find(table, merge_turns=renderer.merge_turns) for table in sources]):
        convert = columns.convert if columns is not None else decide_format(source).convert
        for label, number, payload in islice(_payloads(source), source.table.max_rows):
            try:
                row = source.renamed(payload)
                sample = convert(row)
                prompt, ids = renderer.ask(sample)
            except (RowError, DataError) as error:
                if skip_bad and isinstance(error, RowError):
                    continue
                raise DataError(f"{label}:{number}: {error}") from None
            right = columns.answer(row) if columns is not None else sample.reference
            yield Question(
                id=f"{label} row {number}",
                row=row,
                prompt=prompt,
                ids=tuple(ids),
                as_chat=sample.open_chat is not None,
                reference=right,
                chat=sample.open_chat,
            )
            count += 1
            progress(count)


def followed_by(renderer: Renderer, question: Question, choice: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokenise the question and a choice together; a space joins raw text, as in lm-eval."""
    joined = choice if question.as_chat or question.prompt[-1:].isspace() else f" {choice}"
    return renderer.pair(question.prompt, joined, as_chat=question.as_chat)


def _payloads(source: RowSource) -> Iterator[tuple[str, int, Payload]]:
    for file in source.files:
        for number, payload in source.rows(file):
            yield file.label, number, payload


def trained_as_chat(sources: Sequence[SourceTable], *, merge_turns: bool = False) -> bool:
    """Return whether the first row that is trained is a chat.

    Raises:
        DataError: the first source cannot be read, or has no good row.
    """
    source = find(sources[0], merge_turns=merge_turns)
    spec = decide_format(source)
    for _, _, payload in islice(_payloads(source), 20):
        try:
            return spec.convert(source.renamed(payload)).open_chat is not None
        except RowError:
            continue
    raise DataError(f"{sources[0].path}: none of its first rows is of the format {spec.name}")


def rows_hash(questions: Sequence[Question]) -> str:
    """Return the sha256 over the questions and their references, in order: equal for equal sets."""
    digest = hashlib.sha256()
    for question in questions:
        fields = [question.id, question.prompt, list(question.ids), question.reference, question.row]
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()
