"""The examination by several processes: cheap looks first, then who has come, then what they measure together.

Whoever cannot come to the others says so itself; everything else is said once, by rank 0.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from distft.core.errors import MachineError
from distft.doctor.checks import CHECKS
from distft.doctor.finding import Check, Facts, Finding, Here, Seen, fail, names, run_judge, run_look
from distft.doctor.findings_table import Report

if TYPE_CHECKING:
    from distft.engine.rendezvous import Rendezvous

LIMIT_S, SHORT_LIMIT_S = 180.0, 60.0
"""Seconds for one check of those that are made together; after that somebody hangs in it."""
LINGER_S = 5.0
"""Rank 0 keeps the store open for the others' last look at it."""
NETWORK_FIX = (
    "both hosts must reach that port: firewall, MASTER_ADDR, MASTER_PORT, and NCCL_SOCKET_IFNAME/GLOO_SOCKET_IFNAME"
)


class Together:
    """One process of the several."""

    def __init__(self, here: Here, *, as_json: bool, join_s: float) -> None:
        """`join_s`: how long the others may take to come."""
        self._here, self._as_json, self._join_s = here, as_json, join_s
        self._checks = [check for check in CHECKS if check.short or not here.options.short]
        self._report = Report(here.hosts)
        self._now = "processes"

    def examine(self) -> int:
        """Run all checks and print the table; return the exit code, equal on all ranks that got that far."""
        from distft.engine.rendezvous import Rendezvous

        facts = {check.name: run_look(check, self._here) for check in self._checks if not check.together}
        try:
            rendezvous = Rendezvous.open(self._here.rank, self._here.world, self._join_s)
            rendezvous.announce(self._here.hosts[0])
            rendezvous.put(f"facts/{self._here.rank}", json.dumps({"host": self._here.hosts[0], "facts": facts}))
            decision = (
                self._decide(rendezvous) if self._here.rank == 0 else rendezvous.wait_for("told", 2 * self._join_s)
            )
            if decision is None:
                raise MachineError("rank 0 has looked at nothing and said nothing")
        except (MachineError, RuntimeError) as error:
            return self._alone(facts, str(error).splitlines()[0])
        word = json.loads(decision)
        if not word["go"]:
            rendezvous.put(f"bye/{self._here.rank}", "")
            if self._here.rank == 0:
                rendezvous.wait_for_all((f"bye/{rank}" for rank in word["came"]), LINGER_S)
            return word["code"]
        self._report.hosts = tuple(word["hosts"])
        return self._measure(rendezvous)

    def _decide(self, rendezvous: Rendezvous) -> str:
        """Wait for all ranks on rank 0, judge what each saw alone, and decide whether they go on."""
        world = range(self._here.world)
        heard = rendezvous.wait_for_all((f"facts/{rank}" for rank in world), self._join_s)
        reports = {rank: json.loads(heard[f"facts/{rank}"]) for rank in world if f"facts/{rank}" in heard}
        self._report.hosts = tuple(word["host"] for word in reports.values())
        stop = len(reports) < len(world)
        if stop:
            self._report.add("processes", [_absent(self._here.world, self._report.hosts, reports, self._here.env)])
        for check in self._checks:
            if not check.together and not (stop and check.name == "processes"):
                seen = [Seen(rank=r, host=w["host"], facts=w["facts"][check.name]) for r, w in reports.items()]
                findings = run_judge(check, seen, self._here.options)
                self._report.add(check.name, findings)
                stop = stop or (check.gate and any(finding.verdict.value == "fail" for finding in findings))
        if stop:
            self._print()
        decision = {"go": not stop, "code": self._report.code, "came": list(reports), "hosts": self._report.hosts}
        rendezvous.put("told", json.dumps(decision))
        return json.dumps(decision)

    def _measure(self, rendezvous: Rendezvous) -> int:
        """Form a process group on all ranks and run the checks that need one."""
        from distft.engine import processes
        from distft.engine.bandwidth import ProbeRanks

        limit_s = SHORT_LIMIT_S if self._here.options.short else LIMIT_S
        self._now = "network"
        with Deadline(self._join_s, self._stuck):
            try:
                process_info = processes.join(10 * limit_s, store=rendezvous.store)
                group = ProbeRanks(process_info)
                group.gather(None)
            except (MachineError, RuntimeError) as error:
                return self._broken(error)
        here = replace(self._here, hosts=self._report.hosts, group=group)
        for check in self._checks:
            if check.together:
                self._now = check.name
                with Deadline(limit_s, self._stuck):
                    try:
                        self._run_check(check, here)
                    except RuntimeError as error:
                        return self._broken(error)
        if here.rank == 0:
            self._print()
        code = group.gather(self._report.code)[0]
        processes.leave(process_info)
        return code

    def _run_check(self, check: Check, here: Here) -> None:
        assert here.group is not None
        everyone = here.group.gather(run_look(check, here))
        if here.rank == 0:
            seen = [
                Seen(rank=r, host=host, facts=facts)
                for (r, facts), host in zip(enumerate(everyone), here.hosts, strict=True)
            ]
            self._report.add(check.name, run_judge(check, seen, here.options))

    def _alone(self, facts: Mapping[str, Facts], why: str) -> int:
        """Return what this process could see by itself, when it cannot come to the others."""
        here = self._here
        for check in self._checks:
            if not check.together and check.name != "processes":
                seen = [Seen(rank=here.rank, host=here.hosts[0], facts=facts[check.name])]
                bad = [f for f in run_judge(check, seen, here.options) if f.verdict.value != "ok"]
                self._report.add(check.name, bad)
        self._report.add("network", [fail(why, NETWORK_FIX, here.hosts)])
        self._print()
        return self._report.code

    def _broken(self, error: BaseException) -> int:
        message = f"rank {self._here.rank} on {self._here.hosts[0]}: {str(error).splitlines()[0]}"
        self._report.add(self._now, [fail(message, NETWORK_FIX)])
        self._print()
        return self._report.code

    def _stuck(self, limit_s: float) -> None:
        """End the process; called beside a main thread that does not come back."""
        if self._here.rank != 0:
            time.sleep(LINGER_S)  # rank 0's word first
        message = f"no answer in {limit_s:.0f} s: a process hangs, or what it sends does not arrive"
        self._report.add(self._now, [fail(message, NETWORK_FIX)])
        self._print()
        os._exit(self._report.code)

    def _print(self) -> None:
        rank = self._here.rank
        if rank and not self._as_json:
            print(f"rank {rank} ({self._here.hosts[0]}):", file=sys.stderr)
        print(self._report.text(as_json=self._as_json), file=sys.stderr if rank and not self._as_json else sys.stdout)
        sys.stdout.flush()
        sys.stderr.flush()


class Deadline:
    """`with Deadline(seconds, late):` calls `late(seconds)` in a thread if the block takes longer."""

    def __init__(self, seconds: float, late: Callable[[float], None]) -> None:
        self._timer = threading.Timer(seconds, late, [seconds])
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()


def _absent(world: int, hosts: tuple[str, ...], reported: Iterable[int], env: Mapping[str, str]) -> Finding:
    came = list(reported)
    missing = [rank for rank in range(world) if rank not in came]
    without = [host for host in _expected(env) if host not in hosts]
    who = f"; not heard of: rank{'s' if len(missing) > 1 else ''} {names(missing)}"
    who += f" and {names(without)}" if without else ""
    on = names(
        f"{host} ({', '.join(str(r) for r, h in zip(came, hosts, strict=True) if h == host)})"
        for host in dict.fromkeys(hosts)
    )
    return fail(
        f"{len(came)} of {world} processes came: {on}{who}",
        "see the launcher's output on the others; each machine needs the same number of processes, its own "
        "--machine_rank, and a way to MASTER_ADDR:MASTER_PORT",
        without,
    )


def _expected(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the hosts that should have come, where a scheduler says so."""
    from distft.cluster.slurm import host_names

    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not listed:
        return ()
    try:
        return host_names(listed)
    except MachineError:
        return ()
