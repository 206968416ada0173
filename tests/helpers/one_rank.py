"""The ranks of a single process, for tests of what is collective."""

from typing import Any


class OneRank:
    """Implements `distft.core.ranks.Ranks`."""

    rank = 0
    world = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def gather_to_rank0(self, value: Any) -> list[Any]:
        return [value]

    def all_true(self, value: bool) -> bool:
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""
