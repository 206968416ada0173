"""One pass over the rows of a split: hashes, signatures, lengths, labels, finds. Memory: about 30 bytes a row, and 500
for each of the first half million, which is where near repeats are searched.
"""  # noqa: D205

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from distft.data_quality import patterns, shingles, similar
from distft.data_quality.findings import SHOWN, SensitiveText, Split
from distft.data_quality.row_texts import RowText
from distft.data_quality.similar import EvalIndex, Pairs

NEAR_ROWS = 500_000
"""Training rows whose signatures are kept: 250 MB."""
_CHUNK_ROWS = 4096
_LABEL_CHARS = 60
_MOST_LABELS = 50
_WATCHED_LABELS = 1000
"""Different answers after which they are no labels."""
_SAMPLE_ROWS = 2000
"""Rows that are looked at for what all of them repeat."""


@dataclass(kw_only=True)
class Gathered:
    """What a split's rows came to. Shape letters: N rows, K minima."""

    labels_of_files: list[str]
    """How messages call each file."""
    files: list[np.ndarray] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    texts: list[np.ndarray] = field(default_factory=list)
    """Hash of each row's text; 0: empty."""
    prompts: list[np.ndarray] = field(default_factory=list)
    """Hash of each row's prompt; 0: it has none."""
    questions: list[np.ndarray] = field(default_factory=list)
    """Hash of each row's prompt with its system message and tools; 0: it has no prompt."""
    minima: list[np.ndarray] = field(default_factory=list)
    near_to_eval: list[Pairs] = field(default_factory=list)
    prompt_chars: list[np.ndarray] = field(default_factory=list)
    answer_chars: list[np.ndarray] = field(default_factory=list)
    answers: Counter[str] | None = field(default_factory=Counter)
    """None: too many different ones to be labels."""
    num_found: Counter[str] = field(default_factory=Counter)
    sensitive: list[SensitiveText] = field(default_factory=list)
    num_rows: int = 0

    def joined(self, name: str) -> np.ndarray:
        """Return all of an array so far."""
        return np.concatenate(getattr(self, name)) if self.num_rows else np.zeros(0, np.int64)

    def minima_NK(self) -> np.ndarray:
        """Return the signatures kept."""
        return np.concatenate([np.zeros((0, shingles.NUM_MINIMA), np.uint32), *self.minima])

    def ids(self, rows_P: np.ndarray) -> list[str]:
        """Return `train.jsonl row 12` for each index."""
        files, numbers = self.joined("files"), self.joined("numbers")
        return [f"{self.labels_of_files[files[row]]} row {numbers[row]}" for row in rows_P]

    def split(self, num_unread: int) -> Split:
        """Return the figures of a split."""
        return Split(
            num_rows=self.num_rows,
            num_unread=num_unread,
            prompt_chars=_percentiles(self.joined("prompt_chars")),
            answer_chars=_percentiles(self.joined("answer_chars")),
            labels=self._labels(),
        )

    def _labels(self) -> dict[str, int]:
        if self.answers is None or len(self.answers) > _MOST_LABELS or len(self.answers) * 5 > self.num_rows:
            return {}
        return dict(self.answers.most_common())


def boilerplate(rows: Iterator[RowText]) -> tuple[np.ndarray, Iterator[RowText]]:
    """Return the boilerplate of the first rows, and all rows, none lost."""
    first = list(islice(rows, _SAMPLE_ROWS))
    return shingles.boilerplate([row.text for row in first]), chain(first, rows)


def gather(
    rows: Iterator[RowText],
    labels_of_files: list[str],
    common: np.ndarray,
    *,
    progress: Callable[[int], None],
    against: EvalIndex | None = None,
) -> Gathered:
    """Read `rows` to their end; `against`: evaluation rows that each is compared with on the way."""
    made = Gathered(labels_of_files=labels_of_files)
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        made.files.append(np.array([row.file for row in chunk], np.int32))
        made.numbers.append(np.array([row.number for row in chunk], np.int64))
        made.texts.append(_hashes([row.text for row in chunk]))
        made.prompts.append(_hashes([row.prompt for row in chunk]))
        made.questions.append(_hashes([f"{row.system}\n{row.prompt}" if row.prompt else "" for row in chunk]))
        made.prompt_chars.append(np.array([len(row.prompt) for row in chunk], np.int32))
        made.answer_chars.append(np.array([len(row.answer) for row in chunk], np.int32))
        _near(made, chunk, common, against)
        _look_through(made, chunk)
        _count_answers(made, chunk)
        made.num_rows += len(chunk)
        progress(made.num_rows)
    return made


def _near(made: Gathered, chunk: list[RowText], common: np.ndarray, against: EvalIndex | None) -> None:
    if against is None and made.num_rows >= NEAR_ROWS:
        return
    minima_NK = shingles.signatures([row.text for row in chunk], common)
    if made.num_rows < NEAR_ROWS:
        made.minima.append(minima_NK)
    if against is not None:
        pairs = against.near(minima_NK)
        moved = Pairs(row_P=pairs.row_P, like_P=pairs.like_P + made.num_rows, similarity_P=pairs.similarity_P)
        made.near_to_eval = [similar.nearest([*made.near_to_eval, moved])]


def _look_through(made: Gathered, chunk: list[RowText]) -> None:
    for row in chunk:
        hits = dict.fromkeys(patterns.find(f"{row.system}\n{row.text}"))  # each once
        made.num_found.update({hit.kind for hit in hits})
        for hit in hits:
            if sum(entry.kind == hit.kind for entry in made.sensitive) < SHOWN:
                name = f"{made.labels_of_files[row.file]} row {row.number}"
                made.sensitive.append(SensitiveText(row=name, kind=hit.kind, secret=hit.secret, masked=hit.masked))


def _count_answers(made: Gathered, chunk: list[RowText]) -> None:
    if made.answers is None:
        return
    made.answers.update(row.answer.strip() for row in chunk)
    if len(made.answers) > _WATCHED_LABELS or any(len(answer) > _LABEL_CHARS for answer in made.answers):
        made.answers = None


def _hashes(texts: list[str]) -> np.ndarray:
    """Return a uint64 of each text but for white space; 0 for an empty one."""
    plain = [" ".join(text.split()).encode("utf-8", errors="replace") for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in plain)
    hashes = np.frombuffer(digests, np.uint64).copy()
    hashes[[not text for text in plain]] = 0
    return hashes


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    levels = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
    return {name: int(np.quantile(values, level, method="inverted_cdf")) for name, level in levels.items()}
