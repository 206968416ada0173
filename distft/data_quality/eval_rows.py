"""Finds the sources of `[[eval.answers]]` that have files of their own: they are evaluation rows too."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distft.data.samples import FormatSpec, PromptCompletion, Row, RowError, text_column
from distft.data.sources import RowSource, decide_format, find
from distft.recipe.eval_rules import has_own_rows

if TYPE_CHECKING:
    from distft.recipe.evaluation import AnswersTable, SourceTable


def question_sources(
    answers: Sequence[AnswersTable], held_out: Sequence[SourceTable]
) -> list[tuple[RowSource, FormatSpec]]:
    """Return each evaluation set's source once, with what reads its rows, but those of `held_out`.

    Raises:
        DataError: a source cannot be read.
    """
    known_places = {_place(table) for table in held_out}
    sources: list[tuple[RowSource, FormatSpec]] = []
    for answers_table in answers:
        table = answers_table.source
        if table is None or not has_own_rows(answers_table) or _place(table) in known_places:
            continue
        known_places.add(_place(table))
        source = find(table.model_copy(update={"max_rows": answers_table.max_rows}))
        spec = (
            decide_format(source)
            if answers_table.prompt is None
            else _columns(answers_table.prompt, answers_table.reference)
        )
        sources.append((source, spec))
    return sources


def _place(table: SourceTable) -> tuple[str | None, ...]:
    return table.path, table.subset, table.split


def _columns(prompt: str, reference: str | None) -> FormatSpec:
    """Return a format of the named columns, for rows that are of no data format."""
    return FormatSpec(
        name=f"columns {prompt} {reference}",
        needs=prompt,
        matches=lambda row: prompt in row,
        convert=functools.partial(_convert, prompt=prompt, reference=reference),
    )


def _convert(row: Row, *, prompt: str, reference: str | None) -> PromptCompletion:
    right = "" if reference is None else row.get(reference)
    if right is None:
        raise RowError(f'missing "{reference}"')
    completion = right if isinstance(right, str) else json.dumps(right)
    return PromptCompletion(prompt=text_column(row, prompt), completion=completion)
