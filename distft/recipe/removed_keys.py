"""Keys of earlier versions that are gone: a recipe, a run folder or a checkpoint may still say what happens without."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RemovedKey:
    """A key that the recipe had, the value that has the meaning of today, and why there is no choice any more."""

    meant: object
    why: str


REMOVED_KEYS: dict[str, RemovedKey] = {
    "data.prefix_sharing": RemovedKey(meant=False, why="it saved less than 1.15 x of a step (docs/decisions/0085)"),
}
"""`table.key` -> what became of it. With its meant value it is passed over, with any other it is refused."""


def is_what_happens(key: str, value: object) -> bool:
    """Return whether `key` ("table.key") is gone, and `value` asks for what happens without it."""
    removed = REMOVED_KEYS.get(key)
    return removed is not None and type(value) is type(removed.meant) and value == removed.meant
