"""What lies in a checkpoints folder, by name; rank 0 alone renames and deletes.

step-00000400             a committed checkpoint        latest, best.json   the newest one (a hint); the best one
step-00000300.corrupt-1   quarantined, never deleted    .tmp-step-…         being written
step-00000500.aside-1     left behind by a rollback     .trash-…            being deleted
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from distft.checkpoint import durable
from distft.checkpoint.manifest import canonical
from distft.core.files import replace_file, sync_folder

PINNED = "PINNED"
LATEST = "latest"
BEST = "best.json"
WHY = "WHY.txt"
"""Written into a quarantined folder: the reason."""
_STEP = re.compile(r"step-(\d{8,})")
_CORRUPT = re.compile(r"step-\d{8,}\.corrupt-\d+")
_REPLACED = re.compile(r"\.replaced-(step-\d{8,})")


class Folders:
    """Names and renames below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def step(self, step: int) -> Path:
        """Return where the checkpoint of a step is or will be."""
        return self.root / f"step-{step:08d}"

    def aside(self, step: int) -> Path:
        """Return where it is written before it is committed."""
        return self.root / f".tmp-step-{step:08d}"

    def replaced(self, step: int) -> Path:
        """Return where an older checkpoint of the same step waits until the new one is committed."""
        return self.root / f".replaced-step-{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that have a committed checkpoint, good or bad, newest first."""
        matches = (_STEP.fullmatch(name) for name in self._names())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def quarantined(self) -> list[Path]:
        """Return the checkpoints found bad earlier."""
        return sorted(self.root / name for name in self._names() if _CORRUPT.fullmatch(name))

    def clean(self) -> None:
        """Remove what dead runs left half done; an old checkpoint whose successor was never committed comes back."""
        for name in self._names():
            path = self.root / name
            match = _REPLACED.fullmatch(name)
            if match and not os.path.lexists(self.root / match[1]):
                path.rename(self.root / match[1])
            elif match or name.startswith((".tmp-step-", ".trash-")):
                durable.remove_tree(path)
            elif name.startswith((f".{LATEST}.", f".{BEST}.", ".probe-")):
                path.unlink(missing_ok=True)

    def quarantine(self, step: int, reasons: list[str]) -> Path:
        """Rename a bad checkpoint so that nobody loads it; what it holds stays as it is."""
        home = self._free(self.step(step), "corrupt")
        self.step(step).rename(home)
        sync_folder(self.root)
        with contextlib.suppress(OSError):
            if not home.is_symlink():
                (home / WHY).write_text("\n".join(reasons) + "\n", encoding="utf-8")
        return home

    def why(self, quarantined: Path) -> str:
        """Return the reason of an earlier quarantine, on one line."""
        try:
            text = durable.read_regular(quarantined / WHY, limit=1 << 20).decode("utf-8", "replace")
        except OSError:
            return "quarantined by an earlier start"
        return "; ".join(text.split("\n")).strip("; ")

    def set_aside(self, step: int) -> Path:
        """Rename a good checkpoint that the run must not continue from any more."""
        home = self._free(self.step(step), "aside")
        self.step(step).rename(home)
        sync_folder(self.root)
        return home

    def point_to(self, step: int) -> None:
        """Renew the `latest` hint."""
        replace_file(self.root / LATEST, f"{self.step(step).name}\n", durable=True)

    def write_best(self, best: dict[str, Any]) -> None:
        """Renew best.json."""
        replace_file(self.root / BEST, canonical(best), durable=True)

    def best_step(self) -> int | None:
        """Return the step that best.json names; None when there is no such file.

        Raises:
            ValueError: the file says something else.
        """
        try:
            best = json.loads((self.root / BEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, RecursionError) as error:
            raise ValueError(str(error)) from error
        step = best.get("step") if isinstance(best, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError("no step in it")
        return step

    def surplus(self, *, keep: int, newest: int, protected: set[int]) -> list[int]:
        """Return the steps that retention lets go of: not among the newest `keep`, not protected, not pinned.

        Steps after `newest` belong to another history (a rollback left them) and are not ours to delete.
        """
        ours = [step for step in self.steps() if step <= newest]
        return [step for step in ours[keep:] if step not in protected and not (self.step(step) / PINNED).exists()]

    def to_trash(self, path: Path) -> Path:
        """Rename in one go, so that a half-deleted folder is never taken for a checkpoint."""
        trash = self._free(self.root / f".trash-{path.name.lstrip('.')}", "del")
        path.rename(trash)
        return trash

    def _free(self, path: Path, kind: str) -> Path:
        number = 1
        while os.path.lexists(path.with_name(f"{path.name}.{kind}-{number}")):
            number += 1
        return path.with_name(f"{path.name}.{kind}-{number}")

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.root))
