"""Clocks of hosts against rank 0's, and of the shared folder's server against them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distft.core import faults
from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, by_host, fail, names, ok, warn
from distft.doctor.places import Probe

LARGE_S, FATAL_S = 1.0, 60.0
"""Past a minute `distft status` takes a living run for a lost one, and past five munge refuses Slurm's messages."""


def look(here: Here) -> Facts:
    """Compare the clocks of rank 0 and the first rank of every other host; then that of the shared folder."""
    ahead: dict[int, float] = {}
    if here.group is not None:
        for leader in here.leaders[1:]:
            if here.rank in (0, leader):
                ahead_s = here.group.clock_ahead_s(leader)
                ahead |= {} if ahead_s is None else {leader: ahead_s}
    facts: Facts = {"ahead_s": ahead, "file_s": None}
    if here.rank == 0:
        with Probe(here.options.shared) as probe:
            probe.write("clock", b"now")
            facts["file_s"] = probe.modified("clock") - faults.now("clock", rank=0)
    return facts


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether the clocks are close enough together."""
    ahead = {seen[0].host: 0.0} | {
        next(process.host for process in seen if process.rank == int(rank)): seconds
        for rank, seconds in seen[0].facts["ahead_s"].items()
    }
    usual = sorted(ahead.values())[(len(ahead) - 1) // 2]
    off = {host: seconds - usual for host, seconds in ahead.items() if abs(seconds - usual) > LARGE_S}
    fatal = {host: seconds for host, seconds in off.items() if abs(seconds) > FATAL_S}
    if off:
        message = names(
            f"{host} is {abs(s):.1f} s {'ahead of' if s > 0 else 'behind'} the others" for host, s in off.items()
        )
        say, hosts = (fail, fatal) if fatal else (warn, off)
        yield say(message, "let one time server set all clocks: chronyc tracking, timedatectl", hosts)
    file_s = seen[0].facts["file_s"]
    if file_s is not None and abs(file_s) > LARGE_S and not off:
        side = "ahead of" if file_s > 0 else "behind"
        yield warn(
            f"the shared folder's clock is {abs(file_s):.1f} s {side} {seen[0].host}'s",
            "let one time server set the file server's clock too: distft status reads ages of files",
        )
    elif not off:
        spread = max(ahead.values()) - min(ahead.values())
        between = f"{1000 * spread:.1f} ms between {len(by_host(seen))} hosts, " if len(ahead) > 1 else ""
        yield ok(f"{between}{1000 * abs(file_s or 0.0):.0f} ms to the shared folder")


CHECK = Check(name="clock", look=look, judge=judge, together=True)
