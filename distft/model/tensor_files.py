"""The *.safetensors files of a model folder: which there are, what their headers say, and tensors read by name.

Headers are read first, without the library: a file that was cut, a Git LFS pointer or an index that names a tensor its
file does not hold is known by the file's name before anything is built from it.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from distft.core.errors import Problem, RecipeError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def mistake(message: str, fix: str) -> RecipeError:
    """Return what is wrong with a model folder, as an error of the recipe that names it."""
    return RecipeError("recipe", [Problem(message=message, fix=fix)])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor, as its file's header describes it."""

    file: Path
    dtype: str
    """The format's name, such as BF16 or F8_E4M3."""
    shape: tuple[int, ...]


class TensorFiles:
    """Every tensor of a folder's weight files, read lazily by name from mapped files."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            RecipeError: there are no weights that can be read, or a file is damaged, incomplete or missing.
        """
        self.entries: dict[str, Entry] = {}
        named, files = _weight_files(folder)
        for file in files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise mistake(
                        f"{name} is in {self.entries[name].file} and in {file}",
                        "keep the files of one model in a folder, with their index",
                    )
                self.entries[name] = entry
        for name, file in named.items():
            if name not in self.entries or self.entries[name].file != folder / file:
                raise mistake(
                    f"{folder / INDEX} says that {name} is in {file}, which does not hold it",
                    "fetch index and files again, from one revision",
                )
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Every tensor in the files."""
        return frozenset(self.entries)

    def read(self, name: str) -> Tensor:
        """Read one tensor; it is a view of its mapped file."""
        file = self.entries[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt").__enter__()
        return self._open[file].get_tensor(name)

    def close(self) -> None:
        """Unmap all files: pages that were read no longer count as this process's; the next read maps again."""
        self._open.clear()


def _weight_files(folder: Path) -> tuple[Mapping[str, str], list[Path]]:
    """Return (tensor -> file by the index, empty without one; every file to read), in transformers' order of names."""
    if (folder / INDEX).is_file():
        named = _index(folder / INDEX)
        missing = sorted({name for name in named.values() if not (folder / name).is_file()})
        if missing:
            raise mistake(f"{folder}: the index names files that are not there: {', '.join(missing)}", "fetch them")
        return named, [folder / name for name in sorted(set(named.values()))]
    if (folder / SINGLE).is_file():
        return {}, [folder / SINGLE]
    shards = sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))
    if shards:
        return {}, _complete(folder, shards)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise mistake(
            f"{folder}: the weight files have other names than transformers gives them: {', '.join(others[:4])}",
            f"name a single file {SINGLE}; of several files fetch {INDEX} too",
        )
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    problem = f"only pickled weights ({pickles[0]}), which can run code" if pickles else "no *.safetensors weights"
    raise mistake(
        f"{folder}: {problem}",
        'convert to safetensors, or set [model] init = "random" to start from the config alone',
    )


def _index(path: Path) -> Mapping[str, str]:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise mistake(
            f"{path}: {_pointer_or(path, 'not an index: a JSON object with weight_map is expected')}", _AGAIN
        ) from error
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()) or not named:
        raise mistake(f"{path}: weight_map does not map tensors to files", _AGAIN)
    return named


def _complete(folder: Path, shards: list[Path]) -> list[Path]:
    """Return the shards of a model without an index, if their names say that none is missing."""
    matches = [_SHARD.fullmatch(path.name) for path in shards]
    counts = {int(match[2]) for match in matches if match}
    if len(counts) > 1:
        raise mistake(f"{folder}: shards of {' and of '.join(map(str, sorted(counts)))} files, and no {INDEX}", _AGAIN)
    [count] = counts
    missing = sorted(set(range(1, count + 1)) - {int(match[1]) for match in matches if match})
    if missing:
        raise mistake(
            f"{folder}: no {INDEX}, and of {count} shards these are not there: {', '.join(map(str, missing[:6]))}",
            "fetch them",
        )
    return shards


_AGAIN = "fetch the folder again (of a git clone: git lfs pull)"


def _pointer_or(path: Path, otherwise: str) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    return "a Git LFS pointer, not the file itself" if start.startswith(b"version https://git-lfs") else otherwise


def read_header(path: Path) -> dict[str, Entry]:
    """Read the entries of the file's header.

    Raises:
        RecipeError: the file is empty, a pointer, cut, or not in the format.
    """
    size = path.stat().st_size
    if size == 0:
        raise mistake(f"{path}: the file is empty", _AGAIN)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
            raise mistake(f"{path}: {_pointer_or(path, 'not a safetensors file')}", _AGAIN)
        text = file.read(length)
    if len(text) < length:
        raise mistake(f"{path}: the file ends inside its header, after {size:,} bytes", _AGAIN)
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        entries = {
            name: Entry(file=path, dtype=fields["dtype"], shape=tuple(fields["shape"])) for name, fields in raw.items()
        }
        end = max((fields["data_offsets"][1] for fields in raw.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise mistake(f"{path}: the header is not safetensors'", _AGAIN) from error
    if size != 8 + length + end:
        problem = "cut" if size < 8 + length + end else "longer than its header says"
        raise mistake(f"{path}: the file is {problem}: {size:,} of {8 + length + end:,} bytes", _AGAIN)
    return entries
