"""sha256 of every file that a run starts from: rows, weights, tokenizer. What `reproduce` compares first."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.compatibility import tokenizer_of
from distft.recipe import Recipe

if TYPE_CHECKING:
    from distft.run_folder import RunFolder

_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_ADAPTER = ("adapter_config.json",)


def rows(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return split -> its sources in the recipe's order, each {"path", "files": {label: sha256}}.

    Raises:
        DataError: a source is not there.
    """
    from distft.data.fingerprint import sources_key
    from distft.data.prepare import with_distinct_labels
    from distft.data.prepared_folder import cache_folder
    from distft.data.sources import decide_format, find

    memory = cache_folder(recipe.data) / "hashes"
    by_split: dict[str, list[dict[str, Any]]] = {}
    for split, tables in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        sources = with_distinct_labels([find(table) for table in tables])
        keys = sources_key(sources, [decide_format(source) for source in sources], memory)
        by_split[split] = [
            {"path": table.path, "files": {label: str(digest) for label, digest in key["files"]}}
            for table, key in zip(tables, keys, strict=True)
        ]
    return by_split


def weights(recipe: Recipe) -> dict[str, Any]:
    """Return {"path", "folder", "revision", "files": {name: sha256}, "tokenizer": {name: sha256}}.

    Hashes of one host are remembered by a file's size and time. Files of the hub's cache are called by their sha256
    there, and taken at their word.

    Raises:
        RecipeError: the model is not there.
        DataError: the tokenizer is not.
    """
    from distft.core.tokenizer_files import TOKENIZER_FILES, tokenizer_folder
    from distft.data.prepared_folder import cache_folder
    from distft.model.load import find_folder

    memory = cache_folder(recipe.data) / "hashes"
    folder = find_folder(recipe.model)
    patterns = _WEIGHTS if recipe.model.init == "pretrained" else ("config.json",)
    files = sorted({file for pattern in (*patterns, *_ADAPTER) for file in folder.glob(pattern)})
    path, revision = tokenizer_of(recipe)
    tokens = tokenizer_folder(path, revision)
    return {
        "path": recipe.model.path,
        "folder": str(folder),
        "revision": recipe.model.revision,
        "init": recipe.model.init,
        "files": {file.name: _hash(file, memory) for file in files},
        "tokenizer": {name: _hash(tokens / name, memory) for name in TOKENIZER_FILES if (tokens / name).is_file()},
    }


def hash_inputs(recipe: Recipe, folder: RunFolder) -> threading.Thread:
    """Write `weights` into the manifest while the run goes on: hashing 140 GB takes minutes, and nobody waits for it.

    Returns:
        The thread, to be joined at the end of the run.
    """
    from distft.core.errors import DistftError

    def work() -> None:
        try:
            folder.learn({"model": weights(recipe)})
        except (DistftError, OSError) as error:  # the run itself will say so, or need not care
            folder.learn({"model": {"path": recipe.model.path, "files": {}, "why": str(error)}})

    thread = threading.Thread(target=work, name="hashes", daemon=True)
    thread.start()
    return thread


def _hash(file: Path, memory: Path) -> str:
    from distft.data.fingerprint import file_hash

    real = file.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    return file_hash(file, memory)
