"""The job step that runs the training processes: its command line, and the signal that passes through it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from distft.cluster.slurm import Allocation
from distft.core import host

Launcher = Literal["srun", "torchrun"]

SECOND_ASKING_S = 20.0
"""A process that was still starting ignored the first signal; a third would end it at once (`distft.core.stop`)."""

_SHIELD = 'trap "" USR1; export PET_NODE_RANK="$SLURM_NODEID"; exec "$@"'
"""Until Python has a handler, and in torchrun always, SIGUSR1 would kill; workers set their own handler anyway.
PET_NODE_RANK is torchrun's --node-rank; nobody else reads it."""
_NOT_FOR_THE_STEP = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND", "SLURM_CPUS_PER_GPU")
"""Options of the job that srun would take over: the first three hide a node's other GPUs from a process (NCCL then
cannot use peer memory), the last contradicts --cpus-per-task."""


def command(launcher: Launcher, given: Allocation, num_nodes: int, train: Sequence[str], port: int) -> list[str]:
    """Return `srun …` with one task per process, or with one torchrun per node."""
    inner = [sys.executable, "-m", "distft.train", *train]
    tasks, cpus = given.per_node, given.cpus_per_process
    if launcher == "torchrun":
        tasks, cpus = 1, given.cpus_per_process * given.per_node
        inner = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(num_nodes), "--nproc-per-node", str(given.per_node)),
            *("--master-addr", given.nodes[0], "--master-port", str(port)),
            *inner[1:],
        ]
    return [
        "srun",
        f"--nodes={num_nodes}",
        f"--ntasks={num_nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",  # srun no longer takes it from the job (Slurm 22.05)
        "--distribution=block:block",  # the default deals neighbouring ranks, and so their GPUs, to different sockets
        *(["--overcommit"] if given.per_node > given.cpus_per_node else []),
        "--kill-on-bad-exit=1",  # one process gone: the others would wait for it in a collective
        "--label",
        *("bash", "-c", _SHIELD, "distft"),
        *inner,
    ]


def environment(env: Mapping[str, str], given: Allocation, port: int) -> dict[str, str]:
    """Return the step's variables: where the processes meet, and as many threads in each as it has CPUs."""
    kept = {key: value for key, value in env.items() if key not in _NOT_FOR_THE_STEP}
    threads = {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", str(given.cpus_per_process))}
    age = host.age_s()
    began = {} if age is None else {host.JOB_START: f"{time.time() - age:.0f}"}
    return kept | threads | began | {"MASTER_ADDR": given.nodes[0], "MASTER_PORT": str(port)}


class Step:
    """A running step."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], *, again_s: float = SECOND_ASKING_S) -> None:
        """Start it; SIGUSR1 is blocked in srun until srun waits for it, so that one sent at once is not lost."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            self._process = subprocess.Popen(list(command), env=dict(env))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        self._again_s = again_s
        self._repeat_at: float | None = None

    def ask_to_stop(self) -> None:
        """Pass the wish on to all processes, and once more after a while."""
        self._process.send_signal(signal.SIGUSR1)
        self._repeat_at = time.monotonic() + self._again_s

    def poll(self, timeout_s: float) -> int | None:
        """Return the exit status, None while it runs; waits up to timeout_s."""
        if self._repeat_at is not None and time.monotonic() >= self._repeat_at:
            self._process.send_signal(signal.SIGUSR1)
            self._repeat_at = None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
