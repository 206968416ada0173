"""A job's folder: what was asked, the recipe, the run folder, and the files by which its processes are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core.files import read_json_object, replace_file, replace_json
from distft.service.alive_lock import hold_lock, is_held

REQUEST, EXAMINED, RECIPE, LOG = "request.json", "examined.json", "recipe.toml", "log.txt"
ALIVE, ENDED = "alive.lock", "ended.json"


@dataclass(frozen=True, kw_only=True)
class JobFolder:
    """`DATA/jobs/ID`."""

    path: Path

    @property
    def job_id(self) -> str:
        """The job's."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The recipe, with absolute paths: the command line runs it too."""
        return self.path / RECIPE

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.path / "runs" / self.job_id

    @property
    def stop_file(self) -> Path:
        """By being there it asks the run to save and stop."""
        return self.run / "STOP"

    @property
    def log(self) -> Path:
        """What the job's processes printed."""
        return self.path / LOG

    def make(self, request: dict[str, Any]) -> None:
        """Make the folder, with what was asked."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_json(self.path / REQUEST, request, indent=1)

    def request(self) -> dict[str, Any]:
        """Return what was asked."""
        return json.loads((self.path / REQUEST).read_text(encoding="utf-8"))

    def examined(self) -> dict[str, Any] | None:
        """Return what was found in the job's files; None while nobody has looked."""
        return read_json_object(self.path / EXAMINED) or None

    def ended(self) -> dict[str, Any] | None:
        """Return how the last start ended; None while nobody has said."""
        return read_json_object(self.path / ENDED) or None

    def write_ended(self, *, attempt: int, code: int, reason: str) -> None:
        """Say how a start ended."""
        replace_json(self.path / ENDED, {"attempt": attempt, "code": code, "reason": reason})

    def exit(self) -> dict[str, Any]:
        """Return the run's own word about its end; empty while there is none."""
        return read_json_object(self.run / "exit.json")

    def ask_to_stop(self) -> None:
        """Ask the run to save and stop, whether its process has come up yet or not."""
        self.run.mkdir(parents=True, exist_ok=True)
        replace_file(self.stop_file, "")

    def let_run(self) -> None:
        """Take the wish to stop back."""
        self.stop_file.unlink(missing_ok=True)

    def forget_end(self) -> None:
        """Remove an earlier start's words, which say nothing of the next; the run's own of a good end stays."""
        (self.path / ENDED).unlink(missing_ok=True)
        (self.path / "process.json").unlink(missing_ok=True)  # its number may be another process's by now
        if self.exit().get("code", 0) != 0:
            (self.run / "exit.json").unlink(missing_ok=True)

    def hold(self) -> int | None:
        """Take the lock that the job's processes hold while any of them lives; None: another process has it.

        The kernel gives it back when the last process that inherited it has ended, however it ended.
        """
        return hold_lock(self.path / ALIVE)

    def is_alive(self) -> bool:
        """Return whether a process of the job lives on this machine."""
        return is_held(self.path / ALIVE)

    def processes(self) -> dict[str, Any]:
        """Return the process group that the last start wrote down."""
        return read_json_object(self.path / "process.json")
