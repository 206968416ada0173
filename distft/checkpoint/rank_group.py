"""The ranks of a run as the checkpoint room sees them; an engine implements it over its host-side process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from distft.checkpoint.durable import explain

T = TypeVar("T")


class RankGroup(Protocol):
    """Small host objects exchanged between all ranks. Only the thread that trains calls it."""

    @property
    def rank(self) -> int:
        """0-based."""
        ...

    @property
    def world(self) -> int:
        """Number of ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Collective: every rank's value, by rank, on every rank."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Collective: every rank's value, by rank, on rank 0; nothing on the others."""
        ...

    def all_say(self, yes: bool) -> bool:
        """Collective: whether every rank says yes; cheap enough for each step."""
        ...

    def barrier(self) -> None:
        """Collective: returns once all ranks have called it."""
        ...


class Alone:
    """The group of a single process."""

    rank = 0
    world = 1

    def gather(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]

    def collect(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]

    def all_say(self, yes: bool) -> bool:
        """What it says itself."""
        return yes

    def barrier(self) -> None:
        """Nobody to wait for."""


class RankErrors(Exception):
    """At least one rank could not do its part; equal on all ranks."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"rank {rank}: {text}" for rank, text in errors.items()))


def on_all_ranks(group: RankGroup, work: Callable[[], T], *, for_first: bool = False) -> list[T]:
    """Collective: do `work` on every rank and tell all ranks how it went, so that none waits for one that failed.

    Errors of the group itself (a peer died) are not caught: nothing can be agreed on any more.

    Args:
        group: all ranks.
        work: this rank's.
        for_first: only rank 0 is given what the others made, which may be large; they get nothing.

    Raises:
        RankErrors: `work` raised on some rank.
    """
    try:
        mine = (None, work())
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        mine = (explain(error), None)
    everyone = group.gather((mine[0], None) if for_first else mine)
    errors = {rank: text for rank, (text, _) in enumerate(everyone) if text is not None}
    if errors:
        raise RankErrors(errors)
    return group.collect(mine[1]) if for_first else [value for _, value in everyone]
