"""The data files of a folder: plain ones, a data set of the hub as it is cloned, or one saved by `save_to_disk`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.errors import DataError
from distft.core.registry import nearest
from distft.data.readers import file_type

if TYPE_CHECKING:
    from distft.recipe.schema import SourceTable

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words by which the `datasets` library knows a split in a file's name."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the library writes about a data set: no rows."""
_DOCUMENTS = ("license", "licence", "readme", "notice", "citation", "requirements", "changelog")


def data_files(folder: Path, table: SourceTable) -> list[Path]:
    """Return the files of the split that the table names, in order.

    Raises:
        DataError: there are none, or of several splits, of which the table names none.
    """
    if table.subset is not None:
        folder = _subset(folder, table.subset)
    elif len(subsets := _subsets(folder)) > 1:
        raise DataError(
            f'{folder}: its README.md names several subsets: {", ".join(subsets)}  write subset = "{subsets[0]}" or '
            "another, or name the files by a glob"
        )
    if (folder / "dataset_dict.json").is_file():
        splits_here = _read(folder / "dataset_dict.json").get("splits") or []
        folder = folder / _chosen(folder, table.split, [str(name) for name in splits_here])
        return _saved(folder, None)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder, table.split)
    data_paths = sorted(
        path
        for path in folder.rglob("*")
        if file_type(path) is not None
        and path.is_file()
        and path.name not in _ABOUT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if any(file_type(path) != ".txt" for path in data_paths):
        data_paths = [
            path for path in data_paths if not path.stem.lower().startswith(_DOCUMENTS) or file_type(path) != ".txt"
        ]
    splits = {path: _split_of(path.relative_to(folder)) for path in data_paths}
    splits_here = list(dict.fromkeys(name for name in splits.values() if name))
    if table.split is not None:
        chosen = _chosen(folder, table.split, splits_here)
        return [path for path in data_paths if splits[path] == chosen]
    if len(splits_here) > 1:
        _chosen(folder, None, splits_here)
    return data_paths


def _saved(folder: Path, split: str | None) -> list[Path]:
    """Return the files of a data set that `save_to_disk` wrote."""
    state = _read(folder / "state.json")
    saved_split = state.get("_split")
    if split is not None and split != saved_split:
        held = f"the split {saved_split}" if saved_split else "no split"
        raise DataError(f'{folder}: holds {held}, not split = "{split}"  remove split')
    files = [folder / str(file["filename"]) for file in state.get("_data_files", [])]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{folder}: a saved data set without its files: {', '.join(missing) or 'none is named'}")
    return files


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _subsets(folder: Path) -> list[str]:
    """Return the configurations that a data set's card declares; the `datasets` library asks for one of several."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    section = re.search(r"^configs:[ ]*\n((?:[ -].*\n?|\n)*)", head[1] + "\n", re.MULTILINE) if head else None
    names = re.findall(r"config_name:[ ]*[\"']?([^\s\"']+)", section[1]) if section else []
    return list(dict.fromkeys(names))


def _subset(folder: Path, subset: str) -> Path:
    for place in (folder / subset, folder / "data" / subset):
        if place.is_dir():
            return place
    inside = sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    raise DataError(f'{folder}: has no folder for subset = "{subset}"  it has: {", ".join(inside) or "none"}')


def _chosen(folder: Path, wanted: str | None, splits: Sequence[str]) -> str:
    """Return the name under which the folder has the split that is wanted.

    Raises:
        DataError: it has none of that name; or none is wanted, and it has several.
    """
    if wanted is None:
        if len(splits) == 1:
            return splits[0]
        if not splits:
            raise DataError(f"{folder}: a saved data set without splits")
        raise DataError(f'{folder}: holds several splits: {", ".join(splits)}  write split = "{splits[0]}", or another')
    same = [name for name in splits if name == wanted] or [name for name in splits if _word(name) == _word(wanted)]
    if not same:
        meant = nearest(wanted, list(splits))
        hint = f', did you mean "{meant}"?' if meant else ""
        raise DataError(
            f'{folder}: has no split = "{wanted}"{hint}  it has: {", ".join(splits) or "files of no split"}'
        )
    return same[0]


def _split_of(path: Path) -> str:
    """Return the split that a file's name, or a folder above it, speaks of; "" none."""
    stem = path.name.split(".")[0]
    if shard := _SHARD.fullmatch(stem):
        return shard[1]
    for part in (*path.parts[:-1], stem):
        for word in re.split(r"[^a-z]+", part.lower()):
            if _word(word) != word or word in _SPLITS:
                return _word(word)
    return ""


def _word(name: str) -> str:
    return next((split for split, words in _SPLITS.items() if name.lower() in words), name)
