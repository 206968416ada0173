"""A row as text, before the tokenizer: the two forms that every document is written in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""Half-open range of characters."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A row's text."""

    text: str
    spans: list[Span]
    """What is trained."""
    notes: dict[str, str] = field(default_factory=dict)
    """What is to be known of it: kind -> an example."""
    empty: bool = False
    """Nothing is trained, because the answers are empty."""


@dataclass(frozen=True, kw_only=True)
class RawText:
    """A row's text that no template wrote: gets the tokens that the tokenizer adds by itself, and end-of-sequence."""

    text: str
    prompt: str | None = None
    """What the text begins with: what follows its tokens is trained. None: all tokens are."""
    notes: dict[str, str] = field(default_factory=dict)
    """What is to be known of it: kind -> an example."""
