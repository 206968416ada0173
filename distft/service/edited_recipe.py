"""A job's recipe that somebody has edited: which keys may be another's than those that the service wrote.

The service decides what a job reads, where it writes and what is executed; people decide how it is trained.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from distft.core.errors import Problem, RecipeError
from distft.recipe.lines import KeyPath, find_lines
from distft.service.job_folder import JobFolder

FREE_TABLES = ("method", "optim", "schedule", "train", "objective", "guard", "best")
"""Tables whose numbers and switches may be changed."""
FREE_KEYS = (
    "checkpoint.every_steps", "checkpoint.keep", "eval.every_steps", "data.max_length", "data.packing", "seed",
    "rollout.answers_per_prompt", "rollout.max_new_tokens", "rollout.temperature", "rollout.top_p", "rollout.updates",
    "rollout.refill", "rollout.mask_truncated",
)  # fmt: skip
FREE_NAMES = ("method.name", "method.target_modules", "optim.name", "schedule.name")
"""Keys whose texts may be changed: none of them names a file, a model or a program."""
SOURCE = "recipe.toml"


def changed_keys(written: str, edited: str) -> list[str]:
    """Return the keys whose values differ from those that the service wrote.

    Raises:
        RecipeError: it is no TOML, or changes a key that is not free; lists all of these, with their lines.
    """
    try:
        ours, theirs = dict(_flat(tomllib.loads(written))), dict(_flat(tomllib.loads(edited)))
    except ValueError as error:
        place = re.search(r"line (\d+)", str(error))
        line = int(place[1]) if place else None
        raise RecipeError(SOURCE, [Problem(message=f"is not valid TOML: {error}", line=line)]) from None
    lines = find_lines(edited)
    keys = [key for key in {**ours, **theirs} if ours.get(key, _NONE) != theirs.get(key, _NONE)]
    problems: list[Problem] = []
    for key in keys:
        values = (value for side in (ours, theirs) if (value := side.get(key, _NONE)) is not _NONE)
        if not _is_free(_dotted(key), list(values)):
            line = next((lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in lines), None)
            problems.append(
                Problem(
                    message=f"{_dotted(key)}  is decided by the service",
                    line=line if key in theirs else None,
                    fix=f"free are the numbers and switches of {', '.join(FREE_TABLES)}, and {', '.join(_FREE)}",
                )
            )
    if problems:
        raise RecipeError(SOURCE, problems)
    return sorted(_dotted(key) for key in keys)


def shown(written: str, folder: JobFolder) -> str:
    """Return a recipe for people: with marks in the place of names and paths, which are another job's in its folder."""
    text = written.replace(str(folder.path), _FOLDER).replace(str(folder.path.parent.parent), _DATA)
    return text.replace(folder.job_id, _JOB)


def from_shown(text: str, folder: JobFolder) -> str:
    """Return a recipe that was shown and edited as this folder's."""
    text = text.replace("\r\n", "\n").replace(_FOLDER, str(folder.path)).replace(_DATA, str(folder.path.parent.parent))
    return text.replace(_JOB, folder.job_id)


_FOLDER, _DATA, _JOB = "{folder}", "{data}", "{job}"
_NONE = object()
_FREE = (*FREE_KEYS, *FREE_NAMES)


def _dotted(key: KeyPath) -> str:
    return ".".join(map(str, key))


def _is_free(key: str, values: list[Any]) -> bool:
    if key in _FREE:
        return True
    plain = all(isinstance(value, bool | int | float) for value in values)
    return plain and key.partition(".")[0] in FREE_TABLES


def _flat(table: Mapping[Any, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every value with its key; a list is a value, and a list of tables many."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*above, key))
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            yield from _flat(dict(enumerate(value)), (*above, key))
        else:
            yield (*above, key), value
