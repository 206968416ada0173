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


def asked_sources(
    answers: Sequence[AnswersTable], held_out: Sequence[SourceTable]
) -> list[tuple[RowSource, FormatSpec]]:
    """Each file once, with what reads its rows; those of `held_out` are looked at anyway.

    Raises:
        DataError: a source cannot be read.
    """
    known = {_place(table) for table in held_out}
    found: list[tuple[RowSource, FormatSpec]] = []
    for one in answers:
        table = one.source
        if table is None or not has_own_rows(one) or _place(table) in known:
            continue
        known.add(_place(table))
        source = find(table.model_copy(update={"max_rows": one.max_rows}))
        spec = decide_format(source) if one.prompt is None else _columns(one.prompt, one.reference)
        found.append((source, spec))
    return found


def _place(table: SourceTable) -> tuple[str | None, ...]:
    return table.path, table.subset, table.split


def _columns(prompt: str, reference: str | None) -> FormatSpec:
    """Of rows that are of no data format."""
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
