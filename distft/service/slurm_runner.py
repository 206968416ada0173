"""Jobs as batch jobs of Slurm, named by their ids: what `distft submit` writes, and what the queue says of them."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

from distft.cluster.script import SlurmRequest, render
from distft.cluster.site import Site, read_site
from distft.core.errors import MachineError
from distft.service.job_folder import JobFolder
from distft.service.runner import RunnerSpec, RunnerState
from distft.service.settings import ServedBase, ServiceSettings
from distft.submit import submit

LOOKS_S = 5.0
"""Between two questions to Slurm's controller, whatever the number of jobs."""
ASK_S = 30.0
_COLUMNS = ("Name:80", "JobID:24", "State:24", "RestartCnt:12", "PreemptTime:24", "NodeList:256", "Reason:128")
_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A batch job as squeue shows it."""

    number: str
    state: str = "PENDING"
    restarts: int = 0
    is_preempted: bool = False
    """Whether a more important job has taken its nodes, and it has a while to save."""
    nodes: str = ""
    reason: str = ""
    """Why it waits, in Slurm's word."""

    def told(self) -> RunnerState:
        """Return what people are told of it."""
        job, waits = f"job {self.number}", self.state in _WAITS
        if waits:
            phase, reason = "waits", f": {self.reason}" if self.reason not in ("", "None") else ""
            words = f"{'back in the queue of' if self.restarts else 'queued in'} Slurm as {job}{reason}"
            event = f"Queued in Slurm as {job}."
            if self.restarts:
                event = f"Slurm put {job} back into its queue; it goes on from its last checkpoint."
        elif self.is_preempted:
            phase, words = "preempted", f"preempted: Slurm takes the nodes of {job}, which saves"
            event = (
                f"Preempted: Slurm takes the nodes of {job} for another one. It saves, and waits in the queue again."
            )
        else:
            phase, again = "runs", f", restart {self.restarts}" if self.restarts else ""
            words = f"Slurm runs {job} on {self.nodes or 'its nodes'}{again}"
            event = f"Slurm {'restarted' if again else 'started'} {job} on {self.nodes or 'its nodes'}{again}."
        return RunnerState(
            key=f"{self.number} {self.restarts} {phase}", waits=waits, words=words, event=event,
            is_setback=phase == "preempted" or (waits and self.restarts > 0),
        )  # fmt: skip


class SlurmRunner:
    """Submits, asks and cancels by name, so that a server that was killed finds its batch jobs."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._site = Site() if settings.site is None else read_site(settings.site)
        self._queue: dict[str, QueuedJob] = {}
        self._asked = -LOOKS_S

    def start(self, folder: JobFolder, base: ServedBase, attempt: int) -> str | None:
        """Submit the run, unless a batch job of this name is in the queue already.

        Raises:
            MachineError: Slurm refuses, or does not answer.
        """
        self._asked = -LOOKS_S
        if self.is_alive(folder, None):
            return None
        folder.forget_end()
        folder.run.mkdir(parents=True, exist_ok=True)
        wanted = SlurmRequest(
            name=folder.job_id, nodes=str(base.nodes), gpus_per_node=base.gpus_per_node, time=base.time,
            partition=None, output_dir=folder.path,
        )  # fmt: skip
        name = submit(render(self._site, wanted, [str(folder.recipe)]))
        self._queue[folder.job_id] = QueuedJob(number=name)
        return name

    def is_alive(self, folder: JobFolder, name: str | None) -> bool:
        """Return whether a batch job of this name waits or runs.

        Raises:
            MachineError: Slurm does not answer: it is not known.
        """
        if time.monotonic() - self._asked >= LOOKS_S:
            columns = ",".join(f"{column}|" for column in _COLUMNS)
            lines = _slurm("squeue", "--me", "--noheader", f"--Format={columns}").splitlines()
            self._queue = dict(map(_queued, filter(None, lines)))
            self._asked = time.monotonic()
        return folder.job_id in self._queue

    def state(self, folder: JobFolder, name: str | None) -> RunnerState | None:
        """Return what Slurm last said of the batch job of this name."""
        job = self._queue.get(folder.job_id)
        return None if job is None else job.told()

    def release(self, folder: JobFolder, name: str | None) -> None:
        """Take a run that has saved and stopped out of the queue, which would start it again."""
        self.kill(folder, name)

    def kill(self, folder: JobFolder, name: str | None) -> None:
        """Cancel the batch jobs of this name."""
        _slurm("scancel", "--me", f"--name={folder.job_id}")
        self._asked = -LOOKS_S


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise MachineError(f"{command[0]}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout


def _queued(line: str) -> tuple[str, QueuedJob]:
    """Return (name, job) of a line of squeue.

    Raises:
        MachineError: this squeue writes another form; nothing is known of any job then.
    """
    cells = [cell.strip() for cell in line.split("|")]
    if len(cells) <= len(_COLUMNS) - 1 or not cells[3].isdecimal():
        raise MachineError(f"squeue: no line of {', '.join(_COLUMNS)}: {line[:200]!r}")
    name, number, state, restarts, preempted, nodes, reason = cells[: len(_COLUMNS)]
    return name, QueuedJob(
        number=number, state=state, restarts=int(restarts), nodes=nodes, reason=reason,
        is_preempted=preempted.upper() not in ("", "N/A", "NONE", "UNKNOWN", "0"),
    )  # fmt: skip


def _layout(base: ServedBase) -> tuple[int, int]:
    return max(1, base.gpus_per_node), base.nodes


SPEC = RunnerSpec(name="slurm", build=SlurmRunner, layout=_layout)
