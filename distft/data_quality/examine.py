"""A look at a recipe's rows before they are trained on: once, then from the cache beside the prepared rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distft.core.errors import DataError, FileSystemError
from distft.core.file_lock import locked_once
from distft.core.files import replace_json
from distft.data.fingerprint import sources_key
from distft.data.prepare import with_distinct_labels
from distft.data.samples import FormatSpec
from distft.data.sources import RowSource, decide_format, find
from distft.data_quality import gather as gathering
from distft.data_quality import similar
from distft.data_quality.eval_rows import question_sources
from distft.data_quality.findings import SHOWN, DataQualityReport, Repeat, Shared
from distft.data_quality.gather import Gathered
from distft.data_quality.notes import notes
from distft.data_quality.row_texts import Unread, row_texts
from distft.recipe.eval_rules import has_own_rows

if TYPE_CHECKING:
    from distft.recipe.evaluation import AnswersTable, SourceTable
    from distft.recipe.schema import DataTable

_SHOWING_CODE = ("card.py", "summary.py")
"""Files of this room that only show what was found; all others decide what is."""
_SHOWN_OVERLAP = 5
KINDS: tuple[str, ...] = ("row", "prompt", "near")
"""How an evaluation row can be trained on, worst first."""


def examine(
    table: DataTable,
    *,
    answers: Sequence[AnswersTable] = (),
    cache_dir: Path,
    progress: Callable[[int], None] = lambda rows: None,
    waiting: Callable[[], None] = lambda: None,
) -> DataQualityReport:
    """Report on the recipe's rows; from the cache where the same files were examined before.

    Of several processes that ask together one works and the others wait.

    Args:
        table: with real paths (see `distft.demo.locate`).
        answers: sets of questions; those with files of their own are evaluation rows too.
        cache_dir: where prepared rows live, see `distft.data.prepare.cache_folder`.
        progress: told the number of rows read so far.
        waiting: called once a second while another process works.

    Raises:
        DataError: a source cannot be read.
        FileSystemError: `cache_dir` cannot be written.
    """
    merge = table.merge_turns
    splits = {"train": _find_sources(table.train, merge)}
    if table.eval or any(map(has_own_rows, answers)):
        splits["eval"] = _find_sources(table.eval, merge, question_sources(answers, table.eval))
    try:
        folder = cache_dir / "care"
        folder.mkdir(parents=True, exist_ok=True)
        key = _key(splits, cache_dir / "hashes")
        note = folder / f"{key[:40]}.json"
        with locked_once(note.with_suffix(".lock"), waiting, done=lambda: _read(note) is not None):
            if (report := _read(note)) is None:
                report = _examine(splits, progress)
                replace_json(note, report.to_json(), ensure_ascii=False)
            return report
    except OSError as error:
        raise FileSystemError(
            f"{cache_dir}: what was found in the rows cannot be kept: {error.strerror or error}  "
            "set [data] cache_dir to a folder that can be written"
        ) from None


def refuse_overlap(report: DataQualityReport, table: DataTable) -> None:
    """Enforce the recipe's `[data] overlap`.

    Raises:
        DataError: evaluation rows are also trained on, and it is "error"; names the first few on both sides.
    """
    if table.overlap != "error" or not report.num_overlap:
        return
    shown = "".join(f"\n  {describe_shared(shared)}" for shared in report.shared[:_SHOWN_OVERLAP])
    more = report.num_overlap - min(_SHOWN_OVERLAP, len(report.shared))
    raise DataError(
        f"{report.num_overlap:,} of {report.splits['eval'].num_rows:,} evaluation rows are also trained on "
        f'([data] overlap = "error"){shown}' + (f"\n  and {more:,} more" if more > 0 else "")
    )


def describe_shared(shared: Shared) -> str:
    """Describe a row that both splits hold, on one line."""
    kinds = {"row": "is", "prompt": "asks the same as", "near": f"is {shared.similarity:.0%} alike to"}
    return f"{shared.eval_row} {kinds[shared.kind]} {shared.train_row}"


_Split = tuple[list[RowSource], list[FormatSpec]]


def _find_sources(
    tables: Sequence[SourceTable], merge: bool, more: Sequence[tuple[RowSource, FormatSpec]] = ()
) -> _Split:
    sources = [find(table, merge_turns=merge) for table in tables]
    with_formats = [(source, decide_format(source)) for source in sources] + list(more)
    return with_distinct_labels([source for source, _ in with_formats]), [spec for _, spec in with_formats]


def _key(splits: dict[str, _Split], memory: Path) -> str:
    here = Path(__file__).parent
    code = [path for path in sorted(here.glob("*.py")) if path.name not in _SHOWING_CODE]
    parts = {
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
        "splits": {name: sources_key(*split, memory) for name, split in splits.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(note: Path) -> DataQualityReport | None:
    try:
        return DataQualityReport.from_json(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not looked at yet, or a torn note


def _examine(splits: dict[str, _Split], progress: Callable[[int], None]) -> DataQualityReport:
    unread = {name: Unread() for name in splits}
    rows = {name: row_texts(*split, unread[name]) for name, split in splits.items()}
    labels = {
        name: [file.label for source in sources for file in source.files] for name, (sources, _) in splits.items()
    }
    common, rows["train"] = gathering.boilerplate(rows["train"])
    held_out = index = None
    if "eval" in splits:
        held_out = gathering.gather(rows["eval"], labels["eval"], common, progress=lambda count: progress(count))
        index = similar.EvalIndex(held_out.minima_NK())
    before = held_out.num_rows if held_out else 0
    train = gathering.gather(
        rows["train"], labels["train"], common, progress=lambda count: progress(before + count), against=index
    )
    same = similar.repeats(train.joined("texts"))
    near = similar.near_repeats(train.minima_NK())
    is_same = np.zeros(train.num_rows, bool)
    is_same[same.row_P] = True
    same_question = similar.repeats(train.joined("questions")).row_P
    near_only = ~is_same[near.row_P]
    every = [train, *([held_out] if held_out else [])]
    num_shared, shared = _overlap(train, held_out)
    num_found = sum((gathered.num_found for gathered in every), start=Counter[str]())
    report = DataQualityReport(
        splits={name: gathered.split(unread[name].num_rows) for name, gathered in zip(splits, every, strict=True)},
        num_same=len(same.row_P),
        num_near=int(near_only.sum()),
        num_conflicting=int((~is_same[same_question]).sum()),
        near_searched=min(train.num_rows, gathering.NEAR_ROWS),
        repeats=(
            *_repeats(train, same.row_P, same.like_P, same.similarity_P),
            *_repeats(train, near.row_P[near_only], near.like_P[near_only], near.similarity_P[near_only]),
        ),
        num_shared=num_shared,
        shared=shared,
        num_found=dict(num_found),
        found=tuple(finding for gathered in every for finding in gathered.sensitive),
    )
    return replace(report, notes=tuple(notes(report)))


def _repeats(train: Gathered, row_P: np.ndarray, like_P: np.ndarray, similarity_P: np.ndarray) -> list[Repeat]:
    ids, likes = train.ids(row_P[:SHOWN]), train.ids(like_P[:SHOWN])
    return [
        Repeat(row=row, like=like, similarity=round(float(near), 3))
        for row, like, near in zip(ids, likes, similarity_P, strict=False)
    ]


def _overlap(train: Gathered, held_out: Gathered | None) -> tuple[dict[str, int], tuple[Shared, ...]]:
    """Return `num_shared` and `shared`; an evaluation row counts under the first kind that it is of."""
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    shared: list[Shared] = []
    if held_out is None:
        return counts, ()
    near = similar.nearest(train.near_to_eval)
    finds = {
        "row": _in_both(held_out.joined("texts"), train.joined("texts")),
        "prompt": _in_both(held_out.joined("prompts"), train.joined("prompts")),
        "near": (near.row_P, near.like_P, near.similarity_P),
    }
    seen = np.zeros(held_out.num_rows, bool)
    for kind, (row_P, like_P, similarity_P) in finds.items():
        new = ~seen[row_P]
        seen[row_P] = True
        counts[kind] = int(new.sum())
        rows, likes = held_out.ids(row_P[new][:SHOWN]), train.ids(like_P[new][:SHOWN])
        shared += [
            Shared(eval_row=row, train_row=like, kind=kind, similarity=round(float(alike), 3))
            for row, like, alike in zip(rows, likes, similarity_P[new], strict=False)
        ]
    return counts, tuple(shared)


def _in_both(held_out_N: np.ndarray, train_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return evaluation rows whose hash training rows have, the first of those, and their similarity of 1."""
    kinds, first = np.unique(train_N, return_index=True)
    nearest = np.minimum(np.searchsorted(kinds, held_out_N), max(len(kinds) - 1, 0))
    hit = np.flatnonzero((kinds[nearest] == held_out_N) & (held_out_N != 0)) if len(kinds) else np.zeros(0, np.int64)
    return hit, first[nearest[hit]] if len(kinds) else hit, np.ones(len(hit))
