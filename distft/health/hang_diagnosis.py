"""Names the ranks that the others wait for, from two readings of all heartbeats; a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distft.health.heartbeat import Heartbeat

SHOWN_HOSTS = 8
"""More would hide what is said of them."""


def diagnose_hang(before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], world: int) -> str:
    """Return the ranks that are to blame when nobody gets on, as a person would name them.

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
    wait = not stuck
    if len(stuck) in (0, len(alive)):  # the stacks do not tell: then the rank that has come least far
        least = min(record.passed for record in alive)
        stuck = [record for record in alive if record.passed == least]
    between = _between(alive)
    if len(stuck) == len(alive):
        return f"all ranks stand in {_doing(alive[0])}: {between}, or a collective that never ends"
    named = "; ".join(f"{record.who} is stuck in {_doing(record)}, the others wait for it" for record in stuck)
    return f"{named}; all of them wait inside collectives, so it may be {between}" if wait else named


def _between(records: Iterable[Heartbeat]) -> str:
    """Return `the network between node1 and node2`; of many hosts the first ones."""
    hosts = sorted({str(record.process.get("host")) for record in records})
    if len(hosts) == 1:
        return "the network between them"
    shown = [*hosts[:SHOWN_HOSTS], *([f"{len(hosts) - SHOWN_HOSTS} more"] if len(hosts) > SHOWN_HOSTS else [])]
    return f"the network between {', '.join(shown[:-1])} and {shown[-1]}"


def _left(record: Heartbeat) -> str:
    return f"{record.who} has ended with code {record.ended}: {record.reason or 'it did not say why'}"


def _doing(record: Heartbeat) -> str:
    return record.place + (f" (at {record.at})" if record.at else "")
