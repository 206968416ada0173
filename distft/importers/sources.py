"""Rows, lengths and chat templates of a recipe, from what tools call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distft.importers.conversion import Conversion
from distft.importers.section import Section

_SLICE = re.compile(r"([\w.-]+)\[:(\d+)\]")
_SPLIT = re.compile(r"[\w.-]+")
Rows = Literal["single", "pairs", "unpaired"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table of [[data.train]] or [[data.eval]]."""

    path: str
    format: str = "auto"
    subset: str | None = None
    split: str | None = None
    max_rows: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Theirs -> ours; equal names are left out."""
    note: str = ""


def add_source(work: Conversion, part: Literal["train", "eval"], source: Source, of: tuple[Section, str]) -> None:
    """Append a source."""
    index = len(work.draft.get(f"data.{part}") or ())
    home = f"data.{part}.{index}"
    split, rows = _split(source, of)
    values = {
        "path": source.path,
        "format": source.format,
        "subset": source.subset,
        "split": split,
        "max_rows": source.max_rows or rows,
        "columns": {column: ours for column, ours in source.columns.items() if column != ours} or None,
    }
    for key, value in values.items():
        if value is not None:
            work.draft.set(f"{home}.{key}", value, of=of[0].path(of[1]))
    if source.note:
        work.draft.comment(f"{home}.format", source.note)
    if source.format != "auto" and source.format not in work.registries.formats:
        formats = ", ".join(work.registries.formats)
        of[0].problem(of[1], f"rows of format {source.format} are not read here", f"formats here: {formats}")


def _split(source: Source, of: tuple[Section, str]) -> tuple[str | None, int | None]:
    """Return the split and the rows of `train[:1000]`."""
    if source.split is None or _SPLIT.fullmatch(source.split):
        return source.split, None
    if match := _SLICE.fullmatch(source.split):
        return match[1], int(match[2])
    of[0].problem(
        "split" if of[0].has("split") else of[1],
        f"split {source.split} is a part of a split",
        "name a whole split, or train[:1000] for its first rows",
    )
    return None, None


def local_split(path: str, split: str | None) -> str | None:
    """Return the split to name: none of a file here, and none where the hub's default is meant."""
    return None if Path(path).expanduser().is_file() or Path(path).suffix in _FILES or split == "train" else split


_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow")


def set_lengths(
    work: Conversion,
    section: Section,
    key: str,
    default: int,
    *,
    rows: Rows,
    long_rows: Literal["drop", "truncate", "error"],
    packing: bool = False,
    packing_of: tuple[Section, str] | None = None,
) -> None:
    """Set [data] max_length, long_rows and packing.

    Args:
        work: the conversion.
        section: where the length is.
        key: its name.
        default: the tool's.
        rows: what a row is made of.
        long_rows: what the tool does with a row that is longer.
        packing: rows are packed.
        packing_of: what says so.
    """
    length = section.whole(key, default, least=8) or default
    pairs = rows == "pairs"
    note = f"both answers of a pair together; {length} tokens for each of them there" if pairs else ""
    work.set("data.max_length", 2 * length if pairs else length, (section, key), note)
    work.set("data.packing", packing and rows == "single", packing_of, _packing_note(work, rows, packing))
    if pairs and long_rows == "truncate":
        work.draft.set("data.long_rows", "drop", note="longer answers are cut there; a pair is never cut here")
    else:
        work.draft.set("data.long_rows", long_rows)


def _packing_note(work: Conversion, rows: Rows, packing: bool) -> str:
    if rows != "single":
        return "pairs are batched one by one there" if rows == "pairs" else "rows are batched one by one there"
    return "best-fit, and documents never attend to each other" if packing else ""


def set_template(
    work: Conversion,
    section: Section,
    key: str,
    *,
    same: Sequence[str],
    tokenizer_names: Sequence[str],
    there: str = "",
) -> None:
    """Set [data] chat_template.

    Args:
        work: the conversion.
        section: where the template is named.
        key: the key that names it.
        same: names that mean the built-in template of that name.
        tokenizer_names: names that mean the tokenizer's.
        there: what the tool's template writes otherwise.
    """
    name = section.text(key)
    if name is None:
        return
    if name in same and name in work.registries.templates:
        work.set("data.chat_template", name, (section, key), there)
    elif name.endswith(".jinja"):
        work.set("data.chat_template", name, (section, key))
    else:
        note = (
            "" if name in tokenizer_names else f"{name} there: compare `distft check`'s samples, or name a .jinja file"
        )
        work.set(
            "data.chat_template",
            "auto",
            (section, key),
            "; ".join(filter(None, (note and f"the tokenizer's own; {note}", there))),
        )
