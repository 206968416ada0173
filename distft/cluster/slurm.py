"""What Slurm gave this job, and the few things we ask Slurm to do."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distft.cluster.restart_policy import Phase
from distft.core.errors import MachineError
from distft.core.host import slurm_job

PORTS = range(20000, 32000)
"""Ports for the rendezvous: below what Linux hands out to outgoing connections (32768 and up)."""
ALIVE = ("RUNNING", "SIGNALING", "SUSPENDED", "CONFIGURING", "RESIZING")
"""States of a job that goes on; SIGNALING is one that is just being sent SIGCONT."""
ASK_S = 30.0
"""How long the controller may take to answer."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One start of one batch job."""

    job: str
    """The job as scontrol takes it."""
    restart: int
    """0: the first."""
    nodes: tuple[str, ...]
    """Host names; the first one runs the batch script."""
    per_node: int
    """Processes on each."""
    gpus_per_node: int
    cpus_per_node: int
    """That every node has at least."""
    partition: str

    @property
    def cpus_per_process(self) -> int:
        """A process's share of its node."""
        return max(1, self.cpus_per_node // self.per_node)


def allocation(env: Mapping[str, str], nodes: tuple[str, ...]) -> Allocation:
    """Read the allocation from Slurm's variables; `nodes` are the names that its node list stands for.

    One process per GPU, whatever --ntasks-per-node says; without GPUs --ntasks-per-node, else one.

    Raises:
        MachineError: this is no batch job.
    """
    job = slurm_job(env)
    if job is None:
        raise MachineError("this is started by sbatch: sbatch [options] cluster/train.sbatch RECIPE [train options]")
    gpus = int(env.get("SLURM_GPUS_ON_NODE", "0"))
    per_node = gpus or int(env.get("SLURM_NTASKS_PER_NODE", "1"))
    return Allocation(
        job=job,
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),  # unset in the first run
        nodes=nodes,
        per_node=per_node,
        gpus_per_node=gpus,
        cpus_per_node=_least(env.get("SLURM_JOB_CPUS_PER_NODE", "1")),
        partition=env.get("SLURM_JOB_PARTITION", ""),
    )


def _least(cpus_per_node: str) -> int:
    """Return the smallest of "32(x3),64": what every node has."""
    return min(int(part) for part in re.sub(r"\(x\d+\)", "", cpus_per_node).split(","))


def host_names(node_list: str) -> tuple[str, ...]:
    """Return the names behind "node[1-3,7]".

    Raises:
        MachineError: scontrol is not there, or does not understand it.
    """
    return tuple(_scontrol("show", "hostnames", node_list).split())


def phase(job: str) -> Phase:
    """Return what Slurm is doing with a job that has ended a step.

    The distinction matters: `scontrol requeue` would bring a job back to life that a person has just cancelled.
    """
    fields = _fields(job)
    if fields.get("JobState") in ALIVE:
        return Phase.RUNNING
    return Phase.TIME_LIMIT if fields.get("Reason") == "TimeLimit" else Phase.ENDING


def requeue(job: str, *, attempts: int = 4, wait_s: float = 10.0) -> None:
    """Put this job back in the queue; Slurm then ends it.

    Raises:
        MachineError: Slurm refuses (--no-requeue), or its controller did not answer for a while.
    """
    for left in range(attempts - 1, -1, -1):
        try:
            _scontrol("requeue", job)
            return
        except MachineError:
            if not left:
                raise
            time.sleep(wait_s)


def excluded(job: str) -> tuple[str, ...]:
    """Return the nodes that this job must not get."""
    listed = _fields(job).get("ExcNodeList", "(null)")
    return () if listed == "(null)" else host_names(listed)


def spare_nodes(given: Allocation, without: Sequence[str]) -> int:
    """Return how many nodes of the job's partition could run it, free or not, when some are left out.

    Raises:
        MachineError: sinfo is not there, or fails.
    """
    output = _output("sinfo", "--noheader", "--Node", f"--partition={given.partition}", "--format=%N %t")
    usable = {node for node, state in (line.split()[:2] for line in output.splitlines()) if _works(state)}
    return len((usable | set(given.nodes)) - set(without))


def requeue_without(job: str, nodes: Sequence[str]) -> None:
    """Put this job back in the queue, and see to it that it does not get these nodes again.

    Only a job that waits may be told so, hence the order; it is not started again while this process lives. From the
    requeue on Slurm sends SIGTERM to whatever runs here, the second command included, and SIGKILL only after KillWait.

    Raises:
        MachineError: Slurm refuses.
    """
    listed = ",".join(dict.fromkeys([*excluded(job), *nodes]))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the commands inherit it
    try:
        requeue(job)
        _scontrol("update", f"JobId={job}", f"ExcNodeList={listed}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def rendezvous_port(job: str, restart: int) -> int:
    """Return a port where the first process can listen: its own for each job, so that jobs on one node do not meet.

    Another program may have it: then the next free one. Must be asked on the node that will listen.

    Raises:
        MachineError: none of a hundred is free.
    """
    first = (int(re.sub(r"\D", "", job) or 0) * 7 + restart) % len(PORTS)
    for port in (PORTS[(first + offset) % len(PORTS)] for offset in range(100)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a finished run's connections may linger
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise MachineError(f"no free port for the rendezvous on {socket.gethostname()} near {PORTS[first]}")


def _fields(job: str) -> dict[str, str]:
    output = _scontrol("show", "job", job, "-o")
    return dict(pair.split("=", 1) for pair in output.split() if "=" in pair)


def _works(state: str) -> bool:
    """Return whether a node works, by its state: not down or about to be, "*" not answering, or "~" switched off."""
    return not state.endswith("*") and not state.startswith(("down", "drain", "drng", "fail", "maint", "unk"))


def _scontrol(*arguments: str) -> str:
    return _output("scontrol", *arguments)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise MachineError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
