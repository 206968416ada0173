"""Before a start on several nodes: the short form of `distft doctor` on each, and which of them to do without."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.cluster.slurm import Allocation
from distft.core.files import parse_json_object

LIMIT_S = 300.0
"""Imports from a busy file system included; a node that takes longer would keep the run waiting too."""
JOIN_S = 120.0
ENDING_S = 10.0
PORT_OFFSET = 5000
"""The run's own port must be free when the run comes."""
_SHIELD = 'trap "" USR1; exec "$@"'
"""SIGUSR1 is for the batch script, which then ends this."""


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What the site calls too slow, in GB/s; None: nothing is."""

    link: float | None = None
    disk: float | None = None


@dataclass(frozen=True, kw_only=True)
class Examined:
    """The doctor's result."""

    ready: bool
    """Whether a run would work."""
    messages: tuple[str, ...]
    """What is wrong, and the fix, one line each, for a person."""
    sick: tuple[str, ...]
    """Nodes to blame, as Slurm calls them; empty: no node in particular."""

    @property
    def why(self) -> str:
        """The reason in one line."""
        return self.messages[0] if self.messages else "the doctor said nothing"


def command(given: Allocation, num_nodes: int, run_dir: Path, floors: Floors) -> list[str]:
    """Return the command that starts one process on each of the nodes that the run will use."""
    options = [*("--output-dir", str(run_dir)), *("--per-host", str(given.per_node)), *("--join-s", f"{JOIN_S:.0f}")]
    for name, value in (("--link-floor", floors.link), ("--disk-floor", floors.disk)):
        options += [] if value is None else [name, f"{value:g}"]
    return [
        "srun",
        f"--nodes={num_nodes}",
        f"--ntasks={num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={given.cpus_per_node}",
        *("bash", "-c", _SHIELD, "distft-doctor"),
        *(sys.executable, "-m", "distft.doctor", "--short", "--json", *options),
    ]


def examine(
    command: Sequence[str], env: Mapping[str, str], nodes: Sequence[str], stop_requested: Callable[[], bool]
) -> Examined | None:
    """Run it to its end; None when the job was asked to stop meanwhile."""
    until = time.monotonic() + LIMIT_S
    with tempfile.TemporaryFile("w+") as output:
        step = subprocess.Popen(list(command), env=dict(env), stdout=output)
        while step.poll() is None and time.monotonic() < until and not stop_requested():
            time.sleep(0.2)
        status = step.poll()
        if status is None:
            _end(step)
            if stop_requested():
                return None
        output.seek(0)
        return read(output.read(), status, nodes)


def read(output: str, status: int | None, nodes: Sequence[str]) -> Examined:
    """Read what the processes printed: rank 0 a report on all, a process that could not reach it one on itself.

    Args:
        output: an object a line, other programs' lines between them.
        status: of srun; None when it had to be ended.
        nodes: that were examined.
    """
    reports = list(_reports(output))
    wrong = [row for report in reports for row in report["findings"] if row["verdict"] == "fail"]
    hosts = [host for row in wrong for host in row["hosts"]]
    messages = [f"{row['check']}: {row['found']}; fix: {row['fix']}" for row in wrong]
    if not any(report["world"] == len(nodes) for report in reports):
        heard = {host for report in reports for host in report["hosts"]}
        silent = [node for node in nodes if not any(_is(node, host) for host in heard)]
        late = f"no answer in {LIMIT_S:.0f} s" if status is None else f"srun ended with status {status}"
        if silent or not reports:
            messages.append(f"the doctor was not heard of on {', '.join(silent)}: {late}")
            hosts += silent
    sick = tuple(node for node in nodes if any(_is(node, host) for host in hosts))
    return Examined(ready=not messages and status == 0, messages=tuple(dict.fromkeys(messages)), sick=sick)


def can_be_replaced(sick: Sequence[str], nodes: Sequence[str]) -> bool:
    """Return whether it is these nodes' fault: what most nodes have in common follows the job to others."""
    return 0 < len(sick) <= len(nodes) // 2


def _reports(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        report = parse_json_object(line)
        if report is not None and "bad_hosts" in report:
            yield report


def _is(node: str, host: str) -> bool:
    """Return whether Slurm's name of a node and the node's own, perhaps with its domain, are of one node."""
    return node == host or node.partition(".")[0] == host.partition(".")[0]


def _end(step: subprocess.Popen[bytes]) -> None:
    step.terminate()
    try:
        step.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        step.kill()
        step.wait()
