"""Runs work on rank 0 and gives its result, or its error, to every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from distft.core.errors import DistftError, PeerEnded

T = TypeVar("T")


class _Group(Protocol):
    @property
    def rank(self) -> int: ...

    def gather(self, value: Any) -> list[Any]: ...


def on_rank_zero(group: _Group, work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; collective. Without it ranks would wait for one that has ended.

    Raises:
        DistftError: what it raised there; on the other ranks PeerEnded, with the same code.
    """
    said: Any = None
    failed: DistftError | None = None
    if group.rank == 0:
        try:
            said = work()
        except DistftError as error:
            failed = error
    said, why = group.gather((said, None if failed is None else (failed.exit_code, str(failed))))[0]
    if failed is not None:
        raise failed
    if why is not None:
        raise PeerEnded(*why)
    return said
