"""Who holds the others up, from two looks at everybody's record: pure, so that every case has a test."""

from __future__ import annotations

from collections.abc import Mapping

from distft.watch.records import Record


def blame(before: Mapping[int, Record], after: Mapping[int, Record], world: int) -> str:
    """The ranks that are to blame when nobody gets on, as a person would name them.

    Args:
        before: records at a first look.
        after: records some beats later.
        world: number of ranks.
    """
    missing = [f"rank {rank} (never heard of)" for rank in range(world) if rank not in after]
    left = [_left(record) for record in after.values() if record.ended is not None]
    silent = [
        f"{record.who} shows no sign of life, last seen in {_doing(record)}"
        for rank, record in after.items()
        if record.ended is None and rank in before and before[rank].beats == record.beats
    ]
    if missing or left or silent:
        return "; ".join([*left, *silent, *missing])
    alive = list(after.values())
    stuck = [record for record in alive if not record.waits]
    if len(stuck) in (0, len(alive)):  # the stacks do not tell: then the rank that has come least far
        least = min(record.passed for record in alive)
        stuck = [record for record in alive if record.passed == least]
    if len(stuck) == len(alive):
        return f"all ranks stand in {_doing(alive[0])}: the network between them, or a collective that never ends"
    return "; ".join(f"{record.who} is stuck in {_doing(record)}, the others wait for it" for record in stuck)


def _left(record: Record) -> str:
    return f"{record.who} has ended with code {record.ended}: {record.reason or 'it did not say why'}"


def _doing(record: Record) -> str:
    return record.place + (f" (at {record.at})" if record.at else "")
