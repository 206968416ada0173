"""What becomes of the keys of another tool, as tables: name of the key -> where it goes, or why it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distft.recipe.other_words import OTHER_WORDS

Fate = Literal["carried", "changed", "left", "refused"]
OFF: tuple[Any, ...] = (None, False, "", 0, [], {}, "no", "none", "off", "false")
"""Values by which a key asks for nothing."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What becomes of one key."""

    fate: Fate
    """carried: the same here; changed: carried over with another meaning; left: nothing here does it, and the trained
    result is the same kind; refused: the result would be another."""
    home: str = ""
    """Where it goes in a recipe, as documentation shows it."""
    text: str = ""
    """What is different, why there is no counterpart, or what to do."""
    off: tuple[Any, ...] = OFF
    """Values that ask for nothing: a key that is left or refused is then not worth a word."""

    def asks(self, value: object) -> bool:
        """Whether a value of this key asks for something."""
        return not any(value is off if isinstance(off, bool) or off is None else value == off for off in self.off)


KeyTable = Mapping[str, Key]


def carried(home: str = "", text: str = "") -> Key:
    """Return the fate of a key that a recipe has: at `home`, or where `OTHER_WORDS` says its name goes."""
    return Key(fate="changed" if text else "carried", home=home, text=text)


def left(text: str, *, off: tuple[Any, ...] = OFF) -> Key:
    """Return the fate of a key without a counterpart whose absence changes no method."""
    return Key(fate="left", text=text, off=off)


def refused(text: str, *, off: tuple[Any, ...] = OFF) -> Key:
    """Return the fate of a key without which another model would be trained."""
    return Key(fate="refused", text=text, off=off)


def table(**keys: Key) -> dict[str, Key]:
    """Return a table; a key that is carried and names no home is one of `OTHER_WORDS`."""
    return {name: _at_home(name, key) for name, key in keys.items()}


def group(names: str, key: Key) -> dict[str, Key]:
    """Return several keys, separated by spaces, of one fate."""
    return table(**dict.fromkeys(names.split(), key))


def _at_home(name: str, key: Key) -> Key:
    if key.fate not in ("carried", "changed") or key.home:
        return key
    return Key(fate=key.fate, home=OTHER_WORDS[name], text=key.text, off=key.off)
