"""Rows, lengths and chat templates of a recipe, from what tools call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distft.importers.conversion import Conversion
from distft.importers.section import Section

_FIRST_ROWS = re.compile(r"([\w.-]+)\[:(\d+)\]")
_FIRST_SHARE = re.compile(r"([\w.-]+)\[:(\d+)%\]")
_SPLIT = re.compile(r"[\w.-]+")
_SLICES = re.compile(r"[\w.-]+(\[-?\d*%?:-?\d*%?\])?(\+[\w.-]+(\[-?\d*%?:-?\d*%?\])?)*")
"""What the `datasets` library takes parts of splits by: `train[:20%]`, `train[80%:]+validation`."""
_SPLIT_KEYS = ("split", "train_on_split", "dataset_train_split")
_LOADERS = ("json", "parquet", "csv", "text", "arrow")
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow")
Rows = Literal["single", "pairs", "unpaired", "prompts"]


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


def add_source(
    work: Conversion,
    part: Literal["train", "eval"],
    source: Source,
    origin: tuple[Section, str],
    files: Sequence[str] = (),
) -> None:
    """Append a source, or one for each of several files that it consists of.

    A split may be a part of one: `train[:1000]` becomes `max_rows`; of the hub's data sets other parts are named as
    there, and of files a share is asked for.
    """
    name, rows = _split(work, part, source, origin, len(files))
    for path in files or (source.path,):
        index = len(work.draft.get(f"data.{part}") or ())
        values = {
            "path": path,
            "format": source.format,
            "subset": source.subset,
            "split": _named_split(path, name, origin),
            "max_rows": source.max_rows or rows,
            "columns": {column: ours for column, ours in source.columns.items() if column != ours} or None,
        }
        for key, value in values.items():
            if value is not None:
                work.draft.set(f"data.{part}.{index}.{key}", value, origin=origin[0].path(origin[1]))
        if source.note:
            work.draft.comment(f"data.{part}.{index}.format", source.note)
    if source.format != "auto" and source.format not in work.registries.formats:
        formats = ", ".join(work.registries.formats)
        origin[0].problem(origin[1], f"rows of format {source.format} are not read here", f"formats here: {formats}")


def data_files(section: Section, loader: str, key: str) -> list[str]:
    """Return the files that a data set consists of; none where it is what its path says.

    Args:
        section: the data set.
        loader: what its path is: a name of the datasets library's loaders, where files are named.
        key: what its path is called.
    """
    files = section.texts("data_files")
    if files and loader not in _LOADERS and not loader.endswith(("/", ".")):
        section.problem("data_files", "chooses files of a hub dataset", f"download them, and name them as {key}")
    return files


def _split(
    work: Conversion, part: str, source: Source, origin: tuple[Section, str], num_files: int
) -> tuple[str | None, int | None]:
    """Return the name of the split, and the rows of `train[:1000]`."""
    if source.split is None or _SPLIT.fullmatch(source.split):
        return source.split, None
    key = next((name for name in _SPLIT_KEYS if origin[0].has(name)), origin[1])
    first, share = _FIRST_ROWS.fullmatch(source.split), _FIRST_SHARE.fullmatch(source.split)
    if first and num_files <= 1:
        return first[1], int(first[2])
    if _SLICES.fullmatch(source.split) and not num_files and _is_of_hub(source.path):
        return source.split, None
    if share and num_files <= 1:
        home = f"data.{part}.{len(work.draft.get(f'data.{part}') or ())}.max_rows"
        why = f"is a share of a split, of {share[2]} %: rows are counted here"
        work.require(home, origin[0], key, why, f"say how many these are: --set {home}=N")
        return share[1], None
    origin[0].problem(key, "is a part of a split", "name a whole split, or train[:1000] for its first rows")
    return None, None


def _is_of_hub(path: str) -> bool:
    """Whether a path is the name of a data set of the hub: of one or two words, and of nothing that is here."""
    there = Path(path)
    return (
        there.suffix not in _FILES
        and len(there.parts) <= 2
        and not path.startswith(("/", ".", "~"))
        and not there.exists()
    )


def _named_split(path: str, name: str | None, origin: tuple[Section, str]) -> str | None:
    """Return the split to name: none of a file, which has no other than train, and none where that is the default."""
    if name in (None, "train"):
        return None
    if Path(path).suffix in _FILES:
        origin[0].problem(origin[1], f"is a file, which has no split {name}", "remove the split")
        return None
    return name


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
