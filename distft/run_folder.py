"""A run's folder: what it was asked, what it ran on, how it ended."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core import environment, host
from distft.core.errors import FileSystemError, Problem, RecipeError
from distft.core.files import append_json_line, replace_file, replace_json
from distft.core.phase import PHASE

if TYPE_CHECKING:
    from distft.core.types import TrainState

FOLLOWS_S = 2.0
"""Seconds for which a rank that ends because of another waits for the other's word."""
DIFF = "uncommitted.diff"
"""What the code around the run had changed since its commit."""


class RunFolder:
    """`output_dir/name`; rank 0 writes, everyone may read."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Make sure the folder is there and, on the writing rank, that it can be written.

        Raises:
            FileSystemError: it cannot be made or written, or a file is in the way.
        """
        self.path, self._writes = path, writes
        self._earlier = self._exit_text()
        """How an earlier start of this run ended."""
        self._step: int | None = None
        self._start = host.this_start(PHASE.runs)["start"]
        try:
            path.mkdir(parents=True, exist_ok=True)
            if writes:
                probe = path / ".probe"
                probe.write_text("", encoding="utf-8")
                probe.unlink()
        except OSError as error:
            raise FileSystemError(
                f"{path}: cannot be written ({error.strerror or error}); choose another output_dir (--output-dir DIR)"
            ) from error

    @property
    def metrics(self) -> Path:
        """One line per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        """What other programs load."""
        return self.path / "final"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    def start(self, recipe_toml: str, facts: dict[str, Any]) -> None:
        """Write what the run was asked and what it runs on."""
        if not self._writes:
            return
        (self.path / "exit.json").unlink(missing_ok=True)  # how an earlier start ended says nothing of this one
        replace_file(self.path / "recipe.toml", recipe_toml)
        code = environment.git_state(Path.cwd())
        if code is not None and code.diff:
            replace_file(self.path / DIFF, code.diff)
        else:
            (self.path / DIFF).unlink(missing_ok=True)
        here = environment.hardware()
        facts = facts | {
            "started": _now(),
            "versions": environment.versions() | environment.built_with(),
            "host": here["host"],
            "platform": here["platform"],
            "cpus": here["cpus"],
            "hardware": here,
            "slurm_job": host.slurm_job(os.environ),
            "git_commit": None if code is None else code.commit,
            "git": None if code is None else code.to_json(),
            "environment": environment.library_variables(os.environ),
            "cwd": str(Path.cwd()),
        }
        replace_json(self.path / "manifest.json", facts, indent=2, default=str)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Keep something beside the manifest; never a reason to stop."""
        if self._writes:
            with contextlib.suppress(OSError):
                replace_json(self.path / name, content, indent=2, default=str)

    def learn(self, facts: dict[str, Any]) -> None:
        """Add facts that took time to find out to manifest.json; a failure is ignored."""
        if not self._writes:
            return
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            replace_json(self.path / "manifest.json", manifest | facts, indent=2, default=str)

    def reach(self, step: int) -> None:
        """Remember the last optimizer step that was finished, for exit.json."""
        self._step = step

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to events.jsonl: what happened to the run besides its steps. Never stops it."""
        if not self._writes:
            return
        step = {} if self._step is None or "step" in facts else {"step": self._step}
        with contextlib.suppress(OSError):
            line = {"time": _now(), "event": event, **step, **facts}
            append_json_line(self.path / "events.jsonl", line, default=str)

    def end(
        self,
        *,
        code: int,
        reason: str,
        rank: int,
        state: TrainState | None = None,
        recipe_sha256: str = "",
        follows: bool = False,
    ) -> bool:
        """Write exit.json; the first rank to fail is the one that knows why, so its word is not overwritten.

        One that only `follows` another gives it a moment to speak first.

        Returns:
            Whether this word is the one that counts.
        """
        if code == 0 and not self._writes:
            return False
        record: dict[str, Any] = {"code": code, "reason": reason, "host": socket.gethostname(), "rank": rank}
        record |= {"step": self._step if state is None else state.step, "time": _now()}
        if state is not None:
            record |= {"state": asdict(state), "recipe_sha256": recipe_sha256}
        record["start"] = self._start
        until = time.monotonic() + (FOLLOWS_S if follows else 0)
        while time.monotonic() < until and not self._end_is_recorded():
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            if not self._end_is_recorded():
                replace_json(self.path / "exit.json", record, indent=2)
                return True
        return False

    def finished(self, is_this: Callable[[Path], bool]) -> TrainState | None:
        """Return where the run ended, if an earlier start of this very recipe ended well and its final/ is there.

        `is_this` is asked whether a file holds the recipe.

        Raises:
            RecipeError: it ended well under another recipe of the same name.
        """
        from distft.core.types import TrainState

        try:
            record = json.loads(self._earlier or "{}")
        except ValueError:
            return None
        if record.get("code") != 0 or not self.final.is_dir():
            return None
        if not is_this(self.path / "recipe.toml"):
            message = f"{self.path} holds a finished run of another recipe with this name"
            raise RecipeError("recipe", [Problem(message=message, fix="change name, or say --resume never")])
        return TrainState(**record["state"])

    def set_aside(self, root: Path) -> None:
        """Rename a folder that a fresh start must not see; it is never deleted."""
        number = 1
        while (aside := root.with_name(f"{root.name}.old-{number}")).exists():
            number += 1
        if root.exists():
            root.rename(aside)

    def _end_is_recorded(self) -> bool:
        """Return whether another rank of this start has written how it ended."""
        text = self._exit_text()
        if text is None or text != self._earlier:
            return text is not None
        with contextlib.suppress(ValueError, AttributeError):
            return json.loads(text).get("start") == self._start
        return False

    def _exit_text(self) -> str | None:
        try:
            return (self.path / "exit.json").read_text(encoding="utf-8")
        except OSError:
            return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
