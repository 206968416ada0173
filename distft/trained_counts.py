"""How many parameters a recipe trains, of how many: counted on the model without values, before anything runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from distft import compatibility
from distft.core.files import replace_json
from distft.core.tokenizer_files import TOKENIZER_FILES, tokenizer_folder
from distft.data.prepared_folder import cache_folder
from distft.model import skeleton
from distft.recipe import Recipe

_SOURCES = Path(skeleton.__file__).parent
"""The room whose code makes the model."""


def trained_counts(recipe: Recipe) -> tuple[int, int]:
    """Return (trained, all) parameters, tied ones once; kept by config, method, versions and code.

    Raises:
        RecipeError: the method does not fit the model.
    """
    with compatibility.with_model_line(recipe):
        folder = skeleton.find_config(recipe.model)
    method, head = recipe.method, recipe.objective.spec.head_of(recipe.objective.params)
    parts = [(folder / "config.json").read_bytes(), head.encode(), version("transformers").encode()]
    parts.append(json.dumps([method.name, method.params.model_dump(mode="json")], sort_keys=True).encode())
    if any(recipe.model.added) or getattr(method.params, "trainable_tokens", ()):  # the ids are the tokenizer's
        longer = Path(tokenizer_folder(*compatibility.tokenizer_of(recipe)))
        parts += [(longer / name).read_bytes() for name in TOKENIZER_FILES if (longer / name).is_file()]
        parts.append(json.dumps([recipe.model.new_rows, recipe.model.pad_vocabulary]).encode())
    parts += [file.read_bytes() for file in sorted(_SOURCES.rglob("*.py"))]
    kept = cache_folder(recipe.data) / "counts" / f"{hashlib.sha256(b''.join(parts)).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        trained, total = json.loads(kept.read_text(encoding="utf-8"))
        return int(trained), int(total)
    from distft.plan import inventory

    with compatibility.with_model_line(recipe):
        found = inventory.read(recipe.model, folder, method.spec, method.params, head=head)
    counts = (found.trained, found.total)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_json(kept, list(counts))
    return counts
