"""Mixtures of data sets as the alignment handbook writes them for TRL: `dataset_mixture` and `dataset_mixer`."""

from __future__ import annotations

from typing import Any

from distft.importers.conversion import Conversion
from distft.importers.keys import carried, left, table
from distft.importers.section import Section
from distft.importers.sources import Source, add_source

MIXTURE_KEYS = table(
    datasets=carried("[[data.train]]"),
    test_split_size=left("no rows are held out by chance: split them off into a file and name it as [[data.eval]]"),
    seed=left("the order of rows comes from the recipe's seed"),
)
MIXED_KEYS = table(
    id=carried("[[data.train]] path"),
    config=carried("[[data.train]] subset"),
    split=carried("[[data.train]] split"),
    columns=left("columns that a format does not read are ignored"),
    weight=carried("[[data.train]] weight", "rows are drawn anew in each epoch here"),
)
_WEIGHT = "a share of the rows, drawn anew in each epoch here"


def set_mixture(work: Conversion, top: Section, format: str, columns: dict[str, str]) -> None:
    """Add the sources of a mixture; nothing where the file has none."""
    if top.has("dataset_mixture"):
        mixture = top.section("dataset_mixture")
        for entry in mixture.sections("datasets"):
            path = entry.text("id") or ""
            source = Source(
                path=path, format=format, subset=entry.text("config"), split=entry.text("split"), columns=columns
            )
            _add(work, "train", source, (entry, "id"), entry.number("weight", 1.0))
            work.settle(entry, MIXED_KEYS)
        work.settle(mixture, MIXTURE_KEYS)
    if top.has("dataset_mixer"):
        mixer = top.section("dataset_mixer")
        splits = top.texts("dataset_splits") or ["train"]
        for name in mixer.values:
            for split in splits:
                part = "eval" if "test" in split else "train"
                source = Source(path=name, format=format, split=split, columns=columns)
                _add(work, part, source, (mixer, name), mixer.number(name, 1.0) if part == "train" else 1.0)


def _add(work: Conversion, part: Any, source: Source, origin: tuple[Section, str], weight: float | None) -> None:
    add_source(work, part, source, origin)
    if weight not in (None, 1.0):
        index = len(work.draft.get(f"data.{part}") or ()) - 1
        work.set(f"data.{part}.{index}.weight", weight, origin, _WEIGHT)
