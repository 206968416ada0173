"""Declares the ranks of a run, and does work on rank 0 or on all of them so that none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from distft.core.errors import DistftError, PeerEnded, explain

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
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
        """Collective: return every rank's value, by rank, on every rank."""
        ...

    def gather_to_rank0(self, value: Any) -> list[Any]:
        """Collective: return every rank's value, by rank, on rank 0; nothing on the others."""
        ...

    def all_true(self, value: bool) -> bool:
        """Collective: return whether the value is true on every rank; cheap enough for each step."""
        ...

    def barrier(self) -> None:
        """Collective: return once all ranks have called it."""
        ...


class ReadGroup(Protocol):
    """Ranks that read a model's files once between them."""

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        ...

    @property
    def size(self) -> int:
        """Ranks in the group."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with that of rank `source`; collective."""
        ...

    def raise_together(self, failure: Exception | None) -> None:
        """Raise on all ranks if one has failed; collective.

        Raises:
            Exception: `failure` itself.
            PeerEnded: another rank has failed.
        """
        ...


class RankErrors(Exception):
    """At least one rank could not do its part; equal on all ranks."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"rank {rank}: {text}" for rank, text in errors.items()))


def on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """Collective: do `work` on rank 0 and return its result on every rank.

    Raises:
        DistftError: what it raised there; on the other ranks PeerEnded, with the same code.
    """
    result: Any = None
    failed: DistftError | None = None
    if ranks.rank == 0:
        try:
            result = work()
        except DistftError as error:
            failed = error
    result, why = ranks.gather((result, None if failed is None else (failed.exit_code, str(failed))))[0]
    if failed is not None:
        raise failed
    if why is not None:
        raise PeerEnded(*why)
    return result


def on_all_ranks(ranks: Ranks, work: Callable[[], T], *, to_rank0: bool = False) -> list[T]:
    """Collective: do `work` on every rank and return the results by rank, on every rank.

    Errors of the exchange itself (a peer died) are not caught: nothing can be agreed on any more.

    Args:
        ranks: all of them.
        work: this rank's.
        to_rank0: only rank 0 gets the results, which may be large; the others get nothing.

    Raises:
        RankErrors: `work` raised on some rank.
    """
    try:
        outcome = (None, work())
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        outcome = (explain(error), None)
    everyone = ranks.gather((outcome[0], None) if to_rank0 else outcome)
    errors = {rank: text for rank, (text, _) in enumerate(everyone) if text is not None}
    if errors:
        raise RankErrors(errors)
    return ranks.gather_to_rank0(outcome[1]) if to_rank0 else [value for _, value in everyone]
