"""What a model's config.json alone says of it: its modules, and how many positions it was made for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core import hub
from distft.core.errors import Problem, RecipeError

if TYPE_CHECKING:
    from distft.model.heads.spec import HeadSpec
    from distft.recipe.schema import ModelTable

_EXTENDING = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of rope scaling: positions up to `factor` times the original ones."""


def find_config(table: ModelTable) -> Path:
    """Return the folder with the model's config.json; of a model on the hub nothing else is fetched.

    Raises:
        RecipeError: neither a folder with a config.json nor a hub id that can be had.
    """
    return find(table, ["config.json"])


def find(table: ModelTable, wanted: list[str]) -> Path:
    """Return the model's folder; of a model on the hub the files that match `wanted` are fetched.

    Raises:
        RecipeError: neither a folder with a config.json nor a hub id that can be had.
    """
    folder = Path(table.path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or table.path.startswith((".", "/", "~")) or table.path.count("/") != 1:
        problem = "no such folder"
        if folder.is_dir():
            contents = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
            problem = f"the folder has no config.json (it holds: {contents or 'nothing'})"
        message = f'[model] path = "{table.path}"  {problem}'
        raise RecipeError("recipe", [Problem(message=message, fix="a folder with config.json, or a hub id owner/name")])
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return hub.snapshot(table.path, table.revision, wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        problem = str(error).strip().splitlines()[0]
        message = f'[model] path = "{table.path}"  no such folder here, and the hub did not give it: {problem}'
        fix = "log in for gated models, or download it once and give the folder"
        raise RecipeError("recipe", [Problem(message=message, fix=fix)]) from error


def build(config: Any, head: HeadSpec | None = None) -> Any:
    """Return the transformers model without values, to be asked for its modules."""
    import torch

    from distft.model import load

    with torch.device("meta"):
        return load.untrained(config, "eager", head)


def has_positions(folder: Path, longest: int) -> bool:
    """Return whether config.json states a number of positions that is enough for `longest` tokens."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        limit = raw.get("text_config", raw).get("max_position_embeddings")
        return isinstance(limit, int) and longest <= limit
    return False


def num_positions(config: Any) -> int | None:
    """Return the positions of the longest text that a model was made for; None when nothing limits them.

    A learned embedding has no row beyond them. A rotary one computes them, and has never seen them. Scaled ropes
    (https://arxiv.org/abs/2309.00071 and others) reach `factor` times as far as the original positions.
    """
    text = config.get_text_config()
    attention = getattr(text, "attn_config", None)  # MPT's
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        return None
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(limit, int):
        return None
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        if rope.get("rope_type") in _EXTENDING:
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limit = max(limit, int((original or limit) * (rope.get("factor") or 1.0)))
    return limit


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters: one set, or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (rope for rope in parameters.values() if isinstance(rope, dict))
