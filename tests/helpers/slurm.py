"""A real Slurm of a few nodes on this machine (tests/cluster/slurm/), and its jobs."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT

SCRIPTS = ROOT / "tests/cluster/slurm"
SAVE = "checkpoint.every_steps=2"
"""Of every run on it."""
ASK_S = 30.0
PATIENCE_S = 300.0
"""Nothing here takes this long on a machine of its own; others may be using this one."""
LAUNCH_FAILED = "launch_failed_requeued_held"
"""A node that was too busy to start a job in time: Slurm holds the job for an administrator, who here is us."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class NoSlurm(Exception):
    """It cannot come up here; says why."""


class Refused(Exception):
    """A command of Slurm failed."""


@dataclass(frozen=True)
class Cluster:
    folder: Path

    @classmethod
    def up(cls, folder: Path, nodes: int = 2) -> "Cluster":
        """Brought up; the caller takes it down.

        Raises:
            NoSlurm: a program is missing, or the kernel forbids namespaces.
        """
        done = _run([str(SCRIPTS / "up.sh"), str(folder), str(nodes)], timeout_s=60)
        if done.returncode == 77:
            raise NoSlurm(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        return cls(folder)

    def down(self) -> None:
        done = _run([str(SCRIPTS / "down.sh"), str(self.folder)], timeout_s=60)
        assert done.returncode == 0, done.stderr
        assert not (left := self.processes()), left

    def processes(self) -> list[str]:
        """Command lines of everything that runs for this cluster: daemons, jobs, and what they left behind."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                told = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
                state = re.search(r"State:\s+(\w)", (process / "status").read_text())
                if str(self.folder).encode() in told and state and state[1] not in "ZX":
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # ended meanwhile, or somebody else's
        return found

    def submit(self, script: str, *options: str, run: Sequence[str] = (), **env: str) -> "Job":
        """`sbatch OPTIONS SCRIPT RUN...` from the project's root; `--wrap=COMMAND` is a script too."""
        log = self.folder / "job-%j.out"
        command = ["sbatch", "--parsable", f"--output={log}", *options, script, *run]
        done = self.ask(*command, **env)
        return Job(self, done.strip(), self.folder / f"job-{done.strip()}.out")

    def ask(self, *command: str, **env: str) -> str:
        """A command's output.

        Raises:
            Refused: it failed; carries what it said.
        """
        done = _run(list(command), SLURM_CONF=str(self.folder / "slurm.conf"), **env)
        if done.returncode:
            raise Refused(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def power_off(self, node: str) -> None:
        """As pulling the plug: every process on it is gone, and nobody is told."""
        os.kill(int((self.folder / f"run/{node}.pid").read_text()), 9)

    def power_on(self, node: str) -> None:
        done = _run([str(SCRIPTS / "node_up.sh"), str(self.folder), node])
        assert done.returncode == 0, done.stderr

    def inside(self, node: str, *command: str) -> None:
        """Run a command in a node's own mounts."""
        pid = (self.folder / f"run/{node}.pid").read_text().strip()
        own = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        done = _run(["nsenter", *own, "--mount", f"--target={pid}", *command])
        assert done.returncode == 0, done.stderr

    def set_node(self, node: str, state: str) -> None:
        """DRAIN: no new job may start on it; RESUME: they may again."""
        self.ask("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    id: str
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        said = self.cluster.ask("scontrol", "show", "job", self.id, "-o")
        return dict(pair.split("=", 1) for pair in said.split() if "=" in pair)

    def warn(self) -> None:
        """As --signal=B:USR1@… does when the time comes: to the batch script alone."""
        self.cluster.ask("scancel", "--signal=USR1", "--batch", self.id)

    def thaw(self) -> None:
        """Let processes go on that a `stop` fault has frozen; nothing if the job has ended this moment."""
        with contextlib.suppress(Refused):
            self.cluster.ask("scancel", "--signal=CONT", self.id)

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until the output holds it so many times."""
        self._until(lambda: self.output.count(text) >= times, f"{times} x {text!r}")

    def wait_until(self, holds: Callable[[], object], what: str, *, thaw: bool = False) -> None:
        """Until a condition holds. `thaw`: keep letting frozen processes go on."""
        self._until(lambda: (self.thaw() if thaw else None) or holds(), what, every_s=1.0 if thaw else 0.3)

    def end(self, *, thaw: bool = False) -> dict[str, str]:
        """Wait until it has ended for good; its fields. `thaw`: keep letting frozen processes go on."""

        def ended() -> bool:
            if thaw and self.fields()["JobState"] == "RUNNING":
                self.thaw()
            return self.fields()["JobState"] in ENDED

        self._until(ended, "its end", every_s=1.0)
        return self.fields()

    def _until(self, holds: Callable[[], object], what: str, *, every_s: float = 0.3) -> None:
        until = time.monotonic() + PATIENCE_S
        while not holds():
            if self.fields()["Reason"] == LAUNCH_FAILED:
                self.cluster.ask("scontrol", "release", self.id)
            over = self.fields()["JobState"] in ENDED and not holds()
            assert not over, f"job {self.id} ended while we waited for {what}; {self.fields()}\n{self.output}"
            assert time.monotonic() < until, f"job {self.id}: waited in vain for {what}; {self.fields()}\n{self.output}"
            time.sleep(every_s)


def _run(command: list[str], *, timeout_s: float = ASK_S, **env: str) -> subprocess.CompletedProcess[str]:
    outside = ("ACCELERATE_", "RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "SBATCH_", "PYTEST_", "DISTFT_FAULT")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(outside)}
    ours = {
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=ROOT, env=clean | ours | env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
