"""Jobs as batch jobs of Slurm, named by their ids: what `distft submit` writes, and what the queue says of them."""

from __future__ import annotations

import subprocess
import time

from distft.cluster.script import SlurmRequest, render
from distft.cluster.site import Site, read_site
from distft.core.errors import MachineError
from distft.service.job_folder import JobFolder
from distft.service.runner import RunnerSpec
from distft.service.settings import ServedBase, ServiceSettings
from distft.submit import submit

LOOKS_S = 5.0
"""Between two questions to Slurm's controller, whatever the number of jobs."""
ASK_S = 30.0


class SlurmRunner:
    """Submits, asks and cancels by name, so that a server that was killed finds its batch jobs."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._site = Site() if settings.site is None else read_site(settings.site)
        self._names: set[str] = set()
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
        self._names.add(folder.job_id)
        return name

    def is_alive(self, folder: JobFolder, name: str | None) -> bool:
        """Return whether a batch job of this name waits or runs.

        Raises:
            MachineError: Slurm does not answer: it is not known.
        """
        if time.monotonic() - self._asked >= LOOKS_S:
            self._names = set(_slurm("squeue", "--me", "--noheader", "--format=%j").split())
            self._asked = time.monotonic()
        return folder.job_id in self._names

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


def _layout(base: ServedBase) -> tuple[int, int]:
    return max(1, base.gpus_per_node), base.nodes


SPEC = RunnerSpec(name="slurm", build=SlurmRunner, layout=_layout)
